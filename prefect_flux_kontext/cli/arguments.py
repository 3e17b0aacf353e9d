"""Arguments that several commands share, and the objects that they stand for."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.manifest.reader import Manifest
    from prefect_flux_kontext.storage.filesystem import OutputFolder

_BLOCK_PREFIX = "block:"


ROW_PARAMETERS = ("mode", "aspect_ratio", "output_format", "provider", "variants")
"""Columns of a manifest that are also options, for rows that leave them empty."""


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
    add_prompt_argument(rows)
    add_style_argument(rows)
    rows.add_argument("--mode", metavar="MODE", help="pro or max, for rows that name none")
    rows.add_argument(
        "--aspect-ratio", metavar="W:H", help="such as 1:1 or 16:9, for rows that name none"
    )
    rows.add_argument(
        "--output-format", metavar="FORMAT", help="jpeg or png, for rows that name none"
    )
    rows.add_argument(
        "--provider", metavar="ROUTE", help="auto, value or official, for rows that name none"
    )
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
    add_fit_argument(table)
    money = parser.add_argument_group("what to pay for")
    add_budget_argument(money)
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
    add_json_argument(display)
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


def add_json_argument(parser: argparse._ActionsContainer) -> None:
    """Add the option for output that programs read."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Add the output of a batch that has run."""
    parser.add_argument("output", metavar="OUTPUT", help="the batch's output folder or prefix")


def add_prompt_argument(parser: argparse._ActionsContainer) -> None:
    """Add the prompt for rows that have none."""
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="prompt for rows that have none")


def add_style_argument(parser: argparse._ActionsContainer) -> None:
    """Add the styles for rows that name none."""
    parser.add_argument(
        "-s",
        "--style",
        action="append",
        default=[],
        dest="styles",
        metavar="NAME|FILE",
        help="style, or YAML or JSON file of styles, for rows that name none (see "
        "`flux-kontext styles`); repeat it to make each row in several styles",
    )


def add_fit_argument(parser: argparse._ActionsContainer) -> None:
    """Add the option that shrinks reference images that are too large."""
    parser.add_argument(
        "--fit-references",
        action="store_true",
        help="shrink and stage local and private reference images that are over 10 MB",
    )


def add_budget_argument(parser: argparse._ActionsContainer) -> None:
    """Add the limit on what the output may cost."""
    parser.add_argument(
        "--budget",
        type=parse_dollars,
        metavar="USD",
        help="limit on what OUTPUT costs in total, including earlier runs and unknown rows",
    )
    parser.add_argument(
        "--budget-by",
        type=parse_group_budget,
        action="append",
        default=[],
        metavar="COLUMN:VALUE=USD",
        help="the same for the rows with a value in a column, such as team:blue=20; the other "
        "rows go on. Repeat it for several",
    )


def add_by_argument(parser: argparse._ActionsContainer) -> None:
    """Add the columns by which money is counted."""
    parser.add_argument(
        "--by",
        type=parse_names,
        default=[],
        metavar="COLUMN,…",
        help="show what was spent by the values of these columns, such as style,team",
    )


class _AddColumns(argparse.Action):
    """Adds up repeated `--columns`; refuses two names for one column."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        _option_string: str | None = None,
    ) -> None:
        names = dict(getattr(namespace, self.dest))
        for column, name in values.items():
            if names.setdefault(column, name) != name:
                raise argparse.ArgumentError(
                    self, f"{column} is both {names[column]!r} and {name!r}"
                )
        setattr(namespace, self.dest, names)


def parse_column_names(text: str) -> dict[str, str]:
    """Parse `image=photo_url,prompt=text` into the manifest's names by our column names.

    Raises:
        ArgumentTypeError: The text does not have that form, or names a column twice.
    """
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(ours.strip() and theirs.strip() for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r} must have the form image=photo_url,prompt=text"
        )
    columns = [ours.strip() for ours, _, _ in pairs]
    if repeated := sorted({name for name in columns if columns.count(name) > 1}):
        raise argparse.ArgumentTypeError(f"{', '.join(repeated)} is repeated in {text!r}")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def parse_dollars(text: str) -> float:
    """Parse an amount such as `25.00` or `$25`.

    Raises:
        ArgumentTypeError: The text is not a finite amount of 0 or more.
    """
    try:
        amount = float(text.removeprefix("$"))
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount in US dollars")
    return amount


def parse_group_budget(text: str) -> tuple[str, str, float]:
    """Parse `team:blue=20` into column, value and dollars.

    Raises:
        ArgumentTypeError: The text does not have that form.
    """
    group, _, amount = text.rpartition("=")
    column, _, value = (part.strip() for part in group.partition(":"))
    if not column or not value:
        raise argparse.ArgumentTypeError(f"{text!r} must have the form team:blue=20")
    return column, value, parse_dollars(amount.strip())


def parse_names(text: str) -> list[str]:
    """Parse `style,team` into names.

    Raises:
        ArgumentTypeError: There is no name.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no column")
    return names


def parse_count(text: str) -> int:
    """Parse a number of 1 or more.

    Raises:
        ArgumentTypeError: The text is no such number.
    """
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def open_output_argument(text: str) -> OutputFolder:
    """Open the folder, URL or saved Block (`block:…`) that a command was given.

    The filesystem's options come from the environment or the Block.

    Raises:
        ConfigurationError: The Block does not exist, or the filesystem cannot be used.
    """
    if text.startswith(_BLOCK_PREFIX):
        from prefect_flux_kontext.orchestration.parameters import open_output  # loads Prefect

        return asyncio.run(open_output(text))
    from prefect_flux_kontext.settings import FluxKontextSettings
    from prefect_flux_kontext.storage.filesystem import OutputFolder

    return OutputFolder(text, FluxKontextSettings().fsspec_options())


def manifest_from_options(options: argparse.Namespace) -> Manifest:
    """Return the manifest that the command line names."""
    from prefect_flux_kontext.manifest.reader import Manifest
    from prefect_flux_kontext.settings import FluxKontextSettings

    return Manifest(
        options.manifest,
        options.prompt,
        options.columns,
        styles=options.styles,
        names=options.names,
        output=str(options.output),
        parameters={name: getattr(options, name) for name in ROW_PARAMETERS},
        format=options.format,
        text_to_image=options.text_to_image,
        base_url=FluxKontextSettings().base_url,
    )


def row_options_from_options(options: argparse.Namespace) -> RowOptions:
    """Return how rows are handled, by the settings and those options that the command has."""
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.images.checks import load_checks
    from prefect_flux_kontext.references.resolver import create_references
    from prefect_flux_kontext.settings import FluxKontextSettings

    settings = FluxKontextSettings()
    budget_by: dict[str, dict[str, float]] = {}
    for column, value, dollars in getattr(options, "budget_by", ()):
        budget_by.setdefault(column, {})[value] = dollars
    return RowOptions(
        cadence=settings.cadence(),
        resubmit_unknown=getattr(options, "resubmit_unknown", False),
        retry_failed=getattr(options, "retry_failed", False),
        result_days=settings.result_days,
        budget_usd=getattr(options, "budget", None),
        budget_by=budget_by,
        spend_by=getattr(options, "by", ()),
        checks=load_checks(getattr(options, "checks", ())),
        references=create_references(
            settings,
            settings.base_url,
            timeout=settings.poll_timeout,
            fit=getattr(options, "fit_references", False),
        ),
    )
