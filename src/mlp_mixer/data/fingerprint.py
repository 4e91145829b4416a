"""What tells one set of images from another."""

from __future__ import annotations

import hashlib

from mlp_mixer.data.items import Source
from mlp_mixer.errors import UserError


def fingerprint(source: Source, most: int | None = 100) -> str:
    """Returns the sha256 over every image's name and class and the bytes of some of them.

    Args:
        source: the images.
        most: of how many, evenly spaced, the bytes count; None takes all.
    """
    digest = hashlib.sha256(f"{len(source)} {source.class_names}".encode(errors="surrogateescape"))
    labels = source.labels
    for index in range(len(source)):
        text = f"{source.item_name(index)}\t{labels[index]}\n"
        digest.update(text.encode(errors="surrogateescape"))
    step = 1 if most is None else max(1, -(-len(source) // most))
    for index in range(0, len(source), step):
        try:
            digest.update(source.read(index))
        except UserError:
            digest.update(b"unreadable")
    return digest.hexdigest()
