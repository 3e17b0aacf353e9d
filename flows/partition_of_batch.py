"""Run one partition of a batch. The batch starts it; do not start it yourself.

The deployment needs no concurrency limit, because each partition leases its share of the account.
"""

from prefect_flux_kontext.orchestration.partitions.flow import style_transfer_partition

partition_of_batch = style_transfer_partition.with_options(description=__doc__)
