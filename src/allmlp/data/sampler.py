"""Stateless sampling: which images a step reads, and their random generators.

Training reads an endless sequence of positions, in which every epoch is a new permutation; step n
reads positions n * batch_size to (n + 1) * batch_size - 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

# Uses of a generator, so that no two uses share random numbers.
ORDER, SAMPLE, STEP = range(3)


def generator(seed: int, use: int, *numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, use, *numbers))))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    kind = np.uint32 if num_images <= 2**32 else np.int64  # the same order, half the memory
    order = np.arange(num_images, dtype=kind)
    generator(seed, ORDER, epoch).shuffle(order)
    return order


def locate(seed: int, position: int, num_images: int) -> tuple[int, int]:
    """Returns (epoch, index) for a position in the endless sequence."""
    epoch, place = divmod(position, num_images)
    return epoch, int(epoch_order(seed, epoch, num_images)[place])


class BalancedOrder:
    """An order in which every class has the same number of places in an epoch, but for one."""

    def __init__(self, seed: int, labels: np.ndarray) -> None:
        self.seed, self.num_images = seed, len(labels)
        order = np.argsort(labels, kind="stable").astype(np.int64)
        ends = np.cumsum(np.unique(labels, return_counts=True)[1])
        self.members = np.split(order, ends[:-1])
        self.epoch_order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        random, classes = generator(self.seed, ORDER, epoch), len(self.members)
        places = np.full(classes, self.num_images // classes)
        places[random.permutation(classes)[: self.num_images % classes]] += 1
        drawn = []
        for own, count in zip(self.members, places.tolist(), strict=True):
            often, rest = divmod(count, len(own))
            drawn += [np.tile(own, often), random.permutation(own)[:rest]]
        order = np.concatenate(drawn)
        random.shuffle(order)
        return order

    def locate(self, position: int) -> tuple[int, int, int]:
        """Returns (epoch, index, place): an image that comes again has other random numbers."""
        epoch, place = divmod(position, self.num_images)
        return epoch, int(self.epoch_order(epoch)[place]), place


@dataclass(frozen=True, kw_only=True)
class Order:
    seed: int  # of the order and of each image's random numbers
    batch_size: int  # summed over ranks; a multiple of `world_size`
    rank: int = 0
    world_size: int = 1
    with_neighbour: bool = False  # append the image before, which mixup blends with
    balanced: bool = False  # draw all classes equally often, see `BalancedOrder`

    def places(self, steps: range, labels: np.ndarray) -> Iterator[list[tuple[int, ...]]]:
        place_of: Callable[[int], tuple[int, ...]]
        place_of = functools.partial(locate, self.seed, num_images=len(labels))
        if self.balanced:
            place_of = BalancedOrder(self.seed, labels).locate
        return ([place_of(at) for at in batch] for batch in self.positions(steps))

    def positions(self, steps: range) -> Iterator[list[int]]:
        """Yields the positions that the rank reads: consecutive parts of the batches."""
        size, own = self.batch_size, self.batch_size // self.world_size
        start = self.rank * own
        before = [(start - 1) % size] if self.with_neighbour else []  # cyclic over the batch
        for step in steps:
            yield [step * size + at for at in (*range(start, start + own), *before)]


def sample_generator(seed: int, epoch: int, index: int, *place: int) -> np.random.Generator:
    return generator(seed, SAMPLE, epoch, index, *place)


def step_generator(seed: int, step: int) -> np.random.Generator:
    return generator(seed, STEP, step)
