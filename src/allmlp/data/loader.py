"""Batches of images from a source, with or without worker processes: the same bits either way.

Legend: N batch, H W pixels; an image is uint8 (H, W, channels).
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from allmlp.data import workers
from allmlp.data.batches import Batch, Sample, collate
from allmlp.data.image import EncodedImage
from allmlp.data.sampler import batches_of_positions, locate, sample_generator
from allmlp.data.source import BadImage, Source
from allmlp.data.transforms import resize_for_evaluation
from allmlp.errors import UserError, at_least, between
from allmlp.preprocessing import Preprocessing

# What training does to one image with its own random numbers; the result has the model's size.
TrainingTransform = Callable[[EncodedImage, np.random.Generator], np.ndarray]

TIMEOUT = 600.0  # seconds without a batch after which a worker is taken for hanging
_LOOK_UP = 1.0  # seconds after which torch reports that no batch came
_NONE_CAME = "DataLoader timed out"


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
    with_neighbour: bool = False,
    num_workers: int | None = None,
    timeout: float = TIMEOUT,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Yields the batches of the steps `start` to `stop` - 1; step n is the same from any start.

    An image that cannot be decoded is replaced by the next good one, and is in `Batch.bad`.

    Args:
        source: the training images.
        preprocessing: of the model's input.
        transform: of each image.
        seed: of the order and of every random number.
        batch_size: images per step, over all ranks.
        start, stop: steps.
        rank, world_size, with_neighbour: which part of every batch: `batches_of_positions`.
        num_workers: processes that decode; None chooses, 0 decodes in this one.
        timeout: seconds to wait for a batch of the workers; 0 waits for ever.
        pin_memory: put the batches into page-locked memory, for a GPU.

    Raises:
        UserError: no image can be decoded, or a worker died or hung: it and its image are named.
    """
    images = _TrainingImages(source, preprocessing, transform, seed)
    positions = batches_of_positions(
        start, stop, batch_size, rank, world_size, with_neighbour=with_neighbour
    )
    # Found here and not in the workers, each of which would hold the order of all images.
    places = ([locate(seed, at, len(source)) for at in batch] for batch in positions)
    if num_workers is None:  # at least one, so that images are decoded during the step
        num_workers = max(1, _default_workers(source, preprocessing))
    own = batch_size // world_size
    for batch in _load(images, places, own, num_workers, timeout, pin_memory):
        if len(batch.labels) < own:
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

    `num_workers` and `timeout` as for `training_batches`.
    """
    at_least("batch_size", batch_size, 1)
    images = _EvaluationImages(source, preprocessing)
    indices = range(len(source))
    batches = (indices[at : at + batch_size] for at in range(0, len(indices), batch_size))
    if num_workers is None:
        num_workers = _default_workers(source, preprocessing)
    return _load(images, batches, batch_size, num_workers, timeout)


class _Images(Dataset[Sample]):
    """What both kinds share: opening an image, and a table of where each worker is."""

    def __init__(self, source: Source, preprocessing: Preprocessing) -> None:
        self.source, self.preprocessing = source, preprocessing
        # For each worker: its process, its current image (-1: none), when it began (ns).
        self.watched = torch.empty(0, 3, dtype=torch.int64)

    @property
    def pixels(self) -> int:
        """Bytes of one image in a batch."""
        height, width = self.preprocessing.image_size
        return height * width * self.preprocessing.channels

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

    def __getitem__(self, place: Any) -> Sample:
        sample = self.load(place)
        worker = get_worker_info()
        if worker is not None:
            self.watched.numpy()[worker.id, 1] = -1
        return sample

    def load(self, place: Any) -> Sample:
        """Returns the image of a place: (epoch, index) in training, the index in evaluation."""
        raise NotImplementedError

    def suspect(self, message: str) -> str:
        """Returns which worker a message of the DataLoader means, and where it was."""
        table, ids = self.watched.tolist(), [int(number) for number in re.findall(r"\d+", message)]
        known = [(start, n, at) for n, (pid, at, start) in enumerate(table) if pid in ids]
        if ids and not known:
            return "a worker process, before its first image"
        if not known:  # a time-out names none: the one with the oldest image
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

    def load(self, place: tuple[int, int]) -> Sample:
        epoch, index = place
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
    def load(self, place: int) -> Sample:
        bad: list[BadImage] = []
        image = self.open(place, bad)
        if image is not None:
            try:
                pixels = resize_for_evaluation(image.decode(), self.preprocessing)
                return pixels, int(self.source.labels[place]), place, bad
            except UserError as error:
                bad.append(BadImage(place, str(image.where), error.what))
        return None, 0, place, bad


def _load(
    images: _Images,
    batches: Iterable[Iterable[Any]],
    batch_size: int,
    num_workers: int,
    timeout: float,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    between("num_workers", num_workers, 0, most_workers())
    batch_bytes = min(batch_size, len(images.source)) * images.pixels
    num_workers = workers.workers_that_start(num_workers, batch_bytes)
    closing = torch.zeros(1, dtype=torch.uint8)
    if num_workers:
        workers.check_guard()
        images.watched = torch.full((num_workers, 3), -1, dtype=torch.int64).share_memory_()
        closing = closing.share_memory_()
        atexit.register(closing.fill_, 1)  # before multiprocessing ends the workers and waits
    with warnings.catch_warnings():
        # More workers than cores are the user's choice; they use none of this process's threads.
        warnings.filterwarnings("ignore", message="This DataLoader will create|.*use of fork")
        loader: Iterable[Batch] = DataLoader(
            images,
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]  (any iterable of lists)
            num_workers=num_workers,
            collate_fn=workers.collate_and_share if num_workers else collate,
            timeout=_LOOK_UP if num_workers else 0,
            worker_init_fn=functools.partial(workers.start_worker, images.watched, closing),
            multiprocessing_context=workers.worker_context() if num_workers else None,
            pin_memory=pin_memory,
        )
        before = workers.on_child_end(signal.SIG_DFL)
        with workers.starting():
            loaded = iter(loader)
        workers.on_child_end(before)
    return _named_failures(images, loaded, timeout, closing)


def _named_failures(
    images: _Images, batches: Iterator[Batch], timeout: float, closing: torch.Tensor
) -> Iterator[Batch]:
    """Yields the batches; a worker that dies or hangs becomes an error that names it."""
    try:
        while True:
            # torch raises wherever the main process happens to be when a worker dies, mostly in
            # the model; by looking here, and only here, it can be named.
            before = workers.on_child_end(workers.raise_if_one_died)
            try:
                workers.raise_if_one_died()
                batch = _wait(batches, timeout)
            finally:
                workers.on_child_end(before)
            if batch is None:
                return
            yield batch
    except RuntimeError as error:
        message = str(error)
        if message.startswith("DataLoader worker (pid"):
            what = f"{images.suspect(message)}, ended without a message: {message}"
            fix = "If memory is short, num_workers=1; else look at that image"
            if workers.could_not_send(batches):
                what = "a worker process has no memory to send a batch"
                fix = "A smaller batch_size, or num_workers=0"
        elif message.startswith(_NONE_CAME):
            what = f"no batch for {timeout:g} seconds; {images.suspect('')}"
            fix = (
                "For a slow disk or network, a larger timeout (in training data.timeout); 0 is none"
            )
        else:
            raise
        raise UserError(what, where=images.source.name, fix=fix) from error
    finally:
        closing.fill_(1)
        atexit.unregister(closing.fill_)


def _wait(batches: Iterator[Batch], timeout: float) -> Batch | None:
    """Returns the next batch, None at the end; checks every second whether a worker has died."""
    begun = time.monotonic()
    while True:
        try:
            return next(batches, None)
        except RuntimeError as error:
            waited = time.monotonic() - begun
            if not str(error).startswith(_NONE_CAME) or 0 < timeout <= waited:
                raise
        except (ConnectionError, EOFError):  # a worker died while it handed a batch over
            for _ in range(50):  # until the system has reported its end
                workers.raise_if_one_died()
                time.sleep(0.1)
            raise
        workers.while_waiting.get()()


def most_workers() -> int:
    """Returns the largest number of worker processes: more would only take memory."""
    return max(64, 8 * (os.cpu_count() or 1))


def _default_workers(source: Source, preprocessing: Preprocessing) -> int:
    """Workers take about a tenth of a second to start: not for a few small images."""
    height, width = preprocessing.image_size
    if len(source) * height * width < 2_000_000:
        return 0
    return min(8, os.cpu_count() or 1)
