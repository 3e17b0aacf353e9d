"""`flux-kontext rebind` and `repair`: maintenance of an output's ledger."""

import asyncio

import pytest

from prefect_flux_kontext.batch import compaction
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.ledger.head import bind
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.manifest.row import make_row
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.batches import KEY
from tests.support.plans import PRICES


@pytest.fixture
def store(tmp_path):
    return open_ledger_store(OutputFolder(str(tmp_path / "out")))


@pytest.fixture
def sandbox(monkeypatch):
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=16, api_key=KEY)) as running:
        monkeypatch.setenv("FLUX_KONTEXT_API_KEY", KEY)
        monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", running.url)
        monkeypatch.setenv("FLUX_KONTEXT_POLL_INITIAL_DELAY", "0")
        yield running


def test_output_of_another_account_is_refused_until_rebound(sandbox, store, tmp_path, capsys):
    asyncio.run(bind(store, "https://api.example.com", "studio"))
    (tmp_path / "m.csv").write_text("id,prompt\na,a lighthouse\n")
    run = ["run", str(tmp_path / "m.csv"), str(tmp_path / "out")]
    assert main(run) == 2
    refusal = capsys.readouterr().err
    assert "belongs to https://api.example.com (account 'studio')" in refusal
    assert "flux-kontext rebind" in refusal
    assert sandbox.service.bill()["accepted"] == 0
    assert main(["rebind", str(tmp_path / "out")]) == 0
    assert "belongs to this machine (account 'default') now" in capsys.readouterr().out
    assert main(run) == 0


def test_repair_says_what_it_did(store, tmp_path, capsys):
    ledger = Ledger(store, "gone", PRICES)
    row = make_row(2, {"prompt": "x"})

    async def damage():
        entry = await ledger.claim(row, await ledger.read(row.key))
        await ledger.record_accepted(entry, "task_1")
        await store.replace("waves/gone-1.open.json", b"{")

    asyncio.run(damage())
    output = str(tmp_path / "out")
    assert main(["status", output]) == 2
    assert "flux-kontext repair" in capsys.readouterr().err
    assert main(["repair", output]) == 0
    assert (
        "Read the records of 1 rows: 0 are stored or failed, 1 are not. Replaced 1 wave files."
        in capsys.readouterr().out
    )
    assert main(["status", output]) == 0
    assert "$0.03  spent" in capsys.readouterr().out


def test_compacted_output_is_used_as_before(sandbox, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compaction, "_MIN_ROWS", 1)
    output, manifest = tmp_path / "out", tmp_path / "m.csv"
    manifest.write_text("id,prompt\n" + "".join(f"{n},a lighthouse {n}\n" for n in range(6)))
    run = ["run", str(manifest), str(output)]
    assert main(run) == 0
    assert main(["status", str(output)]) == 0
    status = capsys.readouterr().out.split("gallery.html\n")[-1]
    assert main(["compact", str(output)]) == 0
    assert "Rows packed: 6, into" in capsys.readouterr().out
    assert not list((output / "_ledger" / "rows").rglob("*.json"))
    assert main(["status", str(output)]) == 0
    assert capsys.readouterr().out in status
    (output / "3.jpg").unlink()
    with manifest.open("a") as file:
        file.write("new,a harbour\n")
    assert main(run) == 0
    assert (output / "3.jpg").exists()
    assert sandbox.service.bill()["accepted"] == 7
    assert main(["export", str(output), str(tmp_path / "set"), "--format", "files"]) == 0
    assert main(["collect", str(output)]) == 0
    assert main(["repair", str(output)]) == 0
    assert "Read the records of 7 rows: 7 are stored or failed" in capsys.readouterr().out
