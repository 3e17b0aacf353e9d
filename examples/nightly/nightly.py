"""Restyle the new images below a prefix every night.

    python examples/nightly/nightly.py s3://shop/incoming s3://shop/nightly

The prefix itself is the manifest: each image below it is a row. Images that an earlier night has
stored cost nothing, so you need not track which are new. This process waits for the schedule; a
deployment to a work pool, as in `prefect.yaml`, needs no such process.
"""

import sys

from prefect.schedules import Cron

from prefect_flux_kontext.flows import style_transfer_batch


def main(incoming: str, output: str) -> None:
    """Serve the flow until Ctrl-C."""
    style_transfer_batch.serve(
        name="nightly",
        schedule=Cron("0 2 * * *", timezone="Europe/Berlin"),
        parameters={
            "manifest": incoming,
            "output": output,
            "styles": ["watercolour"],
            # An invalid image is logged and does not stop the others.
            "skip_invalid": True,
            "budget_usd": 100,
        },
        # Two nights never run concurrently.
        global_limit=1,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
