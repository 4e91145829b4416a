"""All pairs of 64-bit hashes within a Hamming distance, without comparing all pairs.

Multi-index hashing: the bits are cut into bands. Where two hashes differ in at most `distance` bits
they differ in some band b by at most t_b bits, if the sum of all (t_b + 1) is above `distance`: the
pigeonhole principle. So each band is an index, and a hash is compared only with those whose band is
its own with at most t_b bits flipped. Equal hashes are one entry of the index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

_BITS = 64
_MANY = 500_000  # different hashes, from which three wide bands are faster than four narrow ones
_BLOCK = 1 << 20  # comparisons at a time


@dataclass(frozen=True)
class NearPairs:
    """Pairs of places in the array of hashes.

    Attributes:
        first, second: int64 (num_pairs,); first < second, ordered by first, then by second.
        distance: all pairs within this many bits are there; less than was asked for where that
            would have been more than the limit.
        left_out: pairs of equal hashes that are not there: more than the limit at distance 0.
    """

    first: np.ndarray
    second: np.ndarray
    distance: int
    left_out: int


def find_near_pairs(
    hashes: np.ndarray, distance: int, most: int, num_bands: int | None = None
) -> NearPairs:
    """Returns all pairs of hashes that differ in at most `distance` bits.

    Where these are more than `most`, the distance is lowered until they are not. Where equal hashes
    alone make more, each is paired with a few of those that follow it. Both are told.

    Args:
        hashes: uint64 (num_hashes,).
        distance: bits, at least 0.
        most: number of pairs, at least 1.
        num_bands: how many bands to index; None chooses.
    """
    unique, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    members = _Members(np.argsort(inverse, kind="stable"), counts)
    num_equal = int((counts * (counts - 1) // 2).sum())
    search = _Search(unique, counts, distance, most - num_equal)
    if distance > 0 and num_equal <= most and len(unique) > 1:
        search.run(num_bands or (4 if len(unique) < _MANY else 3))
    pairs, left_out = _pairs_of_equal(members, most if num_equal > most else None)
    one, other = search.found()
    single = (counts[one] == 1) & (counts[other] == 1)
    pairs.append(np.stack([members.first(one[single]), members.first(other[single])], axis=1))
    for a, b in zip(one[~single].tolist(), other[~single].tolist(), strict=True):
        grid = np.meshgrid(members[a], members[b], indexing="ij")
        pairs.append(np.stack(grid, axis=-1).reshape(-1, 2))
    joined = np.sort(np.concatenate(pairs), axis=1)
    joined = joined[np.lexsort((joined[:, 1], joined[:, 0]))]
    reached = search.distance if num_equal <= most else 0
    return NearPairs(joined[:, 0], joined[:, 1], reached, left_out)


class _Members:
    """Which places of the array have each of the different hashes."""

    def __init__(self, order: np.ndarray, counts: np.ndarray) -> None:
        self._order, self._counts = order, counts
        self._starts = np.cumsum(counts) - counts

    def __getitem__(self, group: int) -> np.ndarray:
        start = self._starts[group]
        return self._order[start : start + self._counts[group]]

    def first(self, groups: np.ndarray) -> np.ndarray:
        return self._order[self._starts[groups]]

    def several(self) -> list[np.ndarray]:
        return [self[group] for group in np.flatnonzero(self._counts > 1).tolist()]


def _pairs_of_equal(members: _Members, most: int | None) -> tuple[list[np.ndarray], int]:
    """Pairs inside each group of equal hashes, and how many are left out to keep below `most`."""
    groups = members.several()
    following = None  # how many of those behind it each is paired with
    if most is not None:
        following = max(1, most // sum(len(group) for group in groups))
    pairs, left_out = [], 0
    for group in groups:
        size = len(group)
        for step in range(1, size if following is None else min(size, following + 1)):
            pairs.append(np.stack([group[:-step], group[step:]], axis=1))
        if following is not None and size > following + 1:
            rest = size - following
            left_out += rest * (rest - 1) // 2
    return pairs, left_out


class _Search:
    """The search among different hashes, with a limit on what it may find."""

    def __init__(self, hashes: np.ndarray, counts: np.ndarray, distance: int, room: int) -> None:
        self.distance = distance
        self._hashes, self._counts, self._room = hashes, counts, room
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._weights = np.zeros(distance + 1)  # pairs found at each distance, equal ones counted

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """The pairs within the distance as it is in the end."""
        if not self._parts:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        one, other, bits = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        near = bits <= self.distance
        return one[near], other[near]

    def run(self, num_bands: int) -> None:
        done: list[tuple[np.uint64, int]] = []
        for shift, width, radius in _bands(self.distance, num_bands):
            band = np.uint64(((1 << width) - 1) << shift)
            keys = ((self._hashes & band) >> np.uint64(shift)).astype(np.int64)
            order = np.argsort(keys, kind="stable")
            for one, other in _candidates(keys[order], width, radius):
                self._take(order[one], order[other], done)
            done.append((band, radius))

    def _take(self, one: np.ndarray, other: np.ndarray, done: list[tuple[np.uint64, int]]) -> None:
        different = self._hashes[one] ^ self._hashes[other]
        bits = np.bitwise_count(different)
        near = np.flatnonzero(bits <= self.distance)
        for band, radius in done:  # what an earlier band has found already
            near = near[np.bitwise_count(different[near] & band) > radius]
        if not len(near):
            return
        one, other, bits = one[near], other[near], bits[near]
        self._parts.append((one, other, bits))
        weights = self._counts[one].astype(float) * self._counts[other]
        self._weights += np.bincount(bits, weights, minlength=len(self._weights))
        before = self.distance
        while self.distance and self._weights[: self.distance + 1].sum() > self._room:
            self.distance -= 1
        if self.distance < before:
            one, other = self.found()
            kept = np.bitwise_count(self._hashes[one] ^ self._hashes[other])
            self._parts = [(one, other, kept)]


def _bands(distance: int, num_bands: int) -> Iterator[tuple[int, int, int]]:
    """Yields (lowest bit, number of bits, radius) of each band: sum of (radius + 1) > distance."""
    shift = 0
    for band in range(num_bands):
        width = _BITS // num_bands + (band < _BITS % num_bands)
        radius = (distance + 1) // num_bands - 1 + (band < (distance + 1) % num_bands)
        if radius >= 0:
            yield shift, width, radius
        shift += width


def _candidates(
    keys: np.ndarray, width: int, radius: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the places of all pairs of sorted keys that differ in at most `radius` bits, once."""
    sizes = np.bincount(keys, minlength=1 << width).astype(np.int32)
    starts = (np.cumsum(sizes) - sizes).astype(np.int32)
    places = np.arange(len(keys))
    # Equal keys: each with those behind it.
    yield from _expand(places, places + 1, (starts + sizes)[keys] - places - 1)
    for flips in range(1, radius + 1):
        for chosen in combinations(range(width), flips):
            mask = sum(1 << bit for bit in chosen)
            partners = keys ^ mask
            partner_sizes = sizes[partners]
            left = np.flatnonzero((partner_sizes > 0) & (keys < partners))
            yield from _expand(left, starts[partners[left]], partner_sizes[left])


def _expand(
    left: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields each place of `left` with each of its partners, starts to starts + sizes."""
    ends = np.cumsum(sizes, dtype=np.int64)
    at = 0
    while at < len(left):
        before = int(ends[at - 1]) if at else 0
        stop = max(int(np.searchsorted(ends, before + _BLOCK, side="right")), at + 1)
        number = sizes[at:stop]
        offsets = np.arange(int(ends[stop - 1]) - before)
        offsets -= np.repeat(ends[at:stop] - number - before, number)
        yield np.repeat(left[at:stop], number), np.repeat(starts[at:stop], number) + offsets
        at = stop
