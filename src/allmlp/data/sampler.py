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


def balanced_order(seed: int, labels: np.ndarray) -> Callable[[int], np.ndarray]:
    """Returns the order of an epoch: every class has the same number of places, but for one."""
    by_class = np.argsort(labels, kind="stable").astype(np.int64)
    ends = np.cumsum(np.unique(labels, return_counts=True)[1])
    members = np.split(by_class, ends[:-1])

    @functools.lru_cache(maxsize=2)
    def order_of(epoch: int) -> np.ndarray:
        random, classes = generator(seed, ORDER, epoch), len(members)
        places = np.full(classes, len(labels) // classes)
        places[random.permutation(classes)[: len(labels) % classes]] += 1
        drawn = []
        for own, count in zip(members, places.tolist(), strict=True):
            often, rest = divmod(count, len(own))
            drawn += [np.tile(own, often), random.permutation(own)[:rest]]
        order = np.concatenate(drawn)
        random.shuffle(order)
        return order

    return order_of


@dataclass(frozen=True, kw_only=True)
class Order:
    seed: int  # of the order and of each image's random numbers
    batch_size: int  # summed over ranks; a multiple of `world_size`
    rank: int = 0
    world_size: int = 1
    with_neighbour: bool = False  # append the image before, which mixup blends with
    balanced: bool = False  # draw all classes equally often, see `balanced_order`

    def places(self, steps: range, labels: np.ndarray) -> Iterator[list[tuple[int, ...]]]:
        """Yields (epoch, index) of each step's images, with the place in the epoch if balanced."""
        order_of = functools.partial(epoch_order, self.seed, num_images=len(labels))
        if self.balanced:
            order_of = balanced_order(self.seed, labels)
        size, own = self.batch_size, self.batch_size // self.world_size
        start = self.rank * own  # a rank reads consecutive positions
        before = [(start - 1) % size] if self.with_neighbour else []  # cyclic over the batch
        for step in steps:
            positions = [step * size + at for at in (*range(start, start + own), *before)]
            places = [divmod(position, len(labels)) for position in positions]
            yield [
                # An image that comes again in an epoch has other random numbers.
                (epoch, int(order_of(epoch)[place]), *[place] * self.balanced)
                for epoch, place in places
            ]
