"""`flux-kontext plan`, `run`, `retry-failed`, `redo` and `collect`: batches without Prefect."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prefect_flux_kontext.batch.index import PlannedAction
from prefect_flux_kontext.batch.pilot import select_rows
from prefect_flux_kontext.batch.planning import Plan, make_plan
from prefect_flux_kontext.batch.progress import ProgressLine
from prefect_flux_kontext.batch.redo import read_redo_manifest
from prefect_flux_kontext.batch.runner import read_failed_manifest, run_batch, run_collection
from prefect_flux_kontext.batch.session import Session, open_session
from prefect_flux_kontext.batch.spending import describe_groups
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.batch.waves import Wave
from prefect_flux_kontext.callbacks.options import resolve_callback_options
from prefect_flux_kontext.cli.display import print_json, print_text
from prefect_flux_kontext.cli.options import (
    create_client,
    manifest_from_options,
    row_options_from_options,
)
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.report.gallery.builder import GALLERY
from prefect_flux_kontext.settings import FluxKontextSettings

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.manifest.reader import Manifest
    from prefect_flux_kontext.manifest.row import RefusedRow, Row
    from prefect_flux_kontext.storage.filesystem import OutputFolder

SOME_ROWS_NOT_STORED = 1
SOME_ROWS_INVALID = 1
TERMINATED = 128 + signal.SIGTERM

# A log needs a sign of life, a terminal a bar that moves smoothly.
_LINE_INTERVAL_SECONDS = 10.0
_BAR_INTERVAL_SECONDS = 0.2


async def show_plan(options: argparse.Namespace) -> int:
    """Run `plan`."""
    row_options = row_options_from_options(options)
    manifest = manifest_from_options(options)
    plan = await build_plan(manifest, options.output, row_options, limit=options.limit)
    if options.json:
        print_json(plan_as_json(plan, options.output))
    else:
        for line in plan.describe_problems():
            print_text(line)
        if not options.quiet:
            print_text(str(plan))
    return SOME_ROWS_INVALID if plan.refused else 0


async def build_plan(
    manifest: Manifest, output: OutputFolder, options: RowOptions, **selected: int | None
) -> Plan:
    """Make the plan with the account of the environment, and ask for its balance."""
    settings = FluxKontextSettings()
    plan = await make_plan(
        manifest,
        open_ledger_store(output),
        options,
        prices=settings.prices(),
        requests_per_minute=settings.requests_per_minute,
        concurrent_tasks=settings.concurrent_tasks,
        **selected,
    )
    if settings.api_key is not None:
        async with create_client() as client:
            plan.balance = await client.find_balance()
    return plan


def plan_as_json(plan: Plan, output: OutputFolder) -> dict[str, Any]:
    """Return the plan in the form that docs/json.md describes."""
    return {
        "manifest": plan.url,
        "output": str(output),
        "rows": plan.rows,
        "run_rows": plan.run_rows,
        "skipped_files": plan.skipped_files,
        "invalid": plan.refused,
        "duplicates": plan.duplicates,
        "to_pay": plan.to_pay,
        "stored": plan.actions[PlannedAction.STORED],
        "outstanding": plan.actions[PlannedAction.OUTSTANDING],
        "unknown": plan.actions[PlannedAction.UNKNOWN],
        "failed": plan.actions[PlannedAction.FAILED],
        "images": [
            {"mode": mode, "provider": provider, "images": images}
            for (mode, provider), images in sorted(plan.routes.items())
        ],
        "price_usd": round(plan.price, 6),
        "spent_usd": round(plan.spent, 6),
        "budget_usd": plan.budget,
        "balance_usd": plan.balance,
        "budgets": [
            {
                "column": column,
                "value": value,
                "budget_usd": dollars,
                "spent_usd": round(spent, 6),
                "price_usd": round(price, 6),
            }
            for column, value, dollars, spent, price in plan.list_budgets()
        ],
        "seconds": plan.seconds,
        "digest": plan.digest,
        "problems": [
            {"line": row.line, "id": row.id, "reason": row.reason} for row in plan.problems
        ],
    }


def _report(batch: Coroutine[Any, Any, BatchSummary], options: argparse.Namespace) -> int:
    """Run the batch, print its summary and return the exit status."""
    try:
        summary = asyncio.run(batch)
    except asyncio.CancelledError:
        return TERMINATED
    status = 0 if summary.complete else SOME_ROWS_NOT_STORED
    if options.json:
        print_json({**summary.model_dump(mode="json"), "spent": round(summary.spent, 6)})
        return status
    for row in summary.failures:
        print_text(f"  line {row.line}, {row.label}: {row.message}")
    unstored = summary.rows - summary.stored - summary.not_submitted
    if unstored > len(summary.failures):
        print_text(f"  … and {unstored - len(summary.failures)} more")
    if options.quiet:
        return status
    print_text(f"{summary if summary.rows else 'Nothing to do.'}")
    for line in describe_groups(summary.spent_by):
        print_text(line)
    for number, command, purpose in (
        (summary.failed, "retry-failed", "To run the failed rows again"),
        (summary.outstanding, "collect", "To store the outstanding results"),
        (summary.unknown, "status", "To settle the unknown rows"),
    ):
        if number:
            print_text(f"{purpose}: flux-kontext {command} {shlex.quote(options.output_text)}")
    print_text(str(options.output))
    if summary.rows and FluxKontextSettings().gallery_images:
        print_text(f"{summary.output}/{GALLERY}")
    return status


def run(options: argparse.Namespace) -> int:
    """Run `run`."""
    return _plan_or_run(manifest_from_options(options), options)


def retry_failed(options: argparse.Namespace) -> int:
    """Run `retry-failed`."""

    async def retry() -> BatchSummary:
        output = options.output
        manifest = await read_failed_manifest(output, options.prompt, options.styles)
        if manifest is None:
            return BatchSummary(output=str(output))
        return await _run_manifest(manifest, options)

    return _report(retry(), options)


def redo(options: argparse.Namespace) -> int:
    """Run `redo`."""
    base_url = FluxKontextSettings().base_url
    manifest = asyncio.run(read_redo_manifest(options.output, options.styles, base_url))
    if manifest is None:
        print_text("No verdict asks for a redo.")
        return 0
    return _plan_or_run(manifest, options)


def _plan_or_run(manifest: Manifest, options: argparse.Namespace) -> int:
    if not options.dry_run:
        return _report(_run_manifest(manifest, options), options)
    row_options = row_options_from_options(options)
    limit = getattr(options, "limit", None)
    plan = asyncio.run(build_plan(manifest, options.output, row_options, limit=limit))
    if options.json:
        print_json(plan_as_json(plan, options.output))
    elif not options.quiet:
        print_text(str(plan))
    plan.check(skip_invalid=options.skip_invalid)
    return 0


async def _run_manifest(manifest: Manifest, options: argparse.Namespace) -> BatchSummary:
    output, row_options = options.output, row_options_from_options(options)
    # Checked first: otherwise a wrong output shows as a ledger that cannot be read.
    await output.check_writable()
    pilot, limit = getattr(options, "pilot", None), getattr(options, "limit", None)
    if pilot and limit:
        raise ConfigurationError("Give either --pilot or --limit, not both.")
    plan = await build_plan(manifest, output, row_options, limit=limit, pilot=pilot)
    is_shown = not (options.json or options.quiet)
    if is_shown:
        print_text(str(plan))
    plan.check(skip_invalid=options.skip_invalid)
    url = getattr(options, "callback_url", None)

    async def run(rows: Iterable[Row | RefusedRow], number: int, new: int) -> BatchSummary:
        async with (
            _open_session(output, row_options, url=url) as (session, slots),
            show_progress(session, number) if is_shown else nullcontext(),
        ):
            await session.report.announce(new)
            return await run_batch(session, rows, Wave.run, concurrent_tasks=slots)

    is_watched = getattr(options, "watch", False)
    async with _serve_page(options.output_text) if is_watched else nullcontext():
        if plan.pilot:
            number = len(plan.pilot)
            sample = await run(select_rows(manifest.rows(), plan.pilot), number, number)
            rest = await build_plan(manifest, output, row_options)
            if not await _confirm_rest(sample, rest, options):
                sample.rows += rest.to_pay
                sample.not_submitted += rest.to_pay
                return sample
        rows = itertools.islice(manifest.rows(), plan.run_rows)
        return await run(rows, plan.run_rows, plan.new_rows)


@asynccontextmanager
async def _serve_page(output: str) -> AsyncIterator[None]:
    """Serve the live page of an output from a process of its own while the block runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "prefect_flux_kontext", "watch", output
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def _confirm_rest(sample: BatchSummary, rest: Plan, options: argparse.Namespace) -> bool:
    """Whether to run the rows after the pilot: by --yes, or by the answer at a terminal."""
    if not (options.json or options.quiet):
        print_text(f"Pilot: {sample}\n{sample.output}/{GALLERY}")
    if options.yes:
        return True
    if options.json or not sys.stdin.isatty():
        return False
    question = f"Run the other {rest.to_pay:,} images for ${rest.price:,.2f}? [y/N] "
    return (await asyncio.to_thread(input, question)).strip().lower() in ("y", "yes")


def collect(options: argparse.Namespace) -> int:
    """Run `collect`."""
    return _report(_collect(options), options)


async def _collect(options: argparse.Namespace) -> BatchSummary:
    row_options = row_options_from_options(options)
    if options.resume:
        from prefect_flux_kontext.orchestration.events import require_api_url
        from prefect_flux_kontext.orchestration.suspension import resume_suspended

        require_api_url()
    async with _open_session(options.output, row_options, listens=False) as (session, slots):
        summary = await run_collection(session, Wave.run, concurrent_tasks=slots)
    if options.resume and not summary.outstanding:
        for flow_run_id in await resume_suspended(options.output):
            print(f"Resumed flow run {flow_run_id}")
    return summary


@asynccontextmanager
async def _open_session(
    output: OutputFolder, options: RowOptions, *, url: str | None = None, listens: bool = True
) -> AsyncIterator[tuple[Session, int]]:
    """Open a session with the account of the environment; yield it with its number of slots."""
    settings = FluxKontextSettings()
    callbacks = resolve_callback_options(settings, url=url, listens=listens)
    client = create_client()
    await output.check_writable()
    async with open_session(client, output, options, settings, callbacks) as session:
        yield session, settings.concurrent_tasks


@asynccontextmanager
async def show_progress(session: Session, rows: int) -> AsyncIterator[None]:
    """Show the progress of a batch of `rows` rows on standard output while the block runs."""
    line = ProgressLine(session, rows)

    def print_line() -> None:
        print(f"{line.batch.rows:,} of {rows:,} rows done: {line}", flush=True)

    if not sys.stdout.isatty():
        with _repeat(print_line, _LINE_INTERVAL_SECONDS):
            yield
        return
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("", total=rows)

        def update() -> None:
            bar.update(task, completed=line.batch.rows, description=str(line))

        with _repeat(update, _BAR_INTERVAL_SECONDS):
            yield
        update()


@contextmanager
def _repeat(update: Callable[[], None], seconds: float) -> Iterator[None]:
    async def repeat() -> None:
        while True:
            await asyncio.sleep(seconds)
            update()

    repeating = asyncio.create_task(repeat())
    try:
        yield
    finally:
        repeating.cancel()
