"""A batch of images: collated, pinned, and copied to the device while the model computes.

Legend: N batch, H W pixels; an image is uint8 (H, W, channels).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allmlp.data.source import BadImage

# One image on its way into a batch: pixels (None if bad), label, index, what was bad.
Sample = tuple[np.ndarray | None, int, int, list[BadImage]]


@dataclass
class Batch:
    """Images for the model.

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

    def __reduce__(self) -> Any:
        """Sent to another process, pixels in shared memory stay there; the rest is copied."""
        images: Tensor | np.ndarray = self.images
        if len(self.images) and not self.images.is_shared():
            images = self.images.permute(0, 2, 3, 1).numpy()
        return _received, (images, self.labels.numpy(), self.indices.numpy(), self.bad)

    def pin_memory(self) -> Batch:
        """Returns the batch in page-locked memory, from which a GPU copies asynchronously."""
        images, labels = self.images.pin_memory(), self.labels.pin_memory()
        return replace(self, images=images, labels=labels)

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with images and labels on the device."""
        images = self.images.to(device, non_blocking=True)
        return replace(self, images=images, labels=self.labels.to(device, non_blocking=True))


def _received(
    images: Tensor | np.ndarray, labels: np.ndarray, indices: np.ndarray, bad: list[BadImage]
) -> Batch:
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Batch(images, torch.from_numpy(labels), torch.from_numpy(indices), bad)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields the batches with images and labels on the device.

    To a GPU the next batch is copied on a stream of its own while the model computes on this one;
    that needs batches in page-locked memory (`pin_memory`).
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


def collate(samples: list[Sample]) -> Batch:
    """Returns the samples as one batch; those without pixels are only in `bad`."""
    good = [(pixels, label, index) for pixels, label, index, _ in samples if pixels is not None]
    bad = [image for sample in samples for image in sample[3]]
    images, labels, indices = zip(*good, strict=True) if good else ((), (), ())
    # Channels stay last in memory: moving them here would copy every image once more.
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) if images else torch.empty(0)
    labels, indices = torch.tensor(labels).long(), torch.tensor(indices).long()
    return Batch(stacked.to(torch.uint8), labels, indices, bad)
