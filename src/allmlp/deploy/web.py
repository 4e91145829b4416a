"""The HTTP side of `mixer serve`: page, endpoints (docs/serve.md), limits and access control.

The model computes one request at a time in a separate thread while a few others wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from allmlp.deploy.browser import page_file
from allmlp.deploy.inputs import Check, File
from allmlp.errors import UserError, plural

FIELD = "images"
_SEND = f"send image files as multipart/form-data in the field {FIELD!r}, or one as image/*"
_SECONDS_TO_SEND, _SECONDS_FOR_HEAD = 60, 10  # for a complete request and for its head
_PAGE = {"": "index.html", "start.js": "serve.js", "page.css": "page.css", "page.js": "page.js"}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page has the rest of its policy
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class _GivenUp(Exception):
    """The client has disconnected."""


class Connection(H11Protocol):
    """A connection that is closed if the head of its first or next request is not in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def on_response_complete(self) -> None:
        self._expect_head()
        super().on_response_complete()

    def _expect_head(self) -> None:
        before = self.cycle  # a complete head begins another

        def close() -> None:
            if self.cycle is before:
                self.timeout_keep_alive_handler()

        self.loop.call_later(_SECONDS_FOR_HEAD, close)


def make_app(service: Any, hosts: frozenset[str] | None, places: int = 8) -> ASGIApp:
    """Returns a `serve.Service`'s application for these hosts (None: any) and `places` requests."""
    thread, taken = ThreadPoolExecutor(1, thread_name_prefix="mixer-serve"), set[Request]()

    def check_places() -> None:
        if len(taken) >= places:
            message = f"{len(taken)} requests are waiting; try again later"
            raise HTTPException(503, message, {"Retry-After": "2"})

    def post(name: str, setting: str | None = None, most: int | None = None) -> Route:
        """An endpoint, named like the method of the service that answers it."""

        async def handle(request: Request) -> Response:
            number = _number(request, setting)
            check_places()  # a request still being sent takes none: slow clients block nobody
            images, is_form = await _read(request, service, most or service.max_images)
            check_places()
            given = (images,) if most is None else (images[0],)
            work = lambda check: getattr(service, name)(*given, check, *number)  # noqa: E731
            taken.add(request)
            try:
                found = await _compute(request, thread, work)
            finally:
                taken.remove(request)
            if not is_form and most is None and found[0]["error"] is not None:
                raise HTTPException(422, found[0]["error"])
            return _json(found)

        return Route(f"/{name}", handle, methods=["POST"])

    def get(name: str, answer: Callable[[], Response]) -> Route:
        async def handle(_: Request) -> Response:  # Starlette runs plain functions in threads
            return answer()

        return Route(f"/{name}", handle, methods=["GET"])

    def page(name: str) -> Callable[[], Response]:
        return partial(Response, page_file(name), media_type=_TYPES[Path(name).suffix])

    routes = [
        *(get(path, page(name)) for path, name in _PAGE.items()),
        get("health", lambda: _json({"status": "ok"})),
        get("model", lambda: _json(service.about())),
        post("predict", "top_k"),
        post("occlusion", most=1),
        post("units", "layer", most=1),
    ]
    handlers = dict.fromkeys((HTTPException, UserError, ClientDisconnect, Exception), _failed)
    return _guarded(Starlette(routes=routes, exception_handlers=handlers), hosts)


async def _failed(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return _json({"error": error.detail}, error.status_code, error.headers)
    if isinstance(error, UserError):
        return _json({"error": error.what}, 422)
    if isinstance(error, ClientDisconnect | _GivenUp):
        return _json({"error": "the client disconnected"}, 400)
    traceback.print_exception(error, file=sys.stderr)
    return _json({"error": "internal server error; details are in the server's output"}, 500)


def _json(values: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # ASCII, because class names need not be valid text.
    content = json.dumps(values, allow_nan=False).encode("ascii")
    return Response(content, status, headers, media_type="application/json")


def _guarded(app: ASGIApp, hosts: frozenset[str] | None) -> ASGIApp:
    """Rejects requests for another host or from another origin."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        reason = None
        if scope["type"] == "http":
            reason = _why_rejected(Headers(scope=scope), scope["method"], hosts)
        answer = app if reason is None else _json({"error": reason}, 403)
        with contextlib.suppress(Exception):  # answered and printed by `_failed`
            await answer(scope, receive, send_with_headers)

    return guarded


def _why_rejected(headers: Headers, method: str, hosts: frozenset[str] | None) -> str | None:
    """Returns why a request is rejected, or None. Ports may differ because of forwarding."""
    host, origin, name = headers.get("host", ""), headers.get("origin"), None
    with contextlib.suppress(ValueError):
        name = urlsplit(f"//{host}").hostname
    if hosts is not None and name not in hosts:
        return f"this server is not called {host[:100]!r}"
    own = (f"http://{host}".lower(), f"https://{host}".lower())
    if method not in ("GET", "HEAD") and origin is not None and origin.lower() not in own:
        return f"cross-origin request from {origin[:100]!r} rejected"
    return None


def _number(request: Request, known: str | None) -> list[int]:
    """Returns the value of the only query parameter allowed, a number from 1, if it is set."""
    for name, text in request.query_params.items():
        if name != known:
            raise HTTPException(400, f"unknown setting {name[:100]!r}")
        if not (text.isdecimal() and len(text) < 7 and int(text) >= 1):
            raise HTTPException(400, f"{name} must be a number from 1, got {text[:100]!r}")
        return [int(text)]
    return []


async def _compute(
    request: Request, thread: ThreadPoolExecutor, work: Callable[[Check], Any]
) -> Any:
    """Returns what `work` computes in the thread; it ends early if the client disconnects."""
    given_up = threading.Event()

    def check(_: int) -> None:
        if given_up.is_set():
            raise _GivenUp

    def run() -> Any:
        check(0)
        return work(check)

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    job = asyncio.get_running_loop().run_in_executor(thread, run)
    gone = asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            given_up.set()
        return await job
    finally:
        given_up.set()
        gone.cancel()


async def _read(request: Request, service: Any, most: int) -> tuple[list[File], bool]:
    """Reads a request's images within the limits; also returns whether they came in a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = kind == "multipart/form-data"
    if not (is_form or kind.startswith("image/") or kind == "application/octet-stream"):
        raise HTTPException(415, f"content of type {kind[:100]!r} is not supported: {_SEND}")
    largest, seen = service.request_bytes if is_form else service.image_bytes, 0

    async def receive() -> Message:
        nonlocal seen
        message = await request.receive()
        seen += len(message.get("body", b""))
        if seen > largest:
            raise HTTPException(413, f"the request has more than {largest:,} bytes, the limit")
        return message

    reader, images = Request(request.scope, receive), list[File]()
    try:
        async with asyncio.timeout(_SECONDS_TO_SEND):
            if not is_form:
                images = [("image", await reader.body())]
            else:
                async with reader.form(max_files=max(1000, most + 1)) as form:
                    for field, file in form.multi_items():
                        if field != FIELD or isinstance(file, str):
                            raise HTTPException(400, f"the field {field[:100]!r}: {_SEND}")
                        images.append((file.filename or "image", await file.read()))
    except TimeoutError:
        message = f"the request did not arrive within {_SECONDS_TO_SEND} seconds"
        raise HTTPException(408, message) from None
    if not images or (not is_form and not images[0][1]):
        raise HTTPException(400, f"no image in the request: {_SEND}")
    if len(images) > most:
        raise HTTPException(413, f"more than {plural(most, 'image')} in one request, the limit")
    for name, data in images:
        if len(data) > service.image_bytes:
            limit = f"has more than {service.image_bytes:,} bytes, the limit"
            raise HTTPException(413, f"the image {name[:100]!r} {limit}")
    return images, is_form
