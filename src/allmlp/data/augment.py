"""Random changes of a training picture or batch, each from the generator that is handed in.

Legend: N batch, H W pixels; a picture is uint8 (H, W, channels). RandAugment has its own file.
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
    """Returns the picture turned, stretched, slanted, moved and bent at random, as writing varies.

    All in one resampling (bilinear), because each would blur a small picture a little more.

    Args:
        pixels: the picture; what comes in from outside it is black.
        random: the sample's own generator.
        rotate: largest angle, degrees.
        scale: largest relative change of the width and, drawn on its own, of the height.
        shear: largest horizontal slant, pixels a pixel.
        shift: largest move, as a share of the width and of the height.
        elastic: standard deviation of 3 x 3 random moves that are spread smoothly (bicubic) over
            the picture, as a share of its sides; the idea of Simard et al. 2003.
    """
    draw = random.uniform(-1.0, 1.0, size=6)
    angle = math.radians(rotate) * draw[0]
    scale_x, scale_y = 1.0 + scale * draw[1], 1.0 + scale * draw[2]
    cos, sin = math.cos(angle), math.sin(angle)
    # From a place in the new picture to that in the old one, in pixels from the centre.
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
    """Returns the picture moved by whole pixels, as a crop of its size out of one with a border.

    Args:
        pixels: the picture; what comes in from outside it is black.
        random: the sample's own generator.
        padding: width of the border as a share of the sides; 0.125 is the usual 4 of 32 pixels.
    """
    height, width = pixels.shape[:2]
    y, x = round(padding * height), round(padding * width)
    padded = np.pad(pixels, ((y, y), (x, x), (0, 0)))
    top, left = int(random.integers(2 * y + 1)), int(random.integers(2 * x + 1))
    return np.ascontiguousarray(padded[top : top + height, left : left + width])


def random_erasing(
    pixels: np.ndarray, random: np.random.Generator, probability: float
) -> np.ndarray:
    """Returns the picture, or with `probability` a copy with noise in a random rectangle.

    The rectangle has 2 to 33 % of the area and an aspect of 0.3 to 3.3, uniform on a logarithmic
    scale. Source: Zhong et al. 2020, the variant with random values.
    """
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
    """Returns each image blended with its neighbour in the batch, and the targets likewise.

    One share for the whole batch, from Beta(p, p), and never less than one half: as Google's
    big_vision does. Source: Zhang et al. 2018; the paper's Table 4.

    Args:
        images: (N, channels, H, W), float.
        targets: (N, num_classes), rows that sum to 1.
        probability: the paper's mixup strength p; 0 changes nothing.
        random: the step's own generator.
    """
    if probability == 0.0:
        return images, targets
    share = float(random.beta(probability, probability))
    share = max(share, 1.0 - share)
    return (
        torch.lerp(images.roll(1, dims=0), images, share),
        torch.lerp(targets.roll(1, dims=0), targets, share),
    )


def cutmix(
    images: Tensor, targets: Tensor, strength: float, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Returns each image with a rectangle of its neighbour in the batch pasted in.

    One rectangle for the whole batch; the targets are shared by the area that was really pasted.
    Source: Yun et al. 2019.

    Args:
        images: (N, channels, H, W), float.
        targets: (N, num_classes), rows that sum to 1.
        strength: alpha of the Beta(alpha, alpha) that the kept share is drawn from; 0 is off.
        random: the step's own generator.
    """
    if strength == 0.0:
        return images, targets
    share = float(random.beta(strength, strength))
    height, width = images.shape[2:]
    spans = []
    for side in (height, width):
        center, half = int(random.integers(side)), round(side * math.sqrt(1.0 - share) / 2)
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
    """Returns the batch after mixup or cutmix; where both are on, a coin decides each step."""
    if mixup_strength and cutmix_strength:
        if random.random() < 0.5:
            mixup_strength = 0.0
        else:
            cutmix_strength = 0.0
    images, targets = mixup(images, targets, mixup_strength, random)
    return cutmix(images, targets, cutmix_strength, random)
