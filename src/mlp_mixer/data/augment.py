"""Random changes of a training picture or batch, each from the generator that is handed in."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def warp(
    image: Image.Image,
    random: np.random.Generator,
    *,
    rotate: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    shift: float = 0.0,
    elastic: float = 0.0,
) -> Image.Image:
    """Returns the picture turned, stretched, slanted, moved and bent at random, as writing varies.

    All in one resampling (bilinear), because each would blur a small picture a little more.

    Args:
        image: the picture; what comes in from outside it is black.
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
    width, height = image.size
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
    pixels = torch.from_numpy(np.array(image)).float()
    channels = pixels[None] if pixels.dim() == 2 else pixels.movedim(-1, 0)  # (channels, H, W)
    grid = (2.0 * places / sides)[None]  # grid_sample's unit is half a side
    warped = F.grid_sample(channels[None], grid, align_corners=False)[0].round().to(torch.uint8)
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
