"""An exported file beside the model that it came from: do they agree, and how fast are they?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allmlp.deploy.exported_model import ExportedModel
from allmlp.errors import plural
from allmlp.evaluation.result_file import measurement
from allmlp.models.inference import Inference
from allmlp.models.layers import ImageClassifier

# The largest difference of a logit, relative to the largest logit, that is rounding. For int8 the
# accuracy decides.
LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1}
_ROUNDS, _LATENCIES = 5, 4  # single images per round


@dataclass(frozen=True)
class Parity:
    """How well the logits of a model and of its file agree on some images.

    Attributes:
        top1_agreement: the fraction of the images for which both name the same class.
        accuracy: top-1 of the original and of the file; None without labels.
    """

    images: str
    num_images: int
    largest_difference: float
    largest_logit: float
    top1_agreement: float
    accuracy: tuple[float, float] | None = None

    @property
    def relative(self) -> float:
        """The largest difference, relative to the largest logit."""
        return self.largest_difference / (self.largest_logit or 1.0)

    @property
    def drop(self) -> float | None:
        """By how many points the accuracy fell; below 0 where it rose."""
        return None if self.accuracy is None else 100.0 * (self.accuracy[0] - self.accuracy[1])

    def failures(self, precision: str, max_accuracy_drop: float) -> list[str]:
        """Returns the criteria that do not hold, in words."""
        found = []
        if not np.isfinite(self.largest_difference):
            found.append("the file computes logits that are not finite")
        limit = LARGEST_DIFFERENCE.get(precision)
        if limit is not None and self.relative > limit:
            differs = f"the largest difference is {self.relative:.2g} of the largest logit"
            found.append(f"{differs}, and {precision} may differ by {limit:g}")
        if self.drop is not None and self.drop > max_accuracy_drop + 1e-9:
            limits = f"and may fall by {max_accuracy_drop:g}"
            found.append(f"the accuracy fell by {self.drop:.2f} points, {limits}")
        return found


@dataclass(frozen=True)
class Speed:
    """Images per second in batches, and the milliseconds of one image: medians of rounds."""

    images_per_second: float
    latency_ms: float


@dataclass
class ExportReport:
    """What was exported, and how it compares with the model.

    Attributes:
        path: of the file; None if it failed and was not kept.
        files: names of all files, with their sizes in bytes.
        num_threads, batch_size: with which the speed was measured.
        speed: of the original and of the file.
        failures: the criteria that do not hold, in words.
        kept: layers of an int8 file that compute in float32, the most sensitive first.
        num_layers: dense layers of the graph; None except for int8.
        calibration: source and images of int8, and which range was taken; None otherwise.
        attempts: int8 files that were measured on the data: (layers kept, points lost).
    """

    path: str | None
    files: dict[str, int]
    format: str
    precision: str
    runtime: str
    image_size: tuple[int, int]
    uint8_input: bool
    num_threads: int
    batch_size: int
    parity: Parity
    speed: dict[str, Speed]
    failures: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    num_layers: int | None = None
    calibration: dict[str, Any] | None = None
    attempts: list[tuple[int, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the file holds every criterion."""
        return not self.failures

    def rows(self) -> list[tuple[str, str]]:
        """Returns the report as (what, value) pairs."""
        height, width = self.image_size
        shape = "uint8 (N, H, W, channels)" if self.uint8_input else "float32 (N, channels, H, W)"
        sizes = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in self.files.items())
        parity = self.parity
        difference = f"largest difference {parity.largest_difference:.2g}"
        rows = [
            ("file", sizes),
            ("format", f"{self.format}, {self.precision}, run by {self.runtime}"),
            ("input", f"{height}x{width} pixels, {shape}, any batch"),
            ("compared", f"{plural(parity.num_images, 'image')}: {parity.images}"),
            ("logits", f"{difference}, {parity.relative:.2g} of the largest logit"),
            ("agreement", f"{parity.top1_agreement:.2%} have the same top-1 class"),
        ]
        if parity.accuracy is not None:
            before, after = parity.accuracy
            moved = f"{-(parity.drop or 0.0) + 0.0:+.2f} points"
            rows.append(("accuracy", f"{before:.2%} original, {after:.2%} file: {moved}"))
        for name, speed in self.speed.items():
            value = (
                f"{name}: {speed.images_per_second:,.1f} images/s in batches of {self.batch_size}, "
                f"{speed.latency_ms:.3g} ms for one image (threads: at most {self.num_threads})"
            )
            rows.append(("speed", value))
        if self.calibration is not None:
            source = f"{self.calibration['num_images']:,} images of {self.calibration['source']}"
            num_int8 = (self.num_layers or 0) - len(self.kept)
            rows.append(("calibrated", source))
            rows.append(("int8", f"{num_int8} of {self.num_layers} dense layers"))
            rows += [("float32", name) for name in self.kept]
        rows += [("note", note) for note in self.notes]
        rows += [("failed", failure) for failure in self.failures]
        return rows

    def lines(self) -> list[str]:
        """Returns the report as lines for the screen."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {value}" for name, value in rows]

    def markdown(self, title: str) -> str:
        """Returns the report as a page."""
        cells = [f"| {name} | {value.replace('|', '/')} |" for name, value in self.rows()]
        return "\n".join([f"# {title}", "", "| | |", "| --- | --- |", *cells, ""])

    def to_json(self, model: ImageClassifier) -> dict[str, Any]:
        """Returns the report as a measurement, see `allmlp.evaluation.result_file`."""
        return measurement("export", model, {"export": asdict(self) | {"passed": self.passed}})


def compare(
    original: np.ndarray, file: np.ndarray, images: str, accuracy: tuple[float, float] | None = None
) -> Parity:
    """Returns how well the logits (N, K) of a model and of its file agree."""
    difference = float(np.abs(original - file).max())
    same = float((original.argmax(axis=1) == file.argmax(axis=1)).mean())
    largest = float(np.abs(original).max())
    return Parity(images, len(original), difference, largest, same, accuracy)


@torch.inference_mode()
def logits_of(model: ImageClassifier, images: Tensor) -> np.ndarray:
    """Returns the logits (N, K) of inputs of a model, in batches of 1, 3, 3, 3, ..."""
    parts = [model(images[:1])]
    parts += [model(images[start : start + 3]) for start in range(1, len(images), 3)]
    return torch.cat(parts).float().numpy()


@torch.inference_mode()
def measure_speed(models: Mapping[str, ImageClassifier], images: Tensor) -> dict[str, Speed]:
    """Returns the speed of models that take turns, on the processor in float32.

    In every round each computes a batch and a few single images; a file with uint8 input gets
    pixels of the same shape.
    """
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    runs = {}
    for name, model in models.items():
        if isinstance(model, ExportedModel):
            runs[name] = model, images.byte() if model.info.uint8_input else images
        else:
            runs[name] = Inference(model).logits, images
    for count in range(_ROUNDS + 1):  # the first is a warm-up
        for name, (run, batch) in runs.items():
            for at, inputs in enumerate((batch, *[batch[:1]] * _LATENCIES)):
                started = time.perf_counter()
                run(inputs)
                if count:
                    seconds[name][min(at, 1)].append(time.perf_counter() - started)
    medians = {name: map(statistics.median, times) for name, times in seconds.items()}
    return {
        name: Speed(len(images) / max(batch, 1e-9), 1000.0 * single)
        for name, (batch, single) in medians.items()
    }
