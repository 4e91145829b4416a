"""Augmentation of training images and batches; all randomness comes from the given generator.

Legend: N batch, H W pixels; an image is uint8 (H, W, channels). RandAugment is in randaugment.py.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def warp(
    pixels: np.ndarray,
    random: np.random.Generator,
    *,
    rotate: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    shift: float = 0.0,
    elastic: float = 0.0,
) -> np.ndarray:
    """Randomly rotates, scales, shears, shifts and bends (Simard et al. 2003), by at most these."""
    draw = random.uniform(-1.0, 1.0, size=6)
    angle = math.radians(rotate) * draw[0]
    scale_x, scale_y = 1.0 + scale * draw[1], 1.0 + scale * draw[2]
    cos, sin = math.cos(angle), math.sin(angle)
    # Maps output to input coordinates, in pixels from the centre.
    matrix = torch.tensor(
        [[scale_x * cos, -scale_x * sin + shear * draw[3]], [scale_y * sin, scale_y * cos]]
    ).float()
    height, width = pixels.shape[:2]
    y, x = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2,
        torch.arange(width) - (width - 1) / 2,
        indexing="ij",
    )
    sides = torch.tensor([float(width), float(height)])
    places = torch.stack([x, y], dim=-1) @ matrix.T  # (H, W, 2)
    places = places + shift * sides * torch.from_numpy(draw[4:].astype(np.float32))
    if elastic:
        moves = torch.from_numpy(random.normal(size=(1, 2, 3, 3)).astype(np.float32))
        field = F.interpolate(moves, size=(height, width), mode="bicubic", align_corners=True)
        places = places + elastic * sides * field[0].movedim(0, -1)
    channels = torch.from_numpy(pixels.astype(np.float32)).movedim(-1, 0)  # (channels, H, W)
    grid = (2.0 * places / sides)[None]  # grid_sample's unit is half a side
    warped = F.grid_sample(channels[None], grid, align_corners=False)[0].round().to(torch.uint8)
    return np.ascontiguousarray(warped.movedim(0, -1).numpy())


def padded_crop(pixels: np.ndarray, random: np.random.Generator, padding: float) -> np.ndarray:
    """Pads with black by a fraction of the sides, and takes a random crop of the original size."""
    height, width = pixels.shape[:2]
    y, x = round(padding * height), round(padding * width)
    padded = np.pad(pixels, ((y, y), (x, x), (0, 0)))
    top, left = int(random.integers(2 * y + 1)), int(random.integers(2 * x + 1))
    return np.ascontiguousarray(padded[top : top + height, left : left + width])


def random_erasing(
    pixels: np.ndarray, random: np.random.Generator, probability: float
) -> np.ndarray:
    """With that probability fills a random rectangle of a copy with noise (Zhong et al. 2020)."""
    if random.random() >= probability:
        return pixels
    height, width, channels = pixels.shape
    for _ in range(10):
        area = random.uniform(0.02, 1 / 3) * height * width
        ratio = math.exp(random.uniform(math.log(0.3), math.log(3.3)))
        tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 1 <= tall < height and 1 <= wide < width:
            top, left = random.integers(height - tall + 1), random.integers(width - wide + 1)
            out = pixels.copy()
            noise = random.integers(256, size=(tall, wide, channels), dtype=np.uint8)
            out[top : top + tall, left : left + wide] = noise
            return out
    return pixels


def mixup(
    images: Tensor, targets: Tensor, probability: float, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Blends images and targets with their neighbours as big_vision does, one weight per batch."""
    weight = float(random.beta(probability, probability))
    weight = max(weight, 1.0 - weight)
    return (
        torch.lerp(images.roll(1, dims=0), images, weight),
        torch.lerp(targets.roll(1, dims=0), targets, weight),
    )


def cutmix(
    images: Tensor, targets: Tensor, strength: float, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Pastes a rectangle of its neighbour into each image, one per batch (Yun et al. 2019)."""
    kept = float(random.beta(strength, strength))
    height, width = images.shape[2:]
    spans = []
    for side in (height, width):
        center, half = int(random.integers(side)), round(side * math.sqrt(1.0 - kept) / 2)
        spans.append(slice(max(0, center - half), min(side, center + half)))
    rows, columns = spans
    images = images.clone()
    images[:, :, rows, columns] = images.roll(1, dims=0)[:, :, rows, columns]
    pasted = (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return images, torch.lerp(targets, targets.roll(1, dims=0), pasted)


def mix(
    images: Tensor,
    targets: Tensor,
    random: np.random.Generator,
    *,
    mixup_strength: float,
    cutmix_strength: float,
) -> tuple[Tensor, Tensor]:
    """Applies mixup or cutmix; if both are on, one is chosen at random per step."""
    if cutmix_strength and (not mixup_strength or random.random() < 0.5):
        return cutmix(images, targets, cutmix_strength, random)
    if mixup_strength:
        return mixup(images, targets, mixup_strength, random)
    return images, targets
