"""Restyle the new images of a growing folder or prefix every night.

The manifest can be the whole prefix, because images that are stored already cost nothing. Each
night also collects the results that the night before has left.
"""

from prefect_flux_kontext.flows import style_transfer_batch

nightly_prefix = style_transfer_batch.with_options(description=__doc__)
