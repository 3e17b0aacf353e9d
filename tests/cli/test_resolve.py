"""A person's word on a row whose submit's reply was lost."""

import asyncio

import pytest

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import Entry
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.manifest.row import make_row


@pytest.fixture
def unknown(tmp_path):
    """An output in which one row was claimed by a run that is gone; and the row's key."""
    row = make_row(2, {"id": "mug", "prompt": "in oil"})
    key = row.key
    ledger = Ledger(RecordStore(f"{tmp_path}/_ledger"), "gone", {"pro": 0.03})
    asyncio.run(ledger.claim(row, Entry(key=key)))
    return str(tmp_path), key, ledger


def test_a_row_is_settled_as_accepted_once(unknown, capsys):
    output, key, ledger = unknown
    assert main(["resolve", output, key, "--accepted", "task_1"]) == 0
    assert "flux-kontext collect" in capsys.readouterr().out
    entry = asyncio.run(ledger.read(key))
    assert (entry.state, entry.task.task_id, entry.posted.by) == ("accepted", "task_1", "person")
    assert main(["resolve", output, key, "--rejected"]) == 1
    assert "nothing to settle" in capsys.readouterr().err


def test_a_row_is_settled_as_rejected_and_may_be_claimed_again(unknown, capsys):
    output, key, ledger = unknown
    assert main(["resolve", output, key, "--rejected"]) == 0
    assert "The next run submits it" in capsys.readouterr().out
    assert asyncio.run(ledger.read(key)).state == "rejected"


def test_a_word_that_comes_too_late_is_not_said_to_count(unknown, capsys, monkeypatch):
    output, key, ledger = unknown

    async def just_before(self, entry, task_id, *, by=None):
        await ledger.accepted(entry, "task_of_the_callback", by="callback")
        return await real(self, entry, task_id, by=by)

    real = Ledger.accepted
    monkeypatch.setattr(Ledger, "accepted", just_before)
    ledger.accepted = real.__get__(ledger)
    assert main(["resolve", output, key, "--accepted", "task_1"]) == 1
    assert "settled meanwhile: it is accepted" in capsys.readouterr().err


def test_a_row_that_nobody_knows_is_not_settled(tmp_path, capsys):
    assert main(["resolve", str(tmp_path), "0" * 32, "--rejected"]) == 1
    assert "is planned" in capsys.readouterr().err


def test_the_status_of_a_mistyped_output_says_that_nothing_is_there(tmp_path, capsys):
    assert main(["status", str(tmp_path / "typo")]) == 0
    assert "No row is on record" in capsys.readouterr().out


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
