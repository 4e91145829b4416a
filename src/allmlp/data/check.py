"""One pass over a data set, which decodes every image once: its contents, problems and duplicates.

Near duplicates have perceptual hashes within `DISTANCE` bits and thumbnails that, after subtracting
the best-fitting plane, correlate to at least `CORRELATION` (benchmarks/duplicates.md). The hash:
for each of the 8x8 lowest frequencies of the image at 32x32 grey pixels whether it is above their
median.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from rich import filesize
from torch.utils.data import BatchSampler

from allmlp.console import table_of
from allmlp.data.groups import shared_groups
from allmlp.data.image import DARK, EncodedImage
from allmlp.data.loader import Images, Sample, load
from allmlp.data.source import BadImage, Source, only_images
from allmlp.data.sources import notes_of
from allmlp.errors import plural, some_of
from allmlp.io import atomic_write_all, csv_text
from allmlp.runtime.device import cores_of_process

# Files written by the command.
FILES = ("check.json", "bad_files.txt", "duplicates.csv", "samples.png", "duplicates.png")
TINY_SIDE = 16  # pixels; images with a smaller side are reported as tiny
HUGE_PIXELS, HUGE_BYTES = 20_000_000, 20_000_000  # images above either are reported as huge

THUMBNAIL = 16  # side in pixels
FACTS = np.dtype(
    [
        ("readable", "?"),
        ("hash", "u8"),
        ("file_digest", "S16"),
        ("pixel_digest", "S16"),
        ("num_bytes", "i8"),
        ("height", "i4"),
        ("width", "i4"),
        ("format", "S5"),
        ("mode", "S8"),
        ("brightest", "i4"),  # largest 16-bit sample; -1 for other images
        ("thumbnail", "u1", (THUMBNAIL, THUMBNAIL, 3)),
    ]
)
DISTANCE = 10  # bits of 64
CORRELATION = 0.93
LEAST_TEXTURE = 3.0  # RMS grey levels of the thumbnail minus its plane
KINDS = ("same file", "same pixels", "near")
# Two images, the first before the second; index into `KINDS`; 1 - correlation of the thumbnails.
PAIRS = np.dtype([("first", "i8"), ("second", "i8"), ("kind", "u1"), ("difference", "f4")])
NEAR = KINDS.index("near")
Place = tuple[str, int]  # split and index of an image
_PROTECTED = ("test", "validation")  # never excluded because of a split further right
_BATCH = 2048  # thumbnails per comparison
_BLOCK = 2**18  # hashes per comparison
_MOST = 20  # lines shown per list
_WHY = ("same file as", "same pixels as", "near duplicate of")  # by kind


def check_source(
    splits: Mapping[str, Source],
    source: str,
    *,
    duplicates: Literal["near", "exact", "off"] = "near",
    num_workers: int | None = None,
    on_progress: Callable[[int], object] = lambda _: None,
) -> tuple[dict[str, Any], Duplicates | None]:
    """Returns what the data set holds, as in check.json, and its duplicates."""
    scans = scan(splits, num_workers=num_workers, on_progress=on_progress)
    found = described = None
    if duplicates != "off":
        found = find_duplicates(splits, near=duplicates == "near", scans=scans)
        described = {
            "pairs": len(found),
            "pairs_of_other_classes": int(found.other_label().sum()),
            "images_with_a_duplicate": found.counts(),
            "compared_for_equality_only": found.num_plain,
            "hash_distance": found.distance,
        }
    return {
        "source": source,
        "splits": {name: _describe(split, scans[name]) for name, split in splits.items()},
        "duplicates": described,
        "notes": notes_of(splits),
        "shared_groups": shared_groups(splits),
    }, found


def _describe(source: Source, scanned: Scan) -> dict[str, Any]:
    places = np.flatnonzero(scanned.facts["readable"])
    fields = ("num_bytes", "height", "width", "format", "mode", "brightest")
    facts = {name: scanned.facts[name][places] for name in fields}  # without thumbnails
    heights, widths = facts["height"].astype(np.int64), facts["width"].astype(np.int64)
    areas, num_bytes, brightest = heights * widths, facts["num_bytes"], facts["brightest"]
    order = np.lexsort((widths, areas))
    ranks = {"smallest": 0, "median": (len(order) - 1) // 2, "largest": len(order) - 1}
    sizes = {
        rank: (int(heights[order[at]]), int(widths[order[at]]))
        for rank, at in ranks.items()
        if len(order)
    }  # by area

    def listed(flags: np.ndarray, what: Callable[[int], str]) -> list[dict[str, Any]]:
        found = ((at, int(places[at])) for at in np.flatnonzero(flags))
        return [asdict(BadImage(n, source.item_name(n), what(int(at)))) for at, n in found]

    def size(at: int) -> str:
        return f"{heights[at]}x{widths[at]} pixels, {filesize.decimal(int(num_bytes[at]))}"

    several = source.labels.sum(axis=1) if source.is_multi_label else np.empty(0)
    return {
        "num_images": len(source),
        "num_bytes": int(num_bytes.sum()),
        "class_counts": dict(zip(source.class_names, source.class_counts().tolist(), strict=True)),
        "formats": _count(facts["format"]),
        "modes": _count(facts["mode"]),
        "sizes": sizes,
        "unreadable": list(map(asdict, scanned.unreadable)),
        "tiny": listed(np.minimum(heights, widths) < TINY_SIDE, size),
        "huge": listed((areas > HUGE_PIXELS) | (num_bytes > HUGE_BYTES), size),
        "dark": listed(
            (brightest >= 0) & (brightest <= DARK),
            lambda at: f"brightest sample {brightest[at]:,} of 65,535",
        ),
        "labels_per_image": dict(sorted(_count(several).items(), key=lambda item: int(item[0]))),
    }


def _count(values: np.ndarray) -> dict[str, int]:
    texts = (v.decode() if isinstance(v, bytes) else str(v) for v in values.tolist())
    return dict(Counter(texts).most_common())


def save_report(values: Mapping[str, Any], found: Duplicates | None, folder: Path) -> list[str]:
    texts = {"check.json": json.dumps(values, indent=2) + "\n"}
    texts["bad_files.txt"] = "".join(
        f"{name}\t{image['index']}\t{image['name']}\t{image['what']}\n"
        for name, split in values["splits"].items()
        for image in split["unreadable"]
    )
    if found is not None:
        columns = ("split", "index", "name", "class")
        ends = [f"{column}_{end}" for end in (1, 2) for column in columns]
        rows: list[list[object]] = [[*ends, "kind", "difference"]]
        for *images, kind, difference in found.most_different_first():
            cells: list[object] = []
            for split, index in images:
                source = found.splits[split]
                cells += [split, index, source.item_name(index), source.label_text(index)]
            rows.append([*cells, kind, f"{difference:.4f}"])
        texts["duplicates.csv"] = csv_text(rows)
    atomic_write_all({folder / name: text for name, text in texts.items()})
    return list(texts)


def _row_of(name: str, split: Mapping[str, Any]) -> dict[str, str]:
    counts = [count for count in split["class_counts"].values() if count] or [0]
    sizes = {rank: f"{height}x{width}" for rank, (height, width) in split["sizes"].items()}
    return {
        "split": name,
        "images": f"{split['num_images']:,}",
        "classes": f"{len(counts):,}",
        "per class": " to ".join(f"{n:,}" for n in dict.fromkeys((min(counts), max(counts)))),
        "bytes": filesize.decimal(split["num_bytes"]),
        "smallest HxW": sizes.get("smallest", ""),
        "median": sizes.get("median", ""),
        "largest": sizes.get("largest", ""),
    }


def report_lines(
    values: Mapping[str, Any], duplicates: Duplicates | None, problems: list[str] | None
) -> Iterator[str]:
    """Yields what there is in the splits, and what is wrong with it."""
    splits = values["splits"]
    yield f"data     {values['source']}\n"
    yield from table_of(_row_of(name, split) for name, split in splits.items())
    names = dict.fromkeys(name for split in splits.values() for name in split["class_counts"])
    yield f"\nclasses: {some_of(list(names), _MOST)}"
    yield from (f"note: {note}" for note in values["notes"])
    yield ""
    for name, split in splits.items():
        yield f"{name}: {counted({**split['formats'], **split['modes']})}"
        if split["labels_per_image"]:
            numbers = split["labels_per_image"].items()
            per_image = ", ".join(f"{images:,} with {number}" for number, images in numbers)
            yield f"  labels per image: {per_image}"
            yield f"  images per class: {counted(split['class_counts'])}"
        missing = [kind for kind, count in split["class_counts"].items() if not count]
        if missing:
            yield f"  classes without images: {some_of(missing, _MOST)}"
    dark = f"nearly black: no sample above {DARK:,} of 65,535"
    for key, what in {
        "unreadable": "unreadable images",
        "tiny": f"tiny images, a side under {TINY_SIDE} px",
        "huge": f"huge images, over {HUGE_PIXELS // 10**6} megapixels or 20 MB",
        "dark": f"16-bit images, {dark} (scale 12 bits up by 16, and save the images again)",
    }.items():
        images = [(name, image) for name, split in splits.items() for image in split[key]]
        lines = [f"{at}[{im['index']}] {im['name']}: {im['what']}" for at, im in images]
        if lines or key == "unreadable":
            yield from _listed(what, lines)
    if values["shared_groups"]:
        yield from _listed("groups in several splits (leakage)", values["shared_groups"])
    if duplicates is not None:
        yield from _lines_of(duplicates, values["duplicates"])
    if problems is not None:
        yield from _listed("problems of the packed data", problems)


def _lines_of(found: Duplicates, described: Mapping[str, Any]) -> Iterator[str]:
    yield f"\nduplicates: {plural(len(found), 'pair')}"
    if len(found):
        kinds = counted(Counter(KINDS[kind] for kind in found.pairs["kind"].tolist()))
        yield f"{kinds}; images of a split (row) that have a duplicate in a split (column):"
        yield from table_of(
            {"split": name} | {f"in {other}": f"{n:,}" for other, n in row.items()}
            for name, row in described["images_with_a_duplicate"].items()
        )
        yield f"of different classes: {plural(described['pairs_of_other_classes'], 'pair')}"
    if found.num_plain:
        why = "have hardly any texture or fewer than 16 pixels a side"
        yield f"{plural(found.num_plain, 'image')} {why}: compared for equal pixels only"
    if found.distance < DISTANCE:
        how = f"to {found.distance} bits of the hash" if found.distance >= 0 else "to equal pixels"
        yield f"very many images are alike: near duplicates were looked for up {how} only"


def counted(counts: Mapping[Any, int]) -> str:
    return some_of([f"{kind} {count:,}" for kind, count in counts.items()], _MOST)


def _listed(title: str, lines: Sequence[str]) -> Iterator[str]:
    yield f"\n{title}: {len(lines):,}"
    yield from (f"  {line}" for line in lines[:_MOST])
    if len(lines) > _MOST:
        yield f"  ... and {len(lines) - _MOST:,} more"


# The pass


class Scan(NamedTuple):
    facts: np.ndarray  # `FACTS` (num_images,); all zero for unreadable images
    unreadable: list[BadImage]


def scan(
    splits: Mapping[str, Source],
    *,
    num_workers: int | None = None,
    on_progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Scan]:
    """Scans all images; `on_progress` gets the number read since the last call."""
    found: dict[str, Scan] = {}
    for name, source in splits.items():
        only_images(source, "data check")
        workers = num_workers
        if workers is None:  # for few images they do not pay off
            workers = min(8, cores_of_process()) if len(source) > 500 else 0
        found[name], at = Scan(np.zeros(len(source), dtype=FACTS), []), 0
        batches = BatchSampler(range(len(source)), 64, drop_last=False)
        for facts, bad in load(Images(source, _facts_of), batches, workers, collate_fn=_collate):
            found[name].facts[at : at + len(facts)] = facts
            found[name].unreadable.extend(bad)
            at += len(facts)
            on_progress(len(facts))
    return found


def _collate(samples: list[Sample]) -> tuple[np.ndarray, list[BadImage]]:
    unread = np.zeros((), dtype=FACTS)
    facts = np.stack([unread if facts is None else facts for facts, *_ in samples])
    return facts, [image for *_, bad in samples for image in bad]


def _facts_of(image: EncodedImage) -> np.ndarray:
    pixels, data = image.decode(), image.data
    digest = hashlib.blake2b(pixels.data, digest_size=16, person=b"%dx%d" % pixels.shape[:2])
    brightest = image.brightest()
    row = (
        *(True, perceptual_hash(pixels)),
        *(hashlib.blake2b(data, digest_size=16).digest(), digest.digest()),
        *(len(data), *pixels.shape[:2], image.format, image.mode),
        *(-1 if brightest is None else brightest, thumbnail(pixels)),
    )
    return np.array(row, dtype=FACTS)


def perceptual_hash(pixels: np.ndarray) -> int:
    small = cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA)
    frequencies = cv2.dct(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32))[:8, :8]
    bits = frequencies.ravel() > np.median(frequencies)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    return cv2.resize(pixels, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)


# Duplicates


@dataclass(frozen=True)
class Duplicates:
    """Images are numbered across all splits; a copy is paired only with its first occurrence, and
    near duplicates are pairs of first occurrences."""

    splits: Mapping[str, Source]
    pairs: np.ndarray  # `PAIRS` (num_pairs,), in order
    num_plain: int = 0  # images with too little texture or too few pixels for near duplicates
    # Search distance in bits: reduced if there are too many candidates, -1 if even equal hashes
    # are too many.
    distance: int = DISTANCE

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def offsets(self) -> np.ndarray:
        """The first image number of each split, and the total, int64 (num_splits + 1,)."""
        return np.cumsum([0, *map(len, self.splits.values())])

    def locate(self, image: int) -> Place:
        place = int(np.searchsorted(self.offsets, image, side="right")) - 1
        return list(self.splits)[place], int(image - self.offsets[place])

    def other_label(self) -> np.ndarray:
        texts = [s.label_text(at) for s in self.splits.values() for at in range(len(s))]
        labels = np.unique(np.array(texts, dtype=object), return_inverse=True)[1]
        return labels[self.pairs["first"]] != labels[self.pairs["second"]]

    def most_different_first(self) -> Iterator[tuple[Place, Place, str, float]]:
        """Yields two images, kind and difference: 1 - correlation, 0 for equal pixels."""
        order = np.lexsort((self.pairs["kind"] == 0, -self.pairs["difference"]))
        for first, second, kind, difference in self.pairs[order].tolist():
            yield self.locate(first), self.locate(second), KINDS[kind], difference

    @cached_property
    def partners(self) -> dict[int, dict[str, list[int]]]:
        """Maps each image to its duplicates, by split, in order; copies share an entry."""
        copies: dict[int, list[int]] = {}
        near: dict[int, list[int]] = {}
        for one, other, kind, _ in self.pairs.tolist():
            if kind == NEAR:
                near.setdefault(one, []).append(other)
                near.setdefault(other, []).append(one)
            else:
                copies.setdefault(one, [one]).append(other)
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
        """Returns, per split, the number of its images with another duplicate in each split."""
        counts = {split: dict.fromkeys(self.splits, 0) for split in self.splits}
        for image, partners in self.partners.items():
            own = self.locate(image)[0]
            for split, there in partners.items():
                counts[own][split] += len(there) > 1 or there[0] != image
        return counts

    def to_exclude(self) -> Iterator[tuple[str, int, str]]:
        """Yields (split, index, why) of the images to exclude to remove all duplicates; those of
        test stay, then those of validation."""
        rows = self.pairs[self.pairs["kind"] != NEAR].tolist()
        original = {copy: (first, kind) for first, copy, kind, _ in rows}
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
            there, at = self.locate(kept)
            why = f"{_WHY[kind]} {there}[{at}] {self.splits[there].item_name(at)}"
            yield *self.locate(image), why


def find_duplicates(
    splits: Mapping[str, Source],
    *,
    near: bool = True,
    num_workers: int | None = None,
    scans: dict[str, Scan] | None = None,
) -> Duplicates:
    scans = scans or scan(splits, num_workers=num_workers)
    facts = np.concatenate([scans[name].facts for name in splits])
    usable = np.flatnonzero(facts["readable"])
    original = np.arange(len(facts))
    digests = facts["pixel_digest"][usable]
    _, firsts, inverse = np.unique(digests, return_index=True, return_inverse=True)
    original[usable] = usable[firsts][inverse]
    copies = np.flatnonzero(original != np.arange(len(facts)))
    files = facts["file_digest"]
    pairs = _pairs(original[copies], copies, files[original[copies]] != files[copies], 0.0)
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
        near_ones = _pairs(one[alike], other[alike], NEAR, np.maximum(apart[alike], 0))
        pairs = np.concatenate([pairs, near_ones])
    pairs = pairs[np.lexsort((pairs["second"], pairs["first"]))]
    return Duplicates(splits, pairs, num_plain, distance)


def _pairs(*columns: Any) -> np.ndarray:
    return np.rec.fromarrays(np.broadcast_arrays(*columns), dtype=PAIRS)


def near_pairs(hashes: np.ndarray, distance: int, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the pairs within `distance` bits, lowered if there are more than `most`."""
    pairs, number = [np.empty((2, 0), dtype=np.int64)], 0
    # Within `radius` bits in one of four bands: enough if the radii plus one exceed it in sum.
    for band in range(4 if distance >= 0 else 0):
        radius = (distance + 4 - band) // 4 - 1
        keys = ((hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        ordered = hashes[order]  # compared hashes are adjacent in memory
        for one, other in _candidates(keys[order], radius):
            is_near = np.bitwise_count(ordered[one] ^ ordered[other]) <= distance
            pairs.append(np.sort([order[one[is_near]], order[other[is_near]]], axis=0))
            number += int(is_near.sum())
            if number > 4 * most:  # a pair is found in up to four bands
                return near_pairs(hashes, distance - 1, most)
    numbers = np.concatenate(pairs, axis=1)
    first, second = np.divmod(np.unique(numbers[0] * len(hashes) + numbers[1]), max(1, len(hashes)))
    if len(first) > most:
        return near_pairs(hashes, distance - 1, most)
    return first, second, distance


def _candidates(keys: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields index pairs of sorted 16-bit keys that differ in at most `radius` bits."""
    sizes = np.bincount(keys, minlength=2**16)
    starts = np.cumsum(sizes) - sizes
    places = np.arange(len(keys))
    for chosen in (c for flips in range(radius + 1) for c in combinations(range(16), flips)):
        partners = keys ^ sum(1 << bit for bit in chosen)
        left = np.flatnonzero((keys < partners) & (sizes[partners] > 0)) if chosen else places
        begin = starts[partners[left]] if chosen else places + 1  # first partner
        number = (starts + sizes)[partners[left]] - begin
        ends = np.cumsum(number)
        at = 0
        while at < len(left):  # in chunks with a limited number of partners
            before = int(ends[at - 1]) if at else 0
            stop = max(int(np.searchsorted(ends, before + _BLOCK, side="right")), at + 1)
            some = number[at:stop]
            offsets = np.arange(int(some.sum())) - np.repeat(np.cumsum(some) - some, some)
            yield np.repeat(left[at:stop], some), np.repeat(begin[at:stop], some) + offsets
            at = stop


def residuals(thumbnails: np.ndarray) -> np.ndarray:
    """Returns thumbnails, float32 (N, 768), minus their planes: any two skies would correlate."""
    samples = thumbnails.reshape(-1, THUMBNAIL**2, 3).transpose(0, 2, 1).astype(np.float32)
    return (samples - (samples @ _PLANE.T) @ _PLANE).reshape(-1, 3 * THUMBNAIL**2)


# Orthonormal basis of the planes over a thumbnail, float32 (3, 256)
_RAMP = np.tile(np.linspace(-1, 1, THUMBNAIL), (THUMBNAIL, 1))
_BASIS = np.stack([np.ones_like(_RAMP), _RAMP, _RAMP.T]).reshape(3, -1)
_PLANE = (_BASIS / np.linalg.norm(_BASIS, axis=1, keepdims=True)).astype(np.float32)


def correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the correlation of thumbnails, at most 1, float32 (N,)."""
    a, b = residuals(one), residuals(other)
    scale = np.sqrt(np.einsum("np,np->n", a, a) * np.einsum("np,np->n", b, b))
    return np.einsum("np,np->n", a, b) / np.maximum(scale, 1e-6)
