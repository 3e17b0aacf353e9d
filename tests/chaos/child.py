"""A batch's process: the command line, which can kill itself at a given call."""

import itertools
import json
import os
import resource
import signal
import sys
import time
from datetime import datetime, timedelta

_READS_BEFORE_JUMP = 200
"""Reads of the clock before it jumps."""


def kill_at_call(point, when, number):
    """Wrap the async function of a point so that the process kills itself at its n-th call."""
    calls = [0]

    def wrap(function):
        async def wrapped(*args, **how):
            calls[0] += 1
            mine = calls[0] == number
            if mine and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            outcome = await function(*args, **how)
            if mine and when == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return outcome

        return wrapped

    owner, name = _place(point)
    setattr(owner, name, wrap(getattr(owner, name)))


def _place(point):
    from prefect_flux_kontext.client import client  # noqa: PLC0415
    from prefect_flux_kontext.images.ssrf import GuardedTransport  # noqa: PLC0415
    from prefect_flux_kontext.ledger.store import RecordStore  # noqa: PLC0415
    from prefect_flux_kontext.storage.filesystem import OutputFolder  # noqa: PLC0415

    return {
        "create": (RecordStore, "create"),
        "replace": (RecordStore, "replace"),
        "remove": (RecordStore, "remove"),
        "read": (RecordStore, "read"),
        "image": (OutputFolder, "write_unique"),
        "request": (client, "send_request"),
        "download": (GuardedTransport, "handle_async_request"),
    }[point]


def shorten_backoffs():
    """Let retries wait only briefly: faults are frequent here."""
    from prefect_flux_kontext.client import client  # noqa: PLC0415
    from prefect_flux_kontext.images import download as downloads  # noqa: PLC0415
    from prefect_flux_kontext.ledger import store  # noqa: PLC0415
    from prefect_flux_kontext.storage import filesystem as storage  # noqa: PLC0415

    backoff = store.jittered_backoff
    for module in (store, storage, client, downloads):
        module.jittered_backoff = lambda attempt, **how: backoff(attempt, **how) / 20


def _set_clock(first, then):
    """Set the process's clock off by `first` seconds, and after some reads by `then` seconds."""
    from prefect_flux_kontext import models  # noqa: PLC0415

    real_time, reads = time.time, itertools.count()

    def off():
        return first if next(reads) < _READS_BEFORE_JUMP else then

    class Skewed(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(seconds=off())

    models.datetime = Skewed
    time.time = lambda: real_time() + off()


def _run_flow(arguments):
    """Run a manifest as a flow with a time limit; return an exit status."""
    import asyncio  # noqa: PLC0415

    from prefect_flux_kontext.flows import style_transfer_batch  # noqa: PLC0415

    _, manifest, output, seconds = arguments
    limited = style_transfer_batch.with_options(timeout_seconds=float(seconds))
    state = asyncio.run(limited(manifest, output, return_state=True))
    return int(not state.is_completed())


def main(arguments, environment, log, kill_point=None, file_limit=None, clock=None):
    """Run the command line and exit with its status.

    Args:
        arguments: Of the command line, or `flow`, manifest, output and a time limit in seconds.
        environment: Variables to set.
        log: File for its output.
        kill_point: Where the process kills itself: (point, "before" or "after", n-th call).
        file_limit: Size in bytes that no file may exceed, as on a full disk.
        clock: Seconds by which the process's clock is off at first, and later.
    """
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    import fsspec.config  # noqa: PLC0415

    fsspec.config.set_conf_env(fsspec.config.conf)
    from prefect_flux_kontext.cli import main as command_line  # noqa: PLC0415

    shorten_backoffs()
    if kill_point is not None:
        kill_at_call(*kill_point)
    if clock is not None:
        _set_clock(*clock)
    run = _run_flow if arguments[0] == "flow" else command_line
    status = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
