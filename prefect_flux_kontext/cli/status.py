"""`flux-kontext status`, `resolve` and `gallery`: look at a batch's output and settle its rows."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.cli.arguments import (
    add_by_argument,
    add_json_argument,
    add_output_argument,
)
from prefect_flux_kontext.cli.display import print_json

if TYPE_CHECKING:
    import argparse

    from prefect_flux_kontext.batch.collection import LedgerStatus
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.storage.filesystem import OutputFolder

# More would scroll the counts off a terminal.
_UNKNOWN_ROWS_SHOWN = 20


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the command line."""
    status = commands.add_parser(
        "status",
        help="Show the state of a batch's rows and what was spent",
        description="Read from the ledger how many rows are in which state, what was spent, and "
        "which results are outstanding or unknown. Sends no request to the service.",
    )
    add_output_argument(status)
    add_by_argument(status)
    status.add_argument(
        "--verify",
        action="store_true",
        help="list the output to find images that were removed; on a local disk this is always "
        "done, on an object store a listing costs a request for each thousand files",
    )
    add_json_argument(status)
    status.set_defaults(func=lambda options: asyncio.run(_status(options)))

    resolve = commands.add_parser(
        "resolve",
        help="Settle an unknown row",
        description="Settle a row whose submit outcome is unknown: as accepted, if you know its "
        "task (`collect` then stores the image), or as rejected, if you know that the service did "
        "not accept it (the next run then submits it).",
    )
    add_output_argument(resolve)
    resolve.add_argument("key", metavar="KEY", help="row key, as `status` shows it")
    outcome = resolve.add_mutually_exclusive_group(required=True)
    outcome.add_argument(
        "--accepted",
        type=str.strip,
        metavar="TASK_ID",
        help="the service accepted the row as this task",
    )
    outcome.add_argument(
        "--rejected", action="store_true", help="the service did not accept the row"
    )
    resolve.set_defaults(func=lambda options: asyncio.run(_resolve(options)))

    rebind = commands.add_parser(
        "rebind",
        help="Bind an output to the account of the environment",
        description="Bind the output's ledger to the service FLUX_KONTEXT_BASE_URL and the "
        "account FLUX_KONTEXT_ACCOUNT. Use it if the account got another name, or the service "
        "another address: with a different account, rows paid before could not be collected.",
    )
    add_output_argument(rebind)
    rebind.set_defaults(func=lambda options: asyncio.run(_rebind(options.output)))

    repair = commands.add_parser(
        "repair",
        help="Rebuild a ledger's wave files from the records of its rows",
        description="Read the records of all rows, write wave files from them, and remove the old "
        "ones. Use it if a wave file is damaged or was removed. No run may use the output "
        "meanwhile.",
    )
    add_output_argument(repair)
    repair.set_defaults(func=lambda options: asyncio.run(_repair(options.output)))

    gallery = commands.add_parser(
        "gallery",
        help="Rebuild the gallery",
        description="Update OUTPUT/results.jsonl with the results of ended runs and rebuild "
        "OUTPUT/gallery.html from the stored images. Sends no request to the service.",
    )
    add_output_argument(gallery)
    gallery.set_defaults(func=lambda options: asyncio.run(_gallery(options.output)))


async def _status(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.batch.collection import read_ledger_status
    from prefect_flux_kontext.batch.runner import FAILED_ROWS, read_failed_rows
    from prefect_flux_kontext.errors import ConfigurationError
    from prefect_flux_kontext.ledger.records import State
    from prefect_flux_kontext.ledger.store import open_ledger_store

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
    from prefect_flux_kontext.batch.spending import describe_groups
    from prefect_flux_kontext.ledger.records import State

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


async def _resolve(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.errors import FluxKontextError
    from prefect_flux_kontext.ledger.head import check_format
    from prefect_flux_kontext.ledger.ledger import Ledger, is_submitting
    from prefect_flux_kontext.ledger.records import State
    from prefect_flux_kontext.ledger.store import open_ledger_store

    store = open_ledger_store(options.output)
    await check_format(store)
    ledger = Ledger(store, owner="person", prices={})
    entry = await ledger.read(options.key)
    if entry.state is not State.INTENT or entry.intent is None:
        print(
            f"Row {options.key} has the state {entry.state}, so there is nothing to settle.",
            file=sys.stderr,
        )
        return 1
    if await is_submitting(store, entry.intent):
        print(
            f"Row {options.key} is being submitted right now. Try again in three minutes.",
            file=sys.stderr,
        )
        return 1
    if options.accepted is not None:
        entry = await ledger.record_accepted(entry, options.accepted)
        message = f"Accepted. To collect its image: flux-kontext collect {options.output}"
    else:
        by_hand = FluxKontextError("Rejected by `flux-kontext resolve`.", code="resolved")
        entry = await ledger.record_rejected(entry, by_hand)
        message = "Rejected. The next run submits it."
    if entry.posted is None or entry.posted.by != ledger.owner:
        print(
            f"Row {options.key} was settled meanwhile: it has the state {entry.state}.",
            file=sys.stderr,
        )
        return 1
    print(message)
    return 0


async def _rebind(output: OutputFolder) -> int:
    from prefect_flux_kontext.ledger.head import rebind
    from prefect_flux_kontext.ledger.store import open_ledger_store
    from prefect_flux_kontext.settings import FluxKontextSettings

    settings = FluxKontextSettings()
    head = await rebind(open_ledger_store(output), settings.base_url, settings.account)
    print(f"{output} belongs to {head} now.")
    return 0


async def _repair(output: OutputFolder) -> int:
    from prefect_flux_kontext.batch.repair import rebuild_waves
    from prefect_flux_kontext.ledger.store import open_ledger_store

    repair = await rebuild_waves(open_ledger_store(output))
    print(
        f"Read the records of {repair.rows:,} rows: {repair.finished:,} are stored or failed, "
        f"{repair.unfinished:,} are not. Replaced {repair.removed:,} wave files."
    )
    return 0


async def _gallery(output: OutputFolder) -> int:
    from prefect_flux_kontext.errors import ConfigurationError
    from prefect_flux_kontext.ledger.head import check_format
    from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
    from prefect_flux_kontext.ledger.store import open_ledger_store
    from prefect_flux_kontext.report.builder import update_report
    from prefect_flux_kontext.report.gallery.builder import GALLERY
    from prefect_flux_kontext.report.gallery.thumbnails import ThumbnailStore
    from prefect_flux_kontext.settings import FluxKontextSettings

    store = open_ledger_store(output)
    await check_format(store)
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
