"""The permutations of figure 4: one for all images, last of all, and inside the weights' file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import allmlp as am
from allmlp.data.permutation import patch_orders, permute
from allmlp.data.transforms import normalize
from conftest import TINY

pytestmark = pytest.mark.numerics


def rules(
    kind: Any = "patches", size: tuple[int, int] = (8, 12), seed: int = 3
) -> am.Preprocessing:
    return am.Preprocessing(
        image_size=size,
        permutation=kind,
        permutation_patch=4 if kind == "patches" else None,
        permutation_seed=seed,
    )


def numbered(size: tuple[int, int] = (8, 12)) -> torch.Tensor:
    """Two images whose pixels are all different, also between the images and channels."""
    count = 2 * 3 * size[0] * size[1]
    return torch.arange(count).view(2, 3, *size)


@pytest.mark.parametrize("kind", ["patches", "pixels"])
def test_every_pixel_stays_and_all_images_are_permuted_alike(kind):
    images = numbered()
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
    images, settings = numbered(), rules()
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
    plain = dataclasses.replace(
        rules(), permutation="none", permutation_patch=None, permutation_seed=0
    )
    expected = permute(normalize(images, plain), rules())
    assert torch.equal(normalize(images, rules()), expected)


def test_it_travels_with_the_weights(tmp_path: Path):
    model = am.create_model("mixer_s16", 8, 2, **TINY)
    model.preprocessing = rules(size=(8, 8))
    am.save_model(model, tmp_path / "model")
    assert am.load_model(tmp_path / "model").preprocessing == rules(size=(8, 8))
    with pytest.raises(am.UserError, match="permuted pixels"):
        am.load_model(tmp_path / "model", image_size=16)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"permutation": "rows"}, "one of"),
        ({"permutation": "patches"}, "goes with"),
        ({"permutation_patch": 4}, "goes with"),
        ({"permutation": "patches", "permutation_patch": 5}, "must divide 8x12"),
        ({"permutation": "patches", "permutation_patch": 0}, "must divide"),
        ({"permutation_seed": 1}, "0 without"),
        ({"permutation": "pixels", "permutation_seed": -1}, "at least 0"),
    ],
)
def test_values_that_do_not_fit(values, words):
    with pytest.raises(ValueError, match=words):
        am.Preprocessing(image_size=(8, 12), **values)
