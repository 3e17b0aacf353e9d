"""What commands print: text, with colours on a terminal, or one JSON object."""

from __future__ import annotations

import json
import logging
import sys
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


def log_details() -> None:
    """Log the package's details to standard error."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("prefect_flux_kontext").setLevel(logging.DEBUG)
