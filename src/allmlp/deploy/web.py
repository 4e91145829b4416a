"""The HTTP side of `mixer serve`: the page, the endpoint, its limits and who is let in.

    GET  /           the page, with /page.css and /page.js; nothing comes from elsewhere
    GET  /health     {"status": "ok"}
    GET  /model      what is served, and the limits
    POST /predict    images -> a list of {"name", "classes", "error"}
    POST /occlusion  one image -> what its class hangs on
    POST /units      one image -> what its token-mixing units read and write

A success is what is named here; everything else is {"error": "..."} with its status. The model
computes one request at a time in a thread of its own, and the others wait, a few of them. A request
whose client has gone is given up.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping
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

from allmlp.deploy.service import Check, Service
from allmlp.deploy.uploads import Refused, Room, read_images
from allmlp.errors import UserError

PLACES = 8  # requests that have arrived, and wait or are computed
_SENT_AT_ONCE = 4  # times the largest request, by all clients together
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
    """Nobody waits for the answer."""


def make_app(service: Service, hosts: frozenset[str] | None, places: int = PLACES) -> ASGIApp:
    """Returns the application.

    Args:
        service: what is asked.
        hosts: names that requests may address it by, in lower case; None allows all.
        places: requests that have arrived, and wait or are computed at the same time.
    """
    desk = _Desk(service, places)

    def health(_: Request) -> dict[str, Any]:
        return {"status": "ok"}

    def model(_: Request) -> dict[str, Any]:
        return service.about()

    async def predict(request: Request) -> Any:
        top_k = _numbers(request, "top_k").get("top_k")
        return await desk.answer(
            request, lambda given, check: service.predict(given, check, top_k), many=True
        )

    async def occlusion(request: Request) -> Any:
        _numbers(request)
        return await desk.answer(request, lambda given, check: service.occlusion(given[0], check))

    async def units(request: Request) -> Any:
        layer = _numbers(request, "layer").get("layer")
        return await desk.answer(
            request, lambda given, check: service.units(given[0], check, layer)
        )

    gets = {"/health": health, "/model": model}
    posts = {"/predict": predict, "/occlusion": occlusion, "/units": units}
    routes = [Route(path, _page(path), methods=["GET"]) for path in _PAGE]
    routes += [Route(path, _endpoint(function), methods=["GET"]) for path, function in gets.items()]
    routes += [
        Route(path, _endpoint(function), methods=["POST"]) for path, function in posts.items()
    ]
    return _guarded(Starlette(routes=routes, exception_handlers={HTTPException: _told}), hosts)


def _page(path: str) -> Callable[[Request], Awaitable[Response]]:
    name, media_type = _PAGE[path]
    content = files("allmlp").joinpath("deploy", "page", name).read_bytes()

    async def page(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return page


def _endpoint(function: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
    """Returns a handler that gives JSON whatever happens, and a traceback to nobody outside."""

    async def handle(request: Request) -> Response:
        try:
            answer = function(request)
            return _json(await answer if isinstance(answer, Awaitable) else answer)
        except Refused as error:
            return _error(error.status, error.message, error.headers)
        except UserError as error:
            return _error(422, error.what)
        except (ClientDisconnect, _GivenUp):
            return _error(400, "the client has gone")
        except Exception:
            traceback.print_exc(file=sys.stderr)  # where the server runs, and nowhere else
            return _error(500, "a fault of the server; more is said where it runs")

    return handle


async def _told(request: Request, error: Exception) -> Response:
    """What the framework refuses: an address that is not there, another method."""
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return _error(error.status_code, message, error.headers)


def _json(values: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # ASCII, for class names need not be valid text.
    content = json.dumps(values, allow_nan=False).encode("ascii")
    return Response(content, status, headers, media_type="application/json")


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return _json({"error": message}, status, headers)


def _guarded(app: ASGIApp, hosts: frozenset[str] | None) -> ASGIApp:
    """Returns the application for those who address it by its own name, and from its own page."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        refused = _why_not(Headers(scope=scope), scope["method"], hosts)
        if refused is not None:
            await _error(403, refused)(scope, receive, send_with_headers)
        else:
            await app(scope, receive, send_with_headers)

    return guarded


def _why_not(headers: Headers, method: str, hosts: frozenset[str] | None) -> str | None:
    """Returns why a request is refused, or None. Ports may differ: they may be forwarded."""
    host = headers.get("host", "")
    if hosts is not None and _host_name(f"//{host}") not in hosts:
        return f"this server is not called {host[:100]!r}"
    origin = headers.get("origin")
    if method not in ("GET", "HEAD") and origin is not None:
        scheme, _, place = origin.partition("://")
        if scheme not in ("http", "https") or place.lower() != host.lower():
            return f"requests from pages of {origin[:100]!r} are not taken"
    return None


def _host_name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _numbers(request: Request, *known: str) -> dict[str, int]:
    """Returns the settings of the address; what is no number from 1, or unknown, is refused."""
    found: dict[str, int] = {}
    for name, text in request.query_params.multi_items():
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise Refused(400, f"unknown setting {name[:100]!r}: {takes}")
        if not (text.isdecimal() and len(text) < 7 and int(text) >= 1):
            raise Refused(400, f"{name} must be a number from 1, got {text[:100]!r}")
        found[name] = int(text)
    return found


class _Desk:
    """Where requests with images are read, wait and are computed.

    Args:
        service: asked by one thread.
        places: requests that have arrived; those beyond are told to come again. One that is still
            being sent takes none, so that slow clients do not keep out the others.
    """

    def __init__(self, service: Service, places: int) -> None:
        self.service, self.places, self.taken = service, places, 0
        self.room = Room(_SENT_AT_ONCE * service.limits.request_bytes)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="mixer-serve")

    async def answer(
        self,
        request: Request,
        work: Callable[[list[tuple[str, bytes]], Check], Any],
        *,
        many: bool = False,
    ) -> Any:
        """Returns what the work makes of the images of a request.

        Args:
            request: whose body is read here.
            work: called in the thread with the images and a function that raises when nobody waits
                for them any more.
            many: more images than one are taken.

        Raises:
            Refused: the request is not as it should be, or too many others are waiting.
        """
        self._refuse_if_full()
        images, is_single = await read_images(request, self.service.limits, self.room, many=many)
        self._refuse_if_full()
        self.taken += 1
        try:
            found = await self._compute(request, lambda check: work(images, check))
        finally:
            self.taken -= 1
        if is_single and many and found[0]["error"] is not None:
            raise Refused(422, found[0]["error"])
        return found

    def _refuse_if_full(self) -> None:
        if self.taken >= self.places:
            message = f"{self.taken} requests are waiting; try again later"
            raise Refused(503, message, {"Retry-After": "2"})

    async def _compute(self, request: Request, work: Callable[[Check], Any]) -> Any:
        given_up = threading.Event()

        def check(_: int) -> None:
            if given_up.is_set():
                raise _GivenUp

        def run() -> Any:
            check(0)
            return work(check)

        job = asyncio.get_running_loop().run_in_executor(self.thread, run)
        gone = asyncio.ensure_future(_until_gone(request.receive))
        try:
            await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                given_up.set()
            return await job
        finally:
            given_up.set()
            gone.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _half_of_the_descriptors() -> int:
    """How many files and connections the process may have open by the system, halved."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 256 if soft == resource.RLIM_INFINITY else soft // 2


class Connection(H11Protocol):
    """A client: one of so many, which has so long for the head of a request and for the answer.

    Attributes:
        most: connections at the same time; those beyond are told so and closed.
        seconds_for_head: from when the client may send a request, or has its answer.
        seconds_for_answer: to take it, after it has been given.
    """

    most = min(256, _half_of_the_descriptors())
    seconds_for_head, seconds_for_answer = 10.0, 60.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse("503 Service Unavailable", "too many connections; try again later")
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
            late = functools.partial(self._refuse, "408 Request Timeout", message)
            self._timer = self.loop.call_later(self.seconds_for_head, late)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: str, message: str) -> None:
        if not self.transport.is_closing():
            body = json.dumps({"error": message}).encode()
            head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.close()
