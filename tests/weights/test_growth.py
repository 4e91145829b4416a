"""Another image size for CycleMLP and Vision Permutator: what is the same right after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import allmlp as am
from allmlp.models.catalog import model_from_config
from allmlp.weights.growth import grow_map, resample_map, resize_model
from staged_models import small_cycle, small_permutator

pytestmark = pytest.mark.numerics

PLAIN = {"depths": (2,), "dims": (12,), "mlp_ratios": (2,), "segments": (3,), "downsamples": ()}


def resized(model: am.ImageClassifier, size: tuple[int, int], growth: str) -> am.ImageClassifier:
    tensors = dict(model.state_dict())
    config, _ = resize_model(tensors, model.config, size, growth)  # pyright: ignore[reportArgumentType]
    grown = model_from_config(config)
    grown.load_state_dict(tensors)
    return grown.eval()


@pytest.mark.parametrize("factors", [(2, 2), (1, 3), (3, 2)])
def test_copies_of_a_picture_have_its_logits(factors: tuple[int, int]):
    """Block-diagonal growth of a permutator of two stages, on a grid that is no square."""
    model = small_permutator(image_size=(8, 12)).eval()
    grown = resized(model, (8 * factors[0], 12 * factors[1]), "block-diagonal")
    images = torch.randn(4, 3, 8, 12)
    expected = model(images)
    torch.testing.assert_close(grown(images.repeat(1, 1, *factors)), expected, atol=1e-5, rtol=1e-5)
    other = images.repeat(1, 1, *factors) + 0.1 * torch.randn(8 * factors[0], 12 * factors[1])
    assert (grown(other) - expected).abs().max() > 1e-3


def test_a_tile_is_mixed_as_before():
    """Block-diagonal, any picture: what a branch makes of a tile is what it made of a picture."""
    model = small_permutator(image_size=(8, 12)).eval()
    grown = resized(model, (16, 36), "block-diagonal")
    old, new = model.network[0][0].attn, grown.network[0][0].attn
    x = torch.randn(2, 8, 18, 8)  # 2 x 3 tiles of 4 x 6 positions
    for branch in (0, 1):
        found = new.branches(x)[branch]
        for i in range(2):
            for j in range(3):
                tile = (slice(None), slice(4 * i, 4 * i + 4), slice(6 * j, 6 * j + 6))
                torch.testing.assert_close(found[tile], old.branches(x[tile])[branch])


@pytest.mark.parametrize("factors", [(2, 2), (3, 1)])
def test_repeated_tokens_have_the_logits_of_the_small_grid(factors: tuple[int, int]):
    """Resampling by a whole factor, one stage: every patch stands where K x K of it stand."""
    model = small_permutator(image_size=(8, 6), **PLAIN).eval()
    grown = resized(model, (8 * factors[0], 6 * factors[1]), "resample")
    patches = torch.randn(4, 3, 4, 1, 2, 3, 1, 2)  # rows, repeated, pixels; columns likewise
    images = patches.reshape(4, 3, 8, 6)
    large = patches.repeat(1, 1, 1, factors[0], 1, 1, factors[1], 1).reshape(
        4, 3, 8 * factors[0], 6 * factors[1]
    )
    torch.testing.assert_close(grown(large), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("new", [1, 3, 5, 7, 12])
def test_a_resampled_map_is_resize_mix_resize(new: int):
    """By its definition, column by column; and back again where it had grown by a whole factor."""
    torch.manual_seed(0)
    old, size = 4, 3
    weight = torch.randn(old * size, old * size, dtype=torch.float64)
    grown = resample_map(weight, old, new, size)
    constant = torch.randn(size, dtype=torch.float64)
    before = (weight @ constant.repeat(old)).view(old, size)
    after = (grown @ constant.repeat(new)).view(new, size)
    assert after.min() >= before.min() - 1e-12
    assert after.max() <= before.max() + 1e-12
    if new % old == 0:
        torch.testing.assert_close(after, before.repeat_interleave(new // old, dim=0))
        torch.testing.assert_close(resample_map(grown, new, old, size), weight)
        assert not torch.allclose(grown, grow_map(weight, old, new, size))


def test_a_block_diagonal_map():
    weight = torch.arange(16.0).view(4, 4)
    grown = grow_map(weight, 2, 6, 2)
    assert torch.equal(grown, torch.kron(torch.eye(3), weight))
    assert torch.equal(grow_map(weight, 2, 2, 2), weight)


def test_sizes_of_a_permutator_that_cannot_be(tmp_path: Path):
    path = am.save_model(small_permutator().eval(), tmp_path / "model").parent
    with pytest.raises(am.UserError, match="4x4 patches do not become 6x4 in this way"):
        am.load_model(path, image_size=(12, 8), resize_weights="block-diagonal", quiet=True)
    with pytest.raises(am.UserError, match="image size 10x10 is not divisible by 4"):
        am.load_model(path, image_size=10, quiet=True)
    with pytest.raises(am.UserError, match=r"token mixing at 4000000x4 pixels needs [\d,]+ GiB"):
        am.load_model(path, image_size=(4_000_000, 4), quiet=True)


def test_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    permutator = am.save_model(small_permutator().eval(), tmp_path / "permutator").parent
    cycle = am.save_model(small_cycle().eval(), tmp_path / "cycle").parent
    am.load_model(permutator, image_size=16)
    assert "grown    8x8 -> 16x16 pixels: block-diagonal, 2x2 tiles" in capsys.readouterr().err
    am.load_model(permutator, image_size=12)
    assert "grown    8x8 -> 12x12 pixels: resampled (nearest)" in capsys.readouterr().err
    am.load_model(cycle, image_size=(21, 40))
    assert "16x16 -> 21x40 pixels: the weights stay as they are" in capsys.readouterr().err


def test_no_weight_of_cycle_mlp_depends_on_the_size(tmp_path: Path):
    model = small_cycle().eval()
    path = am.save_model(model, tmp_path / "cycle").parent
    large = am.load_model(path, image_size=(33, 18), quiet=True)
    ours, theirs = model.state_dict(), large.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert large.config.image_size == (33, 18)
    with pytest.raises(am.UserError, match="resize_weights 'resample' has no effect: no weight"):
        am.load_model(path, image_size=32, resize_weights="resample", quiet=True)
    with pytest.raises(am.UserError, match="image size 3x9 is below the stem's stride"):
        am.load_model(path, image_size=(3, 9), quiet=True)
    with pytest.raises(am.UserError, match="unknown resize_weights 'bigger'"):
        resize_model({}, model.config, (32, 32), "bigger")  # pyright: ignore[reportArgumentType]
