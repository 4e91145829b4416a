"""One pass over a data set: every image is read and decoded once, and some facts are kept.

About 850 bytes per image: sizes, digests, a perceptual hash and a thumbnail of 16x16 RGB pixels.
The hash (64 bits): the image at 32x32 grey pixels, its discrete cosine transform, and for each of
the 8x8 lowest frequencies whether it is above their median. benchmarks/duplicates.md has how it was
chosen.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from allmlp.data.loader import Images, in_order, load
from allmlp.data.source import BadImage, Source
from allmlp.errors import UserError

THUMBNAIL = 16  # pixels a side
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
        ("brightest", "i4"),  # of 16-bit samples; -1 for other images
        ("thumbnail", "u1", (THUMBNAIL, THUMBNAIL, 3)),
    ]
)
_CHUNK = 64  # images that a worker takes at a time
_FEW = 500  # images up to which workers are not worth their start


@dataclass(frozen=True)
class Scan:
    """What was found in one split: (num_images,) of dtype `FACTS`, and images that are unreadable.

    Of an unreadable image only `readable` counts.
    """

    facts: np.ndarray
    unreadable: list[BadImage]


def scan(
    splits: Mapping[str, Source],
    *,
    num_workers: int | None = None,
    on_progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Scan]:
    """Reads and decodes every image of every split once; the result is the same with any workers.

    `on_progress` is called with the number of images read since the last call.
    """
    found: dict[str, Scan] = {}
    for name, source in splits.items():
        workers = num_workers
        if workers is None:
            workers = min(8, os.cpu_count() or 1) if len(source) > _FEW else 0
        parts, unreadable = [np.empty(0, dtype=FACTS)], []
        for facts, bad in load(_Facts(source), in_order(source, _CHUNK), workers):
            parts.append(facts)
            unreadable += bad
            on_progress(len(facts))
        found[name] = Scan(np.concatenate(parts), unreadable)
    return found


class _Facts(Images):
    def load(self, place: int) -> tuple[np.ndarray, list[BadImage]]:
        facts, bad = np.zeros((), dtype=FACTS), []
        image = self.open(place, bad)
        if image is None:
            return facts, bad
        try:
            pixels = image.decode()
        except UserError as error:
            return facts, [BadImage(place, self.source.item_name(place), error.what)]
        digest = hashlib.blake2b(pixels.data, digest_size=16, person=b"%dx%d" % pixels.shape[:2])
        brightest = image.brightest()
        facts[()] = (
            *(True, perceptual_hash(pixels)),
            *(hashlib.blake2b(image.data, digest_size=16).digest(), digest.digest()),
            *(len(image.data), *pixels.shape[:2], image.format, image.mode),
            *(-1 if brightest is None else brightest, thumbnail(pixels)),
        )
        return facts, bad

    def collate(self, samples: list[Any]) -> tuple[np.ndarray, list[BadImage]]:
        return np.stack([facts for facts, _ in samples]), [
            bad for _, some in samples for bad in some
        ]


def perceptual_hash(pixels: np.ndarray) -> int:
    """Returns the 64-bit hash of an image, uint8 (H, W, 3)."""
    small = cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA)
    frequencies = cv2.dct(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32))[:8, :8]
    bits = frequencies.ravel() > np.median(frequencies)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Returns an image, uint8 (H, W, 3), at 16x16 pixels, averaged over areas."""
    return cv2.resize(pixels, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
