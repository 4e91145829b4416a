"""An image of any size becomes one of the model's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp as am
from allmlp.data.image import EncodedImage
from allmlp.data.transforms import (
    denormalize,
    inception_box,
    inception_crop,
    normalize,
    patch_orders,
    permute,
    random_crop,
    resize,
    resize_for_evaluation,
)
from allmlp.preprocessing import Preprocessing
from conftest import TINY, draw, encode

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("method", ["resize-crop", "resmall-crop"])
@pytest.mark.parametrize("side", [32, 224])
def test_small_pictures_are_cropped_where_the_protocol_says_so(method, side):
    """The paper's on CIFAR: 32 -> 256 -> the centre's 224, on both sides of the limit."""
    image = draw(3, (side, side)).resize((side, side))
    protocol = Preprocessing(image_size=(224, 224), resize=method, crop_small=True)
    found = resize_for_evaluation(np.asarray(image), protocol)
    whole = image.resize((256, 256), Image.Resampling.BILINEAR)
    expected = np.asarray(whole.crop((16, 16, 240, 240)), int)
    assert np.abs(found.astype(int) - expected).max() <= 1
    kept = resize_for_evaluation(np.asarray(image), replace(protocol, crop=1.0))
    default = resize_for_evaluation(np.asarray(image), replace(protocol, crop_small=False))
    assert (kept == default).all()


@pytest.mark.parametrize(
    ("width", "side", "own", "ends"),
    [
        (512, 224, {}, (72, 183.5)),
        (256, 128, {"crop": 1.0}, (0.5, 254.5)),
        (256, 128, {"crop": 0.5}, (64, 191)),
    ],
)
def test_resmall_crop_keeps_the_aspect_and_cuts_the_centre(width, side, own, ends):
    """224 of a shorter side of 256: the share 7/8 of it, and as much of the longer side."""
    ramp = np.broadcast_to(np.arange(width) * 256 // width, (256, width)).astype(np.uint8)
    preprocessing = Preprocessing(image_size=(side, side), channels=1, **own)
    cut = np.asarray(resize_for_evaluation(ramp[..., None], preprocessing), float)
    assert (cut[0, 0], cut[0, -1]) == pytest.approx(ends, abs=1)


def test_inception_boxes_are_drawn_as_tensorflow_draws_them():
    """The aspect is uniform; given it, the height is uniform between its limits."""
    boxes = []
    for seed in range(2000):
        random = np.random.default_rng(seed)
        top, left, height, width = inception_box((400, 480), random, (0.1, 0.5))
        assert 0 <= top <= 400 - height
        assert 0 <= left <= 480 - width
        boxes.append((height, width, top / max(1, 400 - height), left / max(1, 480 - width)))
    heights, widths, tops, lefts = np.array(boxes).T
    shares, ratios = heights * widths / (400 * 480), widths / heights
    assert 0.098 < shares.min() < 0.11
    assert 0.48 < shares.max() < 0.503
    assert 0.745 < ratios.min() < 0.76
    assert 1.32 < ratios.max() < 1.34
    assert ratios.mean() == pytest.approx((3 / 4 + 4 / 3) / 2, abs=0.015)
    low, high = np.sqrt(0.1 * 400 * 480 / ratios), np.sqrt(0.5 * 400 * 480 / ratios)
    quantiles = (heights - low) / (np.minimum(high, 400) - low)
    assert np.quantile(quantiles, (0.1, 0.5, 0.9)) == pytest.approx((0.1, 0.5, 0.9), abs=0.04)
    for places in (tops, lefts):
        assert np.quantile(places, (0.1, 0.5, 0.9)) == pytest.approx((0.1, 0.5, 0.9), abs=0.04)


@pytest.mark.parametrize("size", [(1, 1), (2, 4000), (4000, 2), (3, 5), (20, 20), (1, 2)])
def test_inception_boxes_of_any_picture(size):
    for seed in range(50):
        top, left, height, width = inception_box(size, np.random.default_rng(seed))
        assert 0 <= top < top + height <= size[0]
        assert 0 <= left < left + width <= size[1]
    image = EncodedImage(encode(Image.new("RGB", size[::-1])), "x")
    assert inception_crop(image, (8, 8), np.random.default_rng(0)).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(32, 32), (180, 200)])
def test_inception_crop_shows_the_box_that_was_drawn(kind, size):
    """At a reduced scale too: the places of a ramp say what part is shown."""
    y, x = np.mgrid[0:240, 0:250]
    data = encode(Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)), kind)
    for seed in range(100):
        top, left, height, width = inception_box((240, 250), np.random.default_rng(seed))
        crop = inception_crop(EncodedImage(data, "x"), size, np.random.default_rng(seed))
        assert crop.shape == (*size, 3)
        pixels = crop.astype(float)
        shown = pixels[..., 1].mean(), pixels[..., 0].mean()
        assert shown == pytest.approx((top + height / 2, left + width / 2), abs=6)
        spread = (pixels[-1, :, 1] - pixels[0, :, 1]).mean()
        assert spread == pytest.approx(height * (1 - 1 / size[0]), abs=10)


def test_resize_is_bilinear_without_antialiasing():
    """Against the formula: half-pixel centres, two neighbours a side, whatever the reduction."""
    pixels = np.asarray(draw(5, (50, 37)))
    for height, width in ((20, 16), (37, 50), (80, 90)):
        y = np.clip((np.arange(height) + 0.5) * 37 / height - 0.5, 0, 36)
        x = np.clip((np.arange(width) + 0.5) * 50 / width - 0.5, 0, 49)
        rows, columns = np.minimum(y.astype(int), 35), np.minimum(x.astype(int), 48)
        down, right = (y - rows)[:, None, None], (x - columns)[None, :, None]
        upper = pixels[rows][:, columns] * (1 - right) + pixels[rows][:, columns + 1] * right
        lower = (
            pixels[rows + 1][:, columns] * (1 - right) + pixels[rows + 1][:, columns + 1] * right
        )
        expected = upper * (1 - down) + lower * down
        assert np.abs(resize(pixels, (height, width)) - expected).max() <= 1.01
    assert resize(pixels[..., :1], (8, 9)).shape == (8, 9, 1)


def test_normalize_with_a_mean_and_deviation_for_each_channel():
    values = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 3, 1, 1).repeat(2, 1, 1, 1)
    preprocessing = Preprocessing(image_size=(1, 1), mean=(0.5, 0.0, 0.2), std=(0.5, 2.0, 1.0))
    scaled = normalize(values, preprocessing)
    torch.testing.assert_close(scaled[1].flatten(), torch.tensor([-1.0, 0.5, 0.0]))
    torch.testing.assert_close(denormalize(scaled, preprocessing), values / 255)
    miil = Preprocessing(image_size=(1, 1), mean=0.0, std=1.0)
    torch.testing.assert_close(normalize(values, miil), values / 255)
    torch.testing.assert_close(denormalize(normalize(values, miil), miil), values / 255)


def test_the_interpolation_is_the_models():
    image = draw(3, (90, 70))
    for name in ("bilinear", "bicubic"):
        own = Preprocessing(image_size=(32, 32), resize="squash", interpolation=name)
        resized = resize_for_evaluation(np.asarray(image), own)
        expected = image.resize((32, 32), Image.Resampling[name.upper()])
        assert resized.tobytes() == expected.tobytes()


def test_a_random_crop_is_cut_from_the_squashed_picture():
    """8/7 of the size, every place as likely as another, and the same again from the same seed."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(32, 64, 3), dtype=np.uint8)
    preprocessing = Preprocessing(image_size=(14, 21))
    whole, seen = resize(pixels, (16, 24)), set()
    parts = {whole[y : y + 14, x : x + 21].tobytes(): (y, x) for y, x in np.ndindex(3, 4)}
    for seed in range(60):
        found = random_crop(pixels, preprocessing, np.random.default_rng(seed))
        again = random_crop(pixels, preprocessing, np.random.default_rng(seed))
        assert (found.shape, found.flags.c_contiguous) == ((14, 21, 3), True)
        assert (found == again).all()
        seen.add(parts[found.tobytes()])
    assert len(seen) == 12


# The permutations of figure 4: one for all images, last of all, and inside the weights' file


def rules(kind: Any = "patches", size: tuple[int, int] = (8, 12), seed: int = 3) -> Preprocessing:
    own = {"permutation_patch": 4 if kind == "patches" else None, "permutation_seed": seed}
    return Preprocessing(image_size=size, permutation=kind, **own)


# Two images whose pixels are all different, also between the images and channels.
NUMBERED = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12)


@pytest.mark.parametrize("kind", ["patches", "pixels"])
def test_every_pixel_stays_and_all_images_are_permuted_alike(kind):
    images = NUMBERED
    permuted = permute(images, rules(kind))
    assert sorted(permuted.flatten().tolist()) == sorted(images.flatten().tolist())
    assert not torch.equal(permuted, images)
    shifts = (permuted[:1] - permuted[1:]).unique()  # channels and images move together
    assert shifts.tolist() == [-3 * 96]
    again = permute(images, rules(kind))
    other = permute(images, rules(kind, seed=4))
    assert torch.equal(again, permuted)
    assert not torch.equal(other, permuted)


def test_patches_move_whole_and_their_pixels_within_them_alike():
    images, settings = NUMBERED, rules()
    permuted = permute(images, settings)
    patches, inside = patch_orders(settings)
    assert sorted(patches) == list(range(6))
    assert sorted(inside) == list(range(16))
    for place, origin in enumerate(patches):
        row, column = divmod(place, 3)
        old_row, old_column = divmod(int(origin), 3)
        new = permuted[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        old = images[:, :, 4 * old_row : 4 * old_row + 4, 4 * old_column : 4 * old_column + 4]
        assert torch.equal(new.flatten(2), old.flatten(2)[:, :, inside])


def test_normalize_permutes():
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    plain = replace(rules(), permutation="none", permutation_patch=None, permutation_seed=0)
    expected = permute(normalize(images, plain), rules())
    assert torch.equal(normalize(images, rules()), expected)


def test_it_travels_with_the_weights(tmp_path: Path):
    model = am.create_model("mixer_s16", 8, 2, **TINY)
    model.preprocessing = rules(size=(8, 8))
    am.save_model(model, tmp_path / "model")
    assert am.load_model(tmp_path / "model").preprocessing == rules(size=(8, 8))
    with pytest.raises(am.UserError, match="permuted pixels"):
        am.load_model(tmp_path / "model", image_size=16)
