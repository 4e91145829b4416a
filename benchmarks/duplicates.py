"""Near duplicates of a data set: the time and what is found; and which changes are still found.

    python benchmarks/duplicates.py --data "cifar10_*.parquet"
    python benchmarks/duplicates.py --data "cifar10_*.parquet" --changes 2000

With --changes, that many images of the source's first split are re-encoded, scaled, lightened and
cut, and it is counted for how many the copy would be found: by the hash and by the verification.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np

from allmlp.data.check import (
    CORRELATION,
    DISTANCE,
    KINDS,
    correlation,
    find_duplicates,
    perceptual_hash,
    thumbnail,
)
from allmlp.data.image import decode
from allmlp.data.sources import open_splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, metavar="SOURCE")
    parser.add_argument("--changes", type=int, default=0, metavar="IMAGES")
    parser.add_argument("--num-workers", type=int)
    arguments = parser.parse_args()
    if arguments.changes:
        measure_changes(arguments.data, arguments.changes)
    else:
        search(arguments.data, arguments.num_workers)


def search(name: str, num_workers: int | None) -> None:
    """The whole search, end to end: opening, reading, decoding, hashing, pairs, verification."""
    started = time.perf_counter()
    splits = open_splits(name)
    found = find_duplicates(splits, num_workers=num_workers)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    images = sum(map(len, splits.values()))
    print(f"{images:,} images in {seconds:.1f} s; peak {peak:,.0f} MiB, a worker {worker:,.0f} MiB")
    kinds = np.bincount(found.pairs["kind"], minlength=len(KINDS))
    print(", ".join(f"{kind}: {count:,}" for kind, count in zip(KINDS, kinds, strict=True)))
    for one, counts in found.counts().items():
        for other, number in counts.items():
            print(f"images of {one} with a duplicate in {other}: {number:,}")
    print(f"pairs of different classes: {found.other_label().sum():,}")
    print(f"compared for equality only: {found.num_plain:,}; distance {found.distance}")
    for split, number in Counter(split for split, *_ in found.to_exclude()).items():
        print(f"to exclude, {split}: {number:,}")


def measure_changes(name: str, number: int) -> None:
    """How many changed copies have a hash within the distance and a correlation above the limit."""
    source = next(iter(open_splits(name).values()))
    indices = np.linspace(0, len(source) - 1, min(number, len(source))).astype(int)
    pictures = [decode(source.read(int(i)), source.item_name(int(i))) for i in indices]
    hashes = np.array([perceptual_hash(each) for each in pictures], dtype=np.uint64)
    small = np.stack([thumbnail(each) for each in pictures])
    print("| change | bits, median | bits, 99 % | by the hash | correlation, 1 % | found |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for what, change in CHANGES.items():
        changed = [change(each) for each in pictures]
        other = np.array([perceptual_hash(each) for each in changed], dtype=np.uint64)
        bits = np.bitwise_count(hashes ^ other)
        alike = correlation(small, np.stack([thumbnail(each) for each in changed]))
        near = bits <= DISTANCE
        cells = [
            what,
            f"{np.median(bits):.0f}",
            f"{np.percentile(bits, 99):.0f}",
            f"{near.mean():.2%}",
            f"{np.percentile(alike, 1):.3f}",
            f"{(near & (alike >= CORRELATION)).mean():.2%}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
    one, other = np.triu_indices(len(hashes), 1)
    bits = np.bitwise_count(hashes[one] ^ hashes[other])
    near = bits <= DISTANCE
    alike = correlation(small[one[near]], small[other[near]]) >= CORRELATION
    print(
        f"different images: {near.sum():,} of {len(bits):,} pairs by the hash, {alike.sum():,} left"
    )


def jpeg(quality: int, picture: np.ndarray) -> np.ndarray:
    blue_first = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", blue_first, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def scale(factor: float, picture: np.ndarray) -> np.ndarray:
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(picture, None, fx=factor, fy=factor, interpolation=way)


def lighten(factor: float, picture: np.ndarray) -> np.ndarray:
    return np.clip(picture * np.float32(factor), 0, 255).astype(np.uint8)


def cut(share: float, picture: np.ndarray) -> np.ndarray:
    """Cuts that share of the side off at each edge; of small pictures parts of pixels too."""
    height, width = picture.shape[:2]
    factor = 1 / (1 - 2 * share)
    matrix = np.array([[factor, 0, -width * share * factor], [0, factor, -height * share * factor]])
    return cv2.warpAffine(picture, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)


def several(picture: np.ndarray) -> np.ndarray:
    return jpeg(75, lighten(1.1, scale(0.75, cut(0.01, picture))))


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "JPEG, quality 95": partial(jpeg, 95),
    "JPEG, quality 75": partial(jpeg, 75),
    "JPEG, quality 50": partial(jpeg, 50),
    "scaled by 0.5": partial(scale, 0.5),
    "scaled by 1.5": partial(scale, 1.5),
    "10 % lighter": partial(lighten, 1.1),
    "10 % darker": partial(lighten, 0.9),
    "1 % cut off at each edge": partial(cut, 0.01),
    "2 % cut off at each edge": partial(cut, 0.02),
    "4 % cut off at each edge": partial(cut, 0.04),
    "1 % cut, scaled by 0.75, 10 % lighter, JPEG 75": several,
    "mirrored": lambda picture: np.ascontiguousarray(picture[:, ::-1]),
}


if __name__ == "__main__":
    main()
