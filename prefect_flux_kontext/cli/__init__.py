"""The command line `flux-kontext`."""

from __future__ import annotations

import asyncio
import inspect
import logging
import pkgutil
import sys
from collections.abc import Sequence

from prefect_flux_kontext.cli.commands import create_parser

SOME_ROWS_NOT_STORED = 1
COULD_NOT_START = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of the arguments, by default of `sys.argv`, and return its exit status.

    0: all rows stored. 1: some rows not stored. 2: the run could not start. 130: interrupted.
    """
    options = create_parser().parse_args(arguments)
    # Imported here to keep --help fast.
    from prefect_flux_kontext.cli.display import configure_logging, print_json
    from prefect_flux_kontext.errors import BatchStoppedError, FluxKontextError

    if hasattr(options, "log_format"):
        configure_logging(verbose=options.verbose, log_format=options.log_format)
    try:
        if getattr(options, "output", None) is not None:
            from prefect_flux_kontext.cli.options import open_output

            options.output_text = options.output  # as given, for messages
            options.output = open_output(options.output)
        status = pkgutil.resolve_name(f"{__name__}.{options.handler}")(options)
        return int(asyncio.run(status) if inspect.iscoroutine(status) else status)
    except FluxKontextError as error:
        if getattr(options, "json", False):
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        if getattr(options, "log_format", "text") == "json":
            logging.getLogger(__name__).error(error)  # noqa: TRY400 - people read the message
        else:
            print(f"flux-kontext: {error}", file=sys.stderr)
        return SOME_ROWS_NOT_STORED if isinstance(error, BatchStoppedError) else COULD_NOT_START
    except KeyboardInterrupt:
        print("flux-kontext: interrupted", file=sys.stderr)
        return INTERRUPTED
