"""A part of a batch that was cut into several: started by the batch, not by a person.

It has no limit of its own on how many run at once: each leases its share of the account.
"""

from prefect_flux_kontext.parts.part import style_transfer_part

part_of_batch = style_transfer_part.with_options(description=__doc__)
