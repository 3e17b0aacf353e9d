"""The active faults: the plan, the counters, and the middleware that applies them."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prefect_flux_kontext.sandbox.contract import Refusal
from prefect_flux_kontext.sandbox.faults.exchange import Exchange
from prefect_flux_kontext.sandbox.faults.plan import BadPlanError, FaultPlan, read_plan
from prefect_flux_kontext.sandbox.faults.registry import HANDLERS

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

_PATHS = {
    "/api/v1/generateTask/": "submit",
    "/api/v1/statusTask/": "status",
    "/results/": "download",
}
_LASTING = {"status": "never-ends", "download": "lost-result"}
"""By kind of request, the fault of a task that shows in it."""


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


class FaultMiddleware:
    """ASGI middleware that applies faults to requests."""

    def __init__(self, app: ASGIApp, faults: ActiveFaults) -> None:
        self._app = app
        self._faults = faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or apply its fault."""
        path = scope["path"] if scope["type"] == "http" else ""
        kind = next((kind for start, kind in _PATHS.items() if path.startswith(start)), None)
        if kind is None:
            await self._app(scope, receive, send)
            return
        fault, number = self._faults.applies(kind)
        lasting = _LASTING.get(kind)
        if fault is not None:
            handler = HANDLERS[kind, fault]
        elif lasting and self._faults.task_fault(_task_id(kind, scope)) == lasting:
            handler = HANDLERS["task", lasting]
        else:
            await self._app(scope, receive, send)
            return
        await handler(Exchange(self._app, scope, receive, send, self._faults.plan, number))


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
