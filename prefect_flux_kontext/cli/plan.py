"""`flux-kontext plan`, and what all commands that take a manifest have in common."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.planning import Plan
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.manifest.reader import Manifest
    from prefect_flux_kontext.manifest.row import RefusedRow
    from prefect_flux_kontext.storage.filesystem import OutputFolder

SOME_ROWS_INVALID = 1


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    plan = commands.add_parser(
        "plan",
        help="tell what a run would do and cost, and every row that is invalid",
        description="Tell what a run would do and cost, and every row that is invalid. Asks the "
        "service nothing. Exit status: 0 all rows are valid, 1 some are not, 2 the manifest or "
        "the ledger cannot be read.",
    )
    add_manifest_arguments(plan)
    plan.set_defaults(func=lambda options: asyncio.run(_plan(options)))


def add_manifest_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what is to be done, and for how much."""
    parser.add_argument(
        "manifest",
        metavar="MANIFEST",
        help="CSV, TSV, JSON Lines or Parquet file, or a folder, prefix or glob of images; a "
        "path or fsspec URL",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder or prefix to store to")
    parser.add_argument("--prompt", help="the prompt for rows that have none of their own")
    parser.add_argument(
        "--columns",
        type=column_names,
        action=_AddColumns,
        default={},
        metavar="IMAGE=PHOTO_URL,…",
        help="the manifest's own names for columns: image=photo_url,prompt=text",
    )
    add_style_argument(parser)
    parser.add_argument(
        "--names",
        metavar="TEMPLATE",
        help="names of the images, with any column; default: {id}/{style}.{ext}, or {id}.{ext} "
        "for rows without a style",
    )
    parser.add_argument(
        "--resubmit-unknown",
        action="store_true",
        help="pay again for rows whose submit's reply was lost; they may be paid for already",
    )
    add_fit_argument(parser)
    add_budget_argument(parser)


def add_style_argument(parser: argparse.ArgumentParser) -> None:
    """Add the styles for rows that name none."""
    parser.add_argument(
        "--style",
        action="append",
        default=[],
        dest="styles",
        metavar="NAME|FILE",
        help="a style, or a YAML or JSON file of styles (see `flux-kontext styles`); give it "
        "again for more: each row that names no style is made in each of them",
    )


def manifest_from_options(options: argparse.Namespace) -> Manifest:
    """The manifest that the arguments say."""
    from prefect_flux_kontext.manifest.reader import Manifest

    return Manifest(
        options.manifest,
        options.prompt,
        options.columns,
        styles=options.styles,
        names=options.names,
        output=str(options.output),
    )


def add_fit_argument(parser: argparse.ArgumentParser) -> None:
    """Add what to do about reference images that are too large."""
    parser.add_argument(
        "--fit-references",
        action="store_true",
        help="shrink local and private reference images that are over 10 MB, and stage them",
    )


def add_budget_argument(parser: argparse.ArgumentParser) -> None:
    """Add the cap on what the output may cost."""
    parser.add_argument(
        "--budget",
        type=dollars,
        metavar="DOLLARS",
        help="what OUTPUT may cost in all, earlier runs and what is doubtful included; never "
        "passed",
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


def column_names(text: str) -> dict[str, str]:
    """`image=photo_url,prompt=text` as the manifest's own names for columns.

    Raises:
        ArgumentTypeError: It is not of that form.
    """
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(meant.strip() and name.strip() for meant, _, name in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not like image=photo_url,prompt=text")
    columns = [meant.strip() for meant, _, _ in pairs]
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise argparse.ArgumentTypeError(f"{', '.join(twice)} stands twice in {text!r}")
    return {meant.strip(): name.strip() for meant, _, name in pairs}


def dollars(text: str) -> float:
    """An amount such as `25.00`.

    Raises:
        ArgumentTypeError: It is none.
    """
    try:
        amount = float(text.removeprefix("$"))
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of dollars")
    return amount


async def show_plan(manifest: Manifest, output: OutputFolder, options: RowOptions) -> Plan:
    """Make the plan and print it, below every row that is invalid.

    Raises:
        ManifestError: The manifest cannot be read to its end, or has no rows.
        LedgerError: The ledger cannot be read or is damaged.
    """
    from prefect_flux_kontext.batch.planning import make_plan
    from prefect_flux_kontext.ledger.store import open_ledger_store
    from prefect_flux_kontext.settings import FluxKontextSettings

    def tell(row: RefusedRow) -> None:
        print(f"  line {row.line}, {row.id!r:.80}: {row.reason}")

    settings = FluxKontextSettings()
    plan = await make_plan(
        manifest,
        open_ledger_store(output),
        options,
        prices=settings.prices(),
        requests_per_minute=settings.requests_per_minute,
        concurrent_tasks=settings.concurrent_tasks,
        tell=tell,
    )
    print(plan, flush=True)
    return plan


async def _plan(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.references.resolver import create_references
    from prefect_flux_kontext.settings import FluxKontextSettings

    settings = FluxKontextSettings()
    decided = RowOptions(
        cadence=settings.cadence(),
        resubmit_unknown=options.resubmit_unknown,
        budget_usd=options.budget,
        references=create_references(
            settings, timeout=settings.poll_timeout, fit=options.fit_references
        ),
    )
    plan = await show_plan(manifest_from_options(options), options.output, decided)
    return SOME_ROWS_INVALID if plan.refused else 0
