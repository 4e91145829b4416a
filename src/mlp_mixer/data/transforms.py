"""A picture of any size -> one of the model's: random for training, fixed for evaluation.

Source: the paper's appendix B and its evaluation protocols (resize-crop, resmall-crop), Szegedy et
al. 2015 (inception crop). Every random number comes from the generator that is handed in.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlp_mixer.preprocessing import Preprocessing

_BILINEAR = Image.Resampling.BILINEAR


def resize_for_evaluation(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Returns the picture at the model's size, by the model's own method (`RESIZE_METHODS`)."""
    height, width = preprocessing.image_size
    if image.size == (width, height):
        return image
    is_small = image.width <= width and image.height <= height
    crop = 1.0 if is_small else preprocessing.crop
    filters = {"bilinear": _BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    resampling = filters[preprocessing.interpolation]
    if preprocessing.resize == "squash":
        return image.resize((width, height), resampling)
    if preprocessing.resize == "resize-crop":
        resized_width, resized_height = round(width / crop), round(height / crop)
    else:
        scale = max(width / image.width, height / image.height) / crop
        resized_width = max(width, round(image.width * scale))
        resized_height = max(height, round(image.height * scale))
    # Cut the centre out of the original, then resize once: the same pixels, less work.
    x_scale, y_scale = image.width / resized_width, image.height / resized_height
    left, top = (resized_width - width) // 2, (resized_height - height) // 2
    box = (left * x_scale, top * y_scale, (left + width) * x_scale, (top + height) * y_scale)
    return image.resize((width, height), resampling, box=box)


def inception_crop(
    image: Image.Image,
    size: tuple[int, int],
    random: np.random.Generator,
    area: tuple[float, float] = (0.05, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """Returns a random rectangle of the picture, resized.

    Args:
        image: the whole picture.
        size: (H, W) to return, in pixels.
        random: the sample's own generator.
        area: smallest and largest share of the picture's area.
        aspect: smallest and largest width / height of the rectangle.
    """
    height, width = size
    for _ in range(10):
        share = random.uniform(*area) * image.width * image.height
        ratio = random.uniform(*aspect)
        crop_width = round(math.sqrt(share * ratio))
        crop_height = round(math.sqrt(share / ratio))
        if 0 < crop_width <= image.width and 0 < crop_height <= image.height:
            left = int(random.integers(image.width - crop_width + 1))
            top = int(random.integers(image.height - crop_height + 1))
            box = (left, top, left + crop_width, top + crop_height)
            return image.resize((width, height), _BILINEAR, box=box)
    return image.resize((width, height), _BILINEAR)  # a very long picture: no rectangle fits


def flip(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Returns the picture, or with probability 1/2 its mirror image left to right."""
    if random.random() < 0.5:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """Returns the picture as uint8 (channels, H, W)."""
    pixels = np.array(image)  # a copy that torch may own
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Returns uint8 images (N, channels, H, W) as the float32 input of the model."""
    mean, std = _per_channel(preprocessing.mean, images), _per_channel(preprocessing.std, images)
    return images.float().div_(255.0).sub_(mean).div_(std)


def denormalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Returns inputs of the model (N, channels, H, W) as pixel values on [0, 1]."""
    mean, std = _per_channel(preprocessing.mean, images), _per_channel(preprocessing.std, images)
    return images * std + mean


def _per_channel(value: float | tuple[float, ...], images: Tensor) -> float | Tensor:
    if not isinstance(value, tuple):
        return value
    return torch.tensor(value, device=images.device).view(1, -1, 1, 1)
