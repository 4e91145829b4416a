"""From images to model outputs: evaluate, few-shot, predict, export and serve all compute here.

Shapes: N images of a batch, K classes, C features.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allmlp.data.loader import TIMEOUT, Batch, evaluation_batches, on_device
from allmlp.data.source import BadImage, Source, subset
from allmlp.data.transforms import normalize
from allmlp.errors import UserError, between
from allmlp.evaluation.options import MeasureOptions
from allmlp.models.inference import Inference, choose_precision
from allmlp.models.layers import Classifier, ImageClassifier, preprocessing_of
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.device import (
    Transfer,
    check_device_of_exported,
    choose_device,
    side_stream,
    step_threads,
)
from allmlp.runtime.world import World

Compute = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


@dataclass
class Outputs:
    """Outputs for a batch, all on the CPU."""

    values: tuple[np.ndarray, ...]  # N rows each, one array per tensor; () if N is 0
    labels: np.ndarray  # int64 (N,)
    indices: np.ndarray  # int64 (N,), positions of the images in the source
    bad: list[BadImage] = field(default_factory=list)  # images that could not be decoded

    def __len__(self) -> int:
        """Number of images in the batch, including bad ones."""
        return len(self.labels) + len(self.bad)


class Predictor:
    """A model prepared for inference over many batches; the weights are captured here.

    `device` and `preprocessing` are the model's by default, `precision` is float32.
    """

    def __init__(
        self,
        model: Classifier,
        *,
        device: str | None = None,
        precision: str | None = None,
        preprocessing: Preprocessing | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        between("batch_size", batch_size, 1, math.inf)
        self.model = model
        self._inference: Inference | None = None
        if isinstance(model, ImageClassifier):
            self.model = model if device is None else model.to(choose_device(device))
            self.precision, self.why = choose_precision(self.model, precision)
            self._inference = Inference(self.model, self.precision)
        else:
            check_device_of_exported(device)
            if precision == "bfloat16" and model.precision != precision:
                what = f"an exported file keeps its own precision, {model.precision or 'float32'}"
                raise UserError(what, where="precision", fix="Leave it out, or export it again")
            self.precision, self.why = model.precision or "float32", "of the file"
        self.device = self.model.device
        self.preprocessing = preprocessing or preprocessing_of(model)
        self.batch_size, self.num_workers, self.timeout = batch_size, num_workers, timeout

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Returns the logits, float32 (N, K), on the device, of uint8 images (N, channels, H, W) of
        the model's size; features if the model has no head."""
        if self._inference is None:  # exported files take pixels
            are_arrays = self.preprocessing.kind == "arrays"
            return self.model(self._normalized(images) if are_arrays else images).float()
        return self._inference.logits(self._normalized(images))

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Returns the pooled features, float32 (N, C), on the device; `images` as in `logits`."""
        assert self._inference is not None  # see `check_features`
        features = self._inference.features(self._normalized(images))
        if features.dim() != 2 or len(features) != len(images):
            what = f"features() gave {tuple(features.shape)} for {len(images)} images, not (N, C)"
            raise UserError(what, where=type(self.model).__name__)
        return features

    def _normalized(self, images: Tensor) -> Tensor:
        return normalize(images.to(self.device), self.preprocessing)

    def run(
        self, source: Source, compute: Compute | None = None, world: World | None = None
    ) -> Iterator[Outputs]:
        """Yields the outputs for every image of a source once, batch by batch, in order.

        `compute` maps uint8 images (N, channels, H, W) to tensors of N rows; None means the logits.
        GPU results are copied while the next batch is computed. With several processes, each takes
        whole batches: the model sees the same batches, and gives the same bits, for any number.
        """
        first, part = 0, source
        if world is not None and world.size > 1:
            number = math.ceil(len(source) / self.batch_size)
            first, stop = (
                min(number * rank // world.size * self.batch_size, len(source))
                for rank in (world.rank, world.rank + 1)
            )
            part = subset(source, np.arange(first, stop), source.name)
        if self._inference is not None:
            self._inference.compile_for(len(part), self.batch_size)
        batches: Iterable[Batch] = evaluation_batches(
            part,
            self.preprocessing,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            timeout=self.timeout,
        )
        stream = side_stream(self.device)
        if stream is not None:
            pinned = (batch.pin_memory() if len(batch.labels) else batch for batch in batches)
            batches = on_device(pinned, self.device)
        pending: deque[tuple[Batch, Transfer]] = deque()

        def oldest() -> Outputs:
            batch, transfer = pending.popleft()
            labels, *values = transfer.wait()
            bad = [replace(image, index=image.index + first) for image in batch.bad]
            return Outputs(tuple(values), labels, batch.indices.numpy() + first, bad)

        for batch in batches:
            values: Tensor | tuple[Tensor, ...] = ()
            if len(batch.labels):
                operations = self.model.config.flops * len(batch.labels)
                with torch.inference_mode(), step_threads(self.device, operations):
                    values = (compute or self.logits)(batch.images)
            values = (values,) if isinstance(values, Tensor) else values
            pending.append((batch, Transfer((batch.labels, *values), stream)))
            if stream is None or len(pending) > 1:
                yield oldest()
        while pending:
            yield oldest()


def check_finite(
    values: np.ndarray, indices: np.ndarray, source: Source, what: str, fix: str
) -> None:
    """Raises UserError with the name of the first image whose row in `values` is not finite."""
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        row = values[wrong[0]]
        value = row[~np.isfinite(row)][0]
        many = f"the {what} of {len(wrong):,} of {len(values):,} images are not finite: "
        where = source.item_name(int(indices[wrong[0]]))
        raise UserError(f"{many}{value} for the first of them", where=where, fix=fix)


def predictor_for(
    options: MeasureOptions, model: Classifier, device: str | None, **changes: Any
) -> Predictor:
    """Returns the predictor of a measuring command; `changes` override the preprocessing."""
    if options.ignore_exif:
        changes["exif_orientation"] = False
    return Predictor(
        model,
        device=device,
        precision=options.precision,
        preprocessing=replace(preprocessing_of(model), **changes),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        timeout=options.timeout,
    )
