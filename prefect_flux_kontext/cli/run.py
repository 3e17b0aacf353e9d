"""`flux-kontext run`, `retry-failed` and `collect`: run batches without Prefect."""

from __future__ import annotations

import asyncio
import itertools
import shlex
import signal
import sys
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.cli.arguments import (
    add_budget_argument,
    add_by_argument,
    add_display_arguments,
    add_fit_argument,
    add_manifest_arguments,
    add_output_argument,
    add_prompt_argument,
    add_style_argument,
    manifest_from_options,
    parse_count,
    row_options_from_options,
)
from prefect_flux_kontext.cli.display import print_json, print_text
from prefect_flux_kontext.cli.plan import build_plan, plan_as_json
from prefect_flux_kontext.cli.watch import serve_beside

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Coroutine, Iterable

    from prefect_flux_kontext.batch.planning import Plan
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.batch.summary import BatchSummary
    from prefect_flux_kontext.manifest.reader import Manifest
    from prefect_flux_kontext.manifest.row import RefusedRow, Row
    from prefect_flux_kontext.storage.filesystem import OutputFolder

SOME_ROWS_FAILED = 1
TERMINATED = 128 + signal.SIGTERM
_EXIT_STATUS = (
    "Exit status: 0 all rows are stored, 1 some rows are not stored, 2 the run could not start."
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the command line."""
    run = commands.add_parser(
        "run",
        usage="%(prog)s [OPTION …] MANIFEST OUTPUT",
        help="Generate and store the image of every row of a manifest",
        description="Show the plan, then generate and store the image of every row. Stops after "
        "the plan when a row is invalid. Run it again to continue: it pays only for new rows and "
        f"collects outstanding results. {_EXIT_STATUS}",
    )
    add_manifest_arguments(run)
    how = run.add_argument_group("how to run")
    how.add_argument(
        "--skip-invalid", action="store_true", help="skip invalid rows and run the others"
    )
    how.add_argument(
        "--callback-url",
        metavar="URL",
        help="public URL of a receiver: wait for callbacks instead of polling; see the settings "
        "FLUX_KONTEXT_CALLBACK_…",
    )
    how.add_argument(
        "--pilot",
        type=parse_count,
        metavar="ROWS",
        help="run a sample with rows of each style first, then ask whether to run the rest; "
        "without a terminal, stop after the sample",
    )
    how.add_argument("-y", "--yes", action="store_true", help="after the pilot, run the rest")
    how.add_argument(
        "--check",
        action="append",
        default=[],
        dest="checks",
        metavar="MODULE:FUNCTION",
        help="own check of the images: takes an image and its row, returns flags; repeatable",
    )
    how.add_argument("-n", "--dry-run", action="store_true", help="stop after the plan")
    add_by_argument(how)
    how.add_argument(
        "--watch", action="store_true", help="serve the live page of `watch` during the run"
    )
    add_display_arguments(run)
    run.set_defaults(func=_run)

    retry = commands.add_parser(
        "retry-failed",
        help="Run the failed rows of a batch again",
        description="Run only the rows in OUTPUT/failed.csv again. Rows that broke the content "
        "rules are not submitted until you change their prompt in that file. "
        f"{_EXIT_STATUS}",
    )
    add_output_argument(retry)
    add_prompt_argument(retry)
    add_style_argument(retry)
    add_fit_argument(retry)
    add_budget_argument(retry)
    add_by_argument(retry)
    add_display_arguments(retry)
    retry.set_defaults(func=lambda options: _report(_retry(options), options))

    redo = commands.add_parser(
        "redo",
        help="Make images again that a verdict asks to redo",
        description="Show the plan and the price, then make the images again whose verdict, given "
        "in the live page of `watch`, is redo: with another prompt or style, or as another try. "
        f"Run it again to continue: an image is made once for each verdict. {_EXIT_STATUS}",
    )
    add_output_argument(redo)
    add_style_argument(redo)
    add_fit_argument(redo)
    add_budget_argument(redo)
    redo.add_argument("-n", "--dry-run", action="store_true", help="stop after the plan")
    add_display_arguments(redo)
    redo.set_defaults(func=_redo)

    collect = commands.add_parser(
        "collect",
        help="Store the outstanding results of ended runs; submits nothing",
        description="Wait for, download and store the outstanding results of ended runs. Submits "
        f"nothing, so it costs nothing. {_EXIT_STATUS}",
    )
    add_output_argument(collect)
    collect.add_argument(
        "--resume",
        action="store_true",
        help="once everything is stored, resume the suspended flow runs of OUTPUT in the Prefect "
        "at PREFECT_API_URL",
    )
    add_display_arguments(collect)
    collect.set_defaults(func=lambda options: _report(_collect(options), options))


def _report(batch: Coroutine[Any, Any, BatchSummary], options: argparse.Namespace) -> int:
    """Run the batch, print its summary and return the exit status."""
    from prefect_flux_kontext.batch.spending import describe_groups
    from prefect_flux_kontext.report.gallery.builder import GALLERY
    from prefect_flux_kontext.settings import FluxKontextSettings

    try:
        summary = asyncio.run(batch)
    except asyncio.CancelledError:
        return TERMINATED
    status = 0 if summary.complete else SOME_ROWS_FAILED
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


def _run(options: argparse.Namespace) -> int:
    if options.dry_run:
        manifest = manifest_from_options(options)
        return asyncio.run(_show_plan(manifest, options, options.limit))
    batch = _run_manifest(manifest_from_options(options), options.output, options, options.limit)
    return _report(batch, options)


async def _show_plan(manifest: Manifest, options: argparse.Namespace, limit: int | None) -> int:
    row_options = row_options_from_options(options)
    plan = await build_plan(manifest, options.output, row_options, limit)
    if options.json:
        print_json(plan_as_json(plan, options.output))
    elif not options.quiet:
        print_text(str(plan))
    plan.check(skip_invalid=options.skip_invalid)
    return 0


async def _retry(options: argparse.Namespace) -> BatchSummary:
    from prefect_flux_kontext.batch.runner import read_failed_manifest
    from prefect_flux_kontext.batch.summary import BatchSummary

    manifest = await read_failed_manifest(options.output, options.prompt, options.styles)
    if manifest is None:
        return BatchSummary(output=str(options.output))
    # failed.csv also lists rows that were skipped as invalid; they must not stop the others.
    options.skip_invalid = options.retry_failed = True
    return await _run_manifest(manifest, options.output, options)


def _redo(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.batch.redo import read_redo_manifest
    from prefect_flux_kontext.settings import FluxKontextSettings

    base_url = FluxKontextSettings().base_url
    manifest = asyncio.run(read_redo_manifest(options.output, options.styles, base_url))
    if manifest is None:
        print_text("No verdict asks for a redo.")
        return 0
    options.skip_invalid = False
    if options.dry_run:
        return asyncio.run(_show_plan(manifest, options, None))
    return _report(_run_manifest(manifest, options.output, options), options)


async def _run_manifest(
    manifest: Manifest, output: OutputFolder, options: argparse.Namespace, limit: int | None = None
) -> BatchSummary:
    from prefect_flux_kontext.batch.pilot import select_rows
    from prefect_flux_kontext.batch.runner import run_batch
    from prefect_flux_kontext.cli.progress import show_progress
    from prefect_flux_kontext.errors import ConfigurationError

    row_options = row_options_from_options(options)
    # Checked first: otherwise a wrong output shows as a ledger that cannot be read.
    await output.check_writable()
    pilot = getattr(options, "pilot", None)
    if pilot and limit:
        raise ConfigurationError("Give either --pilot or --limit, not both.")
    plan = await build_plan(manifest, output, row_options, limit, pilot)
    is_shown = not (options.json or options.quiet)
    if is_shown:
        print_text(str(plan))
    plan.check(skip_invalid=options.skip_invalid)
    url = getattr(options, "callback_url", None)

    async def run(rows: Iterable[Row | RefusedRow], number: int, new: int) -> BatchSummary:
        async with (
            _open_session(output, row_options, callback_url=url) as (session, slots),
            show_progress(session, number) if is_shown else nullcontext(),
        ):
            await session.report.announce(new)
            return await run_batch(session, rows, lambda wave: wave.run(), concurrent_tasks=slots)

    is_watched = getattr(options, "watch", False)
    async with serve_beside(options.output_text) if is_watched else nullcontext():
        if plan.pilot:
            number = len(plan.pilot)
            sample = await run(select_rows(manifest.rows(), plan.pilot), number, number)
            rest = await build_plan(manifest, output, row_options, None)
            if not await _confirm_rest(sample, rest, options):
                sample.rows += rest.to_pay
                sample.not_submitted += rest.to_pay
                return sample
        rows = itertools.islice(manifest.rows(), plan.run_rows)
        return await run(rows, plan.run_rows, plan.new_rows)


async def _confirm_rest(sample: BatchSummary, rest: Plan, options: argparse.Namespace) -> bool:
    """Whether to run the rows after the pilot: by --yes, or by the answer at a terminal."""
    from prefect_flux_kontext.report.gallery.builder import GALLERY

    if not (options.json or options.quiet):
        print_text(f"Pilot: {sample}\n{sample.output}/{GALLERY}")
    if options.yes:
        return True
    if options.json or not sys.stdin.isatty():
        return False
    question = f"Run the other {rest.to_pay:,} images for ${rest.price:,.2f}? [y/N] "
    return (await asyncio.to_thread(input, question)).strip().lower() in ("y", "yes")


async def _collect(options: argparse.Namespace) -> BatchSummary:
    from prefect_flux_kontext.batch.runner import run_collection

    row_options = row_options_from_options(options)
    if options.resume:
        from prefect_flux_kontext.orchestration.events import require_api_url
        from prefect_flux_kontext.orchestration.suspension import resume_suspended

        require_api_url()
    async with _open_session(options.output, row_options, listens=False) as (session, slots):
        summary = await run_collection(session, lambda wave: wave.run(), concurrent_tasks=slots)
    if options.resume and not summary.outstanding:
        for flow_run_id in await resume_suspended(options.output):
            print(f"Resumed flow run {flow_run_id}")
    return summary


@asynccontextmanager
async def _open_session(
    output: OutputFolder,
    options: RowOptions,
    *,
    callback_url: str | None = None,
    listens: bool = True,
) -> AsyncIterator[tuple[Session, int]]:
    """Open a session with the account of the environment; yield it with its number of slots."""
    from prefect_flux_kontext.batch.session import open_session
    from prefect_flux_kontext.callbacks.options import resolve_callback_options
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.settings import FluxKontextSettings

    settings = FluxKontextSettings()
    callbacks = resolve_callback_options(settings, url=callback_url, listens=listens)
    client = FluxKontextClient(
        settings.require_api_key(),
        base_url=settings.base_url,
        requests_per_minute=settings.requests_per_minute,
        concurrent_tasks=settings.concurrent_tasks,
    )
    await output.check_writable()
    async with open_session(client, output, options, settings, callbacks) as session:
        yield session, settings.concurrent_tasks
