"""Exact and near duplicates inside and across the splits of a data set.

Exact: equal files, or equal pixels once decoded. Near: the same picture encoded again, scaled,
lightened, or with a little cut off. Candidates are all pairs whose perceptual hashes differ in at
most `DISTANCE` bits. Each is then verified on pixels: the thumbnails of both, less the plane that
fits them best, must correlate to `CORRELATION`. A picture with hardly any texture has no stable
hash, and one smaller than a thumbnail too few pixels to tell: these are compared for equality only.
Mirrored and turned copies are not looked for.

The paper (section 3, after BiT) takes near duplicates of its test images out of the pre-training
data; `drop_list` says which images that would be. The limits are from benchmarks/duplicates.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from allmlp.data.hamming import find_near_pairs
from allmlp.data.items import BadImage, Source
from allmlp.data.scan import THUMBNAIL, Scan, read_thumbnails, residuals, scan

DISTANCE = 10  # bits of 64
CORRELATION = 0.93
LEAST_TEXTURE = 3.0  # grey levels, root mean square, of the thumbnail less its plane
KINDS = ("same file", "same pixels", "near")
NEAR = KINDS.index("near")
_MOST_THUMBNAILS = 200_000  # in memory at a time: 150 MB
_BATCH = 2048  # pairs compared at a time


@dataclass(frozen=True)
class DuplicatePair:
    """Two images, the earlier one first; `difference` is 1 - correlation, 0 where pixels equal."""

    first: tuple[str, int]
    second: tuple[str, int]
    kind: str
    difference: float


@dataclass(frozen=True)
class Duplicates:
    """The duplicates of a data set; images are numbered through all its splits.

    Attributes:
        splits: the data.
        first, second: int64 (num_pairs,); first < second. An exact copy is paired with the first
            image of its kind only, and near copies are pairs of such first images.
        kind: uint8 (num_pairs,), an index into `KINDS`.
        difference: float32 (num_pairs,), 1 - correlation of the thumbnails.
        original: int64 (num_images,), the first image with the same pixels: often itself.
        unreadable: by split; they are compared with nothing.
        num_plain: images with too little texture or too few pixels, compared for equality only.
        distance: bits within which near duplicates were looked for; below `DISTANCE` where so many
            pictures are alike that there would be too many candidates.
        unchecked: pairs of pictures with equal hashes that were not compared, for the same reason.
    """

    splits: Mapping[str, Source]
    first: np.ndarray
    second: np.ndarray
    kind: np.ndarray
    difference: np.ndarray
    original: np.ndarray
    unreadable: dict[str, list[BadImage]]
    num_plain: int = 0
    distance: int = DISTANCE
    unchecked: int = 0

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

    def split_of(self, images: np.ndarray) -> np.ndarray:
        """Returns the split of each image as an index into `splits`, int64."""
        return np.searchsorted(self.offsets, images, side="right") - 1

    def kind_of(self, one: int, other: int) -> str:
        """Returns how two images that are duplicates are alike, one of `KINDS`."""
        if self.original[one] != self.original[other]:
            return KINDS[NEAR]
        return KINDS[max(self._copy_kind.get(one, 0), self._copy_kind.get(other, 0))]

    @cached_property
    def _copy_kind(self) -> dict[int, int]:
        exact = self.kind != NEAR
        return dict(zip(self.second[exact].tolist(), self.kind[exact].tolist(), strict=True))

    def pair(self, number: int) -> DuplicatePair:
        """Returns one of the pairs."""
        ends = self.locate(int(self.first[number])), self.locate(int(self.second[number]))
        kind = KINDS[self.kind[number]]
        return DuplicatePair(*ends, kind, float(self.difference[number]))

    @cached_property
    def labels(self) -> np.ndarray:
        """The class of each image; equal names have equal numbers in all splits."""
        numbers: dict[str, int] = {}
        parts = [np.empty(0, dtype=np.int64)]
        for source in self.splits.values():
            own = [numbers.setdefault(name, len(numbers)) for name in source.class_names]
            parts.append(np.array(own, dtype=np.int64)[source.labels])
        return np.concatenate(parts)

    def other_label(self) -> np.ndarray:
        """Returns for each pair whether the two are of different classes, bool (num_pairs,)."""
        return self.labels[self.first] != self.labels[self.second]

    def most_different_first(self) -> np.ndarray:
        """Returns the numbers of all pairs, by falling difference, int64 (num_pairs,)."""
        return np.lexsort((np.arange(len(self)), self.kind == 0, -self.difference))

    @cached_property
    def partners(self) -> dict[int, dict[str, list[int]]]:
        """For each image that has duplicates, near or exact, these by split, in order.

        Copies of one image share one entry, so that each finds itself in it too.
        """
        copies: dict[int, list[int]] = {}
        near: dict[int, list[int]] = {}
        exact = self.kind != NEAR
        for one, other in zip(self.first[exact].tolist(), self.second[exact].tolist(), strict=True):
            copies.setdefault(one, [one]).append(other)
        for a, b in zip(self.first[~exact].tolist(), self.second[~exact].tolist(), strict=True):
            near.setdefault(a, []).append(b)
            near.setdefault(b, []).append(a)
        found: dict[int, dict[str, list[int]]] = {}
        for original in {*copies, *near}:
            alike = [original, *near.get(original, [])]
            images = np.sort([each for at in alike for each in copies.get(at, [at])])
            ends = np.searchsorted(images, self.offsets)
            entry = {
                name: images[start:stop].tolist()
                for name, start, stop in zip(self.splits, ends, ends[1:], strict=False)
                if stop > start
            }
            found.update(dict.fromkeys(copies.get(original, [original]), entry))
        return found

    def groups(self) -> list[list[int]]:
        """Returns the images that belong together, also by way of others; the largest first."""
        parent: dict[int, int] = {}

        def root(image: int) -> int:
            while parent.setdefault(image, image) != image:
                parent[image] = image = parent[parent[image]]
            return image

        for one, other in zip(self.first.tolist(), self.second.tolist(), strict=True):
            a, b = sorted((root(one), root(other)))
            parent[b] = a
        groups: dict[int, list[int]] = {}
        for image in sorted(parent):
            groups.setdefault(root(image), []).append(image)
        return sorted(groups.values(), key=len, reverse=True)

    def count_with(self, split: str, other: str) -> int:
        """Returns how many images of `split` have a duplicate, not themselves, in `other`."""
        count = 0
        for image, partners in self.partners.items():
            there = partners.get(other, [])
            if there and self.locate(image)[0] == split:
                count += len(there) > 1 or there[0] != image
        return count


def find_duplicates(
    splits: Mapping[str, Source],
    *,
    near: bool = True,
    num_workers: int | None = None,
    on_progress: Callable[[int], object] | None = None,
    scans: dict[str, Scan] | None = None,
) -> Duplicates:
    """Returns the exact duplicates, and the near ones, among all images of all splits.

    Args:
        splits: the data; numbering follows their order.
        near: look for near duplicates too.
        num_workers: processes that read; 0 reads in this one, None chooses.
        on_progress: is called with the number of images read since the last call.
        scans: of the same splits, where they have been read already.

    Raises:
        UserError: fewer than 0 workers.
    """
    if scans is None:
        scans = scan(splits, num_workers=num_workers, on_progress=on_progress)
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
    distance, unchecked, num_plain = DISTANCE, 0, 0
    if near:
        apart = usable[original[usable] == usable]
        comparable = facts["texture"] >= LEAST_TEXTURE
        comparable &= np.minimum(facts["height"], facts["width"]) >= THUMBNAIL
        num_plain = int((~comparable[usable]).sum())
        textured = apart[comparable[apart]]
        most = max(2_000_000, 4 * len(facts))
        candidates = find_near_pairs(facts["hash"][textured], DISTANCE, most)
        distance, unchecked = candidates.distance, candidates.left_out
        ends = textured[candidates.first], textured[candidates.second]
        one, other, apart_by = _verify(splits, *ends, num_workers)
        first, second = np.concatenate([first, one]), np.concatenate([second, other])
        kind = np.concatenate([kind, np.full(len(one), NEAR, dtype=np.uint8)])
        difference = np.concatenate([difference, apart_by])
    order = np.lexsort((second, first))
    return Duplicates(
        splits=splits,
        first=first[order],
        second=second[order],
        kind=kind[order],
        difference=difference[order],
        original=original,
        unreadable={name: scans[name].unreadable for name in splits},
        num_plain=num_plain,
        distance=distance,
        unchecked=unchecked,
    )


def correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns how alike pictures are, up to 1, float32 (N,).

    Args:
        one, other: their thumbnails, uint8 (N, 16, 16, 3).
    """
    a, b = residuals(one), residuals(other)
    scale = np.sqrt(np.einsum("np,np->n", a, a) * np.einsum("np,np->n", b, b))
    return np.einsum("np,np->n", a, b) / np.maximum(scale, 1e-6)


def _verify(
    splits: Mapping[str, Source], first: np.ndarray, second: np.ndarray, num_workers: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs (ordered by `first`) that are alike, and 1 - correlation of each."""
    offsets = np.cumsum([0, *map(len, splits.values())])
    names = list(splits)
    result = np.empty(len(first), dtype=np.float32)
    at = 0
    while at < len(first):  # as many pairs at a time as few enough images take part in
        _, appearances = np.unique(np.stack([first[at:], second[at:]], axis=1), return_index=True)
        stop = len(first)
        if len(appearances) > _MOST_THUMBNAILS:
            stop = at + int(np.sort(appearances)[_MOST_THUMBNAILS]) // 2
        images = np.unique([first[at:stop], second[at:stop]])
        places = np.searchsorted(offsets, images, side="right") - 1
        located = [
            (names[place], int(image - offsets[place]))
            for image, place in zip(images, places, strict=True)
        ]
        thumbnails = read_thumbnails(splits, located, num_workers=num_workers)
        for start in range(at, stop, _BATCH):
            batch = slice(start, min(start + _BATCH, stop))
            one = thumbnails[np.searchsorted(images, first[batch])]
            other = thumbnails[np.searchsorted(images, second[batch])]
            result[batch] = 1 - correlation(one, other)
        at = stop
    alike = result <= 1 - CORRELATION
    return first[alike], second[alike], np.maximum(result[alike], 0)
