"""`flux-kontext watch`: the gallery of an output as a page that updates itself and takes verdicts.

The server listens on loopback. A request needs the token in its path and the name of this machine
in its Host header, so that other web pages can neither read the page nor post a verdict.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from prefect_flux_kontext.batch.watching import WatchedOutput
from prefect_flux_kontext.callbacks.receiver import serve
from prefect_flux_kontext.errors import FluxKontextError, LedgerError
from prefect_flux_kontext.ledger.head import check_format
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.report.gallery.page import render_page
from prefect_flux_kontext.report.gallery.thumbnails import GALLERY_FOLDER
from prefect_flux_kontext.report.thumbnails import RESULT_EDGE_PIXELS, make_thumbnail
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.styles.styles import builtin_styles

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from prefect_flux_kontext.storage.filesystem import OutputFolder

_OWN_HOSTS = ("127.0.0.1", "localhost")

_MIN_REFRESH_SECONDS = 2.0

# At most a fifth of the time goes to reading, however slow the store or large the output is.
_IDLE_SHARE = 4.0

_MAX_BODY_BYTES = 2**20

# About 10 MB.
_MAX_THUMBNAILS = 500

_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_IMAGE_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


def watch(options: argparse.Namespace) -> int:
    """Run `watch`."""
    asyncio.run(check_format(open_ledger_store(options.output)))
    token = secrets.token_urlsafe(24)

    def announce(url: str) -> None:
        print(f"{url}/{token}/", flush=True)

    serve(create_app(options.output, token), "127.0.0.1", options.port, announce)
    return 0


def create_app(output: OutputFolder, token: str) -> ASGIApp:
    """Create the app that serves the page of an output below `/TOKEN/`."""
    page = _Page(output)
    routes = [
        Route("/", page.show),
        Route("/changes", page.show_changes),
        Route("/verdicts", page.judge, methods=["POST"]),
        Route("/thumbnails/{name}", page.show_thumbnail),
        Route("/{file:path}", page.show_file),
    ]
    app = Starlette(routes=routes, exception_handlers={FluxKontextError: _report})
    return _guard(app, token)


async def _report(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 503)


class _Page:
    """The handlers of the page."""

    def __init__(self, output: OutputFolder) -> None:
        self._output = output
        self._watched = WatchedOutput(output, FluxKontextSettings().gallery_images)
        self._lock = asyncio.Lock()
        self._next_refresh = 0.0
        self._thumbnails: OrderedDict[str, bytes] = OrderedDict()

    async def show(self, _request: Request) -> Response:
        await self._refresh()
        await self._watched.load_verdicts()
        numbers = self._watched.numbers()
        styles = {line.get("style") for line in self._watched.rows} - {None}
        pieces = render_page(
            self._watched.gallery_rows(),
            self._output,
            statistics=numbers["statistics"],
            files=self._watched.thumbnails.files,
            embedded={},
            live={
                "version": self._watched.version,
                "progress": numbers["progress"],
                "styles": sorted(styles | set(builtin_styles())),
            },
        )
        return HTMLResponse(await asyncio.to_thread("".join, pieces))

    async def show_changes(self, request: Request) -> Response:
        await self._refresh()
        version = int(request.query_params.get("since", "0"))
        return JSONResponse(self._watched.changes(version))

    async def judge(self, request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_BODY_BYTES:
                return JSONResponse({"error": "The request is too large."}, 413)
        try:
            asked = json.loads(body)
            fields = {name: asked.get(name) or None for name in ("verdict", "prompt", "style")}
            await self._watched.judge(asked["names"], fields)
        except (ValueError, LookupError, TypeError, AttributeError, ValidationError):
            return JSONResponse({"error": "The verdict is invalid."}, 400)
        except LedgerError as error:
            return JSONResponse({"error": f"The verdict was not recorded: {error}"}, 403)
        return JSONResponse(self._watched.changes(int(asked.get("since", 0))))

    async def show_thumbnail(self, request: Request) -> Response:
        """Show the thumbnail of an image whose run has not written it yet."""
        name = request.path_params["name"]
        if name not in self._thumbnails:
            file = self._watched.find_file(name)
            image = await self._output.read(file) if file else None
            if image is None:
                return _refuse(404)
            try:
                made = await asyncio.to_thread(make_thumbnail, image, RESULT_EDGE_PIXELS)
            except Exception:  # noqa: BLE001 - decoders raise many types of errors
                return _refuse(404)
            self._thumbnails[name] = made
            if len(self._thumbnails) > _MAX_THUMBNAILS:
                self._thumbnails.popitem(last=False)
        return Response(self._thumbnails[name], media_type="image/webp")

    async def show_file(self, request: Request) -> Response:
        file = request.path_params["file"]
        media_type = _IMAGE_TYPES.get(file.rpartition(".")[2])
        if file.startswith(f"{GALLERY_FOLDER}/"):
            media_type = "text/javascript"
        data = None
        if media_type is not None and self._watched.has_file(file):
            data = await self._output.read(file)
        return _refuse(404) if data is None else Response(data, media_type=media_type)

    async def _refresh(self) -> None:
        """Read what is new, for all open pages at a time and not too often."""
        loop = asyncio.get_running_loop()
        async with self._lock:
            began = loop.time()
            if began >= self._next_refresh:
                await self._watched.refresh()
                taken = loop.time() - began
                self._next_refresh = loop.time() + max(_MIN_REFRESH_SECONDS, _IDLE_SHARE * taken)


def _refuse(status: int) -> Response:
    return PlainTextResponse("Not found." if status == 404 else "Refused.", status)  # noqa: PLR2004


def _guard(app: ASGIApp, token: str) -> ASGIApp:
    """Serve requests with the token that name this machine and come from the page itself."""

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        # A name that leads here is not ours (DNS rebinding). Browsers send the origin of a POST.
        origins = {f"http://{host}"} if scope["method"] == "POST" else {f"http://{host}", None}
        given, _, path = scope["path"].lstrip("/").partition("/")
        if host.partition(":")[0] not in _OWN_HOSTS or origin not in origins:
            await _refuse(403)(scope, receive, send_with_headers)
        elif not secrets.compare_digest(given.encode(), token.encode()):
            await _refuse(404)(scope, receive, send_with_headers)
        else:
            await app({**scope, "path": f"/{path}"}, receive, send_with_headers)

    return guarded
