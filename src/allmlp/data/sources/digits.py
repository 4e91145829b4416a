"""The digits: 1,797 real 8x8 scans bundled with the package.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, licence CC BY 4.0. `digits.csv.gz` is its test
set as distributed by scikit-learn: 64 values from 0 to 16 and the class in every row.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Iterator
from importlib.resources import files

import numpy as np

from allmlp.data.classes import RawLabels
from allmlp.data.groups import split_by_class
from allmlp.data.image import encode_png
from allmlp.data.source import EncodedImages, PackedBytes, labelled, subset
from allmlp.data.source_spec import SourceSpec
from allmlp.data.sources.columns import Kind, Rows
from allmlp.errors import UserError


@functools.cache
def _read() -> tuple[EncodedImages, np.ndarray]:
    packed = files("allmlp.data").joinpath("digits.csv.gz").read_bytes()
    rows = np.loadtxt(gzip.decompress(packed).decode().split(), delimiter=",", dtype=np.uint8)
    pixels = np.round(rows[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = EncodedImages(PackedBytes(map(encode_png, pixels)), "digits")
    return images, rows[:, 64].astype(np.int64)


def open_digits(spec: SourceSpec, labels: bool) -> Iterator[Rows]:
    """Yields 1,259 / 179 / 359 images; digits@1, digits@2, ... are other random splits."""
    _, _, text = spec.base.partition("@")
    if not (spec.base == "digits" or text.isdecimal()):
        raise UserError(f"unknown data {spec.base!r}", fix="digits, or digits@1 for another split")
    seed = int(text or 0)
    images, classes = _read()
    names = [*"0123456789"]
    whole = labelled(images, "digits", names, classes)
    rest, test = split_by_class(classes, 0.2, seed=2 * seed)
    kept, held_out = split_by_class(classes[rest], 0.125, seed=2 * seed + 1)
    for split, at in (("train", rest[kept]), ("validation", rest[held_out]), ("test", test)):
        raw = RawLabels(classes[at], names, are_classes=True)
        yield Rows(subset(whole, at, split), {"label": lambda raw=raw: raw}, split)


def names_digits(spec: SourceSpec) -> bool:
    return spec.base.partition("@")[0] == "digits" and not spec.path.exists()


KIND = Kind("the digits", names_digits, open_digits)
