"""A process that runs a user's flow of the three tasks, and can kill itself at a given call."""

import os
import sys
import traceback


def main(spec, environment, log, kill_point=None):
    """Run a flow and exit with 0 if it completed.

    Args:
        spec: Arguments of `own_flows.run_flow`.
        environment: Variables to set, before Prefect is imported.
        log: File for its output.
        kill_point: Where the process kills itself: (point, "before" or "after", n-th call).
    """
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    import fsspec.config  # noqa: PLC0415

    fsspec.config.set_conf_env(fsspec.config.conf)
    from tests.chaos.child import kill_at_call, shorten_backoffs  # noqa: PLC0415
    from tests.chaos.own_flows import run_flow  # noqa: PLC0415

    shorten_backoffs()
    if kill_point is not None:
        kill_at_call(*kill_point)
    status = 0
    try:
        run_flow(**spec)
    except BaseException:  # noqa: BLE001 - a terminated flow run raises one
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
