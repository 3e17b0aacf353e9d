"""`flux-kontext receive`: a receiver of callbacks in its own process."""

from __future__ import annotations

import argparse
import asyncio

from prefect_flux_kontext.callbacks.inbox import INBOX_FOLDER, Inbox
from prefect_flux_kontext.callbacks.receiver import create_receiver, serve
from prefect_flux_kontext.cli.options import open_output
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.ledger.store import LEDGER_FOLDER, RecordStore
from prefect_flux_kontext.settings import FluxKontextSettings

_GREETING = """\
Receiving callbacks on {url} and storing them in {inbox}

The service calls by HTTPS only, so put a proxy with TLS in front. Give each batch the proxy's
URL as FLUX_KONTEXT_CALLBACK_URL and the same FLUX_KONTEXT_CALLBACK_SECRET.
Stop with Ctrl-C.
"""


def receive(options: argparse.Namespace) -> int:
    """Run `receive`."""
    if options.inbox is None:
        folder = options.output.below(f"{LEDGER_FOLDER}/{INBOX_FOLDER}")
    elif options.resume:
        raise ConfigurationError(
            "--resume reads the ledger of one output: name OUTPUT in place of --inbox."
        )
    else:
        folder = open_output(options.inbox)
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
