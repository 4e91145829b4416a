"""Random changes of a training picture or batch, each from the generator that is handed in."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def random_affine(
    image: Image.Image,
    random: np.random.Generator,
    *,
    rotate: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    shift: float = 0.0,
) -> Image.Image:
    """Returns the picture turned, stretched, slanted and moved at random about its centre.

    Args:
        image: the picture; what comes in from outside it is black.
        random: the sample's own generator.
        rotate: largest angle, degrees.
        scale: largest relative change of the width and, drawn on its own, of the height.
        shear: largest horizontal slant, pixels a pixel.
        shift: largest move, as a share of the width and of the height.
    """
    draw = random.uniform(-1.0, 1.0, size=6)
    angle = math.radians(rotate) * draw[0]
    scale_x, scale_y = 1.0 + scale * draw[1], 1.0 + scale * draw[2]
    cos, sin = math.cos(angle), math.sin(angle)
    # Pillow wants the map from the new picture to the old one.
    a, b = scale_x * cos, -scale_x * sin + shear * draw[3]
    d, e = scale_y * sin, scale_y * cos
    center_x, center_y = image.width / 2, image.height / 2
    c = center_x - a * center_x - b * center_y + shift * image.width * draw[4]
    f = center_y - d * center_x - e * center_y + shift * image.height * draw[5]
    matrix = (a, b, c, d, e, f)
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )


def elastic(image: Image.Image, random: np.random.Generator, strength: float) -> Image.Image:
    """Returns the picture warped smoothly at random, as handwriting varies.

    A grid of 3 x 3 random moves is spread over the picture (bicubic) and every pixel is moved by
    its own share of it. Source: the idea of Simard et al. 2003, on a coarser grid.

    Args:
        image: the picture; what comes in from outside it is black.
        random: the sample's own generator.
        strength: standard deviation of the moves, as a share of the picture's sides.
    """
    moves = torch.from_numpy(random.normal(size=(1, 2, 3, 3)).astype(np.float32))
    size = (image.height, image.width)
    field = F.interpolate(moves, size=size, mode="bicubic", align_corners=True)
    still = F.affine_grid(torch.eye(2, 3)[None], [1, 1, *size], align_corners=False)
    grid = still + 2.0 * strength * field.movedim(1, -1)  # the grid's unit is half a side
    pixels = torch.from_numpy(np.array(image)).float()
    channels = pixels[None, None] if pixels.dim() == 2 else pixels.movedim(-1, 0)[None]
    warped = F.grid_sample(channels, grid, align_corners=False)[0].round().to(torch.uint8)
    return Image.fromarray(warped[0].numpy() if len(warped) == 1 else warped.movedim(0, -1).numpy())


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
