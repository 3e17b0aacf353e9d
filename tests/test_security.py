"""The lines of `docs/security.md` that no other test holds."""

import asyncio
import csv
import io
import json
import logging
import re
from pathlib import Path

import pytest
import yaml
from pydantic_core import to_jsonable_python

from prefect_flux_kontext.batch.runner import format_failed_rows
from prefect_flux_kontext.batch.summary import RowOutcome
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.errors import ConfigurationError, LedgerError, StorageError
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.manifest.row import RefusedRow
from prefect_flux_kontext.references.staging import Staging
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sandbox(monkeypatch):
    with running_sandbox(SandboxSettings(mean=0.1, long_edge=64, api_key="key")) as running:
        for name, value in {
            "API_KEY": "key",
            "BASE_URL": running.url,
            "POLL_INITIAL_DELAY": "0",
            "POLL_INTERVAL": "0.05",
        }.items():
            monkeypatch.setenv(f"FLUX_KONTEXT_{name}", value)
        yield running


def write_manifest(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "prompt"), *rows])
    return str(path)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "..", "rows/../../../x"])
def test_name_from_a_file_does_not_leave_the_output(name, tmp_path):
    (tmp_path / "x").write_bytes(b"secret")
    output, records = OutputFolder(str(tmp_path / "out")), RecordStore(str(tmp_path / "out"))
    for action in (output.read(name), output.write(name, b""), output.remove(name)):
        with pytest.raises(StorageError, match="leads out of"):
            asyncio.run(action)
    for action in (records.read(name), records.replace(name, b""), records.list_names(name)):
        with pytest.raises(LedgerError, match="leads out of"):
            asyncio.run(action)
    assert (tmp_path / "x").read_bytes() == b"secret"


def test_planted_ledger_record_copies_no_file(sandbox, tmp_path, capsys):
    """A wave file says that the image of a row is a file outside of the output."""
    output = tmp_path / "out"
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    main(["run", write_manifest(tmp_path / "m.csv", ("a", "oil")), str(output)])
    (wave,) = (output / "_ledger" / "waves").glob("*.jsonl")
    wave.write_text(wave.read_text().replace('"a.jpg"', '"../secret.jpg"'))
    assert main(["run", write_manifest(tmp_path / "m.csv", ("b", "oil")), str(output)]) > 0
    printed = capsys.readouterr()
    assert "leads out of" in printed.out + printed.err
    assert b"secret" not in [path.read_bytes() for path in output.iterdir() if path.is_file()]


def test_control_characters_of_a_manifest_reach_no_terminal(sandbox, tmp_path, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    manifest = tmp_path / "m.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("id", "prompt", "style", "mode", "\x1b[2Jown"),
                ("a\x1b]0;owned\x07", "oil", "", "", ""),
                ("b", "oil", "\x1b[31mred", "", ""),
                ("c", "oil", "", "\x9b2J", ""),
                ("d", "oil", "", "", ""),
            ]
        )
    main(["plan", str(manifest), str(tmp_path / "out")])
    main(["run", str(manifest), str(tmp_path / "out")])
    assert main(["run", str(manifest), str(tmp_path / "out"), "--skip-invalid"]) == 1
    printed = capsys.readouterr()
    text = printed.out + printed.err + caplog.text
    assert "invisible character" in text
    assert not {"\x1b", "\x07", "\x9b"} & set(text)


def test_label_of_a_refused_row_is_showable():
    row = RefusedRow("\x1b[2J", 1, "bad \x1b", {"style": "\x9b"})
    assert row.reason == r"bad \x1b"
    assert RowOutcome.refused(row).label == r"\x1b[2J (\x9b)"


def test_output_that_is_serialized_shows_no_options(tmp_path):
    output = OutputFolder(str(tmp_path), {"auto_mkdir": True, "secret": "canary"})
    assert not hasattr(output, "__dict__")
    text = json.dumps(to_jsonable_python(output, fallback=str))
    assert "canary" not in text + repr(output) + str(output)


@pytest.mark.parametrize("url", ["s3://key:canary@b/x", "ftp://u:canary@h/x", "gs://canary@b/x"])
def test_password_in_the_url_of_a_place_is_refused(url):
    for create in (OutputFolder, Staging):
        with pytest.raises(ConfigurationError, match="user name or password in its URL") as raised:
            create(url)
        assert "canary" not in str(raised.value)


@pytest.mark.parametrize("start", "=+-@\t\r")
def test_formula_of_the_service_is_text_in_failed_rows(start):
    """A spreadsheet runs a cell that begins with `=`; the manifest's own cells stay."""
    outcome = RowOutcome(id="a", line=2, state="failed", reason=f"{start}1", message=f"{start}2")
    text = format_failed_rows([({"id": "=1", "prompt": "-x"}, outcome)]).decode()
    (row,) = csv.DictReader(io.StringIO(text, newline=""))
    assert (row["id"], row["prompt"]) == ("=1", "-x")
    assert (row["failed_reason"], row["failed_message"]) == (f"'{start}1", f"'{start}2")


def test_every_line_of_the_page_names_a_test():
    page = (ROOT / "docs" / "security.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("|")]
    lines = [line for line in lines if line[:5] not in ("|---|", "| gua")]
    assert len(lines) > 25
    for line in lines:
        tests = re.findall(r"`([\w/]+\.py)::(test_\w+)`", line.split(" | ")[1])
        assert tests, line
        for file, name in tests:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), (file, name)


def test_release_is_built_from_main_by_known_packages():
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    build = yaml.safe_load(workflow)["jobs"]["build"]["steps"]
    commands = [step.get("run", "") for step in build]
    assert 'git merge-base --is-ancestor "$GITHUB_SHA" origin/main' in commands
    (install,) = [command for command in commands if "pip install" in command]
    assert "--require-hashes --no-deps --only-binary :all:" in install
    assert "python -m build --no-isolation" in commands
    lines = (ROOT / ".github" / "release.txt").read_text().splitlines()[1:]
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    for line in lines:
        name, _, digest = line.partition(" --hash=sha256:")
        assert name in pinned
        assert len(digest) == 64
    tests = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert "pip_audit --requirement constraints.txt --no-deps --disable-pip --strict" in tests


def test_deployments_that_pay_have_a_budget():
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    budgets = {each["name"]: each.get("parameters", {}).get("budget_usd") for each in deployments}
    # These pay for one image, nothing, and what the batch that starts them allows.
    for name in ("style-transfer", "collect-hourly", "partition-of-batch"):
        assert budgets.pop(name) is None
    assert all(budgets.values()), budgets
