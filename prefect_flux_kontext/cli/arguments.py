"""The strict argument parser, the arguments that several commands share, and their types."""

from __future__ import annotations

import argparse
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """An argument parser that takes each option once, by its whole name, and no empty value.

    It is strict because a misread option may cost money: an abbreviation or a repeated option
    could silently replace what was meant, and an empty value is mostly an unset variable of the
    shell.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.register("action", None, _StoreOnce)
        self.register("action", "store", _StoreOnce)
        self.register("action", "append", _AppendValue)


class _StoreOnce(argparse._StoreAction):  # noqa: SLF001 - argparse has no public base for it
    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        _check_not_empty(self, values)
        given = namespace.__dict__.setdefault("_given", set())
        if option is not None and self.dest in given:
            raise argparse.ArgumentError(self, "given more than once")
        given.add(self.dest)
        super().__call__(parser, namespace, values, option)


class _AppendValue(argparse._AppendAction):  # noqa: SLF001 - as above
    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        _check_not_empty(self, values)
        super().__call__(parser, namespace, values, option)


def _check_not_empty(action: argparse.Action, value: Any) -> None:
    if isinstance(value, str) and not value.strip():
        raise argparse.ArgumentError(action, "the value is empty; is a shell variable unset?")


class _AddColumns(argparse.Action):
    """Adds up repeated `--columns`; refuses two names for one column."""

    def __call__(self, _parser: Any, namespace: Any, values: Any, _option: Any = None) -> None:
        names = dict(getattr(namespace, self.dest))
        for column, name in values.items():
            if names.setdefault(column, name) != name:
                raise argparse.ArgumentError(
                    self, f"{column} is both {names[column]!r} and {name!r}"
                )
        setattr(namespace, self.dest, names)


def parse_column_names(text: str) -> dict[str, str]:
    """Parse `image=photo_url,prompt=text` into the manifest's names by our column names."""
    parted = [pair.partition("=") for pair in text.split(",")]
    pairs = [(ours.strip(), theirs.strip()) for ours, _, theirs in parted]
    if not all(ours and theirs for ours, theirs in pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r} must have the form image=photo_url,prompt=text"
        )
    columns = [ours for ours, _ in pairs]
    if repeated := sorted({name for name in columns if columns.count(name) > 1}):
        raise argparse.ArgumentTypeError(f"{', '.join(repeated)} is repeated in {text!r}")
    return dict(pairs)


def parse_dollars(text: str) -> float:
    """Parse an amount such as `25.00` or `$25`."""
    try:
        amount = float(text.removeprefix("$"))
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount in US dollars")
    return amount


def parse_group_budget(text: str) -> tuple[str, str, float]:
    """Parse `team:blue=20` into column, value and dollars."""
    group, _, amount = text.rpartition("=")
    column, _, value = (part.strip() for part in group.partition(":"))
    if not column or not value:
        raise argparse.ArgumentTypeError(f"{text!r} must have the form team:blue=20")
    return column, value, parse_dollars(amount.strip())


def parse_names(text: str) -> list[str]:
    """Parse `style,team` into names."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no column")
    return names


def parse_count(text: str) -> int:
    """Parse a number of 1 or more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def parse_pair(text: str) -> tuple[str, str]:
    """Parse `NAME=VALUE`."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        # argparse turns this into its own message, with the option and the text.
        raise ValueError
    return name, value


_SHARED: dict[str, dict[str, Any]] = {
    "output": {"metavar": "OUTPUT", "help": "the batch's output folder or prefix"},
    "--output": {
        # Another name than `output`: Prefect gets the text, and nothing opens the folder.
        "dest": "output_url",
        "metavar": "OUTPUT",
        "required": True,
        "help": "folder or prefix for the images",
    },
    "-p/--prompt": {"metavar": "TEXT", "help": "prompt for rows that have none"},
    "-s/--style": {
        "action": "append",
        "default": [],
        "dest": "styles",
        "metavar": "NAME|FILE",
        "help": "style, or YAML or JSON file of styles, for rows that name none (see "
        "`flux-kontext styles`); repeat it to make each row in several styles",
    },
    "--fit-references": {
        "action": "store_true",
        "help": "shrink and stage local and private reference images that are over 10 MB",
    },
    "--budget": {
        "type": parse_dollars,
        "metavar": "USD",
        "help": "limit on what OUTPUT costs in total, including earlier runs and unknown rows",
    },
    "--budget-by": {
        "type": parse_group_budget,
        "action": "append",
        "default": [],
        "metavar": "COLUMN:VALUE=USD",
        "help": "the same for the rows with a value in a column, such as team:blue=20; the other "
        "rows go on. Repeat it for several",
    },
    "--by": {
        "type": parse_names,
        "default": [],
        "metavar": "COLUMN,…",
        "help": "show what was spent by the values of these columns, such as style,team",
    },
    "-n/--dry-run": {"action": "store_true", "help": "stop after the plan"},
    "--json": {"action": "store_true", "help": "print one JSON object and nothing else"},
}


def add_arguments(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add arguments that several commands have."""
    for name in names:
        parser.add_argument(*name.split("/"), **_SHARED[name])


def add_manifest_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the manifest, the output, and the options of every command that reads a manifest."""
    parser.add_argument(
        "manifest",
        metavar="MANIFEST",
        help="CSV, TSV, JSON Lines or Parquet file, or a folder, prefix or glob of images; a "
        "path or an fsspec URL",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder or prefix for the images")
    rows = parser.add_argument_group("what to make")
    add_arguments(rows, "-p/--prompt", "-s/--style")
    for option, metavar, values in (
        ("--mode", "MODE", "pro or max"),
        ("--aspect-ratio", "W:H", "such as 1:1 or 16:9"),
        ("--output-format", "FORMAT", "jpeg or png"),
        ("--provider", "ROUTE", "auto, value or official"),
    ):
        rows.add_argument(option, metavar=metavar, help=f"{values}, for rows that name none")
    rows.add_argument(
        "--variants",
        metavar="N",
        help="images to make of each row that names no number, each paid for",
    )
    table = parser.add_argument_group("how to read the manifest")
    table.add_argument(
        "--columns",
        type=parse_column_names,
        action=_AddColumns,
        default={},
        metavar="IMAGE=PHOTO_URL,…",
        help="columns that have other names in the manifest, such as image=photo_url,prompt=text",
    )
    table.add_argument(
        "--names",
        metavar="TEMPLATE",
        help="template for image names; may use any column (default: {id}/{style}.{ext}, or "
        "{id}.{ext} for rows without a style)",
    )
    add_arguments(table, "--fit-references")
    money = parser.add_argument_group("what to pay for")
    add_arguments(money, "--budget", "--budget-by")
    money.add_argument(
        "-l",
        "--limit",
        type=parse_count,
        metavar="ROWS",
        help="run the manifest only up to the last of the first ROWS rows to be paid for",
    )
    money.add_argument(
        "--resubmit-unknown",
        action="store_true",
        help="submit unknown rows again; they may already have been billed",
    )
    parser.add_argument(
        "--format",
        choices=("csv", "semicolon", "tsv", "json", "parquet"),
        help="format of MANIFEST (default: by its name, content type or content)",
    )
    parser.add_argument(
        "--text-to-image",
        action="store_true",
        help="rows without a reference are meant, though other columns look like images",
    )


def add_display_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a command prints."""
    display = parser.add_argument_group("what to print")
    add_arguments(display, "--json")
    display.add_argument(
        "-q", "--quiet", action="store_true", help="print only rows with problems, and errors"
    )
    display.add_argument(
        "-v", "--verbose", action="store_true", help="log details to standard error"
    )
    display.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="what is logged to standard error: text, or one JSON object a line",
    )
