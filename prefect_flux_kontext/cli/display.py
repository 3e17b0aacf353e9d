"""What commands print: text, with colours on a terminal, or one JSON object."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

JSON_VERSION = 1
"""Version of the JSON output; it changes when a field is removed or changes its meaning."""


def print_text(text: str) -> None:
    """Print text; on a terminal, with numbers, paths and URLs in colours."""
    if not sys.stdout.isatty():
        print(text, flush=True)
        return
    from rich.console import Console  # slow to import

    Console(soft_wrap=True, markup=False, emoji=False).print(text)


def print_json(values: dict[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps({"version": JSON_VERSION, **values}, indent=2), flush=True)


class _JsonFormatter(logging.Formatter):
    """Formats a log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(*, verbose: bool, log_format: str) -> None:
    """Log to standard error as `text`, or as `json`: one JSON object a line."""
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(_JsonFormatter())
    elif verbose:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    else:
        return
    logging.basicConfig(handlers=[handler])
    logging.getLogger("prefect_flux_kontext").setLevel(logging.DEBUG if verbose else logging.INFO)
