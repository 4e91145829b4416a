"""The HTTP side of `mixer serve`: the page, the endpoint, its limits and who may use it.

    GET  /           the page, with /page.css and /page.js; nothing comes from elsewhere
    GET  /health     {"status": "ok"}
    GET  /model      what is served, and the limits
    POST /predict    images -> a list of {"name", "classes", "error"}
    POST /occlusion  one image -> which regions its class depends on
    POST /units      one image -> what its token-mixing units read and write

A success is what is named here; everything else is {"error": "..."} with its status. The model
computes one request at a time in a thread of its own, and a few others wait. A request whose client
has gone is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from allmlp.data.image import EncodedImage
from allmlp.deploy.service import Check, File, Service, megabytes
from allmlp.errors import UserError, plural

PLACES = 8  # requests that have arrived, and wait or are computed
FIELD = "images"
_SEND = f"send image files as multipart/form-data in the field {FIELD!r}, or one as image/*"
_SECONDS_TO_SEND = 60  # for the whole of a request
_SENT_AT_ONCE = 4  # times the largest request, by all clients together
_DRAINED, _SECONDS_TO_DRAIN = 400_000_000, 10  # of the body of a rejected request
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
_LATER = {"Retry-After": "2"}


class _GivenUp(Exception):
    """The client has gone."""


def make_app(service: Service, hosts: frozenset[str] | None, places: int = PLACES) -> ASGIApp:
    """Returns the application, for requests that address it by one of the hosts (None: any)."""
    desk = _Desk(service, places)

    async def predict(request: Request) -> Response:
        top_k = _numbers(request, "top_k").get("top_k")
        return await desk.answer(request, lambda given, check: service.predict(given, check, top_k))

    async def occlusion(request: Request) -> Response:
        _numbers(request)
        return await desk.answer(
            request, lambda given, check: service.occlusion(given[0], check), most=1
        )

    async def units(request: Request) -> Response:
        layer = _numbers(request, "layer").get("layer")
        return await desk.answer(
            request, lambda given, check: service.units(given[0], check, layer), most=1
        )

    def page(name: str, media_type: str) -> Callable[[Request], Response]:
        content = files("allmlp").joinpath("deploy", "page", name).read_bytes()
        return lambda _: Response(content, media_type=media_type)

    gets = {path: page(*entry) for path, entry in _PAGE.items()}
    gets["/health"] = lambda _: _json({"status": "ok"})
    gets["/model"] = lambda _: _json(service.about())
    routes = [Route(path, _inline(get), methods=["GET"]) for path, get in gets.items()]
    posts = {"/predict": predict, "/occlusion": occlusion, "/units": units}
    routes += [Route(path, post, methods=["POST"]) for path, post in posts.items()]
    handlers = dict.fromkeys((HTTPException, UserError, ClientDisconnect, Exception), _failed)
    return _guarded(Starlette(routes=routes, exception_handlers=handlers), hosts)


def _inline(get: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Starlette calls plain functions in threads; these need none."""

    async def handle(request: Request) -> Response:
        return get(request)

    return handle


async def _failed(request: Request, error: Exception) -> Response:
    """Returns JSON whatever went wrong, and a traceback to nobody outside."""
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
    # ASCII, for class names need not be valid text.
    content = json.dumps(values, allow_nan=False).encode("ascii")
    return Response(content, status, headers, media_type="application/json")


def _guarded(app: ASGIApp, hosts: frozenset[str] | None) -> ASGIApp:
    """Returns the application for those who address it by its own name, and from its own page."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
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
    """Returns why a request is rejected, or None. Ports may differ: they may be forwarded."""
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


def _numbers(request: Request, *known: str) -> dict[str, int]:
    """Returns the settings in the address, which are numbers from 1."""
    found: dict[str, int] = {}
    for name, text in request.query_params.multi_items():
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise HTTPException(400, f"unknown setting {name[:100]!r}: {takes}")
        if not (text.isdecimal() and len(text) < 7 and int(text) >= 1):
            raise HTTPException(400, f"{name} must be a number from 1, got {text[:100]!r}")
        found[name] = int(text)
    return found


class _Desk:
    """Where requests with images are read, wait and are computed.

    One that is still being sent takes no place, so that slow clients do not keep out the others;
    the memory for what all are sending has a limit of its own.
    """

    def __init__(self, service: Service, places: int) -> None:
        self.service, self.places, self.taken = service, places, 0
        self.room = _SENT_AT_ONCE * service.limits.request_bytes  # bytes
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="mixer-serve")

    async def answer(
        self, request: Request, work: Callable[[list[File], Check], Any], most: int | None = None
    ) -> Response:
        """Returns what the work gives for the images of a request, of which it takes `most`."""
        self._check_places()
        images, is_form = await _read_images(request, self, most)
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
            raise HTTPException(503, message, _LATER)

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


class _Body:
    """The body of a request, up to a limit, in the room that all share."""

    def __init__(self, receive: Receive, most: int, message: str, desk: _Desk) -> None:
        self._receive, self._desk = receive, desk
        self._most, self._message = most, message
        self.seen, self._held, self.is_whole = 0, 0, False

    async def receive(self) -> Message:
        message = await self._receive()
        size = len(message.get("body", b""))
        self.seen += size
        self.is_whole = not message.get("more_body", False)
        if self.seen > self._most:
            raise HTTPException(413, self._message)
        if size > self._desk.room:
            message = "too much is being sent at the same time; try again later"
            raise HTTPException(503, message, _LATER)
        self._desk.room -= size
        self._held += size
        return message

    def release(self) -> None:
        """Gives back the room: the body is handed on or dropped."""
        self._desk.room += self._held
        self._held = 0

    async def drain(self) -> None:
        """Reads on, so that a client that only listens when it has sent all gets its answer."""
        end = self.seen + _DRAINED
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SECONDS_TO_DRAIN):
                while not self.is_whole and self.seen < end:
                    message = await self._receive()
                    self.seen += len(message.get("body", b""))
                    self.is_whole = not message.get("more_body", False)


async def _read_images(request: Request, desk: _Desk, most: int | None) -> tuple[list[File], bool]:
    """Returns the images of a request within the limits, and whether they came in a form."""
    limits = desk.service.limits
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = kind == "multipart/form-data"
    largest = limits.request_bytes if is_form else limits.image_bytes
    what = "request" if is_form else "image"
    too_large = f"the {what} has more than {megabytes(largest)}, the limit"
    body = _Body(request.receive, largest, too_large, desk)
    length = request.headers.get("content-length", "")
    try:
        if not (is_form or kind.startswith("image/") or kind == "application/octet-stream"):
            shown = f"content of type {kind[:100]!r}" if kind else "content without a type"
            raise HTTPException(415, f"{shown} is not taken: {_SEND}")
        if length.isdecimal() and int(length) > largest:
            raise HTTPException(413, too_large)
        async with asyncio.timeout(_SECONDS_TO_SEND):
            reader = Request(request.scope, body.receive)
            if is_form:
                images = await _read_form(reader, most or limits.images)
            else:
                images = [("image", await reader.body())]
    except TimeoutError:
        message = f"the request did not arrive within {_SECONDS_TO_SEND} seconds"
        raise HTTPException(408, message) from None
    except HTTPException:
        body.release()
        if "expect" not in request.headers:  # curl waits for an answer before it sends
            await body.drain()
        raise
    finally:
        body.release()
    if not images or (not is_form and not images[0][1]):
        raise HTTPException(400, f"no image in the request: {_SEND}")
    pixels = await asyncio.to_thread(_count_pixels, images)
    if pixels > limits.pixels:
        found, allowed = (f"{number / 1e6:,.1f}" for number in (pixels, limits.pixels))
        message = f"the images of a request may have {allowed} megapixels together, got {found}"
        raise HTTPException(413, message)
    return images, is_form


def _count_pixels(images: Sequence[File]) -> int:
    """Returns how many pixels the images have by their headers; none is decoded."""
    total = 0
    for name, data in images:
        with contextlib.suppress(UserError):  # reported when its turn comes
            height, width = EncodedImage(data, name).size
            total += height * width
    return total


class _InMemory(MultiPartParser):
    """Keeps large files in memory too: files on disk take descriptors, which connections need."""

    spool_max_size = sys.maxsize


async def _read_form(request: Request, most: int) -> list[File]:
    try:
        async with contextlib.aclosing(request.stream()) as stream:
            parser = _InMemory(request.headers, stream, max_files=most, max_fields=0)
            form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            message = f"more than {plural(most, 'image')} in one request, the limit here"
            raise HTTPException(413, message) from error
        message = f"the form cannot be read: {error.message}"
        if error.message.startswith("Too many fields"):
            message = f"a field without a file: image files go into the field {FIELD!r}"
        raise HTTPException(400, message) from error
    images = []
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(form.close)
        for field, file in form.multi_items():
            if field != FIELD:
                message = f"unknown field {field[:100]!r}: image files go into the field {FIELD!r}"
                raise HTTPException(400, message)
            assert isinstance(file, UploadFile)
            images.append((file.filename or "image", await file.read()))
    return images


def _half_of_the_descriptors() -> int:
    """Half of how many files and connections the system lets the process open."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 256 if soft == resource.RLIM_INFINITY else soft // 2


class Connection(H11Protocol):
    """A client, with a time limit for the head of a request and for taking the answer."""

    most = min(256, _half_of_the_descriptors())  # those beyond get a 503 and are closed
    seconds_for_head, seconds_for_answer = 10.0, 60.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._reject("503 Service Unavailable", "too many connections; try again later")
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()  # closes when all is sent, which may be never
        self.loop.call_later(self.seconds_for_answer, self.transport.abort)

    def _watch(self) -> None:
        is_answered = self.cycle is not None and self.cycle.response_complete
        if self.conn.their_state is not h11.IDLE and not is_answered:
            self._unwatch()
        elif self._timer is None:
            message = f"no request arrived within {self.seconds_for_head:g} seconds"
            late = functools.partial(self._reject, "408 Request Timeout", message)
            self._timer = self.loop.call_later(self.seconds_for_head, late)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _reject(self, status: str, message: str) -> None:
        if not self.transport.is_closing():
            body = json.dumps({"error": message}).encode()
            head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.close()
