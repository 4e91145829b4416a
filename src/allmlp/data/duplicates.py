"""Exact and near duplicates inside and across the splits of a data set, and what to exclude.

Near: pairs whose perceptual hashes differ in at most `DISTANCE` bits, and whose thumbnails, less
the plane that fits them best, correlate to `CORRELATION`. An image with hardly any texture has no
stable hash, and one smaller than a thumbnail too few pixels: these are compared for equal pixels
only. The limits are from benchmarks/duplicates.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from allmlp.data.scan import THUMBNAIL, Scan, scan
from allmlp.data.source import Source

DISTANCE = 10  # bits of 64
CORRELATION = 0.93
LEAST_TEXTURE = 3.0  # grey levels, root mean square, of the thumbnail less its plane
KINDS = ("same file", "same pixels", "near")
NEAR = KINDS.index("near")
_PROTECTED = ("test", "validation")  # no image of these is excluded because of one further right
_BATCH = 2048  # thumbnails compared at a time
_BLOCK = 2**18  # hashes compared at a time


@dataclass(frozen=True)
class DuplicatePair:
    """Two images by split and index; `difference` is 1 - correlation, 0 for equal pixels."""

    first: tuple[str, int]
    second: tuple[str, int]
    kind: str
    difference: float = 0.0


@dataclass(frozen=True)
class Duplicates:
    """The pairs of duplicates of a data set; images are numbered through all its splits.

    An exact copy is paired with the first image of its kind only, and near copies are pairs of such
    first images.
    """

    splits: Mapping[str, Source]
    first: np.ndarray  # int64 (num_pairs,)
    second: np.ndarray  # above `first`
    kind: np.ndarray  # uint8 (num_pairs,), indices into `KINDS`
    difference: np.ndarray  # float32 (num_pairs,), 1 - correlation of the thumbnails
    num_plain: int = 0  # images with too little texture or too few pixels for near duplicates
    # Bits within which near duplicates were looked for: fewer if there would be too many
    # candidates, -1 if even of equal hashes.
    distance: int = DISTANCE

    def __len__(self) -> int:
        return len(self.first)

    @cached_property
    def offsets(self) -> np.ndarray:
        """The number of the first image of each split, and of all, int64 (num_splits + 1,)."""
        return np.cumsum([0, *map(len, self.splits.values())])

    def locate(self, image: int) -> tuple[str, int]:
        """Returns (split, index) of an image."""
        place = int(np.searchsorted(self.offsets, image, side="right")) - 1
        return list(self.splits)[place], int(image - self.offsets[place])

    def pair(self, number: int) -> DuplicatePair:
        """Returns one of the pairs."""
        ends = self.locate(int(self.first[number])), self.locate(int(self.second[number]))
        return DuplicatePair(*ends, KINDS[self.kind[number]], float(self.difference[number]))

    def class_of(self, split: str, index: int) -> str:
        """Returns the class of an image."""
        source = self.splits[split]
        return source.class_names[int(source.labels[index])]

    def other_label(self) -> np.ndarray:
        """Returns which pairs are of different classes, bool (num_pairs,)."""
        numbers: dict[str, int] = {}
        parts = [np.empty(0, dtype=np.int64)]
        for source in self.splits.values():
            own = [numbers.setdefault(name, len(numbers)) for name in source.class_names]
            parts.append(np.array(own, dtype=np.int64)[source.labels])
        labels = np.concatenate(parts)
        return labels[self.first] != labels[self.second]

    def most_different_first(self) -> np.ndarray:
        """Returns the numbers of all pairs by falling difference, int64 (num_pairs,)."""
        return np.lexsort((np.arange(len(self)), self.kind == 0, -self.difference))

    @cached_property
    def partners(self) -> dict[int, dict[str, list[int]]]:
        """The duplicates of each image that has some, near or exact, by split and in order.

        Copies of one image share one entry, so each finds itself in it too.
        """
        copies: dict[int, list[int]] = {}
        near: dict[int, list[int]] = {}
        for one, other, kind in zip(*map(list, (self.first, self.second, self.kind)), strict=True):
            if kind == NEAR:
                near.setdefault(int(one), []).append(int(other))
                near.setdefault(int(other), []).append(int(one))
            else:
                copies.setdefault(int(one), [int(one)]).append(int(other))
        found: dict[int, dict[str, list[int]]] = {}
        for original in {*copies, *near}:
            alike = [original, *near.get(original, [])]
            images = np.sort([copy for at in alike for copy in copies.get(at, [at])])
            ends = np.searchsorted(images, self.offsets)
            parts = {name: images[ends[n] : ends[n + 1]] for n, name in enumerate(self.splits)}
            entry = {name: part.tolist() for name, part in parts.items() if len(part)}
            found.update(dict.fromkeys(copies.get(original, [original]), entry))
        return found

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns for each split how many of its images have another duplicate in each split."""
        counts = {split: dict.fromkeys(self.splits, 0) for split in self.splits}
        for image, partners in self.partners.items():
            own = self.locate(image)[0]
            for split, there in partners.items():
                counts[own][split] += len(there) > 1 or there[0] != image
        return counts

    def to_exclude(self) -> Iterator[DuplicatePair]:
        """Yields the images to leave out so that no duplicates remain, each behind the one to keep.

        Images of train that duplicate one of validation or test, images of validation that
        duplicate one of test, and those of which an earlier one in the split is a duplicate and
        stays. (The paper removes near duplicates of its test images from the pre-training data.)
        """
        is_copy = self.kind != NEAR
        copies = zip(self.second[is_copy], self.first[is_copy], self.kind[is_copy], strict=True)
        original = {int(copy): (int(first), int(kind)) for copy, first, kind in copies}
        gone: set[int] = set()
        for image in sorted(self.partners):
            split = self.locate(image)[0]
            partners = self.partners[image]
            rank = _PROTECTED.index(split) if split in _PROTECTED else len(_PROTECTED)
            above = [partners[name][0] for name in _PROTECTED[:rank] if name in partners]
            earlier = (other for other in partners[split] if other < image and other not in gone)
            kept = above[0] if above else next(earlier, None)
            if kept is None:
                continue
            gone.add(image)
            (one, kind), (other, its_kind) = (original.get(at, (at, 0)) for at in (kept, image))
            kind = max(kind, its_kind) if one == other else NEAR
            yield DuplicatePair(self.locate(kept), self.locate(image), KINDS[kind])


def find_duplicates(
    splits: Mapping[str, Source],
    *,
    near: bool = True,
    num_workers: int | None = None,
    scans: dict[str, Scan] | None = None,
) -> Duplicates:
    """Returns the duplicates among all images; `scans` are those of the splits, if made already."""
    scans = scans or scan(splits, num_workers=num_workers)
    facts = np.concatenate([scans[name].facts for name in splits])
    usable = np.flatnonzero(facts["readable"])
    original = np.arange(len(facts))
    _, firsts, inverse = np.unique(
        facts["pixel_digest"][usable], return_index=True, return_inverse=True
    )
    original[usable] = usable[firsts][inverse]
    second = np.flatnonzero(original != np.arange(len(facts)))
    first = original[second]
    kind = (facts["file_digest"][first] != facts["file_digest"][second]).astype(np.uint8)
    difference = np.zeros(len(first), dtype=np.float32)
    distance, num_plain = DISTANCE, 0
    if near:
        thumbnails = facts["thumbnail"]
        comparable = np.zeros(len(facts), dtype=bool)
        for at in (usable[start : start + _BATCH] for start in range(0, len(usable), _BATCH)):
            texture = np.sqrt(np.mean(residuals(thumbnails[at]) ** 2, axis=1))
            comparable[at] = texture >= LEAST_TEXTURE
        comparable &= np.minimum(facts["height"], facts["width"]) >= THUMBNAIL
        num_plain = int((~comparable[usable]).sum())
        textured = np.flatnonzero(comparable & (original == np.arange(len(facts))))
        most = max(2_000_000, 4 * len(facts))
        one, other, distance = near_pairs(facts["hash"][textured], DISTANCE, most)
        one, other = textured[one], textured[other]
        apart = np.empty(len(one), dtype=np.float32)
        for start in range(0, len(one), _BATCH):
            batch = slice(start, start + _BATCH)
            apart[batch] = 1 - correlation(thumbnails[one[batch]], thumbnails[other[batch]])
        alike = apart <= 1 - CORRELATION
        first = np.concatenate([first, one[alike]])
        second = np.concatenate([second, other[alike]])
        kind = np.concatenate([kind, np.full(alike.sum(), NEAR, dtype=np.uint8)])
        difference = np.concatenate([difference, np.maximum(apart[alike], 0)])
    order = np.lexsort((second, first))
    first, second, kind, difference = (c[order] for c in (first, second, kind, difference))
    return Duplicates(splits, first, second, kind, difference, num_plain, distance)


def near_pairs(hashes: np.ndarray, distance: int, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns all pairs of hashes, uint64 (n,), that differ in at most `distance` bits, in order.

    If these are more than `most`, the distance is lowered until they are not: it is returned too.
    Two such hashes differ in at most `radius` bits of one of four bands, if the radii plus one add
    up to more than `distance`: only those are compared.
    """
    pairs, number = [np.empty((2, 0), dtype=np.int64)], 0
    for band in range(4 if distance >= 0 else 0):
        radius = (distance + 4 - band) // 4 - 1
        keys = ((hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        ordered = hashes[order]  # hashes that are compared lie close together
        for one, other in _candidates(keys[order], radius):
            is_near = np.bitwise_count(ordered[one] ^ ordered[other]) <= distance
            pairs.append(np.sort([order[one[is_near]], order[other[is_near]]], axis=0))
            number += int(is_near.sum())
            if number > 4 * most:  # each is found in up to four bands
                return near_pairs(hashes, distance - 1, most)
    numbers = np.concatenate(pairs, axis=1)
    first, second = np.divmod(np.unique(numbers[0] * len(hashes) + numbers[1]), max(1, len(hashes)))
    if len(first) > most:
        return near_pairs(hashes, distance - 1, most)
    return first, second, distance


def _candidates(keys: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the places of all pairs of sorted 16-bit keys that differ in up to `radius` bits."""
    sizes = np.bincount(keys, minlength=2**16)
    starts = np.cumsum(sizes) - sizes
    places = np.arange(len(keys))
    for chosen in (c for flips in range(radius + 1) for c in combinations(range(16), flips)):
        partners = keys ^ sum(1 << bit for bit in chosen)
        left = np.flatnonzero((keys < partners) & (sizes[partners] > 0)) if chosen else places
        begin = starts[partners[left]] if chosen else places + 1  # of its partners
        number = (starts + sizes)[partners[left]] - begin
        ends = np.cumsum(number)
        at = 0
        while at < len(left):  # as many places at a time as have few enough partners
            before = int(ends[at - 1]) if at else 0
            stop = max(int(np.searchsorted(ends, before + _BLOCK, side="right")), at + 1)
            some = number[at:stop]
            offsets = np.arange(int(some.sum())) - np.repeat(np.cumsum(some) - some, some)
            yield np.repeat(left[at:stop], some), np.repeat(begin[at:stop], some) + offsets
            at = stop


def residuals(thumbnails: np.ndarray) -> np.ndarray:
    """Returns grey levels, float32 (N, 3 * 16 * 16): thumbnails less the planes that fit them best.

    Without it any two images of an even sky, or of one colour, would look alike.
    """
    samples = thumbnails.reshape(-1, THUMBNAIL**2, 3).transpose(0, 2, 1).astype(np.float32)
    return (samples - (samples @ _PLANE.T) @ _PLANE).reshape(-1, 3 * THUMBNAIL**2)


def _plane() -> np.ndarray:
    """An orthonormal basis of the planes over a thumbnail, float32 (3, 256)."""
    ramp = np.linspace(-1, 1, THUMBNAIL)
    across = np.tile(ramp, (THUMBNAIL, 1))
    basis = np.stack([np.ones_like(across), across, across.T]).reshape(3, -1)
    return (basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32)


_PLANE = _plane()


def correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns how alike images are, up to 1, float32 (N,), by their thumbnails."""
    a, b = residuals(one), residuals(other)
    scale = np.sqrt(np.einsum("np,np->n", a, a) * np.einsum("np,np->n", b, b))
    return np.einsum("np,np->n", a, b) / np.maximum(scale, 1e-6)
