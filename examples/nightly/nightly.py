"""Every night: restyle what is new under a prefix, and pay for nothing twice.

    python examples/nightly/nightly.py s3://shop/incoming s3://shop/nightly

The prefix itself is the manifest: each picture below it is a row. What an earlier night has stored
costs nothing to look at, so nobody has to keep track of what is new. This process waits for the
schedule; a deployment to a work pool, as in `prefect.yaml`, does without it.
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
            # A picture that cannot be used is told, and does not hold up the others.
            "skip_invalid": True,
            "budget_usd": 100,
        },
        # Two nights never run side by side.
        global_limit=1,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
