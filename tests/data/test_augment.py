"""Random changes: exact where they can be, and bounded where they are random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import draw
from mlp_mixer.data.augment import mixup, warp


def test_no_strength_changes_nothing():
    image = draw(0)
    out = warp(image, np.random.default_rng(0))
    assert (np.asarray(out) == np.asarray(image)).all()


def test_shift_moves_by_its_share():
    pixels = np.zeros((40, 40), np.uint8)
    pixels[18:22, 18:22] = 255
    centers = []
    for seed in range(200):
        out = warp(Image.fromarray(pixels), np.random.default_rng(seed), shift=0.2)
        y, x = np.nonzero(np.asarray(out) > 100)
        centers.append((x.mean() - 19.5, y.mean() - 19.5))
    spread = np.abs(centers).max(axis=0)
    assert (spread > 7.0).all()
    assert (spread <= 8.5).all()


def test_rotation_keeps_the_centre_and_turns_by_its_angle():
    pixels = np.zeros((41, 41), np.uint8)
    pixels[19:22, 30:33] = 255
    angles = []
    for seed in range(200):
        out = warp(Image.fromarray(pixels), np.random.default_rng(seed), rotate=30.0)
        y, x = np.nonzero(np.asarray(out) > 60)
        angles.append(np.degrees(np.arctan2(y.mean() - 20, x.mean() - 20)))
        assert np.hypot(y.mean() - 20, x.mean() - 20) == pytest.approx(11.0, abs=0.7)
    assert 27 < max(angles) < 32
    assert -32 < min(angles) < -27


def test_the_same_generator_gives_the_same_picture():
    options = {"rotate": 10.0, "scale": 0.1, "shear": 0.1, "shift": 0.1, "elastic": 0.05}
    first = warp(draw(0), np.random.default_rng(5), **options)
    again = warp(draw(0), np.random.default_rng(5), **options)
    other = warp(draw(0), np.random.default_rng(6), **options)
    assert (np.asarray(first) == np.asarray(again)).all()
    assert (np.asarray(first) != np.asarray(other)).any()


def test_grey_stays_grey():
    for image in (draw(0), draw(0).convert("L")):
        out = warp(image, np.random.default_rng(0), elastic=0.0)
        assert out.mode == image.mode
        assert np.abs(np.asarray(out, int) - np.asarray(image, int)).max() <= 1


def test_elastic_moves_by_its_strength():
    """A dot in the middle sits on the grid's middle point: it moves by that normal draw."""
    pixels = np.zeros((65, 65, 3), np.uint8)
    pixels[31:34, 31:34] = 255
    moves = []
    for seed in range(300):
        out = np.asarray(warp(Image.fromarray(pixels), np.random.default_rng(seed), elastic=0.05))
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


def test_mixup_shares_follow_the_folded_beta():
    shares = []
    for seed in range(500):
        _, labels = mixup(torch.zeros(2, 1), torch.eye(2), 0.2, np.random.default_rng(seed))
        shares.append(float(labels[0, 0]))
    assert min(shares) >= 0.5
    assert np.mean(shares) == pytest.approx(0.885, abs=0.03)  # E max(a, 1-a) of Beta(0.2, 0.2)


def test_mixup_of_strength_zero_is_off():
    images, targets = torch.randn(2, 3), torch.eye(2)
    mixed, labels = mixup(images, targets, 0.0, np.random.default_rng(0))
    assert mixed is images
    assert labels is targets
