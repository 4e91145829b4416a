"""Response maps and occlusion, on models whose answers are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import allmlp as am
from allmlp.inspection.attribution import (
    occlusion,
    occlusion_places,
    read_image,
    responses_of,
    unit_responses,
)
from allmlp.inspection.units import TokenMixingLayer, model_units
from conftest import TINY, draw, encode, tiny_model

pytestmark = pytest.mark.numerics


class OnePatch(am.ImageClassifier):
    """Looks at one patch of a 4x6 grid only: the brighter it is, the more it is class 2."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__()
        self.config = am.MixerConfig(image_size=(16, 24), num_classes=3, **TINY)
        self.stem = nn.Conv2d(3, 4, kernel_size=4, stride=4)
        self.head = nn.Linear(1, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.0], [0.0], [4.0]]))
            self.head.bias.zero_()
        self.row, self.column, self.calls = row, column, []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        assert not self.training
        patch = images[:, :, 4 * self.row :, 4 * self.column :][:, :, :4, :4]
        return self.head(patch.mean(dim=(1, 2, 3))[:, None])


WHITE = torch.ones(1, 3, 16, 24)


@pytest.mark.parametrize("place", [(0, 0), (1, 4), (3, 5)])
def test_occlusion_finds_the_patch(place):
    model, sizes = OnePatch(*place).train(), []
    model.class_names = ["a", "b", "bright"]
    found = occlusion(model, WHITE, batch_size=20, on_batch=sizes.append)
    assert model.calls == [1, *sizes] == [1, 20, 4]
    assert found.drop.shape == found.patch_drop.shape == (4, 6)
    # White gives e^4 / (e^4 + 2), grey (0 in the model's range of [-1, 1]) a third.
    expected = np.zeros((4, 6))
    expected[place] = np.e**4 / (np.e**4 + 2) - 1 / 3
    assert found.drop == pytest.approx(expected, abs=1e-6)
    assert found.patch_drop == pytest.approx(expected, abs=1e-6)
    assert found.largest == (found.drop.max(), place[0] + 1, place[1] + 1)
    assert found.probability == pytest.approx(np.e**4 / (np.e**4 + 2))
    assert (found.label, found.name) == (2, "bright")
    assert model.training  # as before
    assert (WHITE == 1).all()


@pytest.mark.parametrize(
    ("size", "side", "last"), [(16, 1, (3, 3)), (56, 3, (11, 11)), ((64, 180), 3, (13, 42))]
)
def test_windows_cover_every_patch(size, side, last):
    window, places, _ = occlusion_places(tiny_model(image_size=size))
    assert (window, tuple(places[-1, -1])) == (side, last)
    assert (np.diff(places[:, 0, 0]) <= side).all()
    assert (np.diff(places[0, :, 1]) <= side).all()


def test_wide_windows_share_their_patches():
    model = OnePatch(9, 9).train()
    model.config = am.MixerConfig(image_size=(64, 64), num_classes=3, **TINY)
    found = occlusion(model, torch.ones(1, 3, 64, 64))
    assert np.unravel_index(int(found.patch_drop.argmax()), (16, 16)) == (9, 9)
    assert (found.drop > 0.1).sum() == found.window**2  # it is covered by so many windows


def test_no_class_to_explain():
    image = torch.zeros(1, 3, 8, 8)
    broken = tiny_model()
    torch.nn.init.constant_(broken.head.bias, float("nan"))
    for model, what in (
        (tiny_model(num_classes=0), "no head"),
        (am.create_model("mixer_s16", 8, 3, **TINY), "all zeros"),
        (broken, "not finite"),
    ):
        with pytest.raises(am.UserError, match=what):
            occlusion(model, image)


def test_response_maps_by_hand():
    """Two channels, a 1x3 grid, two units, the stronger one first."""
    weights = np.array([[[0.0, 3.0, 0.0]], [[1.0, 0.0, -2.0]]])
    outgoing = np.array([[[0.5, 0.0, 0.0]], [[0.0, -1.0, 2.0]]])
    tokens = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])  # (C, S)
    activation = np.array([[1.0, 3.0], [-1.0, 4.0]])  # (C, U)
    first, second = responses_of(TokenMixingLayer(4, "x", weights, outgoing), tokens, activation)
    assert first.read.tolist() == [[1 * (3 * 1 + 4 * 4), 0, -2 * (3 * 3 + 4 * 6)]]
    assert second.read.tolist() == [[0, 3 * (2 - 5), 0]]
    assert first.strength == 5.0
    assert first.written.tolist() == [[0, 5, 10]]
    assert [(one.layer, one.unit) for one in (first, second)] == [(4, 1), (4, 0)]


@pytest.mark.parametrize("size", [8, (8, 12)])
def test_response_maps_of_a_model(size):
    """`read` sums to h . (a - b), and `written` is what leaving the unit out changes."""
    model = tiny_model(image_size=size).eval()
    mixing = model.blocks[1].token_mixing
    torch.nn.init.normal_(mixing.dense_0.bias)
    image = torch.randn(1, 3, *model.config.image_size, generator=torch.Generator().manual_seed(1))
    seen = {}
    mixing.dense_0.register_forward_hook(lambda _, __, out: seen.update(drive=out))
    mixing.register_forward_hook(lambda _, __, out: seen.update(mixed=out))
    with torch.no_grad():
        model(image)
        drive, mixed = seen["drive"][0].double(), seen["mixed"][0].clone()
        found = unit_responses(model, model_units(model), image, 2)
        found.sort(key=lambda response: response.unit)
        active = nn.functional.gelu(drive, approximate="tanh")
        excess = (active * (drive - mixing.dense_0.bias.double())).sum(dim=0)
        assert [unit.read.sum() for unit in found] == pytest.approx(excess.tolist(), rel=1e-5)
        unit = 3
        mixing.dense_1.weight[:, unit] = 0
        model(image)
        change = (mixed - seen["mixed"][0]).norm(dim=0).view(model.config.grid)
    written = found[unit].written
    assert torch.from_numpy(written).float().sub(change).abs().max() < 1e-5
    assert written.max() > 0.01
    assert not mixing.dense_0._forward_pre_hooks  # nothing is left behind


def test_images_are_read_as_the_model_wants_them(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(draw(1, (40, 30))))
    image, pixels = read_image(path, tiny_model(image_size=(8, 12)))
    assert (image.shape, pixels.shape) == ((1, 3, 8, 12), (8, 12, 3))
    again = (image[0].permute(1, 2, 0) + 1) * 127.5
    assert again.numpy() == pytest.approx(pixels.astype(float), abs=1e-3)
    grey, pixels = read_image(path, tiny_model(in_channels=1))
    assert (grey.shape, pixels.shape) == ((1, 1, 8, 8), (8, 8, 1))
    path.write_bytes(path.read_bytes()[:200])
    for broken in (path, tmp_path / "none.png"):
        with pytest.raises(am.UserError) as error:
            read_image(broken, tiny_model())
        assert error.value.where == str(broken)
