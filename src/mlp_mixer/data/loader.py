"""Batches of images from a source, with or without worker processes: the same bits either way.

Legend: N batch, H W pixels; a picture is uint8 (H, W, channels).
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mlp_mixer.data.image import EncodedImage
from mlp_mixer.data.items import BadImage, Source
from mlp_mixer.data.sampler import batches_of_positions, locate, sample_generator
from mlp_mixer.data.transforms import resize_for_evaluation
from mlp_mixer.errors import UserError
from mlp_mixer.preprocessing import Preprocessing

# What training does to one picture with its own random numbers; the result has the model's size.
TrainingTransform = Callable[[EncodedImage, np.random.Generator], np.ndarray]

TIMEOUT = 600.0  # seconds without a batch after which a worker is taken for hanging


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

    def pin_memory(self) -> Batch:
        """Returns the batch in page-locked memory, from where a GPU copies on its own."""
        images, labels = self.images.pin_memory(), self.labels.pin_memory()
        return replace(self, images=images, labels=labels)

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with images and labels on the device."""
        images = self.images.to(device, non_blocking=True)
        return replace(self, images=images, labels=self.labels.to(device, non_blocking=True))


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields the batches with images and labels on the device.

    To a GPU the next batch is copied on a stream of its own while the model works on this one; that
    takes batches in page-locked memory (`pin_memory`).
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream = torch.cuda.Stream(device)

    def ready(batch: Batch, copied: torch.cuda.Event) -> Batch:
        present = torch.cuda.current_stream(device)
        present.wait_event(copied)
        batch.images.record_stream(present)
        batch.labels.record_stream(present)
        return batch

    waiting: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        copied = torch.cuda.Event()
        with torch.cuda.stream(stream):
            following = batch.to(device), copied
            copied.record(stream)
        if waiting is not None:
            yield ready(*waiting)
        waiting = following
    if waiting is not None:
        yield ready(*waiting)


def training_batches(
    source: Source,
    preprocessing: Preprocessing,
    transform: TrainingTransform,
    *,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int | None = None,
    timeout: float = TIMEOUT,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yields the batches of the steps `start` to `stop` - 1; step n is the same from any start.

    An image that cannot be decoded is replaced by the next good one and named in `Batch.bad`.

    Args:
        source: the training images.
        preprocessing: the input that the model expects.
        transform: what happens to each picture.
        seed: of the order and of every random number.
        batch_size: images a step, over all ranks.
        start, stop: steps.
        rank, world_size: which share of every batch to yield: `batches_of_positions`.
        num_workers: processes that decode; None chooses, 0 decodes in this one.
        timeout: seconds to wait for a batch of the workers; 0 waits for ever.
        pin_memory: put the batches into page-locked memory, for a GPU.

    Raises:
        UserError: none of the images can be decoded, the ranks cannot share a batch, or a worker
            died or hung; then its number and the image that it was at are named.
    """
    images = _TrainingImages(source, preprocessing, transform, seed)
    positions = batches_of_positions(start, stop, batch_size, rank, world_size)
    if num_workers is None:  # at least one, so that images are made ready during the step
        num_workers = max(1, _workers(source, preprocessing))
    for batch in _load(images, positions, num_workers, timeout, pin_memory):
        if len(batch.labels) < batch_size // world_size:
            raise UserError("none of the images can be decoded", where=source.name)
        yield batch


def evaluation_batches(
    source: Source,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    num_workers: int | None = None,
    timeout: float = TIMEOUT,
) -> Iterator[Batch]:
    """Yields every image once and in order; one that cannot be decoded is only in `Batch.bad`.

    Args:
        source: the images.
        preprocessing: the input that the model expects.
        batch_size: images a batch; the last may have fewer.
        num_workers: processes that decode; None chooses, 0 decodes in this one.
        timeout: seconds to wait for a batch of the workers; 0 waits for ever.

    Raises:
        UserError: a batch size below 1, workers below 0, or a worker that died or hung.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    images = _EvaluationImages(source, preprocessing)
    indices = range(len(source))
    batches = (indices[at : at + batch_size] for at in range(0, len(indices), batch_size))
    if num_workers is None:
        num_workers = _workers(source, preprocessing)
    return _load(images, batches, num_workers, timeout)


# One image on its way into a batch: pixels (None if bad), label, index, what was bad.
_Sample = tuple[np.ndarray | None, int, int, list[BadImage]]


class _Images(Dataset[_Sample]):
    """What both kinds share: reading an image, and a table of what each worker is at."""

    def __init__(self, source: Source, preprocessing: Preprocessing) -> None:
        self.source, self.preprocessing = source, preprocessing
        # For each worker: its process, the image that it is at (-1: none), when it began (ns).
        self.watched = torch.empty(0, 3, dtype=torch.int64)

    def open(self, index: int, bad: list[BadImage]) -> EncodedImage | None:
        """Returns the image with its header read, or None and a line in `bad`."""
        name = self.source.item_name(index)
        worker = get_worker_info()
        if worker is not None:
            self.watched.numpy()[worker.id] = (os.getpid(), index, time.monotonic_ns())
        try:
            return EncodedImage(
                self.source.read(index),
                name,
                self.preprocessing.channels,
                exif_orientation=self.preprocessing.exif_orientation,
            )
        except UserError as error:
            bad.append(BadImage(index, name, error.what))
            return None

    def __getitem__(self, position: int) -> _Sample:
        sample = self.load(position)
        worker = get_worker_info()
        if worker is not None:
            self.watched.numpy()[worker.id, 1] = -1
        return sample

    def load(self, position: int) -> _Sample:
        """Returns the image that belongs to the position."""
        raise NotImplementedError

    def suspect(self, message: str) -> str:
        """Returns which worker a message of the DataLoader means, and what that was at."""
        table, ids = self.watched.tolist(), [int(each) for each in re.findall(r"\d+", message)]
        known = [(start, n, at) for n, (pid, at, start) in enumerate(table) if pid in ids]
        if not known:  # a time-out names none: the one that has been at its image the longest
            known = [(start, n, at) for n, (_, at, start) in enumerate(table) if at >= 0]
        if not known:
            return "a worker process, between two images"
        _, number, index = min(known)
        what = f"at {self.source.item_name(index)}" if index >= 0 else "between two images"
        return f"worker process {number}, {what}"


class _TrainingImages(_Images):
    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        transform: TrainingTransform,
        seed: int,
    ) -> None:
        super().__init__(source, preprocessing)
        self.transform, self.seed = transform, seed

    def load(self, position: int) -> _Sample:
        epoch, index = locate(self.seed, position, len(self.source))
        bad: list[BadImage] = []
        for step in range(len(self.source)):  # this image, or the next that can be decoded
            chosen = (index + step) % len(self.source)
            image = self.open(chosen, bad)
            if image is None:
                continue
            try:
                pixels = self.transform(image, sample_generator(self.seed, epoch, index))
            except UserError as error:
                bad.append(BadImage(chosen, str(image.where), error.what))
                continue
            return pixels, int(self.source.labels[chosen]), chosen, bad
        return None, 0, index, bad


class _EvaluationImages(_Images):
    def load(self, position: int) -> _Sample:
        bad: list[BadImage] = []
        image = self.open(position, bad)
        if image is not None:
            try:
                pixels = resize_for_evaluation(image.decode(), self.preprocessing)
                return pixels, int(self.source.labels[position]), position, bad
            except UserError as error:
                bad.append(BadImage(position, str(image.where), error.what))
        return None, 0, position, bad


def _collate(samples: list[_Sample]) -> Batch:
    good = [(pixels, label, index) for pixels, label, index, _ in samples if pixels is not None]
    bad = [each for sample in samples for each in sample[3]]
    images, labels, indices = zip(*good, strict=True) if good else ((), (), ())
    # Channels stay last in memory: turning them here would copy every picture once more.
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) if images else torch.empty(0)
    labels, indices = torch.tensor(labels).long(), torch.tensor(indices).long()
    return Batch(stacked.to(torch.uint8), labels, indices, bad)


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # its threads do not survive the fork, and each worker has one core


def _load(
    images: _Images,
    batches: Iterable[Iterable[int]],
    num_workers: int,
    timeout: float,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    if num_workers < 0:
        raise UserError(f"num_workers must be at least 0, got {num_workers}")
    if num_workers:
        images.watched = torch.full((num_workers, 3), -1, dtype=torch.int64).share_memory_()
    with warnings.catch_warnings():  # more workers than cores are the user's choice
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: Iterable[Batch] = DataLoader(
            images,
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]  (any iterable of lists)
            num_workers=num_workers,
            collate_fn=_collate,
            timeout=timeout if num_workers else 0,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
        )
        loaded = iter(loader)
    return _named_failures(images, loaded, timeout)


def _named_failures(images: _Images, batches: Iterator[Batch], timeout: float) -> Iterator[Batch]:
    """Yields the batches; a worker that dies or hangs becomes an error that names it."""
    try:
        yield from batches
    except RuntimeError as error:
        message = str(error)
        if message.startswith("DataLoader worker (pid"):
            what = f"{images.suspect(message)}, ended without a word: {message}"
            fix = "Out of memory? Then fewer: --num-workers 1. Else look at that image"
        elif message.startswith("DataLoader timed out"):
            what = f"no batch for {timeout:g} seconds; {images.suspect('')}"
            fix = "A slow disk or network? data.timeout is the limit in seconds, 0 for none"
        else:
            raise
        raise UserError(what, where=images.source.name, fix=fix) from error


def _workers(source: Source, preprocessing: Preprocessing) -> int:
    """Workers cost about a tenth of a second to start: not for a few small pictures."""
    height, width = preprocessing.image_size
    if len(source) * height * width < 2_000_000:
        return 0
    return min(8, os.cpu_count() or 1)
