"""Plans of faults: which apply, how often and to which requests; and applying them."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qs

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prefect_flux_kontext.sandbox.contract import Refusal
from prefect_flux_kontext.sandbox.faults.exchange import Exchange
from prefect_flux_kontext.sandbox.faults.handlers import FAULTS, HANDLERS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

_PATHS = {
    "/api/v1/generateTask/": "submit",
    "/api/v1/statusTask/": "status",
    "/results/": "download",
}
_LASTING = {"status": "never-ends", "download": "lost-result"}
"""By kind of request, the fault of a task that shows in it."""
_FAULT_PATTERN = re.compile(
    r"(?P<kind>[a-z]+):(?P<name>[a-z0-9-]+)"
    r"(=(?P<share>[0-9]*\.?[0-9]+))?"
    r"(@(?P<first>[0-9]+)(?P<open>-(?P<last>[0-9]+)?)?)?"
)


class BadPlanError(ValueError):
    """A plan of faults is invalid; the message lists the problems, one line for each."""


@dataclass(frozen=True)
class PlannedFault:
    """One fault: `submit:lost-reply=0.02@100-200`, numbers from 1. None as `last` has no end."""

    kind: str
    name: str
    share: float = 1.0
    first: int = 1
    last: int | None = None

    def __str__(self) -> str:
        share = f"={self.share:g}" if self.share < 1 else ""
        if self.last is None:
            numbers = f"@{self.first}-" if self.first > 1 else ""
        else:
            numbers = f"@{self.first}" + (f"-{self.last}" if self.last > self.first else "")
        return f"{self.kind}:{self.name}{share}{numbers}"


def read_fault(text: Any) -> PlannedFault:
    """Parse `KIND:FAULT`, optionally followed by `=SHARE` and `@FIRST-LAST`."""
    if isinstance(text, PlannedFault):
        return text
    match = _FAULT_PATTERN.fullmatch(str(text))
    if match is None:
        raise BadPlanError(
            f"{str(text)[:80]!r} must have the form KIND:FAULT=SHARE@FIRST-LAST, "
            "such as submit:lost-reply=0.02 or status:limited@100-200"
        )
    kind, name = match["kind"], match["name"]
    if kind not in FAULTS:
        raise BadPlanError(f"{text!r}: unknown kind {kind!r}; use one of {', '.join(FAULTS)}")
    if name not in FAULTS[kind]:
        raise BadPlanError(f"{text!r}: a {kind} has no fault {name!r}")
    share = float(match["share"] or 1)
    if share > 1:
        raise BadPlanError(f"{text!r}: the share must be at most 1")
    first = int(match["first"] or 1)
    one = match["first"] is not None and match["open"] is None
    last = first if one else int(match["last"]) if match["last"] else None
    return PlannedFault(kind, name, share, first, last)


FaultSpec = Annotated[PlannedFault, BeforeValidator(read_fault), PlainSerializer(str)]


class FaultPlan(BaseModel):
    """A plan of faults with their durations in seconds. The first fault that applies is used."""

    # Pydantic has no schema for the dataclass; `read_fault` checks every value.
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    faults: tuple[FaultSpec, ...] = ()
    seed: int = 0  # decides, with kind and number, to which requests a share applies
    hang: float = Field(60.0, ge=0)  # before a request that hangs is closed
    slow: float = Field(5.0, ge=0)  # over which a slow reply is spread
    late: float = Field(600.0, ge=0)  # by which a late callback is delayed

    def fault(self, kind: str, number: int) -> str | None:
        """Return the fault of the n-th of a kind, or None. The same plan gives the same result."""
        if not self.faults:
            return None
        remaining = random.Random(f"{self.seed}/{kind}/{number}").random()
        for planned in self.faults:
            last = number if planned.last is None else planned.last
            if planned.kind == kind and planned.first <= number <= last:
                remaining -= planned.share
                if remaining < 0:
                    return planned.name
        return None


def read_plan(given: object) -> FaultPlan:
    """Validate a plan parsed from JSON or YAML; a BadPlanError lists all problems."""
    try:
        return FaultPlan.model_validate(given)
    except ValidationError as invalid:
        problems = (
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in invalid.errors(include_url=False)
        )
        raise BadPlanError("\n".join(line.removeprefix(": ") for line in problems)) from None


def load_plan(file: Path | None, faults: Sequence[str], seed: int) -> FaultPlan:
    """Load a plan from JSON or YAML, if any, and put further faults before its own."""
    import yaml  # noqa: PLC0415 - few plans are files

    given: Any = {}
    if file is not None:
        try:
            given = yaml.safe_load(file.read_bytes()) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise BadPlanError(f"{file} cannot be read: {error}") from None
        if not isinstance(given, dict):
            raise BadPlanError(f"{file} must hold a mapping with `faults`")
        if not isinstance(given.get("faults", []), list):
            raise BadPlanError(f"{file}: `faults` must be a list")
    return read_plan({"seed": seed, **given, "faults": [*faults, *given.get("faults", [])]})


class ActiveFaults:
    """Decides which fault applies to each request, task and callback.

    Assigning another plan keeps the counters: of each kind, and of each applied `kind:fault`.
    """

    def __init__(self, plan: FaultPlan) -> None:
        self.change(plan)

    def change(self, plan: FaultPlan) -> None:
        """Set a plan and reset the counters."""
        self.plan = plan
        self.numbers: Counter[str] = Counter()
        self.applied: Counter[str] = Counter()
        self._task_faults: dict[str, str] = {}

    def applies(self, kind: str) -> tuple[str | None, int]:
        """Count the next of a kind; return its fault, or None, and its number."""
        self.numbers[kind] += 1
        fault = self.plan.fault(kind, self.numbers[kind])
        if fault is not None:
            self.applied[f"{kind}:{fault}"] += 1
        return fault, self.numbers[kind]

    def accepted(self, task_id: str) -> None:
        """Choose the fault of a task that was just accepted."""
        fault, _ = self.applies("task")
        if fault is not None:
            self._task_faults[task_id] = fault

    def task_fault(self, task_id: str) -> str | None:
        """Return the fault of a task, or None."""
        return self._task_faults.get(task_id) if self.plan.faults else None

    def report(self) -> dict[str, Any]:
        """Return the plan and the counters, as `/sandbox/faults` shows them."""
        return {
            "plan": self.plan.model_dump(mode="json"),
            "seen": dict(self.numbers),
            "applied": dict(self.applied),
        }


def inject_faults(app: ASGIApp, faults: ActiveFaults) -> ASGIApp:
    """Apply faults to the requests of an application."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        kind = next((kind for start, kind in _PATHS.items() if path.startswith(start)), None)
        if kind is None:
            await app(scope, receive, send)
            return
        fault, number = faults.applies(kind)
        lasting = _LASTING.get(kind)
        if fault is not None:
            handler = HANDLERS[kind, fault]
        elif lasting and faults.task_fault(_task_id(kind, scope)) == lasting:
            handler = HANDLERS["task", lasting]
        else:
            await app(scope, receive, send)
            return
        await handler(Exchange(app, scope, receive, send, faults.plan, number))

    return serve


def _task_id(kind: str, scope: Scope) -> str:
    if kind == "download":
        return str(scope["path"]).split("/")[2]
    query = parse_qs(scope["query_string"].decode("latin-1"))
    return str(query.get("taskId", [""])[0])


def faults_endpoint(faults: ActiveFaults) -> Route:
    """Make the route: GET shows plan and counters, PUT sets a plan, DELETE removes it."""

    async def handle(request: Request) -> Response:
        if request.method == "PUT":
            body = await request.body()
            try:
                faults.change(read_plan(json.loads(body)))
            except (BadPlanError, ValueError, RecursionError) as error:
                raise Refusal(400, "invalid plan of faults", str(error)) from None
        elif request.method == "DELETE":
            faults.change(FaultPlan())
        return JSONResponse(faults.report())

    return Route("/sandbox/faults", handle, methods=["GET", "PUT", "DELETE"])
