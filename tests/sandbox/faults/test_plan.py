"""Plans of faults from text, JSON and files."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.sandbox.faults.handlers import FAULTS, describe_faults
from prefect_flux_kontext.sandbox.faults.plan import (
    BadPlanError,
    FaultPlan,
    PlannedFault,
    load_plan,
    read_fault,
    read_plan,
)

ALL = [(kind, name) for kind, faults in FAULTS.items() for name in faults]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("submit:lost-reply", PlannedFault("submit", "lost-reply")),
        ("submit:lost-reply=0.02", PlannedFault("submit", "lost-reply", 0.02)),
        ("status:limited@7", PlannedFault("status", "limited", 1.0, 7, 7)),
        ("status:limited@7-", PlannedFault("status", "limited", 1.0, 7, None)),
        ("task:never-ends=.5@7-9", PlannedFault("task", "never-ends", 0.5, 7, 9)),
    ],
)
def test_fault_text_has_share_and_numbers(text, fault):
    assert read_fault(text) == fault
    assert read_fault(str(fault)) == fault


@given(
    st.sampled_from(ALL),
    st.sampled_from([0.001, 0.02, 0.5, 1.0]),
    st.integers(1, 10**6),
    st.none() | st.integers(0, 10**6),
)
def test_what_is_written_is_read_again(which, share, first, more):
    fault = PlannedFault(*which, share, first, None if more is None else first + more)
    assert read_fault(str(fault)) == fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lost-reply", "must have the form"),
        ("submit:lost-reply=2%", "must have the form"),
        (
            "upload:lost-reply",
            "unknown kind 'upload'; use one of submit, status, download, task, callback",
        ),
        ("callback:html", "a callback has no fault 'html'"),
        ("submit:html=1.5", "at most 1"),
    ],
)
def test_invalid_fault_is_named(text, message):
    with pytest.raises(BadPlanError, match=message):
        read_fault(text)


def test_all_problems_of_a_plan_are_listed():
    with pytest.raises(BadPlanError) as raised:
        read_plan({"faults": ["rain", "submit:rain", "status:html"], "hang": -1, "wind": 3})
    first, *rest = str(raised.value).splitlines()
    assert first.startswith("faults.0: 'rain' must have the form")
    assert [line.split(":")[0] for line in rest] == ["faults.1", "hang", "wind"]


@pytest.mark.parametrize("given", [None, [], "rain", {"faults": "rain"}, {"faults": [3]}])
def test_what_is_no_plan_at_all_is_refused(given):
    with pytest.raises(BadPlanError):
        read_plan(given)


def test_a_plan_survives_json():
    plan = FaultPlan(faults=["submit:html=0.5@3-4", "task:never-ends"], seed=3, hang=1)
    assert read_plan(json.loads(plan.model_dump_json())) == plan


@given(st.integers(0, 100), st.sampled_from(ALL), st.integers(1, 10_000))
def test_the_same_plan_decides_the_same(seed, which, number):
    kind, name = which
    plans = [FaultPlan(faults=[f"{kind}:{name}=0.5"], seed=seed) for _ in range(2)]
    assert plans[0].fault(kind, number) == plans[1].fault(kind, number)


def test_shares_hold_and_depend_on_the_seed():
    def results(seed):
        plan = FaultPlan(faults=["submit:html=0.1", "submit:reset=0.2"], seed=seed)
        return [plan.fault("submit", number) for number in range(1, 5_001)]

    first = results(1)
    assert 400 < first.count("html") < 600
    assert 850 < first.count("reset") < 1_150
    assert first != results(2)
    assert FaultPlan(faults=["submit:html"], seed=1).fault("status", 1) is None


def test_fault_applies_to_its_numbers_only():
    plan = FaultPlan(faults=["status:limited@3-5", "status:html@9-"])
    faults = [plan.fault("status", number) for number in range(1, 11)]
    assert faults == [None, None, *["limited"] * 3, None, None, None, "html", "html"]


@pytest.mark.parametrize(
    "text", ['{"seed": 5, "faults": ["submit:html"]}', "seed: 5\nfaults:\n  - submit:html\n"]
)
def test_plan_file_follows_command_line_faults(tmp_path, text):
    file = tmp_path / "plan"
    file.write_text(text)
    plan = load_plan(file, ["submit:reset@1"], 9)
    assert (plan.seed, [str(fault) for fault in plan.faults]) == (
        5,
        ["submit:reset@1", "submit:html"],
    )
    assert load_plan(None, ["submit:reset"], 9).seed == 9


@pytest.mark.parametrize("text", ["[1]", "faults: rain", "{", "\x00"])
def test_a_file_that_is_no_plan_is_refused_by_its_name(tmp_path, text):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(BadPlanError, match=r"plan\.yaml"):
        load_plan(file, [], 0)
    with pytest.raises(BadPlanError, match=r"no-such-file"):
        load_plan(tmp_path / "no-such-file", [], 0)


def test_empty_plan_file_has_no_faults(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("")
    assert load_plan(file, [], 0) == FaultPlan()


def test_every_fault_is_described_in_a_line():
    lines = describe_faults().splitlines()
    for _, name in ALL:
        assert any(line.startswith(f"  {name} ") and len(line) > 30 for line in lines), name
    assert max(map(len, lines)) < 110
