"""Rows in a ledger, brought to an outcome without a service."""

from prefect_flux_kontext.errors import FluxKontextError

FAILED = FluxKontextError("no", code="FAILED")


async def pay(ledger, row, outcome):
    """Bring a row to an outcome, and return it as recorded.

    A row that is `retried` failed before it was stored; one that is `rejected after a failure`
    also has two attempts.
    """
    entry = await ledger.claim(row, await ledger.read(row.key))
    if outcome == "unknown":
        return entry
    if outcome == "rejected":
        return await ledger.record_rejected(entry, FAILED)
    entry = await ledger.record_accepted(entry, f"task_{row.key}")
    if outcome == "accepted":
        return entry
    if outcome != "stored":
        entry = await ledger.record_failed(entry, FAILED)
        if outcome == "failed":
            return entry
        entry = await ledger.claim(row, entry)
        if outcome == "rejected after a failure":
            return await ledger.record_rejected(entry, FAILED)
        entry = await ledger.record_accepted(entry, f"task_{row.key}_2")
    return await ledger.record_stored(entry, [f"{row.key}.jpg"], [])
