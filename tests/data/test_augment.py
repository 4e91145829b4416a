"""Random changes: exact where they can be, and bounded where they are random."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from allmlp.data.augment import (
    cutmix,
    mix,
    mixup,
    padded_crop,
    random_erasing,
    warp,
)
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


def test_mixup_shares_follow_the_folded_beta():
    shares = []
    for seed in range(500):
        _, labels = mixup(torch.zeros(2, 1), torch.eye(2), 0.2, np.random.default_rng(seed))
        shares.append(float(labels[0, 0]))
    assert min(shares) >= 0.5
    assert np.mean(shares) == pytest.approx(0.885, abs=0.03)  # E max(a, 1-a) of Beta(0.2, 0.2)


def test_a_padded_crop_moves_by_whole_pixels_and_fills_with_black():
    pixels = np.asarray(draw(2, (32, 32))) // 2 + 100  # nothing black in it
    places = set()
    for seed in range(300):
        out = padded_crop(pixels, np.random.default_rng(seed), 0.125)
        assert out.shape == pixels.shape
        rows, columns = np.flatnonzero(out.any(axis=(1, 2))), np.flatnonzero(out.any(axis=(0, 2)))
        y = 32 - len(rows) if rows[0] == 0 else -(32 - len(rows))
        x = 32 - len(columns) if columns[0] == 0 else -(32 - len(columns))
        shown = out[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        part = pixels[max(0, y) : 32 + min(0, y), max(0, x) : 32 + min(0, x)]
        assert (shown == part).all()
        places.add((y, x))
    assert {y for y, _ in places} == {x for _, x in places} == set(range(-4, 5))


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
        mixed, _ = mix(
            images, targets, np.random.default_rng(seed), mixup_strength=0.5, cutmix_strength=1.0
        )
        kinds.append(bool((mixed == images).any() or (mixed == images.roll(1, 0)).any()))
    assert 30 < sum(kinds) < 70
    same, _ = mix(images, targets, np.random.default_rng(0), mixup_strength=0, cutmix_strength=0)
    assert same is images
