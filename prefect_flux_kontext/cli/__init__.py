"""The command line `flux-kontext`: one module for each command or group of commands.

Each command imports what it needs when it runs, so that `--help` stays fast.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from prefect_flux_kontext import __version__
from prefect_flux_kontext.cli import (
    balance,
    completion,
    demo,
    plan,
    prefect_commands,
    receive,
    run,
    sandbox,
    status,
    styles,
)
from prefect_flux_kontext.cli.arguments import open_output_argument
from prefect_flux_kontext.cli.display import configure_logging, print_json
from prefect_flux_kontext.cli.parser import CommandParser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

COULD_NOT_START = 2
INTERRUPTED = 130

# In the order in which `--help` lists their commands.
_MODULES = (
    plan,
    run,
    status,
    styles,
    balance,
    receive,
    prefect_commands,
    sandbox,
    demo,
    completion,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: all rows stored. 1: some rows not stored. 2: the run could not start. 130: interrupted.

    Args:
        arguments: The words after the program's name; None takes them from `sys.argv`.
    """
    # Imported here to keep --help fast.
    from prefect_flux_kontext.errors import BatchStoppedError, FluxKontextError

    options = _parser().parse_args(arguments)
    if hasattr(options, "log_format"):
        configure_logging(verbose=options.verbose, log_format=options.log_format)
    try:
        if getattr(options, "output", None) is not None:
            options.output_text = options.output  # as given, for messages
            options.output = open_output_argument(options.output)
        return int(options.func(options))
    except FluxKontextError as error:
        if getattr(options, "json", False):
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        if getattr(options, "log_format", "text") == "json":
            logging.getLogger(__name__).error(error)  # noqa: TRY400 - people read the message
        else:
            print(f"flux-kontext: {error}", file=sys.stderr)
        return run.SOME_ROWS_FAILED if isinstance(error, BatchStoppedError) else COULD_NOT_START
    except KeyboardInterrupt:
        print("flux-kontext: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="flux-kontext",
        description="Generate and restyle images in batches with the Flux Kontext API.",
        epilog="The environment names the account: FLUX_KONTEXT_API_KEY and "
        "FLUX_KONTEXT_BASE_URL.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in _MODULES:
        module.add_parser(commands)
    return parser
