"""RandAugment as used to pre-train Mixer: two of sixteen operations on 8-bit pixels.

Source: Cubuk et al. 2020; operations, strengths and quirks match the paper's code (big_vision,
autoaugment.py). The scale of magnitudes is 0 to 10; the paper's 15 and 20 go beyond it. Note:

- The magnitude sets the strength; only the sign is random. An operation is always applied.
- `posterize` keeps 6 and 8 bits at magnitudes 15 and 20, and one at 0: its effect decreases.
- `solarize` has the threshold 25.6 * magnitude, which TensorFlow wraps to 8 bits: 256 (magnitude
  10) and 512 (20) become 0, which inverts the whole image, and 384 (15) becomes 128.
- `contrast` blends with the grey level (number of pixels) / 256, which is 196 at 224 x 224, instead
  of the image's mean.
- `color`, `contrast`, `brightness` and `sharpness` use the factor 0.1 + 0.18 * magnitude: 5 leaves
  an image unchanged, 0 removes nearly everything, 15 gives 2.8.
- The outside is filled with grey, 128. Interpolation is nearest-neighbour.

Google's shifts and cutouts are in pixels at 224 x 224; here they scale with the image.

Legend: H W pixels; an image is uint8 (H, W, channels).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import cv2
import numpy as np

Operation = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]

FILL = 128
_SIDE = 224  # image side in pixels assumed by Google's constants
_VALUES = np.arange(256)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def randaugment(
    pixels: np.ndarray, magnitude: float, random: np.random.Generator, num_layers: int = 2
) -> np.ndarray:
    for number in random.integers(len(OPERATIONS), size=num_layers):
        operation = _IN_ORDER[number]
        pixels = operation(pixels, magnitude, random).reshape(pixels.shape)
    return pixels


def autocontrast(pixels: np.ndarray, _: float, __: object) -> np.ndarray:
    tables = []
    for channel in cv2.split(pixels):
        low, high = cv2.minMaxLoc(channel)[:2]
        scale = 255.0 / (high - low) if high > low else 1.0
        tables.append(_VALUES * scale - low * scale if high > low else _VALUES)
    return _look_up(pixels, *tables)


def equalize(pixels: np.ndarray, _: float, __: object) -> np.ndarray:
    tables = []
    for channel in cv2.split(pixels):
        counts = cv2.calcHist([channel], [0], None, [256], [0, 256])[:, 0].astype(np.int64)
        used = counts[counts > 0]
        step = int(used.sum() - used[-1]) // 255
        tables.append((np.cumsum(counts) - counts + step // 2) // step if step else _VALUES)
    return _look_up(pixels, *tables)


def color(pixels: np.ndarray, magnitude: float, _: object) -> np.ndarray:
    if pixels.shape[2] == 1:
        return pixels
    grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _blend(grey, pixels, _factor(magnitude))


def contrast(pixels: np.ndarray, magnitude: float, _: object) -> np.ndarray:
    shade = np.float32(min(pixels.shape[0] * pixels.shape[1] // 256, 255))
    values = _VALUES.astype(np.float32)  # as in Pillow, for equal fractions
    return _look_up(pixels, shade + np.float32(_factor(magnitude)) * (values - shade))


def sharpness(pixels: np.ndarray, magnitude: float, _: object) -> np.ndarray:
    """Sharpens or, below magnitude 5, smooths; border pixels are unchanged."""
    if min(pixels.shape[:2]) < 3:
        return pixels
    smooth = cv2.filter2D(pixels, -1, _SMOOTH).reshape(pixels.shape)
    out = pixels.copy()
    inner = np.s_[1:-1, 1:-1]
    out[inner] = _blend(smooth, pixels, _factor(magnitude)).reshape(pixels.shape)[inner]
    return out


def rotate(pixels: np.ndarray, magnitude: float, random: np.random.Generator) -> np.ndarray:
    """Rotates by +-3 * magnitude degrees about the centre."""
    angle = np.deg2rad(_sign(random) * 3.0 * magnitude)
    cos, sin = np.cos(angle), np.sin(angle)
    height, width = pixels.shape[:2]
    x, y = (width - 1) / 2, (height - 1) / 2
    return _affine(pixels, cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def shear(
    pixels: np.ndarray, magnitude: float, random: np.random.Generator, axis: int
) -> np.ndarray:
    """Shears by +-0.03 * magnitude pixels per pixel along an axis."""
    level = _sign(random) * 0.03 * magnitude
    across, down = (level, 0.0) if axis == 1 else (0.0, level)
    return _affine(pixels, 1.0, across, 0.0, down, 1.0, 0.0)


def translate(
    pixels: np.ndarray, magnitude: float, random: np.random.Generator, axis: int
) -> np.ndarray:
    """Shifts by +-10 * magnitude of 224 pixels along an axis."""
    side = pixels.shape[axis]
    shift = round(_sign(random) * 10.0 * magnitude * side / _SIDE)
    out = np.full_like(pixels, FILL)
    kept = max(0, side - abs(shift))
    old, new = max(0, shift), max(0, -shift)
    index = (slice(None),) * axis
    out[(*index, slice(new, new + kept))] = pixels[(*index, slice(old, old + kept))]
    return out


def cutout(pixels: np.ndarray, magnitude: float, random: np.random.Generator) -> np.ndarray:
    """Pastes a grey square with a side of 2 * int(4 * magnitude) of 224 pixels."""
    out = pixels.copy()
    spans = []
    for side in pixels.shape[:2]:
        half, center = round(int(4 * magnitude) * side / _SIDE), int(random.integers(side))
        spans.append(slice(max(0, center - half), center + half))
    out[spans[0], spans[1]] = FILL
    return out


def _sign(random: np.random.Generator) -> float:
    return -1.0 if random.random() < 0.5 else 1.0


def _factor(magnitude: float) -> float:
    return 0.1 + 0.18 * magnitude


def _look_up(pixels: np.ndarray, *tables: np.ndarray) -> np.ndarray:
    """Applies one lookup table to all channels, or one per channel; truncates fractions."""
    table = np.clip(np.stack(tables, axis=-1), 0, 255).astype(np.uint8)  # (256, 1 or channels)
    return cv2.LUT(pixels, table[None])


def _blend(first: np.ndarray, second: np.ndarray, factor: float) -> np.ndarray:
    """first + factor * (second - first) in 8 bits; OpenCV rounds where Pillow truncates."""
    return cv2.addWeighted(first, 1.0 - factor, second, factor, 1 / 512 - 0.5)


def _affine(pixels: np.ndarray, *matrix: float) -> np.ndarray:
    """Returns the image whose pixel (x, y) is the input pixel nearest to matrix * (x, y, 1)."""
    height, width = pixels.shape[:2]
    return cv2.warpAffine(
        pixels,
        np.array(matrix, dtype=np.float64).reshape(2, 3),
        (width, height),
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(FILL, FILL, FILL, FILL),
    )


def _by_value(table: Callable[[float], np.ndarray]) -> Operation:
    """An operation that applies a lookup table that depends on the magnitude."""
    return lambda pixels, magnitude, _: _look_up(pixels, table(magnitude))


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": _by_value(lambda m: 255 - _VALUES),
    "Rotate": rotate,
    # Keeps the highest int(0.4 * m) bits, at least one; TensorFlow shifts by 7 at most.
    "Posterize": _by_value(lambda m: _VALUES & 256 - (1 << 8 - min(max(int(0.4 * m), 1), 8))),
    "Solarize": _by_value(
        lambda m: np.where(int(25.6 * m) % 256 > _VALUES, _VALUES, 255 - _VALUES)
    ),
    "Color": color,
    "Contrast": contrast,
    "Brightness": _by_value(lambda m: np.float32(_factor(m)) * _VALUES.astype(np.float32)),
    "Sharpness": sharpness,
    "ShearX": partial(shear, axis=1),
    "ShearY": partial(shear, axis=0),
    "TranslateX": partial(translate, axis=1),
    "TranslateY": partial(translate, axis=0),
    "Cutout": cutout,
    "SolarizeAdd": _by_value(
        lambda m: np.where(_VALUES < 128, np.minimum(_VALUES + int(11 * m), 255), _VALUES)
    ),
}
_IN_ORDER = list(OPERATIONS.values())
