"""`--json` prints one object with the documented fields, and -q and -v print less and more."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from prefect_flux_kontext.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "json.md"


def documented(heading):
    """Return the fields of one table of the page."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", " ".join(rows)))


@pytest.fixture
def run(tmp_path, capsys):
    """Run a command; return its exit status, the object that it printed, and its errors."""
    path = tmp_path / "m.csv"
    path.write_text("id,prompt\na,oil\nb,nsfw\n")
    places = {"MANIFEST": str(path), "OUTPUT": str(tmp_path / "out")}

    def call(*words):
        status = main([places.get(word, word) for word in words])
        printed = capsys.readouterr()
        return status, json.loads(printed.out), printed.err

    return call


def test_json_has_the_documented_fields(sandbox, run):
    status, plan, _ = run("plan", "MANIFEST", "OUTPUT", "--json")
    assert (status, plan["to_pay"], plan["price_usd"]) == (0, 2, 0.06)
    assert set(plan) == documented("plan")
    assert run("run", "MANIFEST", "OUTPUT", "--dry-run", "--json")[1] == plan
    status, summary, _ = run("run", "MANIFEST", "OUTPUT", "--json")
    assert (status, summary["stored"], summary["failed"]) == (1, 1, 1)
    assert set(summary) == documented("run, retry-failed, redo, collect")
    assert set(summary["failures"][0]) == documented("Rows that are not stored")
    status, ledger, _ = run("status", "OUTPUT", "--json")
    assert (status, ledger["states"]) == (0, {"stored": 1, "failed": 1})
    assert set(ledger) == documented("status")
    assert run("collect", "OUTPUT", "--json")[1]["rows"] == 0
    assert run("retry-failed", "OUTPUT", "--json")[0] == 1
    status, account, _ = run("balance", "--json")
    assert set(account) == documented("balance")


def test_error_with_json_is_an_object_too(sandbox, run, monkeypatch):
    status, answer, text = run("status", "OUTPUT", "--json")
    assert status == 2
    assert set(answer) == documented("Errors")
    assert answer["error"]["message"] in text
    monkeypatch.setenv("FLUX_KONTEXT_API_KEY", "another")
    status, answer, _ = run("balance", "--json")
    assert (status, answer["error"]["type"]) == (2, "UnauthorizedError")


def test_quiet_run_prints_only_problems(sandbox, tmp_path, capsys):
    path = tmp_path / "m.csv"
    path.write_text("id,prompt\na,oil\n")
    arguments = ["run", str(path), str(tmp_path / "out"), "-q"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == ""
    path.write_text("id,prompt\na,oil\nb,nsfw\n")
    assert main(arguments) == 1
    assert capsys.readouterr().out.startswith("  line 3, b: ")


def test_end_names_the_next_command(sandbox, tmp_path, capsys):
    path = tmp_path / "m.csv"
    path.write_text("id,prompt\nb,nsfw\n")
    output = str(tmp_path / "my pictures")
    assert main(["run", str(path), output]) == 1
    assert f"flux-kontext retry-failed '{output}'" in capsys.readouterr().out


def test_balance_is_shown(sandbox, capsys):
    assert main(["balance"]) == 0
    assert capsys.readouterr().out == f"$10,000.00  at {sandbox.url}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_commands_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("retry-failed", "balance", "budget", "aspect-ratio"):
        assert word in script


def test_bash_completes_commands_and_options(capsys):
    main(["completion", "bash"])
    program = (
        capsys.readouterr().out
        + """
for words in "flux-kontext ret" "flux-kontext run --bud"; do
  COMP_WORDS=($words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _flux_kontext
  echo "${COMPREPLY[@]}"
done"""
    )
    ran = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["retry-failed", "--budget", "--budget-by"]
