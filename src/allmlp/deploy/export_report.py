"""An exported file beside the model that it came from: do they agree, and how fast are they?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allmlp.deploy.runner import ExportedModel
from allmlp.errors import plural
from allmlp.evaluation.result_file import measurement
from allmlp.models.inference import Inference
from allmlp.models.layers import ImageClassifier

# The largest difference of a logit, relative to the largest logit, that is rounding. Of int8 the
# accuracy says what it is worth.
LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1}
_LATENCIES = 4  # single images to a round


@dataclass(frozen=True)
class Parity:
    """How well two models agree.

    Attributes:
        images: what they were shown.
        num_images: of these.
        largest_difference: of a logit.
        largest_logit: of the original, by size.
        top1_agreement: the share of the images for which both name the same class.
        accuracy: top-1 of the original and of the file; None where no labels were given.
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


@dataclass(frozen=True)
class Speed:
    """Images a second in batches, and the milliseconds of one image: medians of rounds."""

    images_per_second: float
    latency_ms: float


@dataclass
class ExportReport:
    """What was exported, and what it is worth.

    Attributes:
        path: of the file; None where it failed and there is none.
        files: names of all files, with their sizes in bytes.
        format, precision, runtime, image_size, uint8_input: what it is.
        num_threads, batch_size: with which the speed was measured.
        parity: with the original, in float32.
        speed: of the original and of the file.
        failures: the criteria that do not hold, in words.
        kept: layers of an int8 file that compute in float32, the most sensitive first.
        num_layers: dense layers of the graph; None but for int8.
        calibration: source and images of int8, and which range was taken; None otherwise.
        attempts: int8 files that were measured on the data: (layers kept, points that it fell).
        notes: what else a reader must know.
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
        goes_in = "uint8 (N, H, W, channels)" if self.uint8_input else "float32 (N, channels, H, W)"
        sizes = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in self.files.items())
        found = self.parity
        rows = [
            ("file", sizes),
            ("format", f"{self.format}, {self.precision}, run by {self.runtime}"),
            ("input", f"{height}x{width} pixels, {goes_in}, any batch"),
            ("compared", f"{plural(found.num_images, 'image')}: {found.images}"),
            (
                "logits",
                f"largest difference {found.largest_difference:.2g}, "
                f"{found.relative:.2g} of the largest logit",
            ),
            ("agreement", f"{found.top1_agreement:.2%} have the same top-1 class"),
        ]
        if found.accuracy is not None:
            before, after = found.accuracy
            moved = f"{-(found.drop or 0.0) + 0.0:+.2f} points"
            rows.append(("accuracy", f"{before:.2%} original, {after:.2%} file: {moved}"))
        for name, each in self.speed.items():
            rows.append(
                (
                    "speed",
                    f"{name}: {each.images_per_second:,.1f} images/s in batches of "
                    f"{self.batch_size}, {each.latency_ms:.3g} ms for one image "
                    f"(threads: at most {self.num_threads})",
                )
            )
        if self.calibration is not None:
            known = self.calibration
            rows.append(("calibrated", f"{known['num_images']:,} images of {known['source']}"))
            whole = (self.num_layers or 0) - len(self.kept)
            rows.append(("int8", f"{whole} of {self.num_layers} dense layers"))
            rows += [("float32", name) for name in self.kept]
        rows += [("note", each) for each in self.notes]
        rows += [("failed", each) for each in self.failures]
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
    original: np.ndarray,
    file: np.ndarray,
    images: str,
    accuracy: tuple[float, float] | None = None,
) -> Parity:
    """Returns how well the logits (N, K) of a model and of its file agree."""
    difference = float(np.abs(original - file).max())
    same = original.argmax(axis=1) == file.argmax(axis=1)
    return Parity(
        images,
        len(original),
        difference,
        float(np.abs(original).max()),
        float(same.mean()),
        accuracy,
    )


def failures(parity: Parity, precision: str, max_accuracy_drop: float) -> list[str]:
    """Returns the criteria that do not hold, in words."""
    found = []
    if not np.isfinite(parity.largest_difference):
        found.append("the file computes logits that are not finite")
    limit = LARGEST_DIFFERENCE.get(precision)
    if limit is not None and parity.relative > limit:
        differs = f"the largest difference is {parity.relative:.2g} of the largest logit"
        found.append(f"{differs}, and {precision} may differ by {limit:g}")
    if parity.drop is not None and parity.drop > max_accuracy_drop + 1e-9:
        found.append(
            f"the accuracy fell by {parity.drop:.2f} points, and may fall by {max_accuracy_drop:g}"
        )
    return found


@torch.inference_mode()
def logits_of(model: ImageClassifier, images: Tensor) -> np.ndarray:
    """Returns the logits (N, K) of inputs of a model, in batches of 1, 3, 3, 3, ..."""
    parts = [model(images[:1])]
    parts += [model(images[at : at + 3]) for at in range(1, len(images), 3)]
    return torch.cat(parts).float().numpy()


def measure_speed(
    models: Mapping[str, ImageClassifier],
    images: Tensor,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Speed]:
    """Returns the speed of models that take turns, by their names.

    Args:
        models: on the processor, with threads as they are set; a model computes in float32, as the
            verb evaluate lets it.
        images: a batch, inputs of a model; of an exported file with uint8 input they are pixels.
        rounds: in each, every model computes the batch once and then single images.
        clock: seconds that only rise.
    """
    batches: dict[str, list[float]] = {name: [] for name in models}
    singles: dict[str, list[float]] = {name: [] for name in models}

    def given(model: ImageClassifier) -> Tensor:
        is_pixels = isinstance(model, ExportedModel) and model.about.uint8_input
        return images.new_zeros(images.shape).byte() if is_pixels else images

    runs = {
        name: model if isinstance(model, ExportedModel) else Inference(model).logits
        for name, model in models.items()
    }
    with torch.inference_mode():
        for count in range(rounds + 1):  # the first is a warm-up
            for name, run in runs.items():
                batch = given(models[name])
                for place, part in ((batches, batch), *([(singles, batch[:1])] * _LATENCIES)):
                    started = clock()
                    run(part)
                    if count:
                        place[name].append(clock() - started)
    return {
        name: Speed(
            len(images) / max(statistics.median(batches[name]), 1e-9),
            1000.0 * statistics.median(singles[name]),
        )
        for name in models
    }
