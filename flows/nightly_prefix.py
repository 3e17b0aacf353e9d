"""Every night: restyle what is new in a place that keeps filling, and nothing twice.

What is stored already costs nothing to look at, so the manifest may be the whole place, night
after night; what a night has failed to collect, the next one collects.
"""

from prefect_flux_kontext.flows import style_transfer_batch

nightly_prefix = style_transfer_batch.with_options(
    description=__doc__, flow_run_name="nightly-{output}"
)
