"""The sandbox as an ASGI application."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING
from urllib.parse import quote

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from prefect_flux_kontext.sandbox.contract import MODEL, Refusal, failure, success
from prefect_flux_kontext.sandbox.faults.plan import (
    ActiveFaults,
    FaultPlan,
    faults_endpoint,
    inject_faults,
)
from prefect_flux_kontext.sandbox.lifecycle import CallbackSender, Lifecycle
from prefect_flux_kontext.sandbox.painting import choose_style, paint
from prefect_flux_kontext.sandbox.references import BadReferenceError, References, SharedCache
from prefect_flux_kontext.sandbox.service import Service, Task

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prefect_flux_kontext.sandbox.settings import SandboxSettings

_RECORDS_PER_CHUNK = 500
_PICTURE_CACHE_BYTES = 64 * 1024 * 1024
# Not from `mimetypes`: whether it knows WebP depends on the machine.
_MEDIA_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
}


class Sandbox:
    """The endpoints, on top of the service. `url` is set while a server runs."""

    def __init__(self, settings: SandboxSettings, plan: FaultPlan | None = None) -> None:
        self.settings = settings
        self.url = ""
        self.active_faults = ActiveFaults(plan or FaultPlan())
        self.app = Starlette(
            # Most requests go to the first two: routes are matched in order.
            routes=[
                Route("/api/v1/statusTask/{model}", self._status),
                Route("/api/v1/generateTask/{model}", self._submit, methods=["POST"]),
                Route("/results/{task_id}/{name}", self._result),
                Route("/references/{name:path}", self._reference),
                Route("/references", self._list_references),
                Route("/api/v1/apikeys/current-balance", self._balance),
                Route("/sandbox/bill", self._bill),
                Route("/sandbox/tasks", self._tasks),
                Route("/sandbox/reset", self._reset, methods=["POST"]),
                faults_endpoint(self.active_faults),
            ],
            middleware=[Middleware(inject_faults, self.active_faults)],
            exception_handlers=dict.fromkeys(
                (Refusal, HTTPException, ClientDisconnect), _answer_error
            ),
            lifespan=self._lifespan,
        )
        own = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        self.service = Service(settings)
        self._references = References(own, settings.fetch_timeout)
        self._pictures = SharedCache[bytes](_PICTURE_CACHE_BYTES, len)
        # More threads than processors would only compete with the event loop.
        self._render_slots = asyncio.Semaphore(os.cpu_count() or 1)
        sender = CallbackSender(settings.callback_timeout, settings.callback_delay_scale)
        self._lifecycle = Lifecycle(self.service, self._references, sender, self.active_faults)

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        self._lifecycle.stop()

    async def _submit(self, request: Request) -> Response:
        key = self._api_key(request)
        _check_model(request)
        task = self.service.submit(key, await _read_json(request), _base_url(request))
        self.active_faults.accepted(task.task_id)
        self._lifecycle.start(task)
        return JSONResponse(success({"taskId": task.task_id}))

    async def _status(self, request: Request) -> Response:
        key = self._api_key(request)
        _check_model(request)
        task = self.service.status(key, request.query_params.get("taskId"))
        return JSONResponse(success(task.status(self.service.now(), self.service.epoch)))

    async def _balance(self, request: Request) -> Response:
        micro_dollars = self.service.balance(self._api_key(request))
        return JSONResponse(success(micro_dollars / 1_000_000))

    async def _result(self, request: Request) -> Response:
        task = self.service.result(request.path_params["task_id"], request.url.path)
        try:
            picture = await self._render(task)
        except BadReferenceError as error:
            raise Refusal(502, "reference lost", str(error)) from error
        return Response(picture, media_type=f"image/{task.input.output_format}")

    async def _render(self, task: Task) -> bytes:
        """Return the result image of a task, encoded; it is painted when first asked for."""
        prompt, ratio, kind = task.input.prompt, task.input.aspect_ratio, task.input.output_format
        style, content, subject = choose_style(prompt), None, prompt.encode()
        if task.input.image_urls:
            content, subject = await self._references.get(task.input.image_urls[0], task.base_url)

        async def render() -> bytes:
            arguments = content, prompt, style, ratio, kind, self.settings.long_edge
            async with self._render_slots:
                return await asyncio.to_thread(paint, *arguments)

        return await self._pictures.get((subject, style, ratio, kind), render)

    async def _reference(self, request: Request) -> Response:
        name = request.path_params["name"]
        content = await asyncio.to_thread(_read_file, self.settings.references, name)
        if content is None:
            raise HTTPException(404)
        suffix = PurePath(name).suffix.lower()
        return Response(content, media_type=_MEDIA_TYPES.get(suffix, "application/octet-stream"))

    async def _list_references(self, request: Request) -> Response:
        names = await asyncio.to_thread(_list_images, self.settings.references)
        base = f"{_base_url(request)}/references/"
        return JSONResponse([{"name": name, "url": base + quote(name)} for name in names])

    async def _bill(self, _request: Request) -> Response:
        return JSONResponse(self.service.bill())

    async def _tasks(self, _request: Request) -> Response:
        return StreamingResponse(self._record_lines(), media_type="application/x-ndjson")

    async def _record_lines(self) -> AsyncIterator[str]:
        records = self.service.records()
        while chunk := list(islice(records, _RECORDS_PER_CHUNK)):
            yield "".join(json.dumps(record) + "\n" for record in chunk)

    async def _reset(self, _request: Request) -> Response:
        self._lifecycle.stop()
        self._references.clear()
        self._pictures.clear()
        self.service.reset()
        return JSONResponse(self.service.bill())

    def _api_key(self, request: Request) -> str:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise Refusal(401, "unauthorized", "Authorization: Bearer <API key> is required")
        if self.settings.api_key not in (None, key):
            raise Refusal(401, "unauthorized", "this API key is unknown")
        return key


def _check_model(request: Request) -> None:
    model = request.path_params["model"]
    if model != MODEL:
        raise Refusal(404, "model not found", f"no model {model[:64]!r}")


def _read_file(folder: Path, name: str) -> bytes | None:
    """Read a file of the folder; None when it does not exist or is outside."""
    folder = folder.resolve()
    try:
        path = (folder / name).resolve()
        return path.read_bytes() if path.is_relative_to(folder) else None
    except (OSError, ValueError):
        return None


def _list_images(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in _MEDIA_TYPES and path.is_file()
    )


async def _read_json(request: Request) -> object:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refusal(400, "invalid parameters", "the body is not JSON") from None


def _base_url(request: Request) -> str:
    return f"{request.url.scheme}://{request.headers.get('host', '')}"


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = Refusal(error.status_code, error.detail.lower(), request.url.path[:200])
    if not isinstance(error, Refusal):
        # A client that disconnects during a request must not cause a traceback.
        return Response(status_code=400)
    delay = error.retry_after
    headers = {} if delay is None else {"Retry-After": str(delay)}
    return JSONResponse(failure(error), status_code=error.code, headers=headers)
