"""Every hour, and a minute after a batch that has left results: store what is paid for.

Pays for nothing. Flow runs that were suspended until their results are there are resumed.
"""

from prefect_flux_kontext.flows import collect_batch

collect_hourly = collect_batch.with_options(description=__doc__, flow_run_name="collect-{output}")
