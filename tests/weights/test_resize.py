"""Another image size: each method against its own exact oracle."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import allmlp as am
from allmlp.models.catalog import model_from_config
from allmlp.models.mixer import token_weights
from allmlp.models.resize import resize_tokens, resizing
from allmlp.models.vision_permutator import resample_map
from allmlp.weights.load import resize_model
from conftest import tiny_model
from staged_models import small_cycle, small_permutator

pytestmark = pytest.mark.numerics

SIZE = tuple[int, int]
PATCHES = {"mixer": "", "gmixer": "gmixer_24", "resmlp": "resmlp_12", "gmlp": "gmlp_ti16"}
PLAIN = {"depths": (2,), "dims": (12,), "mlp_ratios": (2,), "segments": (3,), "downsamples": ()}


def odd_model(**changes: object) -> am.ImageClassifier:
    """A 2x3 grid of patches and random biases, so that no symmetry hides a wrong order."""
    model = tiny_model(image_size=(8, 12), **changes).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    return model


def odd_family(family: str) -> am.ImageClassifier:
    """Likewise, of any family."""
    if family == "mixer":
        return odd_model()
    if family == "rectangular patches":
        return odd_model(patch_size=(4, 2))
    if family == "permutator":
        return small_permutator(image_size=(8, 12), **PLAIN).eval()
    torch.manual_seed(0)
    model = am.create_model(PATCHES[family], (8, 12), 5, patch_size=4, hidden_dim=16, num_blocks=3)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if name.endswith(("norm.weight", "alpha", "scale_0", "scale_1")):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model.eval()


def resized(
    model: am.ImageClassifier, size: SIZE, method: Any, interpolation: Any = None
) -> am.ImageClassifier:
    tensors = dict(model.state_dict())
    if interpolation is None:
        config, _ = resize_model(tensors, model.config, size, method)
    else:
        config = dataclasses.replace(model.config, image_size=size)
        weights = token_weights(model.config)
        resize_tokens(tensors, weights, model.config, config, method, interpolation)
    grown = model_from_config(config)
    grown.load_state_dict(tensors)
    return grown.eval()


@pytest.mark.parametrize("factors", [(2, 2), (1, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("family", [*PATCHES, "rectangular patches"])
def test_block_diagonal_logits_are_the_mean_over_the_tiles(family: str, factors: SIZE):
    model, (high, wide) = odd_family(family), factors
    grown = resized(model, (8 * high, 12 * wide), "block-diagonal")
    if family in ("mixer", "gmixer", "rectangular patches"):
        assert grown.config.tokens_mlp_dim == high * wide * model.config.tokens_mlp_dim
    images = torch.randn(5, 3, 8 * high, 12 * wide)
    tiles = [
        images[:, :, 8 * row : 8 * row + 8, 12 * column : 12 * column + 12]
        for row in range(high)
        for column in range(wide)
    ]
    expected = torch.stack([model(tile) for tile in tiles]).mean(dim=0)
    assert (grown(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    # The tiles differ, or any order would do.
    assert (model(tiles[0]) - model(tiles[-1])).abs().max() > 0.1


@pytest.mark.parametrize("factors", [(2, 2), (1, 3), (4, 2)])
@pytest.mark.parametrize("family", [*PATCHES, "rectangular patches", "permutator"])
def test_nearest_resampling_repeats_the_logits_of_a_repeated_grid(family: str, factors: SIZE):
    model = odd_family(family)
    tall, wide = getattr(model.config, "patch", 2 * (model.config.patch_size,))
    grown = resized(model, (8 * factors[0], 12 * factors[1]), "resample")
    images = torch.randn(5, 3, 8, 12)
    patches = images.unfold(2, tall, tall).unfold(3, wide, wide)  # (N, 3, h, w, P_h, P_w)
    repeated = patches.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3)
    large = repeated.permute(0, 1, 2, 4, 3, 5).reshape(5, 3, 8 * factors[0], 12 * factors[1])
    expected = model(images)
    assert (grown(large) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (12, 20), (40, 44)])
def test_resampling_is_the_old_mlp_on_the_resized_grid(size: SIZE, interpolation: Any):
    """The documented oracle for every size: token mixing = B . old token mixing(A . tokens)."""
    model = odd_model(num_blocks=1)
    grown = resized(model, size, "resample", interpolation)
    (old_h, old_w), (new_h, new_w) = model.config.grid, grown.config.grid
    tokens = torch.randn(3, 16, new_h * new_w)
    down, up = (
        torch.kron(resizing(a, b, interpolation), resizing(c, d, interpolation)).float()
        for a, b, c, d in ((new_h, old_h, new_w, old_w), (old_h, new_h, old_w, new_w))
    )
    expected = model.blocks[0].token_mixing(tokens @ down.T) @ up.T
    found = grown.blocks[0].token_mixing(tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    first, second = (
        net.blocks[0].token_mixing.dense_0(torch.ones(1, 16, net.config.num_tokens))
        for net in (model, grown)
    )
    assert (first - second).abs().max() <= 1e-5 * first.abs().max()  # of a constant image


def test_everything_but_the_token_mixing_stays():
    model = odd_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for method in ("block-diagonal", "resample"):
        grown = resized(model, (16, 24), method).state_dict()
        same = {name for name, value in grown.items() if torch.equal(value, before[name])}
        assert {name for name in before if "token_mixing" not in name} <= same
        assert not any(name.endswith("token_mixing.dense_0.weight") for name in same)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_grown_model_trains_and_can_be_resized_again(tmp_path: Path):
    grown = resized(odd_model(), (16, 24), "block-diagonal")
    path = am.save_model(grown, tmp_path / "grown.npz", format="google")
    again = am.load_model(path, image_size=(8, 12), resize_weights="resample", quiet=True)
    assert again.config == dataclasses.replace(odd_model().config, tokens_mlp_dim=32)
    grown.train()(torch.randn(2, 3, 16, 24)).square().sum().backward()
    gradient = grown.get_parameter("blocks.0.token_mixing.dense_0.weight").grad
    assert (gradient != 0).float().mean() > 0.9  # also where the growth put zeros


@pytest.mark.parametrize("factors", [(2, 2), (1, 3)])
def test_a_permutator_and_copies_of_an_image(factors: SIZE):
    """Block-diagonal growth, two stages, no square grid: copies of an image have its logits, and
    a branch maps each tile, of any image, as before."""
    model = small_permutator(image_size=(8, 12)).eval()
    grown = resized(model, (8 * factors[0], 12 * factors[1]), "block-diagonal")
    images = torch.randn(4, 3, 8, 12)
    found, expected = grown(images.repeat(1, 1, *factors)), model(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    old, new = model.network[0][0].attn, grown.network[0][0].attn
    x = torch.randn(2, 4 * factors[0], 6 * factors[1], 8)
    for branch in (0, 1):
        found = new.branches(x)[branch]
        for i in range(factors[0]):
            for j in range(factors[1]):
                tile = (slice(None), slice(4 * i, 4 * i + 4), slice(6 * j, 6 * j + 6))
                torch.testing.assert_close(found[tile], old.branches(x[tile])[branch])


@pytest.mark.parametrize("new", [1, 3, 5, 7, 12])
def test_a_resampled_map_of_a_permutator(new: int):
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


@pytest.mark.parametrize(
    ("size", "method", "words"),
    [
        ((16, 12), "auto", "block-diagonal, 2x1 tiles"),
        ((12, 24), "auto", "resampled (nearest)"),
        ((16, 24), "resample", "resampled (nearest)"),
    ],
)
@pytest.mark.parametrize("build", [odd_model, lambda: small_permutator(image_size=(8, 12))])
def test_the_method_that_is_used(build: Any, size: SIZE, method: Any, words: str):
    model = build()
    assert resize_model(dict(model.state_dict()), model.config, size, method)[1] == words


@pytest.mark.parametrize(
    ("build", "size", "method", "named"),
    [
        (odd_model, (12, 24), "block-diagonal", "2x3 patches do not become 3x6"),
        (odd_model, (10, 24), "auto", "10x24"),
        (odd_model, (800_000, 1_200_000), "block-diagonal", "800000x1200000"),
        (lambda: odd_model(pyramid=((1, 3),)), (16, 24), "auto", "pyramid"),
        (small_permutator, (12, 8), "block-diagonal", "4x4 patches do not become 6x4"),
        (small_permutator, (4_000_000, 4), "auto", "4000000x4"),
        (small_cycle, (32, 32), "resample", "resample"),
    ],
)
def test_sizes_that_cannot_be(tmp_path: Path, build: Any, size: SIZE, method: Any, named: str):
    path = am.save_model(build().eval(), tmp_path / "model")
    with pytest.raises(am.UserError, match=named):
        am.load_model(path, image_size=size, resize_weights=method, quiet=True)
