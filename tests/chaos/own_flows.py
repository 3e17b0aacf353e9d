"""User flows of the three tasks: killed at every step, terminated, cancelled, retried.

    python -m tests.chaos.own_flows RESULTS [WORD...]

Each trial has a ledger and a number of requests, of which every one must be paid for once and
stored in the end. RESULTS (JSON Lines) gets a line for each trial. Trials that it has already are
left out, so an interrupted run can be continued; the table is of all lines. The exit status is 1
if a request was paid for twice, lost or missing.
"""

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import httpx
from prefect import flow, runtime, unmapped
from prefect.cache_policies import INPUTS
from prefect.futures import wait
from prefect.settings import PREFECT_FLOWS_DEFAULT_RETRIES, PREFECT_TASKS_DEFAULT_RETRIES
from prefect.settings import temporary_settings as temporary_prefect_settings
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_flux_kontext import (
    GenerationRequest,
    persist_images,
    submit_generation,
    wait_for_generation,
)
from prefect_flux_kontext.cli.prefect_server import prefect_server
from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos import flow_child
from tests.chaos.checker import read_all
from tests.chaos.plain_ledger import PlainLedger
from tests.chaos.processes import KEY, Batch, Started, _fork, without_faults
from tests.chaos.scenarios import TROUBLE
from tests.chaos.trials import print_now
from tests.support.s3 import s3_server

SERVICE = SandboxSettings(mean=0.5, long_edge=16, requests_per_minute=1_000_000, api_key=KEY)
STEPS = {"create": 9, "replace": 3, "read": 8, "image": 2, "request": 6, "download": 2}
"""Calls of a flow of two requests, at each of which it is killed once before and once after."""


def run_flow(kind, prompts, output, *, dies=False):
    """Run a user's flow of a kind; it raises the error of a request.

    Args:
        kind: How the flow is written.
        prompts: One prompt a request.
        output: The output, which is also the ledger.
        dies: Whether the first attempt of the flow raises after its submits.
    """
    retried = {"retries": 2, "retry_delay_seconds": 0}
    tasks = (submit_generation, wait_for_generation, persist_images)
    if kind == "with_options":
        tasks = [
            each.with_options(**retried, cache_policy=INPUTS, persist_result=True)
            for each in tasks
        ]
    submit, wait_for, persist = tasks
    requests = [GenerationRequest(prompt=prompt, aspect_ratio="1:1") for prompt in prompts]

    async def gathered():
        print(f"flow run {runtime.flow_run.id}", flush=True)  # noqa: T201 - the parent reads it

        async def restyle(request):
            task = await submit(request, ledger=output)
            if dies and runtime.flow_run.run_count == 1:
                raise RuntimeError("the flow dies after a submit")
            await persist(await wait_for(task), output)

        outcomes = await asyncio.gather(*map(restyle, requests), return_exceptions=True)
        for error in filter(None, outcomes):
            raise error

    def mapped():
        print(f"flow run {runtime.flow_run.id}", flush=True)  # noqa: T201 - the parent reads it
        submitted = submit.map(requests, ledger=unmapped(output))
        if dies and runtime.flow_run.run_count == 1:
            wait(submitted)
            raise RuntimeError("the flow dies after its submits")
        stored = persist.map(wait_for.map(submitted), output=unmapped(output))
        wait(stored)
        stored.result()

    by_default = dict.fromkeys((PREFECT_FLOWS_DEFAULT_RETRIES, PREFECT_TASKS_DEFAULT_RETRIES), 2)
    with temporary_prefect_settings(by_default if kind == "default retries" else {}):
        own = flow(**retried if kind in ("retries=2", "mapped") else {})
        if kind == "mapped":
            own(mapped).with_options(task_runner=ThreadPoolTaskRunner(max_workers=64))()
        else:
            asyncio.run(own(gathered)())


class Trial:
    """A ledger, the flows that run on it, and what was done to them.

    Args:
        place: Where trials run.
        name: Its name, which its prompts contain.
        size: How many requests it has.
        kind: How its flow is written.
    """

    def __init__(self, place, name, size, kind):
        folder = place.folder / hashlib.sha256(name.encode()).hexdigest()[:8]
        folder.mkdir()
        output = f"{place.bucket}/{folder.name}" if place.bucket else None
        self.batch = Batch(place.service, folder, output, **place.environment)
        self.prompts = [f"{name}, request {number}" for number in range(size)]
        self.kind = kind
        self.flow_runs = 0
        self.kills = defaultdict(int)
        self.problems = []
        self._api = place.environment["PREFECT_API_URL"]

    def start(self, *, kill_point=None, dies=False, prompts=None):
        """Start the flow in a process."""
        self.flow_runs += 1
        log = self.batch.folder / f"flow-{self.flow_runs}.txt"
        spec = {
            "kind": self.kind,
            "prompts": self.prompts if prompts is None else prompts,
            "output": self.batch.output,
            "dies": dies,
        }
        process = _fork.Process(
            target=flow_child.main, args=(spec, self.batch.environment, str(log), kill_point)
        )
        process.start()
        return Started(process, log)

    def run(self, **options):
        """Run the flow to its end; 1,000 requests may take long on a busy machine."""
        running = self.start(**options)
        running.lives_for(3_600)
        return running.end()

    def stop(self, running, how):
        """Stop a process by a signal, or as Prefect's runner does after a cancellation."""
        if how == "cancel":
            found = re.search(r"flow run (\S+)", running.said())
            if found:
                state = {"type": "CANCELLING", "name": "Cancelling"}
                httpx.post(
                    f"{self._api}/flow_runs/{found[1]}/set_state",
                    json={"state": state},
                    timeout=60,
                    trust_env=False,
                )
        if running.lives_for(0):
            self.kills[how] += 1
        if how != "SIGKILL":
            running.send(signal.SIGTERM)
            running.lives_for(30)
        running.kill()

    def run_until(self, accepted, how, rng, **options):
        """Run the flow, and stop it some time after it has paid for a number of its requests."""
        running = self.start(**options)
        while running.lives_for(0.02) and len(self.records) < accepted:
            pass
        running.lives_for(rng.uniform(0, 1.0))
        self.stop(running, how)

    @property
    def records(self):
        """The service's accepted tasks of this trial."""
        own = set(self.prompts)
        return [each for each in self.batch.service.service.records() if each["prompt"] in own]

    def read_ledger(self):
        """Read the attempts of each prompt, and all files of the output."""
        files = read_all(self.batch.output)
        prefix = "_ledger/"
        ledger = PlainLedger.read(
            {
                name.removeprefix(prefix): data
                for name, data in files.items()
                if name.startswith(prefix) and not name.endswith(".part")
            }
        )
        by_prompt = {
            attempts[0].intent["request"]["prompt"]: (key, attempts)
            for key, attempts in ledger.attempts.items()
        }
        return by_prompt, files

    def settle(self):
        """Settle unknown requests by the account's history, as the message says; count them."""
        tasks = {record["prompt"]: record["taskId"] for record in self.records}
        unknown = 0
        for prompt, (key, attempts) in self.read_ledger()[0].items():
            if attempts[-1].state == "unknown":
                unknown += 1
                outcome = ["--accepted", tasks[prompt]] if prompt in tasks else ["--rejected"]
                ended = self.batch.command("resolve", key, *outcome)
                if ended.status != 0:
                    self.problems.append(f"resolve {key}: {ended.said}")
        return unknown

    def finish(self, *, collects=False):
        """Let the flow end, settle what is unknown, check, and return the line of the results."""
        self.run()
        self.batch.service.active_faults.change(FaultPlan())
        unknown = self.settle()
        if collects:
            ended = self.batch.command("collect")
            if ended.status not in (0, 1):
                self.problems.append(f"collect: {ended.said[-500:]}")
        last = self.run()
        if last.status != 0:
            self.problems.append(f"the last run failed: {last.said[-800:]}")
        before = len(self.records)
        return self._check(unknown, before)

    def _check(self, unknown, accepted):
        with without_faults(self.batch.service):
            by_prompt, files = self.read_ledger()
        twice = lost = missing = 0
        tasks = defaultdict(list)
        for record in self.records:
            tasks[record["prompt"]].append(record["taskId"])
        for prompt in self.prompts:
            _, attempts = by_prompt.get(prompt, (None, []))
            ours = {a.posted["task_id"] for a in attempts if a.posted and a.posted.get("task_id")}
            twice += max(0, len(tasks[prompt]) - 1)
            lost += len(set(tasks[prompt]) - ours)
            last = attempts[-1] if attempts else None
            if last is None or last.ended is None or last.ended["state"] != "stored":
                missing += 1
                continue
            (name,), (image,) = last.ended["files"], last.ended["images"]
            sha256 = hashlib.sha256(files.get(name, b"")).hexdigest()
            missing += sha256 != image["sha256"]
        owners = sum(name.startswith("_ledger/owners/") for name in files)
        if owners > self.flow_runs + 1:
            self.problems.append(f"{owners} owner records of {self.flow_runs} processes")
        return {
            "requests": len(self.prompts),
            "flow_runs": self.flow_runs,
            "kills": dict(self.kills),
            "accepted": accepted,
            "paid_twice": twice,
            "lost": lost,
            "missing": missing,
            "unknown": unknown,
            "problems": self.problems,
        }


def at_a_step(place, name, rng, *, kind, kill_point):
    """Kill a flow of two requests right before or after a call."""
    trial = Trial(place, name, 2, kind)
    if trial.start(kill_point=kill_point).end().status == -signal.SIGKILL:
        trial.kills["SIGKILL"] += 1
    return trial.finish(collects=rng.random() < 0.3)


def at_random(place, name, rng, *, kind, size=6, stops=6):
    """Stop a flow at random again and again, under faults; its first attempt may die too."""
    place.inject(rng)
    trial = Trial(place, name, size, kind)
    for _ in range(stops):
        how = rng.choice(["SIGKILL", "SIGKILL", "SIGTERM", "cancel"])
        trial.run_until(rng.randrange(size + 1), how, rng, dies=rng.random() < 0.3)
    return trial.finish(collects=rng.random() < 0.3)


def side_by_side(place, name, rng, *, kind="retries=2", size=6):
    """Run two flows on one ledger, and kill one of them."""
    place.inject(rng)
    trial = Trial(place, name, size, kind)
    for _ in range(2):
        other = trial.start()
        trial.run_until(rng.randrange(1, size), "SIGKILL", rng)
        other.end()
    return trial.finish()


def beside_a_batch(place, name, rng, *, size=4):
    """Run tasks and a batch with a budget on one ledger; the budget is never exceeded."""
    trial = Trial(place, name, size + 6, "retries=2")
    own, rows = trial.prompts[:size], trial.prompts[size:]
    trial.run_until(2, "SIGKILL", rng, prompts=own)
    trial.settle()
    before = len(trial.records)
    trial.batch.write([(f"row-{n}", prompt) for n, prompt in enumerate(rows)])

    def budget(paid):
        return "--aspect-ratio=1:1", f"--budget={(paid + 4) * 0.03:.2f}"

    batch = trial.batch.start_run(*budget(before))
    flows = [trial.start(prompts=own) for _ in range(2)]
    batch.lives_for(rng.uniform(1, 6))
    trial.stop(batch, "SIGKILL")
    for running in flows:
        running.end()
    trial.settle()
    trial.start(prompts=own).end()
    paid_by_tasks = sum(record["prompt"] in own for record in trial.records)
    trial.settle()
    trial.batch.run(*budget(paid_by_tasks))
    if len(trial.records) > max(before, paid_by_tasks) + 4:
        trial.problems.append(f"{len(trial.records)} were paid for, more than the budgets allow")
    trial.settle()
    return trial.finish()


def thousand(place, name, rng):
    """Map 1,000 submits, kill the flow once while it submits, and run it again."""
    trial = Trial(place, name, 1_000, "mapped")
    trial.run_until(300, "SIGKILL", rng)
    return trial.finish()


class Place:
    """A sandbox, a folder, a Prefect server, and a bucket for trials on S3."""

    def __init__(self, folder, service, prefect, bucket=None, access=None):
        self.folder = folder
        self.service = service
        self.bucket = bucket
        self.environment = {
            **prefect,
            "PREFECT_LOGGING_TO_API_ENABLED": "false",
            "PREFECT_LOGGING_LEVEL": "ERROR",
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "0.3",
            "FLUX_KONTEXT_POLL_INTERVAL": "0.5",
            "FLUX_KONTEXT_STOP_TIMEOUT": "5",
            **(access or {}),
        }

    def inject(self, rng):
        """Activate network faults of every kind, at five times the usual share."""
        faults = [f"{name}={float(share) * 5}" for name, share in (f.split("=") for f in TROUBLE)]
        plan = FaultPlan(faults=faults, seed=rng.getrandbits(32), hang=0.5, slow=0.5)
        self.service.active_faults.change(plan)


KINDS = ("retries=2", "default retries", "with_options", "mapped")


def plan_trials():
    """Yield every trial: the name of its scenario, its own name, and the function that runs it."""

    def bind(scenario, **how):
        return lambda place, name, rng: scenario(place, name, rng, **how)

    kinds = itertools.cycle(KINDS)
    for point, last in STEPS.items():
        for number, when in itertools.product(range(1, last + 1), ("before", "after")):
            name = f"killed {when} {point} {number}"
            kill_point = (point, when, number)
            yield (
                "killed at a step",
                name,
                bind(at_a_step, kind=next(kinds), kill_point=kill_point),
            )
    for kind, number in itertools.product(KINDS, range(5)):
        name = f"{kind}, stopped at random {number}"
        yield f"{kind}: stopped at random", name, bind(at_random, kind=kind)
    for number in range(6):
        yield "two flows on one ledger", f"two flows {number}", side_by_side
    for number in range(4):
        yield "a batch with a budget on the ledger", f"beside a batch {number}", beside_a_batch
    for number in range(4):
        name = f"on S3, stopped at random {number}"
        yield "ledger and images on S3 (moto)", name, bind(at_random, kind=KINDS[number], stops=4)
    yield "1,000 mapped submits", "1,000 mapped submits", thousand


@contextlib.contextmanager
def open_places():
    """Yield the function that makes the place of a trial."""
    with (
        tempfile.TemporaryDirectory() as folder,
        prefect_server(Path(folder) / "prefect") as server,
        s3_server() as (bucket, client),
        # Set before the first process is forked, which imports Prefect.
        mock.patch.dict(os.environ, server.environment),
    ):
        _fork.set_forkserver_preload(["tests.chaos.own_flows", "s3fs"])
        access = {
            "FSSPEC_S3_ENDPOINT_URL": client.meta.endpoint_url,
            "FSSPEC_S3_KEY": "testing",
            "FSSPEC_S3_SECRET": "testing",
        }

        @contextlib.contextmanager
        def place(scenario):
            with (
                running_sandbox(SERVICE) as service,
                tempfile.TemporaryDirectory(dir=folder) as here,
            ):
                where = (bucket, access) if "S3" in scenario else ()
                yield Place(Path(here), service, server.environment, *where)

        yield place


def format_table(lines):
    """Return the totals of the scenarios as Markdown."""
    columns = ("requests", "flow_runs", "kills", "paid_twice", "lost", "missing", "unknown")
    totals = defaultdict(lambda: dict.fromkeys(("trials", *columns), 0))
    for line in lines:
        for total in (totals[line["scenario"]], totals["all"]):
            total["trials"] += 1
            for name in columns:
                value = line[name]
                total[name] += sum(value.values()) if isinstance(value, dict) else value
    totals["all"] = totals.pop("all", {})
    head = ["scenario", "trials", *(name.replace("_", " ") for name in columns)]
    rows = [[name, *map(str, total.values())] for name, total in totals.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def main():
    """Run the trials that the results do not have, and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("words", nargs="*", default=[""], help="parts of the scenarios' names")
    parser.add_argument("--every", type=int, default=1, help="run every n-th trial only")
    options = parser.parse_args()
    options.results.touch()

    def read_lines():
        return [json.loads(line) for line in options.results.read_text().splitlines()]

    done = {line["name"] for line in read_lines()}
    planned = [
        trial
        for trial in list(plan_trials())[:: options.every]
        if trial[1] not in done and any(word in trial[0] for word in options.words)
    ]
    with open_places() as open_place:
        for scenario, name, run in planned:
            began = time.monotonic()
            with open_place(scenario) as place:
                line = run(place, name, random.Random(name))
            line |= {"scenario": scenario, "name": name, "s": round(time.monotonic() - began, 1)}
            with options.results.open("a") as results:
                results.write(f"{json.dumps(line)}\n")
            print_now(json.dumps(line))
    lines = read_lines()
    print_now(format_table(lines))
    bad = ("paid_twice", "lost", "missing", "problems")
    return int(any(line[name] for line in lines for name in bad))


if __name__ == "__main__":
    sys.exit(main())
