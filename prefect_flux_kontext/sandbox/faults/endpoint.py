"""`/sandbox/faults`: see and change the weather while the sandbox runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prefect_flux_kontext.sandbox.contract import Refusal
from prefect_flux_kontext.sandbox.faults.plan import BadPlanError, FaultPlan, read_plan

if TYPE_CHECKING:
    from starlette.requests import Request

    from prefect_flux_kontext.sandbox.faults.weather import Weather


def faults_endpoint(weather: Weather) -> Route:
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
