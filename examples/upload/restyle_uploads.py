"""Restyle each manifest that is announced.

    python examples/upload/restyle_uploads.py

The deployment waits for the event `flux-kontext.manifest.arrived`, whose payload becomes the
parameters of the flow run. `upload.py` emits the event.
"""

from prefect.events import DeploymentEventTrigger

from prefect_flux_kontext.flows import style_transfer_batch

ARRIVED = DeploymentEventTrigger(
    name="a manifest of the shop arrives",
    expect={"flux-kontext.manifest.arrived"},
    # Only announcements with an output in this bucket.
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
        triggers=[ARRIVED],
        parameters={"budget_usd": 20},
    )


if __name__ == "__main__":
    main()
