"""The command line `flux-kontext`. Each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from prefect_flux_kontext import __version__
from prefect_flux_kontext.cli import (
    demo,
    events,
    gallery,
    ledger,
    limits,
    plan,
    receive,
    run,
    sandbox,
    styles,
)
from prefect_flux_kontext.cli.outputs import open_output_argument
from prefect_flux_kontext.cli.parser import CommandParser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

COULD_NOT_START = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: all rows stored. 1: some rows not. 2: the run could not start. 130: interrupted.
    """
    # Imported here to keep --help quick.
    from prefect_flux_kontext.errors import (
        BatchStoppedError,
        FluxKontextError,
    )

    options = _parser().parse_args(arguments)
    try:
        if getattr(options, "output", None) is not None:
            options.output = open_output_argument(options.output)
        return int(options.func(options))
    except FluxKontextError as error:
        print(f"flux-kontext: {error}", file=sys.stderr)
        return run.SOME_ROWS_FAILED if isinstance(error, BatchStoppedError) else COULD_NOT_START
    except KeyboardInterrupt:
        print("flux-kontext: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="flux-kontext",
        description="Restyle whole manifests of images with the Flux Kontext API.",
        epilog="The account comes from FLUX_KONTEXT_API_KEY and FLUX_KONTEXT_BASE_URL.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (plan, run, ledger, gallery, styles, receive, events, limits, sandbox, demo):
        command.add_parser(commands)
    return parser
