"""Restyle a manifest when its arrival is announced.

`flux-kontext announce MANIFEST --output OUTPUT`, or `emit_manifest_arrived` in a flow, emits the
event that starts this flow, with the manifest and the output as parameters.
"""

from prefect_flux_kontext.flows import style_transfer_batch

manifest_lands = style_transfer_batch.with_options(description=__doc__)
