"""A picture of any size becomes one of the model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import draw
from mlp_mixer.data.transforms import (
    denormalize,
    flip,
    inception_crop,
    normalize,
    resize_for_evaluation,
    to_tensor,
)
from mlp_mixer.preprocessing import RESIZE_METHODS, Preprocessing


@pytest.mark.parametrize("resize", RESIZE_METHODS)
@pytest.mark.parametrize("size", [(1, 1), (4000, 3), (3, 4000), (500, 333), (8, 8), (16, 24)])
def test_any_picture_gets_the_models_size(resize, size):
    preprocessing = Preprocessing(image_size=(24, 16), resize=resize)
    image = Image.new("RGB", size, (10, 200, 30))
    resized = resize_for_evaluation(image, preprocessing)
    assert resized.size == (16, 24)
    assert np.asarray(resized)[12, 8].tolist() == [10, 200, 30]


def test_a_picture_of_the_models_size_is_left_alone():
    image = draw(0, (16, 24))
    for resize in RESIZE_METHODS:
        kept = resize_for_evaluation(image, Preprocessing(image_size=(24, 16), resize=resize))
        assert (np.asarray(kept) == np.asarray(image)).all()


@pytest.mark.parametrize("resize", RESIZE_METHODS)
def test_small_pictures_show_the_same_at_every_size(resize):
    """Nothing is cut from a picture that is no larger than the input: the border stays."""
    image = Image.new("RGB", (32, 32), (255, 0, 0))
    image.paste((0, 0, 255), (4, 4, 28, 28))
    for size in (32, 48, 64, 96):
        preprocessing = Preprocessing(image_size=(size, size), resize=resize)
        pixels = np.asarray(resize_for_evaluation(image, preprocessing), float)
        assert pixels[..., 0].mean() / 255 == pytest.approx(1 - (24 / 32) ** 2, abs=0.01)
    larger = np.asarray(
        resize_for_evaluation(image, Preprocessing(image_size=(28, 28), resize="resmall-crop"))
    )
    assert larger[..., 0].mean() / 255 < 0.35  # of a larger one the border is cut


def test_resmall_crop_keeps_the_aspect_and_cuts_the_centre():
    """224 of a shorter side of 256: the share 7/8 of it, and as much of the longer side."""
    ramp = np.broadcast_to(np.arange(512, dtype=float) / 2, (256, 512)).astype(np.uint8)
    preprocessing = Preprocessing(image_size=(224, 224), channels=1)
    cut = np.asarray(resize_for_evaluation(Image.fromarray(ramp), preprocessing), float)
    assert (cut[0, 0], cut[0, -1]) == pytest.approx((144 / 2, (144 + 223) / 2), abs=1)


def test_resize_crop_squashes():
    ramp = np.broadcast_to(np.arange(512, dtype=float) / 2, (256, 512)).astype(np.uint8)
    preprocessing = Preprocessing(image_size=(224, 224), resize="resize-crop", channels=1)
    cut = np.asarray(resize_for_evaluation(Image.fromarray(ramp), preprocessing), float)
    assert (cut[0, 0], cut[0, -1]) == pytest.approx((16.5, 255 - 16.5), abs=1)


def test_inception_crop_draws_its_share_of_the_picture():
    y, x = np.mgrid[0:200, 0:240]
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))
    shares, ratios = [], []
    for seed in range(300):
        crop = inception_crop(image, (64, 64), np.random.default_rng(seed), (0.1, 0.5))
        pixels = np.asarray(crop, float)
        width = (pixels[32, -1, 0] - pixels[32, 0, 0]) * 64 / 63
        height = (pixels[-1, 32, 1] - pixels[0, 32, 1]) * 64 / 63
        shares.append(width * height / (200 * 240))
        ratios.append(width / height)
    assert 0.09 < min(shares) < 0.15
    assert 0.45 < max(shares) < 0.52
    assert 0.70 < min(ratios) < 0.80
    assert 1.25 < max(ratios) < 1.40


def test_inception_crop_of_a_very_long_picture():
    crop = inception_crop(Image.new("RGB", (4000, 2)), (8, 8), np.random.default_rng(0))
    assert crop.size == (8, 8)


def test_flip_is_a_fair_coin():
    image = draw(0)
    mirrored = np.asarray(image)[:, ::-1]
    flipped = [
        (np.asarray(flip(image, np.random.default_rng(seed))) == mirrored).all()
        for seed in range(400)
    ]
    assert 160 < sum(flipped) < 240


def test_tensors():
    image = draw(0)
    tensor = to_tensor(image)
    assert (tensor.dtype, tensor.shape) == (torch.uint8, (3, 30, 40))
    assert tensor[:, 5, 7].tolist() == np.asarray(image)[5, 7].tolist()
    assert to_tensor(image.convert("L")).shape == (1, 30, 40)


def test_normalize_gives_googles_range():
    values = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 3, 1, 1)
    scaled = normalize(values, Preprocessing(image_size=(1, 1))).flatten()
    torch.testing.assert_close(scaled, torch.tensor([-1.0, 1.0, -0.6]))
    assert values.flatten().tolist() == [0, 255, 51]


def test_normalize_with_a_mean_and_deviation_for_each_channel():
    values = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 3, 1, 1).repeat(2, 1, 1, 1)
    preprocessing = Preprocessing(image_size=(1, 1), mean=(0.5, 0.0, 0.2), std=(0.5, 2.0, 1.0))
    scaled = normalize(values, preprocessing)
    torch.testing.assert_close(scaled[1].flatten(), torch.tensor([-1.0, 0.5, 0.0]))
    torch.testing.assert_close(denormalize(scaled, preprocessing), values / 255)
    miil = Preprocessing(image_size=(1, 1), mean=0.0, std=1.0)
    torch.testing.assert_close(normalize(values, miil), values / 255)
    torch.testing.assert_close(denormalize(normalize(values, miil), miil), values / 255)


def test_the_crop_and_the_interpolation_are_the_models():
    ramp = np.broadcast_to(np.arange(256, dtype=float), (256, 256)).astype(np.uint8)
    whole = Preprocessing(image_size=(128, 128), channels=1, crop=1.0)
    cut = np.asarray(resize_for_evaluation(Image.fromarray(ramp), whole), float)
    assert (cut[0, 0], cut[0, -1]) == pytest.approx((0.5, 254.5), abs=1)
    half = Preprocessing(image_size=(128, 128), channels=1, crop=0.5)
    cut = np.asarray(resize_for_evaluation(Image.fromarray(ramp), half), float)
    assert (cut[0, 0], cut[0, -1]) == pytest.approx((64, 191), abs=1)
    image = draw(3, (90, 70))
    for interpolation, resampling in (
        ("bilinear", Image.Resampling.BILINEAR),
        ("bicubic", Image.Resampling.BICUBIC),
    ):
        preprocessing = Preprocessing(
            image_size=(32, 32), resize="squash", interpolation=interpolation
        )
        resized = resize_for_evaluation(image, preprocessing)
        assert resized.tobytes() == image.resize((32, 32), resampling).tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5, 0.5)}, "mean must be a number or 3 of them"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be above 0"),
        ({"std": "one"}, "std must be a number or 3"),
        ({"crop": 0}, "crop must be above 0 and at most 1, got 0"),
        ({"crop": 1.2}, "crop must be above 0 and at most 1, got 1.2"),
        ({"interpolation": "area"}, "interpolation must be one of"),
    ],
)
def test_a_preprocessing_that_is_none(change, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(image_size=(8, 8), **change)


def test_a_preprocessing_says_itself():
    preprocessing = Preprocessing(image_size=(8, 8), mean=(0.1, 0.2, 0.3), std=0.5)
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    assert Preprocessing(image_size=(8, 8)).summary() == (
        "resmall-crop 0.875, bilinear, values in [-1, 1]"
    )
    assert "less the mean (0.1, 0.2, 0.3)" in preprocessing.summary()
    assert "crop" not in Preprocessing(image_size=(8, 8), resize="squash").summary()
