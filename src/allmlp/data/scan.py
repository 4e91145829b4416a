"""One pass over a data set: decodes every image once and keeps about 850 bytes of facts.

The 64-bit perceptual hash: the discrete cosine transform of the image at 32x32 grey pixels, and for
each of the 8x8 lowest frequencies whether it is above their median.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from allmlp.data.image import EncodedImage
from allmlp.data.loader import Images, in_order, load
from allmlp.data.source import BadImage, Source, only_images

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
_CHUNK = 64  # images per worker task
_FEW = 500  # up to this many images, workers do not pay off


@dataclass(frozen=True)
class Scan:
    """Facts of a split, `FACTS` (num_images,); all zero for unreadable images."""

    facts: np.ndarray
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
        if workers is None:
            workers = min(8, os.cpu_count() or 1) if len(source) > _FEW else 0
        scanned, at = Scan(np.zeros(len(source), dtype=FACTS), []), 0
        for facts, bad in load(_Facts(source), in_order(source, _CHUNK), workers):
            scanned.facts[at : at + len(facts)] = facts
            scanned.unreadable.extend(bad)
            at += len(facts)
            on_progress(len(facts))
        found[name] = scanned
    return found


class _Facts(Images):
    def load(self, place: int) -> tuple[np.ndarray, list[BadImage]]:
        bad: list[BadImage] = []
        facts = self.decoded(place, bad, _facts_of)
        return np.zeros((), dtype=FACTS) if facts is None else facts, bad

    def collate(self, samples: list[Any]) -> tuple[np.ndarray, list[BadImage]]:
        return np.stack([facts for facts, _ in samples]), [
            bad for _, some in samples for bad in some
        ]


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
    """Returns the 64-bit hash of an image, uint8 (H, W, 3)."""
    small = cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA)
    frequencies = cv2.dct(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32))[:8, :8]
    bits = frequencies.ravel() > np.median(frequencies)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Returns an image, uint8 (H, W, 3), downsampled to 16x16 pixels by area averaging."""
    return cv2.resize(pixels, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
