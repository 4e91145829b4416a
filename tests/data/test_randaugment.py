"""RandAugment: every operation against Pillow's own arithmetic, and Google's quirks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from allmlp.data.randaugment import FILL, OPERATIONS, randaugment

pytestmark = pytest.mark.numerics

MAGNITUDES = (0, 3, 5, 10, 15, 20)


def gradient(size: tuple[int, int] = (224, 224), low: int = 20, high: int = 200) -> np.ndarray:
    """Smooth shapes and noise, so that every operation has something to do."""
    random = np.random.default_rng(0)
    coarse = random.integers(low, high, size=(8, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))
    noise = random.integers(0, 20, size=(*size, 3), dtype=np.uint8)
    return smooth + np.minimum(noise, 255 - smooth)


def apply(name: str, pixels: np.ndarray, magnitude: float, seed: int = 0) -> np.ndarray:
    out = OPERATIONS[name](pixels, magnitude, np.random.default_rng(seed))
    assert out.dtype == np.uint8
    return out.reshape(pixels.shape)


def factor(magnitude: float) -> float:
    return magnitude / 10 * 1.8 + 0.1


def contrast(image: Image.Image, magnitude: float) -> Image.Image:
    """Google's: a blend with the shade (pixels / 256), not with the mean grey."""
    shade = int(min(image.width * image.height / 256, 255))
    constant = Image.new("RGB", image.size, (shade,) * 3)
    return Image.blend(constant, image, factor(magnitude))


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Posterize": lambda image, m: ImageOps.posterize(image, min(max(int(m / 10 * 4), 1), 8)),
    "Solarize": lambda image, m: ImageOps.solarize(image, int(m / 10 * 256) % 256),
    "Color": lambda image, m: ImageEnhance.Color(image).enhance(factor(m)),
    "Contrast": contrast,
    "Brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(factor(m)),
    "Sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(factor(m)),
    "SolarizeAdd": lambda image, m: image.point(
        [min(v + int(m / 10 * 110), 255) if v < 128 else v for v in range(256)] * 3
    ),
}


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", PILLOW)
def test_values_are_pillows(name, magnitude):
    for pixels in (gradient(), gradient((37, 91), 100, 140), gradient((5, 3))):
        ours = apply(name, pixels, magnitude).astype(int)
        theirs = np.asarray(PILLOW[name](Image.fromarray(pixels), magnitude), int)
        difference = np.abs(ours - theirs)
        # One for rounding, times the factor that strengthens it.
        blended = name in ("Color", "Sharpness")
        assert difference.max() <= (1 + factor(magnitude) if blended else 0), name
        assert difference.mean() < 0.2


def moved(image: Image.Image, matrix: tuple[float, ...]) -> np.ndarray:
    options = {"resample": Image.Resampling.NEAREST, "fillcolor": (FILL,) * 3}
    # Pillow's places are corners of pixels, the operation's are centres.
    a, b, c, d, e, f = matrix
    corners = (a, b, c - (a + b - 1) / 2, d, e, f - (d + e - 1) / 2)
    return np.asarray(image.transform(image.size, Image.Transform.AFFINE, corners, **options))


@pytest.mark.parametrize("magnitude", [3.1, 9.7, 14.3, 19.9])
@pytest.mark.parametrize("size", [(224, 224), (112, 112), (60, 90)])
def test_places_are_pillows(magnitude, size):
    """Either sign; a pixel in a hundred may round to its neighbour (no exact ties here)."""
    pixels = gradient(size)
    image = Image.fromarray(pixels)
    height, width = size
    shear, x, y = (
        0.03 * magnitude,
        round(10 * magnitude * width / 224),
        round(10 * magnitude * height / 224),
    )
    expected = {
        "ShearX": [moved(image, (1, s * shear, 0, 0, 1, 0)) for s in (1, -1)],
        "ShearY": [moved(image, (1, 0, 0, s * shear, 1, 0)) for s in (1, -1)],
        "TranslateX": [moved(image, (1, 0, s * x, 0, 1, 0)) for s in (1, -1)],
        "TranslateY": [moved(image, (1, 0, 0, 0, 1, s * y)) for s in (1, -1)],
        "Rotate": [
            np.asarray(image.rotate(s * 3 * magnitude, fillcolor=(FILL,) * 3)) for s in (1, -1)
        ],
    }
    for name, both in expected.items():
        seen = set()
        for seed in range(12):
            ours = apply(name, pixels, magnitude, seed)
            same = [(ours == theirs).all(axis=2).mean() for theirs in both]
            assert max(same) > 0.985, (name, same)
            seen.add(int(np.argmax(same)))
        assert seen == {0, 1}, name


def test_cutout_is_a_grey_square_within_its_size():
    pixels = gradient(low=0, high=100)
    sizes = []
    for seed in range(200):
        out = apply("Cutout", pixels, 15, seed)
        changed = np.nonzero((out != pixels).any(axis=2))
        rows, columns = (int(np.ptp(places)) + 1 for places in changed)
        assert (out[changed] == FILL).all()
        assert max(rows, columns) <= 120
        sizes.append(rows * columns)
    assert max(sizes) == 120 * 120
    assert min(sizes) < 90 * 90  # centres lie anywhere, so squares are cut off at the edge


def test_what_the_documentation_says_of_the_magnitudes():
    pixels = gradient()
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        assert np.abs(apply(name, pixels, 5).astype(int) - pixels).max() <= 1
    for magnitude in (10, 20):  # TensorFlow wraps the thresholds 256 and 512 to 0
        assert (apply("Solarize", pixels, magnitude) == 255 - pixels).all()
    at_128 = np.where(pixels < 128, pixels, 255 - pixels)  # 384 wraps to 128
    assert (apply("Solarize", pixels, 15) == at_128).all()
    assert (at_128 != pixels).any()
    assert (apply("Posterize", pixels, 0) == (pixels & 128)).all()
    assert (apply("Posterize", pixels, 20) == pixels).all()
    assert len(np.unique(apply("Posterize", pixels, 15) & 3)) == 1
    assert math.isclose(factor(15), 2.8)


def test_every_operation_takes_every_shape():
    for shape in ((1, 1, 3), (2, 5, 3), (3, 3, 1), (32, 32, 1), (64, 48, 3)):
        pixels = np.random.default_rng(1).integers(256, size=shape, dtype=np.uint8)
        before = pixels.copy()
        for name in OPERATIONS:
            assert apply(name, pixels, 15).shape == shape
            assert (pixels == before).all(), f"{name} changed its input"


def test_a_grey_picture_is_treated_as_its_colour_twin():
    grey = gradient()[..., :1]
    colors = grey.repeat(3, axis=2)
    for name in OPERATIONS:
        ours = apply(name, grey, 15, 3).astype(int)
        theirs = apply(name, colors, 15, 3).astype(int)
        assert np.abs(ours - theirs).max() <= 1, name


def test_two_operations_drawn_evenly_with_replacement():
    pixels = gradient((16, 16))
    drawn = np.concatenate(
        [np.random.default_rng(seed).integers(16, size=2) for seed in range(3000)]
    )
    counts = np.bincount(drawn, minlength=16)
    assert counts.min() > 300
    names = list(OPERATIONS)
    for seed in range(40):
        random = np.random.default_rng(seed)
        expected = pixels
        for number in random.integers(16, size=2):
            expected = OPERATIONS[names[number]](expected, 15, random).reshape(pixels.shape)
        assert (randaugment(pixels, 15, np.random.default_rng(seed)) == expected).all()
