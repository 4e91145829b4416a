"""Another image size: each growth against its own exact oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import allmlp as am
from allmlp.models.catalog import model_from_config
from allmlp.weights.resolution import resample, resize_tokens, resizing
from conftest import tiny_model

pytestmark = pytest.mark.numerics


def odd_model(**changes: object) -> am.ImageClassifier:
    """A 2x3 grid of patches and random biases, so that no symmetry hides a wrong order."""
    model = tiny_model(image_size=(8, 12), **changes).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    return model


def resized(
    model: am.ImageClassifier, size: tuple[int, int], growth: str, interpolation: str = "nearest"
) -> am.ImageClassifier:
    tensors = dict(model.state_dict())
    config, _ = resize_tokens(tensors, model.config, size, growth, interpolation)
    grown = model_from_config(config)
    grown.load_state_dict(tensors)
    return grown.eval()


@pytest.mark.parametrize("factors", [(2, 2), (3, 3), (1, 2), (3, 1), (2, 3)])
def test_block_diagonal_logits_are_the_mean_over_the_tiles(factors: tuple[int, int]):
    model, (high, wide) = odd_model(), factors
    grown = resized(model, (8 * high, 12 * wide), "block-diagonal")
    assert grown.config.tokens_mlp_dim == high * wide * model.config.tokens_mlp_dim
    images = torch.randn(5, 3, 8 * high, 12 * wide)
    tiles = [
        images[:, :, 8 * row : 8 * row + 8, 12 * column : 12 * column + 12]
        for row in range(high)
        for column in range(wide)
    ]
    expected = torch.stack([model(tile) for tile in tiles]).mean(dim=0)
    assert (grown(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    # The tiles are not alike, or any order would do.
    assert (model(tiles[0]) - model(tiles[-1])).abs().max() > 0.1


@pytest.mark.parametrize("factors", [(2, 2), (3, 3), (1, 3), (4, 2)])
def test_nearest_resampling_repeats_the_logits_of_a_repeated_grid(factors: tuple[int, int]):
    model, (high, wide) = odd_model(), factors
    grown = resized(model, (8 * high, 12 * wide), "resample")
    assert grown.config.tokens_mlp_dim == model.config.tokens_mlp_dim
    images = torch.randn(5, 3, 8, 12)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4)  # (N, 3, h, w, P, P)
    repeated = patches.repeat_interleave(high, dim=2).repeat_interleave(wide, dim=3)
    large = repeated.permute(0, 1, 2, 4, 3, 5).reshape(5, 3, 8 * high, 12 * wide)
    expected = model(images)
    assert (grown(large) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (16, 12), (12, 20), (20, 8), (40, 44)])
def test_resampling_is_the_old_mlp_on_the_resized_grid(size: tuple[int, int], interpolation: str):
    """The documented oracle for every size: token mixing = B . old token mixing(A . tokens)."""
    model = odd_model(num_blocks=1)
    grown = resized(model, size, "resample", interpolation)
    (old_h, old_w), (new_h, new_w) = model.config.grid, grown.config.grid
    tokens = torch.randn(3, 16, new_h * new_w)
    down = torch.kron(
        resizing(new_h, old_h, interpolation), resizing(new_w, old_w, interpolation)
    ).float()
    up = torch.kron(
        resizing(old_h, new_h, interpolation), resizing(old_w, new_w, interpolation)
    ).float()
    expected = model.blocks[0].token_mixing(tokens @ down.T) @ up.T
    found = grown.blocks[0].token_mixing(tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(4, 8), (24, 28), (12, 12)])
def test_a_plain_image_gives_the_same_logits_at_every_size(
    size: tuple[int, int], interpolation: str
):
    """With equal tokens everywhere the hidden units are those of the old grid. (What they write
    differs from token to token, so the blocks after the first see no plain image any more.)"""
    model = odd_model(num_blocks=1)
    grown = resized(model, size, "resample", interpolation)
    hidden = {}
    for name, net in (("old", model), ("new", grown)):
        plain = torch.ones(1, 16, net.config.num_tokens)
        hidden[name] = net.blocks[0].token_mixing.dense_0(plain)
    assert (hidden["old"] - hidden["new"]).abs().max() <= 1e-5 * hidden["old"].abs().max()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("old", "new"), [(1, 5), (5, 1), (3, 7), (7, 3), (4, 8), (8, 4), (6, 6)])
def test_resizing_maps(old: int, new: int, interpolation: str):
    matrix = resizing(old, new, interpolation)
    assert matrix.shape == (new, old)
    assert torch.allclose(matrix.sum(dim=1), torch.ones(new, dtype=torch.float64))
    assert (matrix.abs().sum(dim=0) > 0).all()  # no cell is forgotten
    centre = torch.arange(old, dtype=torch.float64) - (old - 1) / 2
    assert ((matrix @ centre).diff() >= 0).all()  # and none has changed its place
    if old == new:
        assert torch.equal(matrix, torch.eye(old, dtype=torch.float64))
    flipped = matrix.flip(0).flip(1)
    assert torch.allclose(matrix, flipped) or interpolation == "nearest"


def test_which_growth_is_used():
    model = odd_model()

    def how(size: tuple[int, int], growth: str) -> str:
        return resize_tokens(dict(model.state_dict()), model.config, size, growth)[1]

    assert how((16, 24), "auto") == "block-diagonal, 2x2 tiles"
    assert how((16, 12), "auto") == "block-diagonal, 2x1 tiles"
    assert how((12, 24), "auto") == "resampled (nearest)"
    assert how((4, 4), "auto") == "resampled (nearest)"
    assert how((16, 24), "resample") == "resampled (nearest)"
    with pytest.raises(am.UserError, match=r"2x3 patches do not become 3x6 [\s\S]*resample"):
        how((12, 24), "block-diagonal")
    with pytest.raises(am.UserError, match="unknown resize_weights 'bilinear'"):
        how((12, 24), "bilinear")
    with pytest.raises(am.UserError, match="10x24 is not divisible by the patch size 4"):
        how((10, 24), "auto")


@pytest.mark.parametrize("growth", ["block-diagonal", "resample"])
def test_a_size_beyond_the_machine_is_refused_first(growth: str):
    model = odd_model()
    before = dict(model.state_dict())
    with pytest.raises(am.UserError, match=r"800000x1200000 pixels needs [\d,]+ GiB, the machine"):
        resize_tokens(before, model.config, (800_000, 1_200_000), growth)
    assert before.keys() == model.state_dict().keys()


def test_everything_but_the_token_mixing_mlps_stays():
    model = odd_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for growth in ("block-diagonal", "resample"):
        grown = resized(model, (16, 24), growth)
        for name, value in grown.state_dict().items():
            assert ("token_mixing" in name) != torch.equal(value, before[name].to(value)) or (
                name.endswith("token_mixing.dense_0.bias") and growth == "resample"
            )
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_grown_model_trains():
    grown = resized(odd_model(), (16, 24), "block-diagonal").train()
    grown(torch.randn(2, 3, 16, 24)).square().sum().backward()
    gradient = grown.blocks[0].token_mixing.dense_0.weight.grad
    assert gradient is not None
    assert (gradient != 0).float().mean() > 0.9  # also where the growth put zeros


def test_grown_weights_can_be_saved_and_grown_again(tmp_path):
    model = odd_model()
    path = am.save_model(resized(model, (16, 24), "auto"), tmp_path / "grown.npz", format="google")
    again = am.load_model(path, image_size=(8, 12), resize_weights="resample", quiet=True)
    assert again.config == dataclasses.replace(model.config, tokens_mlp_dim=32)


def test_resampling_in_place_needs_no_copy_of_the_rest():
    model = odd_model()
    tensors = dict(model.state_dict())
    resample(tensors, model.config, (4, 6), "nearest")
    assert tensors["stem.weight"].data_ptr() == model.state_dict()["stem.weight"].data_ptr()
