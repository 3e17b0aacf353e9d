"""Runs act on a row in any order, by what they last read: the records stay legal."""

import asyncio
import contextlib
import itertools
import json
from collections import Counter

import fsspec
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_flux_kontext.errors import FluxKontextError, GenerationFailedError, LedgerError
from prefect_flux_kontext.ledger.ledger import Ledger, RowAlreadyClaimedError
from prefect_flux_kontext.ledger.records import Entry
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.manifest.row import make_row

ROW = make_row(2, {"id": "a", "prompt": "a lighthouse"})
OWNERS = ("one", "two", "three")
STEPS = ("read", "claim", "claim", "accepted", "rejected", "stored", "failed")
_numbers = itertools.count()
_REJECTED = FluxKontextError("no", code=429)
_FAILED = GenerationFailedError("no", task_id="task", code="GENERATION_FAILED")


class SimulatedRow:
    """A row's records while runs act on it."""

    def __init__(self):
        self.url = f"memory://any-order-{next(_numbers)}"
        store = RecordStore(self.url)
        self.ledgers = {owner: Ledger(store, owner, {"pro": 0.03}) for owner in OWNERS}
        self.seen = dict.fromkeys(OWNERS, Entry(key=ROW.key))
        self.claims = Counter()
        self.before = {}

    async def act(self, owner, step):
        ledger, entry = self.ledgers[owner], self.seen[owner]
        with contextlib.suppress(LedgerError, RowAlreadyClaimedError):
            match step:
                case "read":
                    entry = await ledger.read(ROW.key)
                case "claim":
                    entry = await ledger.claim(ROW, entry)
                    self.claims[entry.attempt] += 1
                case "accepted":
                    entry = await ledger.record_accepted(entry, f"task of {owner} {entry.attempt}")
                case "rejected":
                    entry = await ledger.record_rejected(entry, _REJECTED)
                case "stored":
                    entry = await ledger.record_stored(entry, [], [])
                case "failed":
                    entry = await ledger.record_failed(entry, _FAILED)
        self.seen[owner] = entry

    async def check(self):
        files = self.files()
        assert files.items() >= self.before.items(), "a record was changed or removed"
        self.before = files
        assert set(self.claims.values()) <= {1}, "two runs have claimed one attempt"
        attempts = {}
        for name, data in files.items():
            number, step = name.split(".")[1:3]
            attempts.setdefault(int(number), {})[step] = json.loads(data)
        assert sorted(attempts) == list(range(1, len(attempts) + 1))
        accepted = 0
        for number, steps in attempts.items():
            assert "intent" in steps
            posted, ended = steps.get("posted"), steps.get("ended")
            accepted += posted is not None and posted["state"] == "accepted"
            assert ended is None or posted["state"] == "accepted"
            if number + 1 in attempts:
                over = posted["state"] == "rejected" or ended["state"] == "failed"
                assert over, "paid for again while an attempt is outstanding"
        now = await self.ledgers["one"].read(ROW.key)
        assert (now.attempt, round(now.spent, 6)) == (len(attempts), round(0.03 * accepted, 6))

    def files(self):
        fs, root = fsspec.url_to_fs(self.url)
        return {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.find(root)}


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(OWNERS), st.sampled_from(STEPS)), max_size=40))
def test_no_attempt_is_paid_while_another_is_outstanding(steps):
    async def main():
        row = SimulatedRow()
        for owner, step in steps:
            await row.act(owner, step)
            await row.check()

    asyncio.run(main())
