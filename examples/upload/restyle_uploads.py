"""Whenever a manifest is announced: restyle it.

    python examples/upload/restyle_uploads.py

The deployment waits for the event `flux-kontext.manifest.arrived`; what was announced with it
becomes the parameters of the flow run. `upload.py` is the other side.
"""

from prefect.events import DeploymentEventTrigger

from prefect_flux_kontext.flows import style_transfer_batch

LANDED = DeploymentEventTrigger(
    name="a manifest of the shop lands",
    expect={"flux-kontext.manifest.arrived"},
    # Those that say where the images are to go, and no others.
    match={"flux-kontext.output": "s3://shop/*"},
    parameters={
        "manifest": "{{ event.payload.manifest }}",
        "output": "{{ event.payload.output }}",
        "prompt": "{{ event.payload.wish }}",
    },
)


def main() -> None:
    """Serve the flow until Ctrl-C."""
    style_transfer_batch.serve(
        name="on-upload",
        triggers=[LANDED],
        parameters={"budget_usd": 20},
    )


if __name__ == "__main__":
    main()
