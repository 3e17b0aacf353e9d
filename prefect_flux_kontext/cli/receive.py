"""`flux-kontext receive`: a receiver of callbacks in its own process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prefect_flux_kontext.cli.arguments import open_output_argument

if TYPE_CHECKING:
    import argparse

_GREETING = """\
Receiving callbacks on {url} and storing them in {inbox}

The service calls by HTTPS only, so put a proxy with TLS in front. Give each batch the proxy's
URL as FLUX_KONTEXT_CALLBACK_URL and the same FLUX_KONTEXT_CALLBACK_SECRET.
Stop with Ctrl-C.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    receive = commands.add_parser(
        "receive",
        help="Receive callbacks for batches that run elsewhere or later",
        description="Receive callbacks and answer each one once it is stored: in the ledger of "
        "one batch, or in an inbox for any number of batches. Needs FLUX_KONTEXT_CALLBACK_SECRET, "
        "but no API key and no running batch.",
    )
    where = receive.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "output", metavar="OUTPUT", nargs="?", help="the batch's output folder or prefix"
    )
    where.add_argument(
        "--inbox",
        metavar="FOLDER",
        help="folder or prefix for the callbacks of all batches that name it as their "
        "FLUX_KONTEXT_CALLBACK_INBOX",
    )
    receive.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    receive.add_argument(
        "--port",
        type=int,
        default=8780,
        help="port to listen on; 0 takes a free one (default: %(default)s)",
    )
    receive.add_argument(
        "--resume",
        action="store_true",
        help="once every outstanding result of OUTPUT has a callback, resume its suspended flow "
        "runs in the Prefect at PREFECT_API_URL",
    )
    receive.set_defaults(func=_receive)


def _receive(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.callbacks.inbox import INBOX_FOLDER, Inbox
    from prefect_flux_kontext.callbacks.receiver import create_receiver, serve
    from prefect_flux_kontext.errors import ConfigurationError
    from prefect_flux_kontext.ledger.store import LEDGER_FOLDER, RecordStore
    from prefect_flux_kontext.settings import FluxKontextSettings

    if options.inbox is None:
        folder = options.output.below(f"{LEDGER_FOLDER}/{INBOX_FOLDER}")
    elif options.resume:
        raise ConfigurationError(
            "--resume reads the ledger of one output: name OUTPUT in place of --inbox."
        )
    else:
        folder = open_output_argument(options.inbox)
    asyncio.run(folder.check_writable())
    inbox = Inbox(RecordStore(folder))
    receiver = create_receiver(inbox, FluxKontextSettings().callback_secret)
    beside = None
    if options.resume:
        # Imported here because it loads Prefect.
        from prefect_flux_kontext.orchestration.receiver import resume_on_completion

        beside = resume_on_completion(options.output, inbox)

    def announce(url: str) -> None:
        print(_GREETING.format(url=url, inbox=inbox), flush=True)

    serve(receiver, options.host, options.port, announce, beside)
    return 0
