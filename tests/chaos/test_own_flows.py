"""A small version of the trials of user flows; `tests.chaos.own_flows` is the large one."""

import json
import random

import pytest

from tests.chaos import own_flows
from tests.chaos.own_flows import at_a_step, at_random, format_table, open_places

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def open_place():
    with open_places() as open_place:
        yield open_place


def assert_no_findings(line):
    found = {name: line[name] for name in ("paid_twice", "lost", "missing", "problems")}
    assert not any(found.values()), found
    assert line["accepted"] == line["requests"]
    assert sum(line["kills"].values()) > 0


@pytest.mark.parametrize(
    "kill_point", [("create", "after", 2), ("request", "after", 1), ("image", "after", 1)]
)
def test_flow_killed_at_a_step_pays_once(open_place, kill_point):
    with open_place("local") as place:
        line = at_a_step(
            place, str(kill_point), random.Random(1), kind="mapped", kill_point=kill_point
        )
    assert_no_findings(line)


def test_flow_stopped_at_random_pays_once(open_place):
    with open_place("local") as place:
        line = at_random(
            place, "stopped", random.Random(2), kind="default retries", size=4, stops=2
        )
    assert_no_findings(line)


def test_trials_continue_where_they_ended(monkeypatch, tmp_path, capsys):
    trial = dict.fromkeys(("requests", "flow_runs", "paid_twice", "lost", "missing", "unknown"), 0)
    trial |= {"kills": {"SIGKILL": 1}, "accepted": 0, "problems": []}
    done = trial | {"scenario": "all of one kind", "name": "first"}
    results = tmp_path / "results.jsonl"
    results.write_text(f"{json.dumps(done)}\n")
    names = []

    def run(_place, name, _rng):
        names.append(name)
        return dict(trial)

    planned = [("all of one kind", name, run) for name in ("first", "second")]
    monkeypatch.setattr(own_flows, "plan_trials", lambda: planned)
    monkeypatch.setattr(own_flows.sys, "argv", ["own_flows", str(results)])
    assert own_flows.main() == 0
    assert names == ["second"]
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["first", "second"]
    assert "| all | 2 |" in capsys.readouterr().out
    assert "| all | 2 |" in format_table(lines)
