"""The two fixed permutations of the paper's figure 4 (section 3.4), the same for every image.

Legend: H W pixels, P patch side, S patches.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from allmlp.preprocessing import Preprocessing


def pixel_order(preprocessing: Preprocessing) -> np.ndarray | None:
    """Returns the source index of each pixel, int64 (H * W,), row-major; None for the identity."""
    kind, seed = preprocessing.permutation, preprocessing.permutation_seed
    height, width = preprocessing.image_size
    if kind == "none":
        return None
    if kind == "pixels":
        return np.random.default_rng(seed).permutation(height * width)
    patch = preprocessing.permutation_patch
    assert patch is not None
    patches, inside = patch_orders(preprocessing)
    rows, columns = height // patch, width // patch
    # Pixel indices as (S, P * P): a row per patch.
    numbers = np.arange(height * width).reshape(rows, patch, columns, patch)
    numbers = numbers.transpose(0, 2, 1, 3).reshape(rows * columns, patch * patch)
    permuted = numbers[patches][:, inside].reshape(rows, columns, patch, patch)
    return permuted.transpose(0, 2, 1, 3).reshape(-1)


def patch_orders(preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source index of each patch (S,) and of each pixel within a patch (P * P,)."""
    patch = preprocessing.permutation_patch
    assert patch is not None
    height, width = preprocessing.image_size
    random = np.random.default_rng(preprocessing.permutation_seed)
    patches = random.permutation((height // patch) * (width // patch))
    return patches, random.permutation(patch * patch)


@functools.lru_cache(maxsize=8)
def _order_on(preprocessing: Preprocessing, device: torch.device) -> Tensor | None:
    order = pixel_order(preprocessing)
    return None if order is None else torch.from_numpy(order).to(device)


def permute(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Permutes the pixels of images (N, channels, H, W) as the preprocessing specifies."""
    order = _order_on(preprocessing, images.device)
    if order is None:
        return images
    return images.flatten(2).index_select(2, order).view_as(images)
