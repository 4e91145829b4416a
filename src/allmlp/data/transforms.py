"""Resizing to the model's input size: random for training, fixed for evaluation (appendix B).

Legend: N batch, H W pixels; an image is uint8 (H, W, channels).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from allmlp.data.image import REDUCTIONS, EncodedImage, to_pillow
from allmlp.data.source import Source, array_shape
from allmlp.errors import UserError
from allmlp.preprocessing import Preprocessing

_ATTEMPTS = 100  # as in TensorFlow


def resize_for_evaluation(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Resizes an image to the model's input size with its resize method (`RESIZE_METHODS`)."""
    height, width = preprocessing.image_size
    given_height, given_width = pixels.shape[:2]
    is_small = given_width <= width and given_height <= height
    is_whole = preprocessing.resize == "squash" or (is_small and not preprocessing.crop_small)
    if is_whole and (given_height, given_width) == (height, width):
        return pixels
    crop = 1.0 if is_whole else preprocessing.crop
    if preprocessing.resize == "squash":
        resized_height, resized_width = height, width
    elif preprocessing.resize == "resize-crop":
        resized_height, resized_width = round(height / crop), round(width / crop)
    else:
        scale = max(width / given_width, height / given_height) / crop
        resized_width = max(width, round(given_width * scale))
        resized_height = max(height, round(given_height * scale))
    # Crop the original, then resize: the same pixels with less work.
    x_scale, y_scale = given_width / resized_width, given_height / resized_height
    left, top = (resized_width - width) // 2, (resized_height - height) // 2
    box = (left * x_scale, top * y_scale, (left + width) * x_scale, (top + height) * y_scale)
    resampling = Image.Resampling[preprocessing.interpolation.upper()]
    resized = np.array(to_pillow(pixels).resize((width, height), resampling, box=box))
    return resized.reshape(height, width, -1)


def model_input(
    data: bytes, where: object, preprocessing: Preprocessing
) -> tuple[Tensor, np.ndarray]:
    """Returns an encoded image as model input, (1, channels, H, W), and the pixels it sees."""
    own = preprocessing
    if own.kind == "arrays":
        raise UserError("the model takes rows of arrays", where=where, fix="Give arrays in a file")
    image = EncodedImage(data, where, own.channels, exif_orientation=own.exif_orientation)
    pixels = resize_for_evaluation(image.decode(), own)
    raw = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
    return normalize(raw, own), permute(raw, own)[0].movedim(0, 2).numpy()


def check_input(source: Source, preprocessing: Preprocessing) -> None:
    """Raises UserError if the data is not what the model takes: images, or arrays of its shape."""
    shape, own = array_shape(source), preprocessing
    wanted = (own.channels, *own.image_size) if own.kind == "arrays" else None
    if shape != wanted:
        has, takes = ("images" if s is None else f"rows (C, H, W) = {s}" for s in (shape, wanted))
        what, fix = f"the data has {has}, the model takes {takes}", "Use data like its training's"
        if shape and wanted and shape[0] == wanted[0]:
            fix = f"image_size={shape[1]}x{shape[2]} resizes the model"
        raise UserError(what, where=source.name, fix=fix, code="shape")


def inception_box(
    size: tuple[int, int], random: np.random.Generator, area: tuple[float, float] = (0.05, 1.0)
) -> tuple[int, int, int, int]:
    """Returns a random rectangle, (top, left, height, width) in pixels, drawn as in TensorFlow."""
    height, width = size
    for _ in range(_ATTEMPTS):
        ratio = random.uniform(3 / 4, 4 / 3)
        low, high = (round(math.sqrt(part * height * width / ratio)) for part in area)
        high = min(high, height, math.floor((width + 0.5) / ratio))
        box_height = int(random.integers(min(low, high), high + 1))
        box_width = min(round(box_height * ratio), width)
        rounding = max(box_height, box_width)
        if min(box_height, box_width) < 1 or (
            box_height * box_width < area[0] * height * width - rounding
        ):
            continue
        top = int(random.integers(height - box_height + 1))
        left = int(random.integers(width - box_width + 1))
        return top, left, box_height, box_width
    return 0, 0, height, width  # no rectangle fits a very elongated image


def inception_crop(
    image: EncodedImage,
    size: tuple[int, int],
    random: np.random.Generator,
    area: tuple[float, float] = (0.05, 1.0),
) -> np.ndarray:
    """Resizes a random rectangle to (H, W) = `size`; of a JPEG no more than that is decoded."""
    top, left, height, width = inception_box(image.size, random, area)
    factors = REDUCTIONS if image.format == "JPEG" else ()
    fits = (r for r in factors if height >= r * size[0] and width >= r * size[1])
    reduction = next(fits, 1)
    pixels = image.decode(reduction, fast=True, rows=top + height)
    if reduction > 1:
        top, left = top // reduction, left // reduction
        height, width = height // reduction, width // reduction
    return resize(pixels[top : top + height, left : left + width], size)


def random_crop(
    pixels: np.ndarray, preprocessing: Preprocessing, random: np.random.Generator
) -> np.ndarray:
    """Takes a random crop of the image, resized to 1 / `crop` of the size (Google's VTAB code)."""
    height, width = preprocessing.image_size
    whole = round(height / preprocessing.crop), round(width / preprocessing.crop)
    resized = resize(pixels, whole)
    top = int(random.integers(whole[0] - height + 1))
    left = int(random.integers(whole[1] - width + 1))
    return np.ascontiguousarray(resized[top : top + height, left : left + width])


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes to (H, W) = `size`, bilinear without antialiasing, as TensorFlow does."""
    height, width = size
    resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    return resized.reshape(height, width, -1)  # OpenCV drops a single channel


def flip(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return cv2.flip(pixels, 1).reshape(pixels.shape) if random.random() < 0.5 else pixels


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Converts images (N, channels, H, W), or rows of arrays, to the model's float32 input."""
    mean, std = _mean_and_std(preprocessing, images.device)
    images = permute(images, preprocessing)
    if preprocessing.kind == "arrays":
        return ((images - mean) / std).contiguous()
    images = images.to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(255.0).sub_(mean).div_(std)


def denormalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Converts model inputs (N, channels, H, W) to pixel values in [0, 1]."""
    mean, std = _mean_and_std(preprocessing, images.device)
    return images * std + mean


@functools.lru_cache(maxsize=8)  # a copy for every batch would wait for a GPU
def _mean_and_std(preprocessing: Preprocessing, device: torch.device) -> list[Any]:
    values = preprocessing.mean, preprocessing.std
    with torch.inference_mode(False):
        return [
            torch.tensor(value, device=device).view(1, -1, 1, 1)
            if isinstance(value, tuple)
            else value
            for value in values
        ]


# The two fixed permutations of the paper's figure 4 (section 3.4), the same for every image


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
    return images if order is None else images.flatten(2).index_select(2, order).view_as(images)
