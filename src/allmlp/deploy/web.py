"""The HTTP side of `mixer serve`: page, endpoints, limits and access control.

    GET  /           the page, with /page.css and /page.js; no external resources
    GET  /health     {"status": "ok"}
    GET  /model      the model and the limits
    POST /predict    images -> a list of {"name", "classes", "error"}
    POST /occlusion  one image -> which regions its class depends on
    POST /units      one image -> what its token-mixing units read and write

Errors are {"error": "..."} with a status code. The model computes one request at a time in a
separate thread while a few others wait. Requests of disconnected clients are dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from allmlp.data.image import EncodedImage
from allmlp.deploy.service import Check, File, Service, megabytes
from allmlp.errors import UserError, plural

PLACES = 8  # requests received that wait or are computed
FIELD = "images"
_SEND = f"send image files as multipart/form-data in the field {FIELD!r}, or one as image/*"
_SECONDS_TO_SEND = 60  # for a complete request
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class _GivenUp(Exception):
    """The client has disconnected."""


def make_app(service: Service, hosts: frozenset[str] | None, places: int = PLACES) -> ASGIApp:
    """Returns the application, which accepts requests for one of the hosts (None: any)."""
    desk = _Desk(service, places)

    async def predict(request: Request) -> Response:
        top_k = _number(request, "top_k")
        return await desk.answer(
            request, lambda images, check: service.predict(images, check, top_k)
        )

    async def occlusion(request: Request) -> Response:
        _number(request, None)
        work = lambda images, check: service.occlusion(images[0], check)  # noqa: E731
        return await desk.answer(request, work, most=1)

    async def units(request: Request) -> Response:
        layer = _number(request, "layer")
        work = lambda images, check: service.units(images[0], check, layer)  # noqa: E731
        return await desk.answer(request, work, most=1)

    def get(path: str, answer: Callable[[], Response]) -> Route:
        async def handle(_: Request) -> Response:  # Starlette runs plain functions in threads
            return answer()

        return Route(path, handle, methods=["GET"])

    def page(name: str, media_type: str) -> Callable[[], Response]:
        content = files("allmlp").joinpath("deploy", "page", name).read_bytes()
        return lambda: Response(content, media_type=media_type)

    routes = [get(path, page(*entry)) for path, entry in _PAGE.items()]
    routes.append(get("/health", lambda: _json({"status": "ok"})))
    routes.append(get("/model", lambda: _json(service.about())))
    posts = {"/predict": predict, "/occlusion": occlusion, "/units": units}
    routes += [Route(path, post, methods=["POST"]) for path, post in posts.items()]
    handlers = dict.fromkeys((HTTPException, UserError, ClientDisconnect, Exception), _failed)
    return _guarded(Starlette(routes=routes, exception_handlers=handlers), hosts)


async def _failed(request: Request, error: Exception) -> Response:
    """Returns any error as JSON, without a traceback."""
    if isinstance(error, HTTPException):
        messages = {
            404: f"there is no {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
        }
        message = messages.get(error.status_code, error.detail)
        return _json({"error": message}, error.status_code, error.headers)
    if isinstance(error, UserError):
        return _json({"error": error.what}, 422)
    if isinstance(error, ClientDisconnect | _GivenUp):
        return _json({"error": "the client has gone"}, 400)
    traceback.print_exception(error, file=sys.stderr)
    return _json({"error": "a fault of the server, which prints more where it runs"}, 500)


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

        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        reason = _why_rejected(Headers(scope=scope), scope["method"], hosts)
        if reason is not None:
            await _json({"error": reason}, 403)(scope, receive, send_with_headers)
            return
        with contextlib.suppress(Exception):  # answered and printed by `_failed`
            await app(scope, receive, send_with_headers)

    return guarded


def _why_rejected(headers: Headers, method: str, hosts: frozenset[str] | None) -> str | None:
    """Returns why a request is rejected, or None. Ports may differ because of forwarding."""
    host = headers.get("host", "")
    name = None
    with contextlib.suppress(ValueError):
        name = urlsplit(f"//{host}").hostname
    if hosts is not None and name not in hosts:
        return f"this server is not called {host[:100]!r}"
    origin = headers.get("origin")
    if method not in ("GET", "HEAD") and origin is not None:
        scheme, _, place = origin.partition("://")
        if scheme not in ("http", "https") or place.lower() != host.lower():
            return f"requests from pages of {origin[:100]!r} are not taken"
    return None


def _number(request: Request, known: str | None) -> int | None:
    """Returns the only query parameter allowed, a number from 1."""
    for name, text in request.query_params.items():
        if name != known:
            takes = f"it takes {known}" if known else "it takes none"
            raise HTTPException(400, f"unknown setting {name[:100]!r}: {takes}")
        if not (text.isdecimal() and len(text) < 7 and int(text) >= 1):
            raise HTTPException(400, f"{name} must be a number from 1, got {text[:100]!r}")
        return int(text)
    return None


class _Desk:
    """Reads, queues and computes requests with images.

    A request still being sent takes no place in the queue, so slow clients do not block others.
    """

    def __init__(self, service: Service, places: int) -> None:
        self.service, self.places, self.taken = service, places, 0
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="mixer-serve")

    async def answer(
        self, request: Request, work: Callable[[list[File], Check], Any], most: int | None = None
    ) -> Response:
        """Returns the result of `work` for a request's images, of which there may be `most`."""
        self._check_places()
        images, is_form = await self._read(request, most or self.service.max_images)
        self._check_places()
        self.taken += 1
        try:
            found = await self._compute(request, lambda check: work(images, check))
        finally:
            self.taken -= 1
        if not is_form and most is None and found[0]["error"] is not None:
            raise HTTPException(422, found[0]["error"])
        return _json(found)

    def _check_places(self) -> None:
        if self.taken >= self.places:
            message = f"{self.taken} requests are waiting; try again later"
            raise HTTPException(503, message, {"Retry-After": "2"})

    async def _compute(self, request: Request, work: Callable[[Check], Any]) -> Any:
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

        job = asyncio.get_running_loop().run_in_executor(self.thread, run)
        gone = asyncio.ensure_future(until_gone())
        try:
            await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                given_up.set()
            return await job
        finally:
            given_up.set()
            gone.cancel()

    async def _read(self, request: Request, most: int) -> tuple[list[File], bool]:
        """Reads a request's images within the limits; also returns whether they came in a form."""
        service = self.service
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_form = kind == "multipart/form-data"
        if not (is_form or kind.startswith("image/") or kind == "application/octet-stream"):
            shown = f"content of type {kind[:100]!r}" if kind else "content without a type"
            raise HTTPException(415, f"{shown} is not taken: {_SEND}")
        largest, seen = service.request_bytes if is_form else service.image_bytes, 0

        async def receive() -> Message:
            nonlocal seen
            message = await request.receive()
            seen += len(message.get("body", b""))
            if seen > largest:
                what = "request" if is_form else "image"
                raise HTTPException(
                    413, f"the {what} has more than {megabytes(largest)}, the limit"
                )
            return message

        reader = Request(request.scope, receive)
        try:
            async with asyncio.timeout(_SECONDS_TO_SEND):
                images = await _files_of(reader) if is_form else [("image", await reader.body())]
        except TimeoutError:
            message = f"the request did not arrive within {_SECONDS_TO_SEND} seconds"
            raise HTTPException(408, message) from None
        if not images or (not is_form and not images[0][1]):
            raise HTTPException(400, f"no image in the request: {_SEND}")
        if len(images) > most:
            raise HTTPException(
                413, f"more than {plural(most, 'image')} in one request, the limit here"
            )
        pixels = await asyncio.to_thread(_count_pixels, images)
        if pixels > service.pixels:
            found, allowed = (f"{number / 1e6:,.1f}" for number in (pixels, service.pixels))
            message = f"the images of a request may have {allowed} megapixels together, got {found}"
            raise HTTPException(413, message)
        return images, is_form


async def _files_of(request: Request) -> list[File]:
    images = []
    async with request.form() as form:
        for field, file in form.multi_items():
            if field != FIELD or isinstance(file, str):
                what = f"the field {field[:100]!r}: image files go into the field {FIELD!r}"
                raise HTTPException(400, what)
            images.append((file.filename or "image", await file.read()))
    return images


def _count_pixels(images: Sequence[File]) -> int:
    """Returns the images' total number of pixels, from their headers."""
    total = 0
    for name, data in images:
        with contextlib.suppress(UserError):  # reported when decoded
            height, width = EncodedImage(data, name).size
            total += height * width
    return total


class Connection(H11Protocol):
    """A connection that is closed if the client does not send the request head in time."""

    seconds_for_head = 10.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        is_answered = self.cycle is not None and self.cycle.response_complete
        if self.conn.their_state is not h11.IDLE and not is_answered:
            self._unwatch()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.seconds_for_head, self._close)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        text = f"no request arrived within {self.seconds_for_head:g} seconds"
        body = json.dumps({"error": text}).encode()
        head = "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
        head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()
