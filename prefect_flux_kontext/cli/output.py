"""Commands that look at a batch's output, settle its rows, or copy its images."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from prefect_flux_kontext.batch.compaction import Compaction, compact_ledger
from prefect_flux_kontext.batch.repair import rebuild_waves
from prefect_flux_kontext.batch.runner import FAILED_ROWS, read_failed_rows
from prefect_flux_kontext.batch.spending import describe_groups
from prefect_flux_kontext.batch.status import LedgerStatus, read_ledger_status
from prefect_flux_kontext.cli.display import print_json, print_text
from prefect_flux_kontext.cli.options import open_output
from prefect_flux_kontext.errors import ConfigurationError, FluxKontextError
from prefect_flux_kontext.ledger import head
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.ledger import Ledger, is_submitting
from prefect_flux_kontext.ledger.records import Entry, State
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.report.builder import update_report
from prefect_flux_kontext.report.export import export_output
from prefect_flux_kontext.report.gallery.builder import GALLERY
from prefect_flux_kontext.report.gallery.thumbnails import ThumbnailStore
from prefect_flux_kontext.settings import FluxKontextSettings

if TYPE_CHECKING:
    from prefect_flux_kontext.storage.filesystem import OutputFolder

# More would scroll the counts off a terminal.
_UNKNOWN_ROWS_SHOWN = 20


async def show_status(options: argparse.Namespace) -> int:
    """Run `status`."""
    output = options.output
    status = await read_ledger_status(
        open_ledger_store(output), output, options.by, verify=options.verify
    )
    # As in failed.csv: it also has rows that were never submitted, and not those stored since.
    del status.states[State.FAILED]
    if await output.read(FAILED_ROWS):
        status.states[State.FAILED] = len(await read_failed_rows(output))
    if not status.states:
        raise ConfigurationError(
            f"No rows on record at {output}: no run has submitted anything there."
        )
    if options.json:
        print_json(_status_as_json(status, output))
    else:
        _print_status(status, output)
    return 0


def _print_status(status: LedgerStatus, output: OutputFolder) -> None:
    for state, rows in sorted(status.states.items()):
        print(f"{rows:>9,}  {state}")
    print(f"{f'${status.spent:,.2f}':>9}  spent")
    if status.doubtful:
        print(f"{f'${status.doubtful:,.2f}':>9}  more may have been billed for unknown submits")
    for line in describe_groups(status.spending.list_groups()):
        print(line)
    if status.missing:
        print(
            f"{status.missing:>9,}  stored {'row has' if status.missing == 1 else 'rows have'} no "
            "image in the output any more. Run the manifest again to fetch what the service keeps."
        )
    if status.missing is None and status.states[State.STORED]:
        print(f"{'':>9}  Whether the images are still there was not checked: add --verify.")
    if status.outstanding:
        oldest = status.outstanding[0].task
        print(
            f"\nThe oldest outstanding result is task {oldest.task_id}, submitted at "
            f"{oldest.submitted_at:%F %T %Z}. To collect: flux-kontext collect {output}"
        )
    if status.unknown:
        _print_unknown(status.unknown, output)


def _print_unknown(entries: list[Entry], output: OutputFolder) -> None:
    several = len(entries) > 1
    print(f"\nUnknown {'rows' if several else 'row'} (may or may not have been billed):")
    for entry in entries[:_UNKNOWN_ROWS_SHOWN]:
        if entry.intent is not None:
            print(f"  {entry.key}  {entry.intent.row_id}  {entry.intent.at:%F %T %Z}")
    if len(entries) > _UNKNOWN_ROWS_SHOWN:
        print(f"  … and {len(entries) - _UNKNOWN_ROWS_SHOWN} more")
    print(
        f"To settle {'one' if several else 'it'}: flux-kontext resolve {output} KEY "
        "--accepted TASK_ID | --rejected"
    )


def _status_as_json(status: LedgerStatus, output: OutputFolder) -> dict[str, Any]:
    """Return the status in the form that docs/json.md describes."""
    return {
        "output": str(output),
        "states": dict(status.states),
        "spent_usd": round(status.spent, 6),
        "may_be_spent_usd": round(status.doubtful, 6),
        "spent_by": [
            {
                "columns": group.columns,
                "rows": group.rows,
                "spent_usd": group.spent,
                "may_be_spent_usd": group.doubtful,
            }
            for group in status.spending.list_groups()
        ],
        "missing_images": status.missing,
        "outstanding": [
            {
                "key": entry.key,
                "id": entry.intent.row_id if entry.intent else None,
                "task_id": entry.task.task_id,
                "submitted_at": entry.task.submitted_at.isoformat(),
            }
            for entry in status.outstanding
        ],
        "unknown": [
            {
                "key": entry.key,
                "id": entry.intent.row_id,
                "submitted_at": entry.intent.at.isoformat(),
            }
            for entry in status.unknown
            if entry.intent
        ],
    }


async def resolve(options: argparse.Namespace) -> int:
    """Run `resolve`."""
    store = open_ledger_store(options.output)
    await head.check_format(store)
    ledger = Ledger(store, owner="person", prices={})
    entry = await ledger.read(options.key)
    if entry.state is not State.INTENT or entry.intent is None:
        return _refuse(
            f"Row {options.key} has the state {entry.state}, so there is nothing to settle."
        )
    if await is_submitting(store, entry.intent):
        return _refuse(
            f"Row {options.key} is being submitted right now. Try again in three minutes."
        )
    if options.accepted is not None:
        entry = await ledger.record_accepted(entry, options.accepted)
        message = f"Accepted. To collect its image: flux-kontext collect {options.output}"
    else:
        by_hand = FluxKontextError("Rejected by `flux-kontext resolve`.", code="resolved")
        entry = await ledger.record_rejected(entry, by_hand)
        message = "Rejected. The next run submits it."
    if entry.posted is None or entry.posted.by != ledger.owner:
        return _refuse(f"Row {options.key} was settled meanwhile: it has the state {entry.state}.")
    print(message)
    return 0


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 1


async def rebind(options: argparse.Namespace) -> int:
    """Run `rebind`."""
    store, settings = open_ledger_store(options.output), FluxKontextSettings()
    bound = await head.rebind(store, settings.base_url, settings.account)
    print(f"{options.output} belongs to {bound} now.")
    return 0


async def repair(options: argparse.Namespace) -> int:
    """Run `repair`."""
    done = await rebuild_waves(open_ledger_store(options.output))
    print(
        f"Read the records of {done.rows:,} rows: {done.finished:,} are stored or failed, "
        f"{done.unfinished:,} are not. Replaced {done.removed:,} wave files."
    )
    return 0


async def compact(options: argparse.Namespace) -> int:
    """Run `compact`."""
    counts = Compaction()
    with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("Packing")
        async with aclosing(compact_ledger(open_ledger_store(options.output))) as steps:
            async for counts in steps:
                bar.update(task, completed=counts.steps_done, total=counts.steps)
    print(
        f"Rows packed: {counts.rows:,}, into {counts.packs:,} packs. "
        f"Files removed: {counts.removed:,}."
    )
    if counts.left:
        print(
            f"Rows that keep their files: {counts.left:,}. They are not stored, too few for a "
            "pack, or in a wave that is not finished, which "
            f"`flux-kontext collect {options.output}` finishes."
        )
    return 0


async def build_gallery(options: argparse.Namespace) -> int:
    """Run `gallery`."""
    output = options.output
    store = open_ledger_store(output)
    await head.check_format(store)
    most = FluxKontextSettings().gallery_images
    if not most:
        raise ConfigurationError(
            "FLUX_KONTEXT_GALLERY_IMAGES is 0, so no gallery is built. Set it to 1 or more."
        )
    async with keep_heartbeat(store) as heartbeat:
        rows = await update_report(
            output,
            store,
            heartbeat.owner,
            ThumbnailStore(output),
            max_rows=most,
            max_new_thumbnails=most,
        )
    if not rows:
        raise ConfigurationError(
            f"No run has written results to {output}. Run its manifest again: rows that are "
            "stored cost nothing."
        )
    print(f"{rows:,} {'row' if rows == 1 else 'rows'}\n{output.uri(GALLERY)}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Run `export`."""
    target = open_output(options.target)
    counts = asyncio.run(
        export_output(
            options.output,
            target,
            options.format,
            only_kept=options.kept,
            shard_bytes=options.shard_mb * 1_000_000,
            base_url=FluxKontextSettings().base_url,
        )
    )
    if options.json:
        print_json({"target": str(target), **counts})
    else:
        shards = f" in {counts['shards']:,} shards" if counts["shards"] else ""
        print_text(f"{counts['rows']:,} images copied{shards} to {target}")
        for name, text in (
            ("without_before", "without their reference, which cannot be read"),
            ("missing", "stored images are missing in the output and left out"),
        ):
            if counts[name]:
                print_text(f"{counts[name]:,} {text}")
    return 1 if counts["missing"] else 0
