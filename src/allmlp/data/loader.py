"""Batches of images from a source, bit-identical with or without worker processes.

Legend: N batch, H W pixels; an image is uint8 (H, W, channels).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, get_worker_info

from allmlp.data import workers
from allmlp.data.image import EncodedImage
from allmlp.data.sampler import SAMPLE, Order, generator
from allmlp.data.source import BadImage, Source, array_row, array_shape
from allmlp.data.transforms import check_input, resize_for_evaluation
from allmlp.errors import UserError, between
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.device import cores_of_process

# Augments one image with its own generator; the result has the model's input size.
TrainingTransform = Callable[[EncodedImage, np.random.Generator], np.ndarray]

# One image of a batch: pixels (None if bad), label or labels, index, bad images.
Sample = tuple[np.ndarray | None, int | np.ndarray, int, list[BadImage]]

CPU = torch.device("cpu")
TIMEOUT = 600.0  # seconds without a batch after which a worker counts as hanging
LARGEST_PART = 32 * 2**20  # bytes; larger batches are handed over in parts
_NONE = torch.empty(0, dtype=torch.uint8)
_NONE_CAME = "DataLoader timed out"


@dataclass
class Batch:
    """A batch of images, and those that could not be decoded."""

    images: Tensor  # uint8 (N, channels, H, W); rows of arrays are float32
    labels: Tensor  # int64 (N,), or multi-hot, bool (N, num_classes)
    indices: Tensor  # int64 (N,), into the source
    bad: list[BadImage] = field(default_factory=list)

    def __reduce__(self) -> Any:
        """Pickles for another process: pixels stay in shared memory, the rest is copied."""
        images: Tensor | np.ndarray = self.images
        if len(self.images) and not self.images.is_shared():
            images = self.images.permute(0, 2, 3, 1).numpy()
        return _received, (images, self.labels.numpy(), self.indices.numpy(), self.bad)

    def pin_memory(self) -> Batch:
        images, labels = self.images.pin_memory(), self.labels.pin_memory()
        return replace(self, images=images, labels=labels)

    def to(self, device: torch.device) -> Batch:
        # Copies to an Apple GPU may read memory that has been freed (pytorch/pytorch#189690).
        does_not_wait = device.type == "cuda"
        images, labels = (
            part.to(device, non_blocking=does_not_wait) for part in (self.images, self.labels)
        )
        return replace(self, images=images, labels=labels)


def _received(images: Any, labels: np.ndarray, indices: np.ndarray, bad: list[BadImage]) -> Batch:
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Batch(images, torch.from_numpy(labels), torch.from_numpy(indices), bad)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields the batches on the device; the next is copied while the GPU computes."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream = torch.cuda.Stream(device)
    waiting: tuple[Batch, torch.cuda.Event] | None = None
    for batch in chain(batches, [None]):
        following = None
        if batch is not None:
            copied = torch.cuda.Event()
            with torch.cuda.stream(stream):
                following = batch.to(device), copied
                copied.record(stream)
        if waiting is not None:
            ready, copied = waiting
            present = torch.cuda.current_stream(device)
            present.wait_event(copied)
            ready.images.record_stream(present)
            ready.labels.record_stream(present)
            yield ready
        waiting = following


def joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    images, labels, indices = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("images", "labels", "indices")
    )
    return Batch(images, labels, indices, [image for part in parts for image in part.bad])


def collate(samples: list[Sample]) -> Batch:
    """Collates samples into a batch; those without pixels appear only in `bad`."""
    good = [(pixels, label, index) for pixels, label, index, _ in samples if pixels is not None]
    bad = [image for sample in samples for image in sample[3]]
    images, labels, indices = zip(*good, strict=True) if good else ((), (), ())
    # Channels stay last in memory, which avoids another copy.
    stacked = _stacked(images).permute(0, 3, 1, 2) if images else _NONE
    labels, indices = torch.from_numpy(np.array(labels)), torch.tensor(indices).long()
    labels = labels if labels.dim() == 2 else labels.long()
    return Batch(stacked, labels, indices, bad)


def _stacked(images: tuple[np.ndarray, ...]) -> Tensor:
    num_bytes, shape = len(images) * images[0].nbytes, (len(images), *images[0].shape)
    dtype = torch.from_numpy(np.empty(0, images[0].dtype)).dtype
    # A worker process writes the pixels where the main process reads them, if there is room.
    if get_worker_info() is not None and workers.is_room_for(num_bytes):
        with contextlib.suppress(RuntimeError, OSError):  # another process took the free memory
            storage = torch.UntypedStorage._new_shared(num_bytes)
            shared = torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # pyright: ignore
            np.stack(images, out=shared.numpy())
            return shared
    return torch.from_numpy(np.stack(images))


def training_batches(
    source: Source,
    preprocessing: Preprocessing,
    transform: TrainingTransform,
    order: Order,
    steps: range,
    *,
    num_workers: int | None = None,
    timeout: float = TIMEOUT,
    device: torch.device = CPU,
) -> Generator[Batch, None, None]:
    """Yields the batches of some steps, on the device; a step is the same from any start.

    A bad image is replaced by the next good one and listed in `Batch.bad`; a worker that dies, or
    gives no batch for `timeout` seconds (0: forever), raises an error that names it.
    """
    images = Images(source, transform, preprocessing, order.seed)
    # In the main process: every worker would otherwise hold the order of all images.
    places = order.places(steps, source.labels)
    num_workers = choose_workers(num_workers, source, preprocessing, 1)  # decodes during the step
    own = order.batch_size // order.world_size
    size, batch_bytes = own + order.with_neighbour, own * _image_bytes(preprocessing)
    # Workers share a large batch: the first comes earlier, and less is in memory at once.
    number = min(own, math.ceil(batch_bytes / LARGEST_PART))
    parts = (
        step[size * part // number : size * (part + 1) // number]
        for step in places
        for part in range(number)
    )
    ahead = max(2, math.ceil(2 * number / max(1, num_workers)))  # two batches are being loaded
    loaded = load(
        *(images, parts, num_workers, batch_bytes // number, timeout),
        pin_memory=device.type == "cuda",
        ahead=ahead,
    )
    moved = on_device(loaded, device)
    for first in moved:
        batch = joined([first, *islice(moved, number - 1)])
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
    """Yields every image once, in order; those that cannot be decoded are only in `Batch.bad`."""
    check_input(source, preprocessing)
    num_workers = choose_workers(num_workers, source, preprocessing)
    batch_bytes = min(batch_size, len(source)) * _image_bytes(preprocessing)
    images = Images(source, functools.partial(_for_evaluation, preprocessing), preprocessing)
    batches = BatchSampler(range(len(source)), int(batch_size), drop_last=False)
    return load(images, batches, num_workers, batch_bytes, timeout)


def _image_bytes(preprocessing: Preprocessing) -> int:
    height, width = preprocessing.image_size
    return height * width * preprocessing.channels * (4 if preprocessing.kind == "arrays" else 1)


class Images(Dataset[Sample]):
    """A source as a DataLoader data set, with a table of what each worker is doing."""

    def __init__(
        self,
        source: Source,
        transform: Callable[..., Any],
        rules: Preprocessing | None = None,
        seed: int | None = None,
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.channels = 3 if rules is None else rules.channels
        self.exif_orientation = rules is None or rules.exif_orientation
        self.are_arrays = array_shape(source) is not None
        # Per worker: process id, current image (-1: none), start time (ns).
        self.watched = torch.empty(0, 3, dtype=torch.int64)

    def __getitem__(self, place: Any) -> Sample:
        """Returns the image at an index; in training the first from there that can be decoded."""
        bad: list[BadImage] = []
        if self.seed is None:
            return self.decoded(place, bad), self.source.labels[place], place, bad
        epoch, index, *more = place
        for step in range(len(self.source)):
            chosen = (index + step) % len(self.source)
            random = generator(self.seed, SAMPLE, epoch, index, *more)
            pixels = self.decoded(chosen, bad, random)
            if pixels is not None:
                return pixels, self.source.labels[chosen], chosen, bad
        return None, 0, index, bad

    def decoded(self, index: int, bad: list[BadImage], *random: np.random.Generator) -> Any:
        """Returns the transformed image, or a row of an array; None after adding it to `bad`."""
        name = self.source.item_name(index)
        worker = get_worker_info()
        if worker is not None:
            self.watched.numpy()[worker.id] = (os.getpid(), index, time.monotonic_ns())
        try:
            if self.are_arrays:
                return array_row(self.source, index).transpose(1, 2, 0)
            data, upright = self.source.read(index), self.exif_orientation
            image = EncodedImage(data, name, self.channels, exif_orientation=upright)
            return self.transform(image, *random)
        except UserError as error:
            bad.append(BadImage(index, name, error.what))
            return None
        finally:
            if worker is not None:
                self.watched.numpy()[worker.id, 1] = -1

    def suspect(self, message: str) -> str:
        """Returns which worker a DataLoader error refers to, and its current image."""
        table, ids = self.watched.tolist(), [int(number) for number in re.findall(r"\d+", message)]
        # A timeout names no worker: take the longest-running.
        known = [
            (start, number, index)
            for number, (process, index, start) in enumerate(table)
            if (process in ids if ids else index >= 0)
        ]
        if not known:
            return f"a worker process, {'before its first image' if ids else 'between two images'}"
        _, number, index = min(known)
        what = f"at {self.source.item_name(index)}" if index >= 0 else "between two images"
        return f"worker process {number}, {what}"


def _for_evaluation(preprocessing: Preprocessing, image: EncodedImage) -> np.ndarray:
    return resize_for_evaluation(image.decode(), preprocessing)


def load(
    images: Images,
    batches: Iterable[Iterable[Any]],
    num_workers: int,
    batch_bytes: int = 0,
    timeout: float = TIMEOUT,
    *,
    pin_memory: bool = False,
    ahead: int = 2,
    collate_fn: Callable[[list[Sample]], Any] | None = None,
) -> Iterator[Any]:
    """Yields batches of images, loaded by worker processes if there are any, so many ahead."""
    between("num_workers", num_workers, 0, most_workers())
    num_workers = workers.workers_that_start(num_workers, batch_bytes, ahead)
    closing = torch.zeros(1, dtype=torch.uint8)
    if num_workers:
        workers.check_guard()
        images.watched = torch.full((num_workers, 3), -1, dtype=torch.int64).share_memory_()
        closing = closing.share_memory_()
        atexit.register(closing.fill_, 1)  # before multiprocessing stops the workers
    with warnings.catch_warnings():
        # More workers than cores are the user's choice; workers use no threads of this process.
        warnings.filterwarnings("ignore", message="This DataLoader will create|.*use of fork")
        loader: Iterable[Any] = DataLoader(
            images,
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]  (any iterable of lists)
            num_workers=num_workers,
            collate_fn=collate_fn or collate,
            timeout=1.0 if num_workers else 0,  # between looks at the workers
            worker_init_fn=functools.partial(workers.start_worker, images.watched, closing),
            multiprocessing_context=workers.worker_context() if num_workers else None,
            pin_memory=pin_memory,
            prefetch_factor=ahead if num_workers else None,
        )
        with workers.on_child_end(signal.SIG_DFL), workers.starting():
            loaded = iter(loader)
    return _named_failures(images, loaded, timeout, closing)


def _named_failures(
    images: Images, batches: Iterator[Any], timeout: float, closing: Tensor
) -> Iterator[Any]:
    try:
        while (batch := _wait(batches, timeout)) is not None:
            yield batch
    except RuntimeError as error:
        message = str(error)
        if message.startswith("DataLoader worker (pid"):
            what = f"{images.suspect(message)}, ended without a message: {message}"
            fix = "If memory is low, reduce batch_size or num_workers; otherwise inspect that image"
        elif message.startswith(_NONE_CAME):
            what = f"no batch for {timeout:g} seconds; {images.suspect('')}"
            fix = "For a slow disk or network, raise timeout (training: data.timeout); 0: no limit"
        else:
            raise
        raise UserError(what, where=images.source.name, fix=fix) from error
    finally:
        closing.fill_(1)
        atexit.unregister(closing.fill_)


def _wait(batches: Iterator[Any], timeout: float) -> Any:
    """Returns the next batch, None at the end; checks every second whether a worker has died."""
    begun = time.monotonic()
    # torch raises wherever the main process is when a worker dies, mostly in the model; checking
    # only here makes it possible to name the worker.
    with workers.on_child_end(workers.raise_if_one_died):
        while True:
            workers.raise_if_one_died()
            try:
                return next(batches, None)
            except RuntimeError as error:
                waited = time.monotonic() - begun
                if not str(error).startswith(_NONE_CAME) or 0 < timeout <= waited:
                    raise
            except (ConnectionError, EOFError):  # a worker died while sending a batch
                for _ in range(50):  # until the system reports its exit
                    workers.raise_if_one_died()
                    time.sleep(0.1)
                raise
            workers.while_waiting.get()()


def most_workers() -> int:
    return max(64, 8 * (os.cpu_count() or 1))


def choose_workers(
    num_workers: int | None, source: Source, preprocessing: Preprocessing, least: int = 0
) -> int:
    if num_workers is not None:
        return num_workers
    if preprocessing.kind == "arrays":
        return 0
    height, width = preprocessing.image_size
    if len(source) * height * width < 2_000_000:  # starting them would take longer, about 0.1 s
        return least
    cores = cores_of_process()
    return min(32, max(1, cores - 1)) if torch.cuda.is_available() else min(8, cores)
