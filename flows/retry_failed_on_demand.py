"""When a person has looked at the failed rows: run them once more, and nothing else."""

from prefect_flux_kontext.flows import retry_failed

retry_failed_on_demand = retry_failed.with_options(
    description=__doc__, flow_run_name="retry-{output}"
)
