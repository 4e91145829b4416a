"""What the local page and its endpoint answer about images; nothing here knows of HTTP.

Images come as bytes and answers go as JSON values; pictures in them are PNG files in data URLs.
Classes are computed as `mixer predict` computes them, maps as `mixer inspect --image` does.

Legend: H W pixels, G_H G_W patches in a column and in a row.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from allmlp.data.image import FORMATS, MAX_PIXELS, MAX_SIDE, encode_png
from allmlp.deploy.answers import Question, make_question, make_ready
from allmlp.deploy.rows import predict_rows
from allmlp.deploy.runner import ExportedModel
from allmlp.errors import UserError
from allmlp.inspection.attribution import (
    UnitResponse,
    decode_image,
    occlusion,
    occlusion_places,
    strongest,
    unit_responses,
)
from allmlp.inspection.figures import blend, unit_pixels
from allmlp.inspection.inspect import FIRST_LAYERS, STRONGEST
from allmlp.inspection.token_mixing import model_units
from allmlp.models.layers import ImageClassifier, classes_of, preprocessing_of

BATCH_SIZE = 8  # between two batches a request that nobody waits for any more is given up
_SEQUENTIAL = "viridis"
_NO_UNITS = (
    "An exported file only computes logits. Serve the run or the weights that it was made from to "
    "see its token-mixing units."
)

Check = Callable[[int], None]  # called after every batch; raises to give up


@dataclass(frozen=True)
class Limits:
    """What a request may bring.

    Attributes:
        images: in one request.
        image_bytes: of one image, encoded.
        request_bytes: of the whole request.
        pixels: of all images of a request, which a small file may have many of.
    """

    images: int = 64
    image_bytes: int = 20_000_000
    request_bytes: int = 100_000_000
    pixels: int = 200_000_000

    @staticmethod
    def of(images: int, megabytes: float, megapixels: float = 200.0) -> Limits:
        """Returns the limits for images of at most so many megabytes each, and pixels together."""
        most, pixels = round(megabytes * 1e6), round(megapixels * 1e6)
        return Limits(images, most, max(Limits.request_bytes, most + 100_000), pixels)


@dataclass(frozen=True)
class Uploads:
    """Encoded images in memory as a source of data.

    Attributes:
        files: (name, encoded file) each.
        most: bytes of a file, above which it is a bad image.
        name: as of every source.
    """

    files: Sequence[tuple[str, bytes]]
    most: int
    name: str = "uploads"

    @property
    def class_names(self) -> list[str]:
        return ["unknown"]

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.zeros(len(self.files), np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        name, data = self.files[index]
        if len(data) > self.most:
            what = f"the file has {megabytes(len(data))}; the limit is {megabytes(self.most)}"
            raise UserError(what, where=name, fix="Make it smaller")
        return data

    def item_name(self, index: int) -> str:
        return self.files[index][0]


class Service:
    """A model that answers; not for two threads at once.

    Args:
        model: on its device, with a head.
        name: of the model, as it was asked for.
        top_k: classes for each image; None is 5.
        precision: of the products, as of `make_question`.
        limits: of a request.

    Raises:
        UserError: a value out of range, or the model gives no classes.
    """

    def __init__(
        self,
        model: ImageClassifier,
        name: str,
        *,
        top_k: int | None = None,
        precision: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.model, self.limits = model, limits or Limits()
        self.source = name
        # The last part of a path; the name of a checkpoint has no other.
        self.name = Path(name).resolve().name if Path(name).exists() else name
        self.num_classes = len(classes_of(model, or_numbers=True))
        self._precision = precision
        self.question = self._ask(top_k)
        self._ready = make_ready(model, self.question)
        self._units = model_units(model)
        self._is_exported = isinstance(model, ExportedModel)
        self._why_no_map = ""
        try:
            self.covered = occlusion_places(model)[2][..., 0].size
        except UserError as error:
            self._why_no_map, self.covered = error.what, 0

    def _ask(self, top_k: int | None) -> Question:
        return make_question(
            self.model, top_k=top_k, precision=self._precision, batch_size=BATCH_SIZE
        )

    def about(self) -> dict[str, Any]:
        """Returns what is served: the model, what can be drawn of it, and the limits."""
        model, rules = self.model, preprocessing_of(self.model)
        height, width = rules.image_size
        precision, runtime = self.question.precision, "torch"
        if isinstance(model, ExportedModel):
            precision, runtime = model.about.precision, model.runtime
        layers = [each.number for each in self._units.layers]
        notes = list(self._units.notes)
        if self._is_exported:
            notes = [_NO_UNITS]
        return {
            "name": self.name,
            "source": self.source,
            "architecture": model.config.summary(),
            "classes": self.num_classes,
            "image_size": [height, width],
            "channels": rules.channels,
            "precision": precision,
            "runtime": runtime,
            "top_k": self.question.width,
            "occlusion": {"covered_images": self.covered, "note": self._why_no_map},
            "units": {"layers": layers, "note": "" if layers else " ".join(notes)},
            "limits": {
                "images": self.limits.images,
                "image_bytes": self.limits.image_bytes,
                "request_bytes": self.limits.request_bytes,
                "request_pixels": self.limits.pixels,
                "pixels": MAX_PIXELS,
                "side": MAX_SIDE,
                "formats": list(FORMATS),
            },
        }

    def predict(
        self, files: Sequence[tuple[str, bytes]], check: Check, top_k: int | None = None
    ) -> list[dict[str, Any]]:
        """Returns name, classes and error of every image, in their order.

        Args:
            files: (name, encoded file) each.
            check: called after every batch.
            top_k: another number of classes than the service's own.

        Raises:
            UserError: top_k is below 1.
        """
        question = self.question if top_k is None else self._ask(top_k)
        source = Uploads(files, self.limits.image_bytes)
        answers: list[dict[str, Any]] = []
        for rows in predict_rows(
            self.model,
            source,
            question,
            batch_size=BATCH_SIZE,
            num_workers=0,
            ready=self._ready,
        ):
            for row in rows:
                classes = [{"name": name, "probability": share} for name, share in row.classes]
                answers.append({"name": row.path, "classes": classes, "error": row.error})
            check(len(rows))
        return answers

    def _open(self, file: tuple[str, bytes]) -> tuple[str, Tensor, NDArray[np.uint8]]:
        name, data = file[0], Uploads([file], self.limits.image_bytes).read(0)
        return name, *decode_image(data, name, self.model)

    def occlusion(self, file: tuple[str, bytes], check: Check) -> dict[str, Any]:
        """Returns where the probability of the predicted class drops when the image is covered.

        Args:
            file: (name, encoded file).
            check: called after every batch of covered images.

        Raises:
            UserError: it cannot be decoded, or there is no such map of this model.
        """
        name, image, pixels = self._open(file)
        found = occlusion(self.model, image, batch_size=BATCH_SIZE, on_batch=check)
        row, column = np.unravel_index(int(found.drop.argmax()), found.drop.shape)
        top, left = (int(each) + 1 for each in found.places[row, column])
        largest = max(float(np.abs(found.patch_drop).max()), 1e-8)
        return {
            "name": name,
            "class": found.name,
            "probability": found.probability,
            "window": found.window,
            "patches": list(found.patch_drop.shape),
            "covered_images": int(found.drop.size),
            "largest_drop": {"drop": float(found.drop[row, column]), "row": top, "column": left},
            "scale": largest,
            "image": data_url(pixels),
            "map": data_url(_bytes_of(blend(pixels, found.patch_drop, largest))),
        }

    def units(
        self, file: tuple[str, bytes], check: Check, layer: int | None = None
    ) -> dict[str, Any]:
        """Returns the response maps of the units that add most to the tokens.

        Args:
            file: (name, encoded file).
            check: called after every layer.
            layer: number, from 1; None takes the first three.

        Raises:
            UserError: it cannot be decoded, or the model has no such units.
        """
        known = [each.number for each in self._units.layers]
        if not known:
            raise UserError(_NO_UNITS if self._is_exported else " ".join(self._units.notes))
        name, image, pixels = self._open(file)
        layers = []
        for number in known[:FIRST_LAYERS] if layer is None else [layer]:
            found = unit_responses(self.model, self._units, image, number)
            shown = [_unit(each, pixels) for each in strongest(found, STRONGEST)]
            layers.append({"layer": number, "units": shown, "of": len(found)})
            check(1)
        return {"name": name, "image": data_url(pixels), "layers": layers}


def _unit(response: UnitResponse, pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """Pictures of one unit, each on its own scale; the unit is counted from 1."""
    largest = max(float(np.abs(response.read).max()), 1e-30)
    written = None
    if response.written is not None:
        share = response.written / max(float(response.written.max()), 1e-30)
        written = data_url(_bytes_of(matplotlib.colormaps[_SEQUENTIAL](share)[..., :3]))
    return {
        "unit": response.unit + 1,
        "strength": response.strength,
        "weights": data_url(unit_pixels(response.weights)),
        "read": data_url(_bytes_of(blend(pixels, response.read, largest))),
        "written": written,
    }


def _bytes_of(colors: NDArray[np.float64]) -> NDArray[np.uint8]:
    return (colors * 255).round().astype(np.uint8)


def data_url(pixels: NDArray[np.uint8]) -> str:
    """Returns a picture, (H, W) or (H, W, 1 or 3), as the address of a PNG file that it holds."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return f"data:image/png;base64,{base64.b64encode(encode_png(pixels)).decode()}"


def megabytes(number: int) -> str:
    """Returns a number of bytes in words: "20.0 MB"."""
    return f"{number / 1e6:.1f} MB" if number >= 1e5 else f"{number:,} bytes"
