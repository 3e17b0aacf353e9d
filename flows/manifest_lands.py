"""When a manifest lands: restyle it, once somebody has announced it.

`flux-kontext announce MANIFEST --output OUTPUT`, or `emit_manifest_arrived` in a flow, emits the
event that starts this, with the manifest and the output as its parameters.
"""

from prefect_flux_kontext.flows import style_transfer_batch

manifest_lands = style_transfer_batch.with_options(
    description=__doc__, flow_run_name="landed-{output}"
)
