"""The weather is told, changed and ended while the sandbox runs, and a seed repeats it."""

import httpx

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from tests.sandbox.faults.asking import BODY, plan, submit
from tests.sandbox.helpers import KEY, SUBMIT


def test_the_weather_is_told_changed_and_ended_at_run_time(http):
    fine = http.get("/sandbox/faults").json()
    assert fine == {
        "plan": {"faults": [], "seed": 0, "hang": 60.0, "slow": 5.0, "late": 600.0},
        "seen": {},
        "befallen": {},
    }
    plan(http, "submit:limited@2", seed=7)
    assert [submit(http).status_code for _ in range(3)] == [200, 429, 200]
    told = http.get("/sandbox/faults").json()
    assert told["plan"]["faults"] == ["submit:limited@2"]
    assert told["seen"] == {"submit": 3, "task": 2}
    assert told["befallen"] == {"submit:limited": 1}
    assert http.delete("/sandbox/faults").json() == fine
    assert [submit(http).status_code for _ in range(3)] == [200] * 3


def test_a_plan_that_is_none_is_refused_and_the_weather_stays(http):
    plan(http, "submit:limited")
    for body in ("rain", '{"faults": ["rain", "submit:rain"]}', "[]", "[" * 10_000):
        reply = http.put("/sandbox/faults", content=body)
        assert reply.status_code == 400, body
        assert reply.json()["message"] == "invalid plan of faults"
    assert submit(http).status_code == 429


def test_the_same_seed_and_requests_meet_the_same_fates(http):
    def fates(seed):
        plan(http, "submit:limited=0.2", "submit:trouble-after=0.2", seed=seed)
        return [submit(http).status_code for _ in range(30)]

    assert fates(1) == fates(1)
    assert fates(1) != fates(2)


def test_a_sandbox_may_start_in_bad_weather():
    with running_sandbox(plan=FaultPlan(faults=["submit:limited"])) as stormy:
        reply = httpx.post(stormy.url + SUBMIT, json=BODY, headers=KEY, trust_env=False)
        assert reply.status_code == 429
        assert stormy.weather.befallen == {"submit:limited": 1}
        stormy.weather.change(FaultPlan())
        reply = httpx.post(stormy.url + SUBMIT, json=BODY, headers=KEY, trust_env=False)
        assert reply.status_code == 200
