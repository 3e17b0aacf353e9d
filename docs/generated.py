"""Pages that are written from the code.

That of the command line is written when the documentation is built, docs/settings.md by this
program: `python docs/generated.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from prefect_flux_kontext.cli.commands import create_parser
from prefect_flux_kontext.settings import FluxKontextSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

_USAGE_WIDTH = 88
"""Characters of a line of usage, so that a block of it needs no scroll bar."""


_SETTINGS = """# Settings

Each setting is an environment variable. An argument overrides a saved Block's field, which
overrides the environment.
"""


def settings_page() -> str:
    """Return the page of the environment settings, made from the settings class."""
    lines = [_SETTINGS, "| variable | default | meaning |", "|---|---|---|"]
    for name, field in FluxKontextSettings.model_fields.items():
        value = field.get_default(call_default_factory=True)
        default = "" if value in (None, [], {}) else f"`{value}`"
        lines.append(
            f"| `FLUX_KONTEXT_{name.upper()}` | {default} | {_cell(field.description or '')} |"
        )
    return "\n".join(lines) + "\n"


def command_line() -> str:
    """Return the commands with their arguments and options, from the command line's parser."""
    parser = create_parser()
    parts = [parser.description, parser.epilog]
    for name, command in _commands(parser):
        parts += [f"## {name}", command.description, f"```text\n{_usage(command)}\n```"]
        table = _arguments(command)
        if table:
            parts.append(table)
    return "\n\n".join(part for part in parts if part) + "\n"


def write_page(page: Path, text: str) -> None:
    """Write a page that others include, unless it is up to date."""
    page.parent.mkdir(exist_ok=True)
    if not page.exists() or page.read_text(encoding="utf-8") != text:
        page.write_text(text, encoding="utf-8")


def _commands(
    parser: argparse.ArgumentParser, before: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each command that can be run, by its words without `flux-kontext`."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no public way to ask
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for word, command in action.choices.items():
                deeper = list(_commands(command, f"{before}{word} "))
                yield from deeper or [(f"{before}{word}", command)]


def _usage(command: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(command.prog, width=_USAGE_WIDTH)
    formatter.add_usage(
        None,
        [action for action in command._actions if action.dest != "help"],  # noqa: SLF001
        command._mutually_exclusive_groups,  # noqa: SLF001
        prefix="",
    )
    return formatter.format_help().strip()


def _arguments(command: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(command.prog)
    rows = []
    for action in command._actions:  # noqa: SLF001
        if action.dest == "help":
            continue
        metavar = formatter._format_args(  # noqa: SLF001
            action,
            formatter._get_default_metavar_for_optional(action),  # noqa: SLF001
        )
        names = action.option_strings
        named = f"{', '.join(names)} {metavar}".strip() if names else action.metavar
        meaning = formatter._expand_help(action) if action.help else ""  # noqa: SLF001
        rows.append(f"| `{_cell(str(named))}` | {_cell(meaning)} |")
    return "\n".join(["| argument | meaning |", "|---|---|", *rows]) if rows else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    write_page(Path(__file__).with_name("settings.md"), settings_page())
