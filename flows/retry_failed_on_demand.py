"""Run the failed rows of a batch again, and no other rows. Review them first."""

from prefect_flux_kontext.flows import retry_failed

retry_failed_on_demand = retry_failed.with_options(description=__doc__)
