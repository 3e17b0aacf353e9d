"""`flux-kontext resolve` and `status`: unknown rows."""

import asyncio

import pytest

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import Entry
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.ledger.waves import OpenWave, open_wave
from prefect_flux_kontext.manifest.row import make_row


@pytest.fixture
def unknown(tmp_path):
    """An output with a row claimed by a run that is gone, the row's key, and the ledger."""
    row = make_row(2, {"id": "mug", "prompt": "in oil"})
    key = row.key
    ledger = Ledger(RecordStore(f"{tmp_path}/_ledger"), "gone", {"pro": 0.03})
    asyncio.run(ledger.claim(row, Entry(key=key)))
    return str(tmp_path), key, ledger


def test_accepted_settles_a_row_once(unknown, capsys):
    output, key, ledger = unknown
    assert main(["resolve", output, key, "--accepted", "task_1"]) == 0
    assert "flux-kontext collect" in capsys.readouterr().out
    entry = asyncio.run(ledger.read(key))
    assert (entry.state, entry.task.task_id, entry.posted.by) == ("accepted", "task_1", "person")
    assert main(["resolve", output, key, "--rejected"]) == 1
    assert "nothing to settle" in capsys.readouterr().err


def test_rejected_lets_the_next_run_submit_the_row(unknown, capsys):
    output, key, ledger = unknown
    assert main(["resolve", output, key, "--rejected"]) == 0
    assert "The next run submits it" in capsys.readouterr().out
    assert asyncio.run(ledger.read(key)).state == "rejected"


def test_resolve_reports_a_row_settled_meanwhile(unknown, capsys, monkeypatch):
    output, key, ledger = unknown

    async def accept_first(self, entry, task_id, *, by=None):
        await ledger.record_accepted(entry, "task_of_the_callback", by="callback")
        return await real(self, entry, task_id, by=by)

    real = Ledger.record_accepted
    monkeypatch.setattr(Ledger, "record_accepted", accept_first)
    ledger.record_accepted = real.__get__(ledger)
    assert main(["resolve", output, key, "--accepted", "task_1"]) == 1
    assert "settled meanwhile: it has the state accepted" in capsys.readouterr().err


def test_resolve_refuses_an_unrecorded_row(tmp_path, capsys):
    assert main(["resolve", str(tmp_path), "0" * 32, "--rejected"]) == 1
    assert "has the state planned, so there is nothing to settle" in capsys.readouterr().err


def test_status_of_an_empty_output_says_so(tmp_path, capsys):
    assert main(["status", str(tmp_path / "typo")]) == 2
    assert "No rows on record" in capsys.readouterr().err


def test_status_of_unknown_rows_is_grammatical(unknown, capsys):
    output, key, ledger = unknown
    asyncio.run(open_wave(ledger.store, OpenWave(name="gone-1", owner="gone", keys=[key])))
    assert main(["status", output]) == 0
    one = capsys.readouterr().out
    assert "$0.03  more may have been billed for unknown submits" in one
    assert "\nUnknown row (may or may not have been billed):\n" in one
    assert "To settle it: flux-kontext resolve" in one
    other = make_row(3, {"id": "cup", "prompt": "in oil, too"})
    asyncio.run(ledger.claim(other, Entry(key=other.key)))
    wave = OpenWave(name="gone-2", owner="gone", keys=[other.key])
    asyncio.run(open_wave(ledger.store, wave))
    assert main(["status", output]) == 0
    two = capsys.readouterr().out
    assert "$0.06  more may have been billed for unknown submits" in two
    assert "\nUnknown rows (may or may not have been billed):\n" in two
    assert "To settle one: flux-kontext resolve" in two


@pytest.mark.parametrize("task_id", ["", " ", "\t"])
def test_resolve_refuses_an_empty_task_id(unknown, task_id, capsys):
    """An unset shell variable must not record a paid row as rejected."""
    output, key, ledger = unknown
    with pytest.raises(SystemExit) as ended:
        main(["resolve", output, key, "--accepted", task_id])
    assert ended.value.code == 2
    assert "--accepted: the value is empty" in capsys.readouterr().err
    assert asyncio.run(ledger.read(key)).state == "intent"


def test_resolve_strips_blanks_around_the_task_id(unknown):
    output, key, ledger = unknown
    assert main(["resolve", output, key, "--accepted", " task_1 "]) == 0
    assert asyncio.run(ledger.read(key)).task.task_id == "task_1"
