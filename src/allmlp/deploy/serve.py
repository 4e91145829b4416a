"""A local page and an HTTP endpoint for one model: `mixer serve`.

Whoever can reach it can use it, for there is no password: it listens on this machine alone unless
another address is given. The web framework is an optional dependency, imported when served.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allmlp.console import Reporter, report_notes
from allmlp.deploy.extras import import_extra
from allmlp.deploy.formats import load_any
from allmlp.deploy.service import Limits, Service
from allmlp.errors import UserError, at_least, between, needs, plural
from allmlp.models.layers import ImageClassifier
from allmlp.models.resize import ResizeWeights
from allmlp.options import ImageSize, Options, Precision, make

if TYPE_CHECKING:
    import uvicorn

_SECONDS_TO_END = 2  # for a request in progress after Ctrl-C
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """Show a model on a local web page, and answer programs over HTTP.

    The page takes images and shows their classes, which regions the prediction depends on, and what
    token-mixing units read and write. There is no password: whoever can reach it can use it.

    Examples of use:
        mixer serve runs/flowers
        mixer serve flowers.onnx --port 8080
        mixer serve mixer_b16.i1k --precision float32 --top-k 10
        mixer serve runs/flowers --host 0.0.0.0
    """

    host: str = "127.0.0.1"
    """The address to listen on; 127.0.0.1 is this machine alone, 0.0.0.0 all networks."""
    port: int = 8000
    """The port to listen on; 0 lets the system choose."""
    top_k: int | None = None
    """Classes per image; 5 if not given."""
    image_size: ImageSize | None = None
    """Another size than the model's own."""
    resize_weights: ResizeWeights | None = None
    """How to reach that size; auto if not given."""
    precision: Precision = "auto"
    """Of the matrix products for the classes; maps are computed in float32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    max_images: int = 64
    """Per request."""
    max_megabytes: float = 20.0
    """Per image file."""
    max_megapixels: float = 200.0
    """Of all images of a request together: a small file may unpack to gigabytes."""

    def __post_init__(self) -> None:
        between("port", self.port, 0, 65535)
        at_least("top_k", self.top_k, 1)
        at_least("max_images", self.max_images, 1)
        between("max_megabytes", self.max_megabytes, 0.001, 1000)
        between("max_megapixels", self.max_megapixels, 0.001, 100_000)
        needs({"resize_weights": self.resize_weights}, "image_size", self.image_size)


def serve(
    model: ImageClassifier | str | Path,
    options: ServeOptions | None = None,
    *,
    on_ready: Callable[[str, Service], None] = lambda url, service: None,
    **fields: Any,
) -> None:
    """Serves a model until Ctrl-C, which is raised as KeyboardInterrupt.

    On a socket of this machine alone, requests that name another host are rejected: a page on the
    internet whose name was made to lead here could otherwise read the answers.

    Args:
        model: or anything that `load_model` or `open_exported` takes.
        options: all options in one object.
        on_ready: called with the address once requests are answered.
        **fields: single options, see `ServeOptions`.

    Raises:
        UserError: the port is taken, there is no such model, or the packages are not installed.
    """
    options = make(ServeOptions, options, fields)
    for package in ("starlette", "uvicorn", "python_multipart"):
        import_extra(package, "serve")
    with open_socket(options.host, options.port) as listening:  # before the weights, which are slow
        net = load_any(model, options.image_size, options.resize_weights)
        image_bytes = round(options.max_megabytes * 1e6)
        limits = Limits(
            options.max_images,
            image_bytes,
            max(Limits.request_bytes, image_bytes + 100_000),
            round(options.max_megapixels * 1e6),
        )
        service = Service(
            net,
            str(net.source if net is model else model),
            top_k=options.top_k,
            precision=options.precision,
            device=options.device,
            limits=limits,
        )
        service.is_local = is_local(listening)
        server = make_server(service, options.host)
        shown = f"[{options.host}]" if ":" in options.host else options.host
        on_ready(f"http://{shown}:{listening.getsockname()[1]}", service)
        server.run(sockets=[listening])


def command(model: str, options: ServeOptions) -> None:
    """Serves with a line for the address and warnings on standard error."""

    def say(url: str, service: Service) -> None:
        if not service.model.class_names:
            report_notes(["the model has no class names: classes are called by their number"])
        if not service.is_local:
            print(
                f"warning: {options.host} is more than this machine, and there is no password: "
                "whoever reaches this port can use it",
                file=sys.stderr,
                flush=True,
            )
        what = f"({service.name}, {plural(service.num_classes, 'class')})"
        Reporter().say(f"serving  {url}  {what}; Ctrl-C ends it")

    serve(model, options, on_ready=say)


def open_socket(host: str, port: int) -> socket.socket:
    """Returns a listening socket: clients wait from now on until they are answered."""
    local = "127.0.0.1 is this machine alone"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"unknown host {host!r}", where="host", fix=local) from error
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        free = "or 0 for any that is free"
        if error.errno == errno.EADDRINUSE:
            what = f"port {port} is taken by another program"
            fix = f"Take {port + 1 if port < 65535 else 8000}, {free}"
            raise UserError(what, where="port", fix=fix, code="taken") from error
        if error.errno == errno.EACCES:
            what = f"port {port} may not be used: those below 1024 are the system's"
            raise UserError(what, where="port", fix=f"Take 8000, {free}") from error
        if error.errno == errno.EADDRNOTAVAIL:
            what = f"{host} is not an address of this machine"
            raise UserError(what, where="host", fix=local) from error
        what = f"cannot listen on {host}, port {port}: {error.strerror}"
        raise UserError(what, where="host") from error
    return listening


def is_local(listening: socket.socket) -> bool:
    """Returns whether only this machine can reach a socket."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def make_server(service: Service, host: str) -> uvicorn.Server:
    """Returns the server."""
    import uvicorn

    from allmlp.deploy.web import Connection, make_app

    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # about damaged forms
    hosts = frozenset((*_LOOPBACK, host.lower())) if service.is_local else None
    config = uvicorn.Config(
        make_app(service, hosts),
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # the application reports what goes wrong in a request
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=max(1, Connection.most // 8),  # asyncio accepts that many before it reads one
        timeout_graceful_shutdown=_SECONDS_TO_END,
    )
    return uvicorn.Server(config)
