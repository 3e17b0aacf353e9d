"""The command line `flux-kontext`: one module for each command or group of commands.

Each command imports what it needs when it runs, so that `--help` stays fast.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from prefect_flux_kontext import __version__
from prefect_flux_kontext.cli import (
    balance,
    completion,
    demo,
    export,
    plan,
    prefect_commands,
    receive,
    run,
    sandbox,
    status,
    styles,
    watch,
)
from prefect_flux_kontext.cli.arguments import open_output_argument
from prefect_flux_kontext.cli.display import configure_logging, print_json
from prefect_flux_kontext.cli.parser import CommandParser

if TYPE_CHECKING:
    from collections.abc import Sequence

COULD_NOT_START = 2
INTERRUPTED = 130

_MODULES = (
    plan,
    run,
    watch,
    status,
    export,
    styles,
    balance,
    receive,
    prefect_commands,
    sandbox,
    demo,
    completion,
)

# As `--help` shows them; the others follow.
_GROUPS = {
    "batches": ("plan", "run", "status", "collect", "retry-failed", "gallery"),
    "account and styles": ("balance", "styles"),
    "Prefect": ("deploy", "announce", "automations", "limits", "receive"),
    "for $0, on this machine": ("demo", "sandbox"),
}


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
    commands = parser.add_subparsers(required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    for module in _MODULES:
        module.add_parser(commands)
    parser.usage = "%(prog)s [OPTION] COMMAND …"
    # argparse lists all commands in one group, and has no public way to list them in several.
    listed = {action.dest: action for action in commands._choices_actions}  # noqa: SLF001
    groups = {title: [listed.pop(name) for name in names] for title, names in _GROUPS.items()}
    for title, actions in (groups | {"more": listed.values()}).items():
        parser.add_argument_group(title)._group_actions.extend(actions)  # noqa: SLF001
    return parser
