"""A partition of a batch that was cut into several: started by the batch, not by a person.

It has no limit of its own on how many run at once: each leases its share of the account.
"""

from prefect_flux_kontext.orchestration.partitions.flow import style_transfer_partition

partition_of_batch = style_transfer_partition.with_options(description=__doc__)
