"""`flux-kontext styles`: list the built-in styles or those of a file."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

_WIDTH = 96


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    styles = commands.add_parser(
        "styles",
        help="List the styles with their prompts",
        description="List the built-in styles, or those of a file. The file maps names to "
        "prompts, or to `prompt`, `mode`, `aspect_ratio`, `output_format`, `provider` and "
        "`extra`. A prompt may contain columns, such as {{ material }}.",
    )
    styles.add_argument(
        "file", metavar="FILE", nargs="?", help="path or URL of a YAML or JSON file of styles"
    )
    styles.set_defaults(func=_styles)


def _styles(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.styles.styles import builtin_styles, read_styles

    styles = builtin_styles().values() if options.file is None else read_styles(options.file)
    for style in styles:
        parameters = ", ".join(f"{name} {value}" for name, value in style.parameters.items())
        print(f"{style.name}  ({parameters})" if parameters else style.name)
        print(textwrap.indent(textwrap.fill(style.prompt, _WIDTH), "    "))
    return 0
