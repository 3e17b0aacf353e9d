"""`flux-kontext run` and what continues it: `retry-failed` and `collect`, all without Prefect."""

from __future__ import annotations

import asyncio
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.cli.plan import (
    add_budget_argument,
    add_fit_argument,
    add_manifest_arguments,
    add_style_argument,
    manifest_from_options,
    show_plan,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Coroutine

    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.batch.summary import BatchSummary
    from prefect_flux_kontext.manifest.reader import Manifest
    from prefect_flux_kontext.storage.filesystem import OutputFolder

SOME_ROWS_FAILED = 1
TERMINATED = 128 + signal.SIGTERM
_EXIT_STATUS = "Exit status: 0 all rows stored, 1 some rows not, 2 the run could not start."


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the command line."""
    run = commands.add_parser(
        "run",
        help="restyle every image of a manifest",
        description="Restyle every image of a manifest and store the results, once the plan is "
        "told and no row is invalid. Run again, it pays only for what is new and collects what "
        f"was left. {_EXIT_STATUS}",
    )
    add_manifest_arguments(run)
    run.add_argument(
        "--skip-invalid", action="store_true", help="run the other rows where some are invalid"
    )
    run.add_argument(
        "--callback-url",
        metavar="URL",
        help="be called back there when an image is ready, instead of polling; see the settings "
        "FLUX_KONTEXT_CALLBACK_…",
    )
    run.add_argument("--dry-run", action="store_true", help="stop after the plan")
    run.set_defaults(func=_run)

    retry = commands.add_parser(
        "retry-failed",
        help="run the failed rows of a batch once more, and nothing else",
        description="Run the rows in OUTPUT/failed.csv once more. Rows against the content rules "
        f"are not paid for again: change their prompt there first. {_EXIT_STATUS}",
    )
    retry.add_argument("output", metavar="OUTPUT", help="the batch's output")
    retry.add_argument("--prompt", help="the prompt for rows that have none of their own")
    add_style_argument(retry)
    add_fit_argument(retry)
    add_budget_argument(retry)
    retry.set_defaults(func=lambda options: _report(_retry(options)))

    collect = commands.add_parser(
        "collect",
        help="store what ended runs have paid for; pays for nothing",
        description="Wait for, download and store what ended runs have paid for. Pays for "
        f"nothing. {_EXIT_STATUS}",
    )
    collect.add_argument("output", metavar="OUTPUT", help="the batch's output")
    collect.add_argument(
        "--resume",
        action="store_true",
        help="when all is stored, resume the flow runs that are suspended for it, at "
        "PREFECT_API_URL",
    )
    collect.set_defaults(func=lambda options: _report(_collect(options)))


def _report(batch: Coroutine[Any, Any, BatchSummary]) -> int:
    from prefect_flux_kontext.report.gallery.builder import GALLERY
    from prefect_flux_kontext.settings import FluxKontextSettings

    try:
        summary = asyncio.run(batch)
    except asyncio.CancelledError:
        return TERMINATED
    for row in summary.failures:
        print(f"  line {row.line}, {row.told}: {row.message}")
    unstored = summary.rows - summary.stored - summary.not_submitted
    if unstored > len(summary.failures):
        print(f"  … and {unstored - len(summary.failures)} more")
    print(f"{summary if summary.rows else 'There is nothing to collect.'}\n{summary.output}")
    if summary.rows and FluxKontextSettings().gallery_images:
        print(f"{summary.output}/{GALLERY}")
    return 0 if summary.complete else SOME_ROWS_FAILED


def _run(options: argparse.Namespace) -> int:
    if options.dry_run:
        return asyncio.run(_dry(options))
    return _report(_batch(manifest_from_options(options), options.output, options))


async def _dry(options: argparse.Namespace) -> int:
    plan = await show_plan(manifest_from_options(options), options.output, _row_options(options))
    plan.check(skip_invalid=options.skip_invalid)
    return 0


async def _retry(options: argparse.Namespace) -> BatchSummary:
    from prefect_flux_kontext.batch.runner import read_failed_rows
    from prefect_flux_kontext.manifest.reader import Manifest

    manifest = Manifest(
        await read_failed_rows(options.output), options.prompt, styles=options.styles
    )
    # A row that was skipped as invalid stands there too, and must not stop the others.
    options.skip_invalid = options.retry_failed = True
    return await _batch(manifest, options.output, options)


async def _batch(
    manifest: Manifest, output: OutputFolder, options: argparse.Namespace
) -> BatchSummary:
    from prefect_flux_kontext.batch.runner import run_batch
    from prefect_flux_kontext.cli.progress import show_progress

    decided = _row_options(options)
    # Else a wrong output would show as a ledger that cannot be read.
    await output.check_writable()
    plan = await show_plan(manifest, output, decided)
    plan.check(skip_invalid=options.skip_invalid)
    url = getattr(options, "callback_url", None)
    async with (
        _session(output, decided, callback_url=url) as (session, slots),
        show_progress(session.rows, plan.rows),
    ):
        return await run_batch(
            session, manifest.rows(), lambda wave: wave.run(), concurrent_tasks=slots
        )


async def _collect(options: argparse.Namespace) -> BatchSummary:
    from prefect_flux_kontext.batch.collection import collect_outstanding

    decided = _row_options(options)
    if options.resume:
        from prefect_flux_kontext.orchestration.events import require_api_url
        from prefect_flux_kontext.orchestration.suspension import resume_suspended

        require_api_url()
    async with _session(options.output, decided, listens=False) as (session, slots):
        summary = await collect_outstanding(
            session, lambda wave: wave.run(), concurrent_tasks=slots
        )
    if options.resume and not summary.outstanding:
        for flow_run_id in await resume_suspended(options.output):
            print(f"Resumed flow run {flow_run_id}")
    return summary


def _row_options(options: argparse.Namespace) -> RowOptions:
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.references.resolver import create_references
    from prefect_flux_kontext.settings import FluxKontextSettings

    settings = FluxKontextSettings()
    return RowOptions(
        cadence=settings.cadence(),
        resubmit_unknown=getattr(options, "resubmit_unknown", False),
        retry_failed=getattr(options, "retry_failed", False),
        result_days=settings.result_days,
        budget_usd=getattr(options, "budget", None),
        references=create_references(
            settings,
            timeout=settings.poll_timeout,
            fit=getattr(options, "fit_references", False),
        ),
    )


@asynccontextmanager
async def _session(
    output: OutputFolder,
    options: RowOptions,
    *,
    callback_url: str | None = None,
    listens: bool = True,
) -> AsyncIterator[tuple[Session, int]]:
    from prefect_flux_kontext.batch.session import open_session
    from prefect_flux_kontext.callbacks.options import resolve_callback_options
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.settings import FluxKontextSettings

    settings = FluxKontextSettings()
    callbacks = resolve_callback_options(settings, url=callback_url, listens=listens)
    client = FluxKontextClient(
        settings.required_api_key(),
        base_url=settings.base_url,
        requests_per_minute=settings.requests_per_minute,
        concurrent_tasks=settings.concurrent_tasks,
    )
    await output.check_writable()
    # Ctrl-C cancels by itself; SIGTERM, which ends containers, is to do the same.
    running = asyncio.current_task()
    if running is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    async with open_session(client, output, options, settings, callbacks) as session:
        yield session, settings.concurrent_tasks
