"""A local page and an HTTP endpoint for one model: `mixer serve`.

Who can reach it can use it, for there is no password: it is bound to this machine alone unless
another address is named. The framework is an extra and is imported when something is served.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from allmlp.deploy.extras import needed
from allmlp.deploy.service import Service
from allmlp.errors import UserError

if TYPE_CHECKING:
    import uvicorn

PACKAGES = ("starlette", "uvicorn", "python_multipart")
_SECONDS_TO_END = 2  # that a request in progress has after Ctrl-C
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_packages() -> None:
    """Finds out whether the extra is installed.

    Raises:
        UserError: it is not; says what to type.
    """
    for name in PACKAGES:
        needed(name)


def open_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that listens: clients wait from now on until they are answered.

    Args:
        host: a name or an address of this machine.
        port: 0 to 65535; 0 lets the system choose.

    Raises:
        UserError: the port is taken or may not be used, or the host is none of this machine.
    """
    if not 0 <= port <= 65535:
        fix = "1024 to 65535, or 0 for any that is free"
        raise UserError(f"no such port: {port}", where="--port", fix=fix)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        what = f"unknown host {host!r}"
        raise UserError(what, where="--host", fix="127.0.0.1 is this machine alone") from error
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise _why_not(error, host, port) from error
    return listening


def _why_not(error: OSError, host: str, port: int) -> UserError:
    if error.errno == errno.EADDRINUSE:
        fix = f"--port {port + 1 if port < 65535 else 8000}, or --port 0 for any that is free"
        return UserError(f"port {port} is taken by another program", where="--port", fix=fix)
    if error.errno == errno.EACCES:
        what = f"port {port} may not be used: those below 1024 are the system's"
        return UserError(what, where="--port", fix="--port 8000")
    if error.errno == errno.EADDRNOTAVAIL:
        what = f"{host} is no address of this machine"
        return UserError(what, where="--host", fix="127.0.0.1 is this machine alone")
    return UserError(f"cannot listen on {host}, port {port}: {error.strerror}", where="--host")


def is_local(listening: socket.socket) -> bool:
    """Returns whether only this machine can reach a socket."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def address_of(listening: socket.socket, host: str) -> str:
    """Returns the address to type into a browser: "http://127.0.0.1:8000"."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"


def serve(
    service: Service,
    listening: socket.socket,
    host: str,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Answers requests until Ctrl-C.

    On a socket of this machine alone, requests that name another host are refused: a page on the
    internet whose name was made to lead here could otherwise read the answers.

    Args:
        service: what is asked.
        listening: by `open_socket`; it is closed in the end.
        host: as `open_socket` was given.
        on_ready: called with the address once requests are answered.

    Raises:
        UserError: the extra is not installed.
        KeyboardInterrupt: it was ended with Ctrl-C.
    """
    server = make_server(service, is_local(listening), host)
    with listening:
        if on_ready is not None:
            on_ready(address_of(listening, host))
        server.run(sockets=[listening])


def make_server(service: Service, local: bool, host: str) -> uvicorn.Server:
    """Returns what answers, see `serve`; `local` where only this machine can reach it."""
    check_packages()
    import uvicorn

    from allmlp.deploy.web import Connection, make_app

    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # of forms that are none
    hosts = frozenset((*_LOOPBACK, host.lower())) if local else None
    config = uvicorn.Config(
        make_app(service, hosts),
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # what goes wrong in a request is said by the application
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=max(
            1, Connection.most // 8
        ),  # asyncio accepts so many before it looks at the first
        timeout_graceful_shutdown=_SECONDS_TO_END,
    )
    return uvicorn.Server(config)
