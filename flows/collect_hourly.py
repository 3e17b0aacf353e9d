"""Store outstanding results, every hour and a minute after a batch that has left some.

Pays for nothing. When all results are stored, resumes the flow runs that are suspended for them.
"""

from prefect_flux_kontext.flows import collect_batch

collect_hourly = collect_batch.with_options(description=__doc__)
