"""`mixer serve`: a local web page and an HTTP endpoint for one model.

There is no password, so it listens on localhost unless another address is given. The web framework
is an optional dependency, imported lazily.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allmlp.console import Reporter, report_notes
from allmlp.deploy.formats import load_any
from allmlp.deploy.options import ServeOptions
from allmlp.deploy.service import Service
from allmlp.errors import UserError, plural
from allmlp.models.layers import Classifier
from allmlp.names import import_extra
from allmlp.options import make

_SECONDS_TO_END = 2  # grace period for requests after Ctrl-C
_CONNECTIONS = 256  # beyond this, clients get a 503


def serve(
    model: Classifier | str | Path,
    options: ServeOptions | None = None,
    *,
    on_ready: Callable[[str, Service], None] = lambda url, service: None,
    **fields: Any,
) -> None:
    """Serves a model until Ctrl-C, which raises KeyboardInterrupt.

    On localhost, requests with another Host header are rejected, to prevent DNS rebinding.

    Args:
        model: a model or anything `load_model` or `open_exported` accepts.
        options: all options as one object.
        on_ready: called with the URL once the server accepts requests.
        **fields: fields of `ServeOptions`.

    Raises:
        UserError: the port is in use, no such model, or packages are not installed.
    """
    options = make(ServeOptions, options, fields)
    for package in ("starlette", "uvicorn", "python_multipart"):
        import_extra(package, "serve")
    import uvicorn

    from allmlp.deploy.web import Connection, make_app

    host = options.host
    with _listening(host, options.port) as listening:  # before the slow loading of weights
        net = load_any(model, options.image_size, options.resize_weights, **options.foreign)
        service = Service(net, str(net.source if net is model else model), options)
        address, port = listening.getsockname()[:2]
        service.is_local = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        own = frozenset(("127.0.0.1", "localhost", "::1", host.lower()))
        logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # malformed forms
        config = uvicorn.Config(
            make_app(service, own if service.is_local else None),
            loop="asyncio",
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # the application reports errors itself
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=_SECONDS_TO_END,
        )
        server = uvicorn.Server(config)
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}", service)
        server.run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """Returns a listening socket; clients queue until the server is ready."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        what = f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}"
        fix = "Another port, or 0 for any that is free; the host 127.0.0.1 is this machine alone"
        raise UserError(what, where="port", fix=fix, code="taken") from error


def command(model: str, options: ServeOptions) -> None:
    """Serves a model; prints the URL and, on standard error, warnings."""

    def say(url: str, service: Service) -> None:
        if not service.model.class_names:
            report_notes(["the model has no class names: classes are called by their number"])
        if not service.is_local:
            why = "is more than this machine, and there is no password"
            warning = f"warning: {options.host} {why}: whoever reaches this port can use it"
            print(warning, file=sys.stderr, flush=True)
        what = f"({service.name}, {plural(service.num_classes, 'class')})"
        Reporter().say(f"serving  {url}  {what}; Ctrl-C ends it")

    serve(model, options, on_ready=say)
