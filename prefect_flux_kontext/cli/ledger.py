"""`flux-kontext status` and `resolve`: what the ledger says, and a person's word on a row."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from prefect_flux_kontext.storage.filesystem import OutputFolder

_ROWS_TOLD = 20


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the command line."""
    status = commands.add_parser(
        "status",
        help="tell where the rows of a batch stand and what was spent",
        description="Tell from the ledger how many rows are in which state, what was spent, and "
        "what is paid for and not yet stored. Asks the service nothing.",
    )
    status.add_argument("output", metavar="OUTPUT", help="the batch's output")
    status.set_defaults(func=lambda options: asyncio.run(_status(options.output)))

    resolve = commands.add_parser(
        "resolve",
        help="settle a row whose submit's reply was lost",
        description="Settle an unknown row: as accepted, when its task is known (its image is "
        "then collected), or as rejected, when it is known not to have been accepted (it is then "
        "submitted by the next run).",
    )
    resolve.add_argument("output", metavar="OUTPUT", help="the batch's output")
    resolve.add_argument("key", metavar="KEY", help="the row key, as `status` shows it")
    word = resolve.add_mutually_exclusive_group(required=True)
    word.add_argument(
        "--accepted", type=str.strip, metavar="TASK_ID", help="it was accepted as this task"
    )
    word.add_argument("--rejected", action="store_true", help="it was not accepted")
    resolve.set_defaults(func=lambda options: asyncio.run(_resolve(options)))


async def _status(output: OutputFolder) -> int:
    from prefect_flux_kontext.batch.collection import read_ledger_status
    from prefect_flux_kontext.ledger.store import open_ledger_store

    status = await read_ledger_status(open_ledger_store(output))
    if not status.states:
        print(f"No row is on record at {output}: no run has paid for anything there.")
    for state, rows in sorted(status.states.items()):
        print(f"{rows:>9,}  {state}")
    print(f"{f'${status.spent:,.2f}':>9}  spent")
    if status.doubtful:
        print(f"{f'${status.doubtful:,.2f}':>9}  more, if the unknown rows were accepted")
    if status.outstanding:
        oldest = status.outstanding[0].task
        print(
            f"\nThe oldest result that is paid for and not stored: task {oldest.task_id}, of "
            f"{oldest.submitted_at:%F %T %Z}. To collect: flux-kontext collect {output}"
        )
    if status.unknown:
        print("\nUnknown rows: their submit's reply was lost, so they may be paid for.")
    for entry in status.unknown[:_ROWS_TOLD]:
        if entry.intent is not None:
            print(f"  {entry.key}  {entry.intent.row_id}  {entry.intent.at:%F %T %Z}")
    if len(status.unknown) > _ROWS_TOLD:
        print(f"  … and {len(status.unknown) - _ROWS_TOLD} more")
    if status.unknown:
        print(f"To settle one: flux-kontext resolve {output} KEY --accepted TASK_ID | --rejected")
    return 0


async def _resolve(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.errors import FluxKontextError
    from prefect_flux_kontext.ledger.heartbeat import is_alive
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import State
    from prefect_flux_kontext.ledger.store import open_ledger_store

    store = open_ledger_store(options.output)
    ledger = Ledger(store, owner="person", prices={})
    entry = await ledger.read(options.key)
    if entry.state is not State.INTENT or entry.intent is None:
        print(
            f"Row {options.key} is {entry.state}, so there is nothing to settle.", file=sys.stderr
        )
        return 1
    if await is_alive(store, entry.intent.owner):
        print(f"Row {options.key} is being submitted right now.", file=sys.stderr)
        return 1
    if options.accepted is not None:
        entry = await ledger.accepted(entry, options.accepted)
        told = f"Accepted. To collect its image: flux-kontext collect {options.output}"
    else:
        entry = await ledger.rejected(entry, FluxKontextError("A person's word.", code="resolved"))
        told = "Rejected. The next run submits it."
    if entry.posted is None or entry.posted.by != ledger.owner:
        print(f"Row {options.key} was settled meanwhile: it is {entry.state}.", file=sys.stderr)
        return 1
    print(told)
    return 0
