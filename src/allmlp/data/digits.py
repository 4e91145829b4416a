"""The scikit-learn digits: 1,797 real 8x8 scans that are installed with a dependency."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from allmlp.data.image import encode_png
from allmlp.data.items import EncodedImages, PackedBytes, Source, split_by_class, subset


def digits(seed: int = 0) -> dict[str, Source]:
    """Returns the three splits of the scikit-learn digits: 1,259 / 179 / 359 images.

    Stratified: a fifth of every class for test, then an eighth of the rest for validation.

    Args:
        seed: of the split; each gives one that is always the same, "digits" is that of seed 0.
    """
    from sklearn.datasets import load_digits  # half a second, so only where it is used

    data = cast(Any, load_digits())
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)  # 17 grey levels
    files = PackedBytes(encode_png(picture) for picture in pixels)
    names = [str(digit) for digit in data.target_names]
    whole = EncodedImages("digits", names, data.target.astype(np.int64), files, "digits")
    rest, test = split_by_class(whole.labels, 0.2, seed=2 * seed)
    kept, held_out = split_by_class(whole.labels[rest], 0.125, seed=2 * seed + 1)
    indices = {"train": rest[kept], "validation": rest[held_out], "test": test}
    name = f"digits@{seed}" if seed else "digits"
    return {split: subset(whole, at, f"{name}:{split}") for split, at in indices.items()}
