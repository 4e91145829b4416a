"""Fingerprints of data sets and images."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np

from allmlp.data.source import Source
from allmlp.errors import UserError


def fingerprint(source: Source, most: int | None = 100, *, moved: bool = False) -> str:
    """Returns the sha256 of all names (`moved`: in the common folder), labels and `most` images."""
    digest = hashlib.sha256(f"{len(source)} {source.class_names}".encode(errors="surrogateescape"))
    names = own_names(source) if moved else map(source.item_name, range(len(source)))
    labels = source.labels
    if source.is_multi_label:
        labels = [row.tobytes().hex() for row in np.packbits(source.labels, axis=1)]
    for name, label in zip(names, labels, strict=True):
        digest.update(f"{name}\t{label}\n".encode(errors="surrogateescape"))
    step = 1 if most is None else max(1, -(-len(source) // most))
    for index in range(0, len(source), step):
        try:
            digest.update(source.read(index))
        except UserError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def own_names(source: Source) -> list[str]:
    """Returns the names of all images without their common parent folder."""
    names = [source.item_name(index) for index in range(len(source))]
    if not names:
        return []
    low, high = min(names), max(names)  # their common prefix is common to all
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))
    start = low.rfind("/", 0, sum(1 for _ in same)) + 1
    return [name[start:] for name in names]


def image_key(encoded: bytes) -> str:
    """Returns the first 16 digits of an image's sha256."""
    return hashlib.sha256(encoded).hexdigest()[:16]
