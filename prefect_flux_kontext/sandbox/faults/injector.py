"""The weather as it is now: the plan, how many have passed, and what has befallen them."""

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
from prefect_flux_kontext.sandbox.faults.registry import FAULTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send


_PATHS = {
    "/api/v1/generateTask/": "submit",
    "/api/v1/statusTask/": "status",
    "/results/": "download",
}
_LASTING = {"status": "never-ends", "download": "lost-result"}
"""What befalls a task shows in this kind of request."""


class ActiveFaults:
    """Decides the fate of each request, task and callback.

    Attributes:
        plan: What is to go wrong; another one goes on with the numbers of the one before.
        numbers: How many of each kind there were.
        befallen: How often each fault, as `kind:fault`, has befallen one.
    """

    def __init__(self, plan: FaultPlan) -> None:
        self.change(plan)

    def change(self, plan: FaultPlan) -> None:
        """Begin anew with a plan: the next request of a kind is its first."""
        self.plan = plan
        self.numbers: Counter[str] = Counter()
        self.befallen: Counter[str] = Counter()
        self._fates: dict[str, str] = {}

    def applies(self, kind: str) -> tuple[str | None, int]:
        """What befalls the next of a kind, and its number."""
        self.numbers[kind] += 1
        fault = self.plan.fault(kind, self.numbers[kind])
        if fault is not None:
            self.befallen[f"{kind}:{fault}"] += 1
        return fault, self.numbers[kind]

    def accepted(self, task_id: str) -> None:
        """Decide the fate of a task that was just accepted."""
        fault, _ = self.applies("task")
        if fault is not None:
            self._fates[task_id] = fault

    def fate(self, task_id: str) -> str | None:
        """What befalls a task for as long as it lives."""
        return self._fates.get(task_id) if self.plan.faults else None

    def told(self) -> dict[str, Any]:
        """The plan, and what came of it."""
        return {
            "plan": self.plan.model_dump(mode="json"),
            "seen": dict(self.numbers),
            "befallen": dict(self.befallen),
        }


class FaultMiddleware:
    """The service in its weather, as ASGI middleware.

    Args:
        app: The service.
        weather: What befalls its requests.
    """

    def __init__(self, app: ASGIApp, weather: ActiveFaults) -> None:
        self._app = app
        self._weather = weather

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or play what befalls it."""
        kind = _kind(scope)
        if kind is None:
            await self._app(scope, receive, send)
            return
        fault, number = self._weather.applies(kind)
        play = self._play(kind, fault, scope)
        if play is None:
            await self._app(scope, receive, send)
        else:
            plan = self._weather.plan
            await play(Exchange(self._app, scope, receive, send, plan=plan, number=number))

    def _play(self, kind: str, fault: str | None, scope: Scope) -> Callable[..., Any] | None:
        if fault is not None:
            return FAULTS[kind][fault]
        lasting = _LASTING.get(kind)
        if lasting is not None and self._weather.fate(_task_id(kind, scope)) == lasting:
            return FAULTS["task"][lasting]
        return None


def _kind(scope: Scope) -> str | None:
    if scope["type"] != "http":
        return None
    path = scope["path"]
    return next((kind for start, kind in _PATHS.items() if path.startswith(start)), None)


def _task_id(kind: str, scope: Scope) -> str:
    if kind == "download":
        return str(scope["path"]).split("/")[2]
    query = parse_qs(scope["query_string"].decode("latin-1"))
    return str(query.get("taskId", [""])[0])


def faults_endpoint(weather: ActiveFaults) -> Route:
    """GET tells the plan and what has happened, PUT begins another one, DELETE ends it."""

    async def handle(request: Request) -> Response:
        if request.method == "PUT":
            weather.change(_plan(await request.body()))
        elif request.method == "DELETE":
            weather.change(FaultPlan())
        return JSONResponse(weather.told())

    return Route("/sandbox/faults", handle, methods=["GET", "PUT", "DELETE"])


def _plan(body: bytes) -> FaultPlan:
    try:
        return read_plan(json.loads(body))
    except (BadPlanError, ValueError, RecursionError) as error:
        raise Refusal(400, "invalid plan of faults", str(error)) from None
