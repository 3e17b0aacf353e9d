"""`flux-kontext run` and what continues it: `retry-failed` and `collect`, all without Prefect."""

from __future__ import annotations

import asyncio
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Coroutine

    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.batch.summary import BatchSummary
    from prefect_flux_kontext.manifest.reading import Manifest

SOME_ROWS_FAILED = 1
TERMINATED = 128 + signal.SIGTERM
_EXIT_STATUS = "Exit status: 0 all rows stored, 1 some rows not, 2 the run could not start."


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the command line."""
    run = commands.add_parser(
        "run",
        help="restyle every image of a manifest",
        description="Restyle every image of a manifest and store the results. Run again, it "
        f"pays only for what is new and collects what was left. {_EXIT_STATUS}",
    )
    run.add_argument(
        "manifest",
        metavar="MANIFEST",
        help="CSV, TSV, JSON Lines or Parquet file, a path or fsspec URL",
    )
    run.add_argument("output", metavar="OUTPUT", help="folder or prefix to store to")
    run.add_argument("--prompt", help="the prompt for rows that have none of their own")
    run.add_argument(
        "--columns",
        type=column_names,
        default={},
        metavar="IMAGE=PHOTO_URL,…",
        help="the manifest's own names for columns: image=photo_url,prompt=text",
    )
    run.add_argument(
        "--resubmit-unknown",
        action="store_true",
        help="pay again for rows whose submit's reply was lost; they may be paid for already",
    )
    run.set_defaults(func=lambda options: _report(_run(options)))

    retry = commands.add_parser(
        "retry-failed",
        help="run the failed rows of a batch once more, and nothing else",
        description="Run the rows in OUTPUT/failed.csv once more. Rows against the content rules "
        f"are not paid for again: change their prompt there first. {_EXIT_STATUS}",
    )
    retry.add_argument("output", metavar="OUTPUT", help="the batch's output")
    retry.add_argument("--prompt", help="the prompt for rows that have none of their own")
    retry.set_defaults(func=lambda options: _report(_retry(options)))

    collect = commands.add_parser(
        "collect",
        help="store what ended runs have paid for; pays for nothing",
        description="Wait for, download and store what ended runs have paid for. Pays for "
        f"nothing. {_EXIT_STATUS}",
    )
    collect.add_argument("output", metavar="OUTPUT", help="the batch's output")
    collect.set_defaults(func=lambda options: _report(_collect(options)))


def column_names(text: str) -> dict[str, str]:
    """`image=photo_url,prompt=text` as the manifest's own names for columns.

    Raises:
        ValueError: It is not of that form.
    """
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(meant.strip() and name.strip() for meant, _, name in pairs):
        raise ValueError(text)
    return {meant.strip(): name.strip() for meant, _, name in pairs}


def _report(batch: Coroutine[Any, Any, BatchSummary]) -> int:
    try:
        summary = asyncio.run(batch)
    except asyncio.CancelledError:
        return TERMINATED
    for row in summary.failures:
        print(f"  line {row.line}, {row.id}: {row.message}")
    unstored = summary.rows - summary.stored - summary.not_submitted
    if unstored > len(summary.failures):
        print(f"  … and {unstored - len(summary.failures)} more")
    print(f"{summary}\n{summary.output}")
    return 0 if summary.complete else SOME_ROWS_FAILED


async def _run(options: argparse.Namespace) -> BatchSummary:
    from prefect_flux_kontext.manifest.reading import Manifest  # noqa: PLC0415

    manifest = Manifest(options.manifest, options.prompt, options.columns)
    return await _batch(manifest, options.output, resubmit_unknown=options.resubmit_unknown)


async def _retry(options: argparse.Namespace) -> BatchSummary:
    from prefect_flux_kontext.batch.batch import FAILED_ROWS  # noqa: PLC0415
    from prefect_flux_kontext.manifest.reading import Manifest  # noqa: PLC0415
    from prefect_flux_kontext.storage import OutputFolder  # noqa: PLC0415

    manifest = Manifest(OutputFolder(options.output).uri(FAILED_ROWS), options.prompt)
    return await _batch(manifest, options.output, retry_failed=True)


async def _batch(
    manifest: Manifest, output: str, *, resubmit_unknown: bool = False, retry_failed: bool = False
) -> BatchSummary:
    from prefect_flux_kontext.batch.batch import run_batch  # noqa: PLC0415
    from prefect_flux_kontext.cli.progress import shown  # noqa: PLC0415

    check = await asyncio.to_thread(manifest.check)
    async with (
        _session(output, resubmit_unknown=resubmit_unknown, retry_failed=retry_failed) as (
            session,
            slots,
        ),
        shown(session.rows, check.rows),
    ):
        return await run_batch(
            session, manifest.rows(), lambda wave: wave.run(), concurrent_tasks=slots
        )


async def _collect(options: argparse.Namespace) -> BatchSummary:
    from prefect_flux_kontext.batch.batch import collect  # noqa: PLC0415

    async with _session(options.output) as (session, slots):
        return await collect(session, lambda wave: wave.run(), concurrent_tasks=slots)


@asynccontextmanager
async def _session(
    output: str, *, resubmit_unknown: bool = False, retry_failed: bool = False
) -> AsyncIterator[tuple[Session, int]]:
    from prefect_flux_kontext.api.client import FluxKontextClient  # noqa: PLC0415
    from prefect_flux_kontext.batch.rows import RowOptions  # noqa: PLC0415
    from prefect_flux_kontext.batch.session import batch_session  # noqa: PLC0415
    from prefect_flux_kontext.settings import FluxKontextSettings  # noqa: PLC0415
    from prefect_flux_kontext.storage import OutputFolder  # noqa: PLC0415

    settings = FluxKontextSettings()
    client = FluxKontextClient(
        settings.required_api_key(),
        base_url=settings.base_url,
        requests_per_minute=settings.requests_per_minute,
        concurrent_tasks=settings.concurrent_tasks,
    )
    folder = OutputFolder(output)
    await folder.check_writable()
    options = RowOptions(
        cadence=settings.cadence(),
        resubmit_unknown=resubmit_unknown,
        retry_failed=retry_failed,
        result_days=settings.result_days,
    )
    # Ctrl-C cancels by itself; SIGTERM, which ends containers, is to do the same.
    running = asyncio.current_task()
    if running is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    async with batch_session(client, folder, options, settings) as session:
        yield session, settings.concurrent_tasks
