"""Money on the command line: balance, budgets by column, and what was spent by columns."""

import json

import pytest

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.cli.conftest import KEY

TEAMS = "id,prompt,team\na,a cat,blue\nb,a dog,blue\nc,a fox,red\nd,a hen,\n"


@pytest.fixture
def places(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(TEAMS)
    return str(path), str(tmp_path / "out")


def test_plan_shows_the_balance(sandbox, places, capsys):
    assert main(["plan", *places]) == 0
    assert "$10,000.00  balance of the account\n" in capsys.readouterr().out
    assert main(["plan", *places, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["balance_usd"] == 10_000


def test_run_says_first_when_the_balance_is_not_enough(sandbox, places, capsys, monkeypatch):
    with running_sandbox(SandboxSettings(mean=0.1, balance=0.05, api_key=KEY)) as poor:
        monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", poor.url)
        assert main(["run", *places]) == 1
    printed = capsys.readouterr().out
    assert "$0.05  balance of the account: not enough for all rows" in printed


@pytest.mark.parametrize("missing", ["key", "service"])
def test_plan_without_a_balance_is_a_plan(sandbox, places, capsys, monkeypatch, missing):
    if missing == "key":
        monkeypatch.delenv("FLUX_KONTEXT_API_KEY")
    else:
        monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", "http://127.0.0.1:1")
    assert main(["plan", *places, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["balance_usd"] is None


def test_run_and_status_show_spend_by_column(sandbox, places, capsys):
    assert main(["run", *places, "--by", "team"]) == 0
    groups = ["$0.06  team=blue: 2 rows", "$0.03  team=other: 1 row", "$0.03  team=red: 1 row"]
    printed = capsys.readouterr().out
    assert [line.strip() for line in printed.splitlines() if "team=" in line] == groups
    assert "the balance fell by $0.12 to $9,999.88" in printed
    assert main(["status", places[1], "--by", "team"]) == 0
    printed = capsys.readouterr().out
    assert [line.strip() for line in printed.splitlines() if "team=" in line] == groups
    assert main(["status", places[1], "--by", "id, team", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["spent_by"]
    assert len(groups) == 4
    assert groups[0]["columns"].keys() == {"id", "team"}


def test_budgets_by_column_hold(sandbox, places, capsys):
    caps = ["--budget-by", "team:blue=0.03", "--budget-by", "team:other=$0"]
    assert main(["run", *places, *caps]) == 1
    printed = capsys.readouterr().out
    assert "$0.03  budget for team=blue: $0.00 spent, $0.06 to be paid, not enough" in printed
    assert "2 of 4 rows stored; 2 not submitted" in printed
    assert sandbox.service.bill()["accepted"] == 2


@pytest.mark.parametrize("text", ["blue=20", "team:blue", "team:=20", ":blue=20", "team:blue=x"])
def test_wrong_budget_by_column_is_refused(sandbox, places, capsys, text):
    with pytest.raises(SystemExit, match="2"):
        main(["run", *places, "--budget-by", text])
    assert "--budget-by" in capsys.readouterr().err


def test_status_by_an_unknown_column_is_refused(sandbox, places, capsys):
    main(["run", *places])
    assert main(["status", places[1], "--by", "tema"]) == 2
    assert "has a value in tema" in capsys.readouterr().err
