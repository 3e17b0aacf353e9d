"""The flows of the deployments in `prefect.yaml`, named after what their runs do.

Workers import them from the installed package, so they need no checkout.
"""

from prefect_flux_kontext.flows import (
    collect_batch,
    retry_failed,
    style_transfer,
    style_transfer_batch,
)
from prefect_flux_kontext.orchestration.partitions.flow import style_transfer_partition

on_demand = style_transfer_batch.with_options(
    description="Restyle a manifest or a folder of images now. Images that are stored already "
    "cost nothing. For a plan without payments, turn on dry_run."
)
one_image = style_transfer.with_options(
    description="Restyle one image now, or create one from text alone."
)
nightly_prefix = style_transfer_batch.with_options(
    description="Restyle the new images of a growing folder or prefix every night. Images that "
    "are stored already cost nothing."
)
manifest_lands = style_transfer_batch.with_options(
    description="Restyle a manifest when its arrival is announced, by `flux-kontext announce "
    "MANIFEST --output OUTPUT` or `emit_manifest_arrived`."
)
collect_hourly = collect_batch.with_options(
    description="Store outstanding results, every hour and a minute after a batch that has left "
    "some. Pays for nothing. Resumes the flow runs that are suspended for them."
)
partition_of_batch = style_transfer_partition.with_options(
    description="Run one partition of a batch. The batch starts it; do not start it yourself."
)
retry_failed_on_demand = retry_failed.with_options(
    description="Run the failed rows of a batch again, and no other rows. Review them first."
)
