"""Batches of images from a source, with or without worker processes: the same bits either way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mlp_mixer.data.image import decode
from mlp_mixer.data.sampler import batches_of_positions, locate, sample_generator
from mlp_mixer.data.sources import BadImage, Source
from mlp_mixer.data.transforms import resize_for_evaluation, to_tensor
from mlp_mixer.errors import UserError
from mlp_mixer.preprocessing import Preprocessing

# What training does to one picture with its own random numbers; the result has the model's size.
TrainingTransform = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass
class Batch:
    """Images on their way to the model.

    Attributes:
        images: uint8 (N, channels, H, W).
        labels: int64 (N,).
        indices: int64 (N,), of the images in the source.
        bad: the images that could not be decoded.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: list[BadImage] = field(default_factory=list)


def training_batches(
    source: Source,
    preprocessing: Preprocessing,
    transform: TrainingTransform,
    *,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    num_workers: int | None = None,
) -> Iterator[Batch]:
    """Yields the batches of the steps `start` to `stop` - 1; step n is the same from any start.

    An image that cannot be decoded is replaced by the next good one and named in `Batch.bad`.

    Args:
        source: the training images.
        preprocessing: the input that the model expects.
        transform: what happens to each picture.
        seed: of the order and of every random number.
        batch_size: images a step.
        start, stop: steps.
        num_workers: processes that decode; None chooses, 0 decodes in this one.

    Raises:
        UserError: none of the images can be decoded.
    """
    images = _TrainingImages(source, preprocessing, transform, seed)
    positions = batches_of_positions(start, stop, batch_size)
    if num_workers is None:  # at least one, so that images are made ready during the step
        num_workers = max(1, _workers(source, preprocessing))
    for batch in _load(images, positions, num_workers):
        if len(batch.labels) < batch_size:
            raise UserError("none of the images can be decoded", where=source.name)
        yield batch


def evaluation_batches(
    source: Source,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    num_workers: int | None = None,
) -> Iterator[Batch]:
    """Yields every image once and in order; one that cannot be decoded is only in `Batch.bad`.

    Args:
        source: the images.
        preprocessing: the input that the model expects.
        batch_size: images a batch; the last may have fewer.
        num_workers: processes that decode; None chooses, 0 decodes in this one.

    Raises:
        UserError: a batch size below 1 or workers below 0.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    images = _EvaluationImages(source, preprocessing)
    indices = range(len(source))
    batches = (indices[at : at + batch_size] for at in range(0, len(indices), batch_size))
    if num_workers is None:
        num_workers = _workers(source, preprocessing)
    return _load(images, batches, num_workers)


# One image on its way into a batch: pixels (None if bad), label, index, what was bad.
_Sample = tuple[Tensor | None, int, int, list[BadImage]]


@dataclass
class _TrainingImages(Dataset[_Sample]):
    source: Source
    preprocessing: Preprocessing
    transform: TrainingTransform
    seed: int

    def __getitem__(self, position: int) -> _Sample:
        epoch, index = locate(self.seed, position, len(self.source))
        bad: list[BadImage] = []
        for step in range(len(self.source)):  # this image, or the next that can be decoded
            chosen = (index + step) % len(self.source)
            image = _decode(self.source, chosen, self.preprocessing.channels, bad)
            if image is not None:
                image = self.transform(image, sample_generator(self.seed, epoch, index))
                return to_tensor(image), int(self.source.labels[chosen]), chosen, bad
        return None, 0, index, bad


@dataclass
class _EvaluationImages(Dataset[_Sample]):
    source: Source
    preprocessing: Preprocessing

    def __getitem__(self, index: int) -> _Sample:
        bad: list[BadImage] = []
        image = _decode(self.source, index, self.preprocessing.channels, bad)
        if image is None:
            return None, 0, index, bad
        image = resize_for_evaluation(image, self.preprocessing)
        return to_tensor(image), int(self.source.labels[index]), index, bad


def _decode(source: Source, index: int, channels: int, bad: list[BadImage]) -> Image.Image | None:
    name = source.item_name(index)
    try:
        return decode(source.read(index), name, channels)
    except UserError as error:
        bad.append(BadImage(index, name, error.what))
        return None


def _collate(samples: list[_Sample]) -> Batch:
    good = [(image, label, index) for image, label, index, _ in samples if image is not None]
    bad = [each for sample in samples for each in sample[3]]
    images, labels, indices = zip(*good, strict=True) if good else ((), (), ())
    stacked = torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)
    return Batch(stacked, torch.tensor(labels).long(), torch.tensor(indices).long(), bad)


def _load(
    images: Dataset[_Sample], batches: Iterable[Iterable[int]], num_workers: int
) -> Iterator[Batch]:
    if num_workers < 0:
        raise UserError(f"num_workers must be at least 0, got {num_workers}")
    loader: Iterable[Batch] = DataLoader(
        images,
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]  (any iterable of lists)
        num_workers=num_workers,
        collate_fn=_collate,
    )
    return iter(loader)


def _workers(source: Source, preprocessing: Preprocessing) -> int:
    """Workers cost about a tenth of a second to start: not for a few small pictures."""
    height, width = preprocessing.image_size
    if len(source) * height * width < 2_000_000:
        return 0
    return min(8, os.cpu_count() or 1)
