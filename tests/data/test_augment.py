"""Random changes: exact where they can be, and bounded where they are random."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from allmlp.data.augment import cutmix, mix, mixup, padded_crop, random_erasing, warp
from allmlp.data.randaugment import FILL, OPERATIONS, randaugment
from conftest import draw

pytestmark = pytest.mark.numerics


def test_shift_moves_by_its_share():
    pixels = np.zeros((40, 40, 1), np.uint8)
    pixels[18:22, 18:22] = 255
    centers = []
    for seed in range(200):
        out = warp(pixels, np.random.default_rng(seed), shift=0.2)
        y, x = np.nonzero(out[..., 0] > 100)
        centers.append((x.mean() - 19.5, y.mean() - 19.5))
    spread = np.abs(centers).max(axis=0)
    assert (spread > 7.0).all()
    assert (spread <= 8.5).all()


def test_rotation_keeps_the_centre_and_turns_by_its_angle():
    pixels = np.zeros((41, 41, 1), np.uint8)
    pixels[19:22, 30:33] = 255
    angles = []
    for seed in range(200):
        out = warp(pixels, np.random.default_rng(seed), rotate=30.0)
        y, x = np.nonzero(out[..., 0] > 60)
        angles.append(np.degrees(np.arctan2(y.mean() - 20, x.mean() - 20)))
        assert np.hypot(y.mean() - 20, x.mean() - 20) == pytest.approx(11.0, abs=0.7)
    assert 27 < max(angles) < 32
    assert -32 < min(angles) < -27


def test_elastic_moves_by_its_strength():
    """A dot in the middle sits on the grid's middle point: it moves by that normal draw."""
    pixels = np.zeros((65, 65, 3), np.uint8)
    pixels[31:34, 31:34] = 255
    moves = []
    for seed in range(300):
        out = warp(pixels, np.random.default_rng(seed), elastic=0.05)
        y, x = np.nonzero(out[..., 1] > 60)
        if len(x):
            moves += [x.mean() - 32, y.mean() - 32]
    assert np.std(moves) == pytest.approx(0.05 * 65, rel=0.15)
    assert abs(np.mean(moves)) < 0.5


def test_mixup_blends_with_the_neighbour():
    images = torch.randn(4, 3, 2, 2)
    targets = torch.eye(4)
    mixed, labels = mixup(images, targets, 0.5, np.random.default_rng(0))
    share = float(labels[0, 0])
    assert 0.5 <= share < 1.0
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
    torch.testing.assert_close(labels, share * targets + (1 - share) * targets.roll(1, 0))
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(4))


def test_a_padded_crop_moves_by_whole_pixels_and_fills_with_black():
    pixels, seen = np.asarray(draw(2, (32, 32))), set()
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    parts = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y, x in np.ndindex(9, 9)}
    for seed in range(300):
        out = padded_crop(pixels, np.random.default_rng(seed), 0.125)
        assert out.shape == pixels.shape
        seen.add(parts[out.tobytes()])
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(9))


def test_erasing_leaves_what_is_outside_its_rectangle():
    pixels = np.zeros((40, 30, 3), np.uint8)
    shares = []
    for seed in range(300):
        out = random_erasing(pixels, np.random.default_rng(seed), 0.5)
        rows, columns = np.nonzero(out.any(axis=2))
        if len(rows):
            box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            assert (out.any(axis=2).sum() - box) == 0
            shares.append(box / 1200)
    assert 110 < len(shares) < 190
    assert min(shares) < 0.05
    assert 0.25 < max(shares) < 0.37
    assert not pixels.any()
    assert random_erasing(pixels, np.random.default_rng(0), 0.0) is pixels


def test_cutmix_pastes_a_rectangle_and_counts_its_area():
    images = torch.arange(3.0)[:, None, None, None].expand(3, 1, 16, 12).contiguous()
    shares = []
    for seed in range(200):
        mixed, labels = cutmix(images, torch.eye(3), 1.0, np.random.default_rng(seed))
        pasted = (mixed != images).float().mean(dim=(1, 2, 3))
        assert (pasted == pasted[0]).all()
        torch.testing.assert_close(labels[1], torch.tensor([pasted[0], 1 - pasted[0], 0.0]))
        assert (mixed[1][mixed[1] != 1] == 0).all()  # the neighbour's
        shares.append(float(pasted[0]))
    assert min(shares) < 0.05
    assert max(shares) > 0.9


def test_with_mixup_and_cutmix_a_coin_decides():
    images, targets = torch.randn(4, 1, 8, 8), torch.eye(4)
    kinds = []
    for seed in range(100):
        random = np.random.default_rng(seed)
        mixed, _ = mix(images, targets, random, mixup_strength=0.5, cutmix_strength=1.0)
        kinds.append(bool((mixed == images).any() or (mixed == images.roll(1, 0)).any()))
    assert 30 < sum(kinds) < 70
    same, _ = mix(images, targets, np.random.default_rng(0), mixup_strength=0, cutmix_strength=0)
    assert same is images


# RandAugment: every operation against Pillow's own arithmetic, and Google's quirks


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


@pytest.mark.parametrize("magnitude", [0, 3, 5, 10, 15, 20])
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
@pytest.mark.parametrize("size", [(224, 224), (60, 90)])
def test_places_are_pillows(magnitude, size):
    """Either sign; a pixel in a hundred may round to its neighbour (no exact ties here)."""
    pixels, shear = gradient(size), 0.03 * magnitude
    image = Image.fromarray(pixels)
    y, x = (round(10 * magnitude * side / 224) for side in size)
    moves = {
        "ShearX": lambda s: moved(image, (1, s * shear, 0, 0, 1, 0)),
        "ShearY": lambda s: moved(image, (1, 0, 0, s * shear, 1, 0)),
        "TranslateX": lambda s: moved(image, (1, 0, s * x, 0, 1, 0)),
        "TranslateY": lambda s: moved(image, (1, 0, 0, 0, 1, s * y)),
        "Rotate": lambda s: np.asarray(image.rotate(s * 3 * magnitude, fillcolor=(FILL,) * 3)),
    }
    for name, move in moves.items():
        both, seen = [move(1), move(-1)], set()
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


def test_every_operation_takes_every_shape():
    for shape in ((1, 1, 3), (2, 5, 3), (3, 3, 1), (32, 32, 1), (64, 48, 3)):
        pixels = np.random.default_rng(1).integers(256, size=shape, dtype=np.uint8)
        before = pixels.copy()
        for name in OPERATIONS:
            assert apply(name, pixels, 15).shape == shape
            assert (pixels == before).all(), f"{name} changed its input"


def test_two_operations_drawn_evenly_with_replacement():
    pixels, names = gradient((16, 16)), list(OPERATIONS)
    for seed in range(40):
        random = np.random.default_rng(seed)
        expected = pixels
        for number in random.integers(16, size=2):
            expected = OPERATIONS[names[number]](expected, 15, random).reshape(pixels.shape)
        assert (randaugment(pixels, 15, np.random.default_rng(seed)) == expected).all()
