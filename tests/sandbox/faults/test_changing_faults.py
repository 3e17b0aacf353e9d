"""The endpoint that shows and changes faults while the sandbox runs."""

import httpx

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from tests.sandbox.faults.asking import BODY, plan, submit
from tests.sandbox.helpers import KEY, SUBMIT


def test_faults_are_shown_changed_and_removed_at_run_time(http):
    fine = http.get("/sandbox/faults").json()
    assert fine == {
        "plan": {"faults": [], "seed": 0, "hang": 60.0, "slow": 5.0, "late": 600.0},
        "seen": {},
        "applied": {},
    }
    plan(http, "submit:limited@2", seed=7)
    assert [submit(http).status_code for _ in range(3)] == [200, 429, 200]
    shown = http.get("/sandbox/faults").json()
    assert shown["plan"]["faults"] == ["submit:limited@2"]
    assert shown["seen"] == {"submit": 3, "task": 2}
    assert shown["applied"] == {"submit:limited": 1}
    assert http.delete("/sandbox/faults").json() == fine
    assert [submit(http).status_code for _ in range(3)] == [200] * 3


def test_invalid_plan_is_refused_and_the_faults_stay(http):
    plan(http, "submit:limited")
    for body in ("rain", '{"faults": ["rain", "submit:rain"]}', "[]", "[" * 10_000):
        reply = http.put("/sandbox/faults", content=body)
        assert reply.status_code == 400, body
        assert reply.json()["message"] == "invalid plan of faults"
    assert submit(http).status_code == 429


def test_seed_repeats_the_faults(http):
    def results(seed):
        plan(http, "submit:limited=0.2", "submit:trouble-after=0.2", seed=seed)
        return [submit(http).status_code for _ in range(30)]

    assert results(1) == results(1)
    assert results(1) != results(2)


def test_sandbox_starts_with_faults():
    with running_sandbox(plan=FaultPlan(faults=["submit:limited"])) as running:
        reply = httpx.post(running.url + SUBMIT, json=BODY, headers=KEY, trust_env=False)
        assert reply.status_code == 429
        assert running.active_faults.applied == {"submit:limited": 1}
        running.active_faults.change(FaultPlan())
        reply = httpx.post(running.url + SUBMIT, json=BODY, headers=KEY, trust_env=False)
        assert reply.status_code == 200
