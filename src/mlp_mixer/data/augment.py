"""Random changes of a training picture or batch, each from the generator that is handed in."""

from __future__ import annotations

import math

import numpy as np
import torch
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
