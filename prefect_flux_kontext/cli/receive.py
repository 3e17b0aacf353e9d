"""`flux-kontext receive`: a receiver of callbacks as a process of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prefect_flux_kontext.cli.outputs import open_output_argument

if TYPE_CHECKING:
    import argparse

_GREETING = """\
Callbacks are received on {url} and kept in {inbox}

The service has to reach it by https, so put a proxy with TLS in front. Batches are told by
FLUX_KONTEXT_CALLBACK_URL where, and have the same FLUX_KONTEXT_CALLBACK_SECRET.
Stop with Ctrl-C.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    receive = commands.add_parser(
        "receive",
        help="receive the callbacks of batches that run elsewhere, or later",
        description="Receive callbacks and answer them when they are durable in the batch's "
        "ledger, or in an inbox for any number of outputs. Needs FLUX_KONTEXT_CALLBACK_SECRET, "
        "but neither the API key nor a batch that runs.",
    )
    where = receive.add_mutually_exclusive_group(required=True)
    where.add_argument("output", metavar="OUTPUT", nargs="?", help="the batch's output")
    where.add_argument(
        "--inbox",
        metavar="FOLDER",
        help="folder or prefix for the callbacks of all batches that have it as their "
        "FLUX_KONTEXT_CALLBACK_INBOX",
    )
    receive.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    receive.add_argument(
        "--port", type=int, default=8780, help="port, 0 for a free one (default: %(default)s)"
    )
    receive.add_argument(
        "--resume",
        action="store_true",
        help="when all results of OUTPUT were called back, resume the flow runs that are "
        "suspended for it, at PREFECT_API_URL",
    )
    receive.set_defaults(func=_receive)


def _receive(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.callbacks.inbox import INBOX_FOLDER, Inbox
    from prefect_flux_kontext.callbacks.receiver import (
        create_receiver,
        serve,
    )
    from prefect_flux_kontext.errors import ConfigurationError
    from prefect_flux_kontext.ledger.store import (
        LEDGER_FOLDER,
        RecordStore,
    )
    from prefect_flux_kontext.settings import FluxKontextSettings

    if options.inbox is None:
        folder = options.output.below(f"{LEDGER_FOLDER}/{INBOX_FOLDER}")
    elif options.resume:
        raise ConfigurationError(
            "--resume looks into the ledger of one output: name OUTPUT in place of --inbox."
        )
    else:
        folder = open_output_argument(options.inbox)
    asyncio.run(folder.check_writable())
    inbox = Inbox(RecordStore(folder))
    receiver = create_receiver(inbox, FluxKontextSettings().callback_secret)
    beside = None
    if options.resume:
        from prefect_flux_kontext.orchestration.receiver import (
            resume_on_completion,  # loads Prefect
        )

        beside = resume_on_completion(options.output, inbox)

    def announce(url: str) -> None:
        print(_GREETING.format(url=url, inbox=inbox), flush=True)

    serve(receiver, options.host, options.port, announce, beside)
    return 0
