"""One pass over a data set: every image is read and decoded once, and some facts are kept.

Some eighty bytes per image: size, format and oddities for `check`, digests and a perceptual hash
for `duplicates`. A million images take under 100 MB; no pixels are kept.

The hash (64 bits): the image at 32x32 grey pixels, its discrete cosine transform, and for each of
the 8x8 lowest frequencies whether it is above their median. The thumbnail is 16x16 RGB pixels; both
are averages over areas. benchmarks/duplicates.md has how they were chosen.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import ExifTags, Image

from allmlp.data.image import FORMATS, EncodedImage
from allmlp.data.source import BadImage, Source
from allmlp.data.workers import check_guard, starting, worker_context, workers_that_start
from allmlp.errors import UserError, at_least

THUMBNAIL = 16  # pixels a side
FACTS = np.dtype(
    [
        ("readable", "?"),
        ("hash", "u8"),
        ("texture", "f4"),  # of the thumbnail, see `residuals`; grey levels
        ("file_digest", "S16"),
        ("pixel_digest", "S16"),
        ("num_bytes", "i8"),
        ("height", "i4"),
        ("width", "i4"),
        ("format", "S5"),
        ("mode", "S8"),
        ("turned", "?"),  # by its EXIF tag
        ("alpha", "?"),
        ("animated", "?"),
        ("deep", "?"),  # 16 bits a sample
        ("brightest", "u2"),  # of them
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
    on_progress: Callable[[int], object] | None = None,
) -> dict[str, Scan]:
    """Reads and decodes every image of every split once; the result is the same with any workers.

    `on_progress` is called with the number of images read since the last call.
    """
    found = {name: Scan(np.zeros(len(source), dtype=FACTS), []) for name, source in splits.items()}
    chunks = [
        (name, range(at, min(at + _CHUNK, len(source))))
        for name, source in splits.items()
        for at in range(0, len(source), _CHUNK)
    ]
    with _pool(splits, num_workers, sum(map(len, splits.values()))) as run:
        for (name, indices), (facts, bad) in zip(chunks, run(_scan_chunk, chunks), strict=True):
            found[name].facts[indices.start : indices.stop] = facts
            found[name].unreadable.extend(bad)
            if on_progress is not None:
                on_progress(len(indices))
    return found


def read_thumbnails(
    splits: Mapping[str, Source], images: list[tuple[str, int]], *, num_workers: int | None = None
) -> np.ndarray:
    """Returns thumbnails, uint8 (num_images, 16, 16, 3), of images, (split, index), that decode."""
    chunks = [images[at : at + _CHUNK] for at in range(0, len(images), _CHUNK)]
    result = np.empty((len(images), THUMBNAIL, THUMBNAIL, 3), dtype=np.uint8)
    with _pool(splits, num_workers, len(images)) as run:
        for number, thumbnails in enumerate(run(_thumbnail_chunk, chunks)):
            result[number * _CHUNK : number * _CHUNK + len(thumbnails)] = thumbnails
    return result


def perceptual_hash(pixels: np.ndarray) -> int:
    """Returns the 64-bit hash of an image, uint8 (H, W, 3)."""
    small = cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA)
    frequencies = cv2.dct(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32))[:8, :8]
    bits = frequencies.ravel() > np.median(frequencies)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Returns an image, uint8 (H, W, 3), at 16x16 pixels."""
    return cv2.resize(pixels, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)


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


def _facts(data: bytes, where: str) -> tuple[Any, ...]:
    """A row of `FACTS`."""
    image = EncodedImage(data, where)
    pixels = image.decode()
    texture = float(np.sqrt(np.mean(residuals(thumbnail(pixels)[None]) ** 2)))
    digest = hashlib.blake2b(pixels.data, digest_size=16, person=b"%dx%d" % pixels.shape[:2])
    return (
        *(True, perceptual_hash(pixels), texture),
        *(hashlib.blake2b(data, digest_size=16).digest(), digest.digest()),
        *(len(data), *pixels.shape[:2], image.format, image.mode, *_oddities(data, image)),
        *(image.bits == 16, image.brightest() or 0),
    )


def _oddities(data: bytes, image: EncodedImage) -> tuple[bool, bool, bool]:
    """Whether it is rotated by its EXIF tag, has alpha, is animated."""
    if image.format == "JPEG" and b"Exif\0\0" not in data:
        return False, False, False  # nearly all images: no need for Pillow
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
            animated = getattr(opened, "n_frames", 1) > 1 and opened.format != "TIFF"
            return turned, opened.has_transparency_data, animated
    except Exception:  # damaged metadata of an image that could be decoded
        return False, False, False


def _scan_chunk(
    sources: Mapping[str, Source], chunk: tuple[str, range]
) -> tuple[np.ndarray, list[BadImage]]:
    name, indices = chunk
    source, facts, bad = sources[name], np.zeros(len(indices), dtype=FACTS), []
    for place, index in enumerate(indices):
        where = source.item_name(index)
        try:
            facts[place] = _facts(source.read(index), where)
        except UserError as error:
            bad.append(BadImage(index, where, error.what))
    return facts, bad


def _thumbnail_chunk(sources: Mapping[str, Source], images: list[tuple[str, int]]) -> np.ndarray:
    thumbnails = []
    for name, index in images:
        source = sources[name]
        pixels = EncodedImage(source.read(index), source.item_name(index)).decode()
        thumbnails.append(thumbnail(pixels))
    return np.stack(thumbnails)


# What a worker process reads from: sent once, when it starts, and not with every chunk.
_worker_sources: dict[str, Source] = {}


def _start_worker(sources: Mapping[str, Source]) -> None:
    cv2.setNumThreads(1)  # there is a process for each core
    _worker_sources.update(sources)


def _in_worker(function: Callable[..., Any], chunk: Any) -> Any:
    return function(_worker_sources, chunk)


@contextmanager
def _pool(
    sources: Mapping[str, Source], num_workers: int | None, num_images: int
) -> Iterator[Callable[[Callable[..., Any], list[Any]], Iterator[Any]]]:
    """Yields a `map` over chunks that keeps their order, in worker processes or in this one."""
    if num_workers is None:
        num_workers = min(8, os.cpu_count() or 1) if num_images > _FEW else 0
    num_workers = workers_that_start(at_least("num_workers", num_workers, 0))
    if num_workers == 0:
        yield lambda function, chunks: map(functools.partial(function, sources), chunks)
        return
    check_guard()
    with starting():
        pool = ProcessPoolExecutor(num_workers, worker_context(), _start_worker, (sources,))

    def run(function: Callable[..., Any], chunks: list[Any]) -> Iterator[Any]:
        with starting():
            return pool.map(functools.partial(_in_worker, function), chunks)

    try:
        yield run
    except BrokenProcessPool as error:
        what = "a process that reads the images was killed; perhaps the memory is full"
        raise UserError(what, fix="A smaller num_workers; 0 reads in one process") from error
    finally:
        pool.shutdown(cancel_futures=True)
