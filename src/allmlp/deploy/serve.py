"""`mixer serve`: a local web page and an HTTP endpoint for one model; `Service` knows no HTTP."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from allmlp.console import Reporter, report_notes
from allmlp.data.image import FORMATS, encode_png
from allmlp.data.source import PackedStrings, unlabelled
from allmlp.data.transforms import model_input
from allmlp.deploy.formats import load_any
from allmlp.deploy.inputs import Check, File, GivenImages
from allmlp.deploy.options import ServeOptions
from allmlp.deploy.rows import choose_columns, predict_rows
from allmlp.errors import UserError, plural
from allmlp.evaluation.predictor import Predictor
from allmlp.inspection.attribution import UnitResponse, occlusion, occlusion_places, unit_responses
from allmlp.inspection.figures import blend, unit_pixels
from allmlp.inspection.inspect import FIRST_LAYERS, STRONGEST
from allmlp.inspection.units import ModelUnits, model_units
from allmlp.models.layers import Classifier, ImageClassifier, classes_of, preprocessing_of
from allmlp.names import import_extra
from allmlp.options import make
from allmlp.page import data_url

BATCH_SIZE = 8  # requests of disconnected clients are dropped between batches
_NO_UNITS = (
    "An exported file only computes logits. Serve the run or the weights that it was made from to "
    "see its token-mixing units."
)


class Service:
    """A served model under the name given by the user; not thread-safe."""

    is_local = True  # reachable from this machine only; set before serving

    def __init__(self, model: Classifier, name: str, options: ServeOptions | None = None) -> None:
        options = make(ServeOptions, options, {})
        if preprocessing_of(model).kind == "arrays":
            what, fix = "serve is for images, and the model takes rows of arrays", "mixer predict"
            raise UserError(what, where=name, fix=fix, code="arrays")
        self.source, self.max_images = name, options.max_images
        self.image_bytes = round(options.max_megabytes * 1e6)
        self.request_bytes = max(100_000_000, self.image_bytes + 100_000)
        # The last part of a path, or the full name of a checkpoint.
        self.name = Path(name).resolve().name if Path(name).exists() else name
        self.num_classes = len(classes_of(model, or_numbers=True))
        self.columns = choose_columns(model, top_k=options.top_k, unsure_below=options.unsure_below)
        self._predictor = Predictor(
            model,
            device=options.device,
            precision=options.precision,
            batch_size=BATCH_SIZE,
            num_workers=0,
        )
        self.model = self._predictor.model
        self._units: ModelUnits | None = None
        self._layers, self._no_units = [], _NO_UNITS
        if isinstance(model, ImageClassifier):
            self._units = model_units(model)
            self._layers = [layer.number for layer in self._units.layers]
            self._no_units = " ".join(self._units.notes)
        self._no_map = ""
        try:
            self._covered = occlusion_places(model)[1][..., 0].size
        except UserError as error:
            self._no_map, self._covered = error.what, 0

    def about(self) -> dict[str, Any]:
        model, preprocessing = self.model, preprocessing_of(self.model)
        return {
            "name": self.name,
            "source": self.source,
            "architecture": model.config.summary(),
            "classes": self.num_classes,
            "image_size": list(preprocessing.image_size),
            "channels": preprocessing.channels,
            "precision": self._predictor.precision,
            "runtime": model.runtime or "torch",
            "top_k": self.columns.width,
            "decision": self.columns.decision.to_json(),
            "occlusion": {"covered_images": self._covered, "note": self._no_map},
            "units": {"layers": self._layers, "note": "" if self._layers else self._no_units},
            "limits": {
                "images": self.max_images,
                "image_bytes": self.image_bytes,
                "request_bytes": self.request_bytes,
                "formats": list(FORMATS),
            },
        }

    def predict(
        self, files: Sequence[File], check: Check, top_k: int | None = None
    ) -> list[dict[str, Any]]:
        """Returns name, classes and error of every image, in order."""
        width = self.columns.width if top_k is None else min(top_k, self.num_classes)
        columns = replace(self.columns, width=width)
        answers: list[dict[str, Any]] = []
        names = PackedStrings(name for name, _ in files)
        images = GivenImages(names, encoded=dict(enumerate(data for _, data in files)))
        source = unlabelled(images, "uploads")
        for rows in predict_rows(self._predictor, source, columns):
            for row in rows:
                classes = [{"name": name, "probability": value} for name, value in row.classes]
                answer = {"name": row.path, **columns.answer(row), "classes": classes}
                answers.append({**answer, "error": row.error})
            check(len(rows))
        return answers

    def occlusion(self, file: File, check: Check) -> dict[str, Any]:
        """Returns the occlusion map: where covering the image lowers the predicted probability."""
        name, data = file
        image, pixels = model_input(data, name, preprocessing_of(self.model))
        found = occlusion(self.model, image, batch_size=BATCH_SIZE, on_batch=check)
        drop, top, left = found.largest
        largest = max(float(np.abs(found.patch_drop).max()), 1e-8)
        return {
            "name": name,
            "class": found.name,
            "probability": found.probability,
            "window": found.window,
            "patches": list(found.patch_drop.shape),
            "covered_images": int(found.drop.size),
            "largest_drop": {"drop": drop, "row": top, "column": left},
            "scale": largest,
            "image": _png_url(pixels),
            "map": _png_url(blend(pixels, found.patch_drop, largest)),
        }

    def units(self, file: File, check: Check, layer: int | None = None) -> dict[str, Any]:
        """Returns response maps of the strongest units in a layer, or in the first three layers."""
        if not self._layers or self._units is None:
            raise UserError(self._no_units)
        assert isinstance(self.model, ImageClassifier)
        name, data = file
        image, pixels = model_input(data, name, preprocessing_of(self.model))
        layers = []
        for number in self._layers[:FIRST_LAYERS] if layer is None else [layer]:
            found = unit_responses(self.model, self._units, image, number)
            shown = [_unit(response, pixels) for response in found[:STRONGEST]]
            layers.append({"layer": number, "units": shown, "of": len(found)})
            check(1)
        return {"name": name, "image": _png_url(pixels), "layers": layers}


def _unit(response: UnitResponse, pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """Images of one unit, each normalized separately; units are numbered from 1."""
    largest = max(float(np.abs(response.read).max()), 1e-30)
    written = None
    if response.written is not None:
        fraction = response.written / max(float(response.written.max()), 1e-30)
        written = _png_url(matplotlib.colormaps["viridis"](fraction)[..., :3])
    return {
        "unit": response.unit + 1,
        "strength": response.strength,
        "weights": _png_url(unit_pixels(response.weights)),
        "read": _png_url(blend(pixels, response.read, largest)),
        "written": written,
    }


def _png_url(pixels: NDArray[Any]) -> str:
    """Encodes an image (H, W) or (H, W, 1 or 3), uint8 or in [0, 1], as a PNG data URL."""
    if pixels.dtype != np.uint8:
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return data_url(encode_png(pixels))


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
        net = load_any(model, **options.loading)
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
            limit_concurrency=256,  # beyond this, clients get a 503
            timeout_graceful_shutdown=2,  # seconds for requests after Ctrl-C
        )
        server = uvicorn.Server(config)
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}", service)
        server.run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        what = f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}"
        fix = "Another port, or 0 for any that is free; the host 127.0.0.1 is this machine alone"
        raise UserError(what, where="port", fix=fix, code="taken") from error


def command(model: str, options: ServeOptions) -> None:
    def say(url: str, service: Service) -> None:
        if not service.model.class_names:
            report_notes(["the model has no class names: classes are called by their number"])
        if not service.is_local:
            warning = f"warning  {options.host} is more than this machine, and has no password"
            Reporter(stderr=True).say(f"{warning}: whoever reaches this port can use it")
        what = f"({service.name}, {plural(service.num_classes, 'class')})"
        Reporter().say(f"serving  {url}  {what}; Ctrl-C ends it")

    serve(model, options, on_ready=say)
