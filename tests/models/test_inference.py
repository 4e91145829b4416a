"""The fast path without gradients: packed dense layers equal torch's own, and touch nothing."""

import pytest
import torch
from test_every_model import KINDS, build, draw
from torch import Tensor, nn

import allmlp as am
from allmlp.models import inference
from allmlp.models.inference import Inference, PackedDense, can_pack, choose_precision, pack

pytestmark = pytest.mark.numerics
WIDE = {"hidden_dim": 512, "tokens_mlp_dim": 256, "channels_mlp_dim": 2048, "image_size": 224}
needs_packing = pytest.mark.skipif(not can_pack("float32"), reason="no packed products here")
needs_bfloat16 = pytest.mark.skipif(not can_pack("bfloat16"), reason="no fast bfloat16 here")


@pytest.fixture(autouse=True)
def packs_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "SMALL_STEP", 0)


@needs_packing
@pytest.mark.parametrize("name", [name for name in KINDS if name != "small_resnet"])
def test_packed_float32_equals_the_plain_model(name: str) -> None:
    model = build(name).eval()
    images = draw(model, 3)
    ready = Inference(model, "float32")
    assert ready.packed
    with torch.no_grad():
        logits, features = model(images), model.features(images)
    torch.testing.assert_close(ready.logits(images), logits, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ready.features(images), features, rtol=1e-5, atol=2e-5)


@needs_bfloat16
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixer_s32", WIDE),
        ("mixer_s32", {**WIDE, "gelu": "exact"}),
        ("cycle_mlp_b1", {"image_size": 224, "dims": (64, 128, 320, 512)}),
        ("vip_s14", {"image_size": 224, "dims": (384,) * 4, "segments": (16,) * 4}),
    ],
)
def test_packed_bfloat16_is_as_near_to_float32_as_autocast(name: str, changes: dict) -> None:
    model = build(name, **changes).eval()
    images = draw(model, 3)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            plain = (model(images).float() - exact).abs().max()
    found = Inference(model, "bfloat16").logits(images)
    assert found.dtype == torch.float32
    error = (found - exact).abs().max()
    assert 0 < error < min(2e-2 * exact.abs().max(), 2 * plain)


@pytest.mark.parametrize("packs", [pytest.param(True, marks=needs_bfloat16), False])
def test_logits_are_not_rounded_to_bfloat16(monkeypatch: pytest.MonkeyPatch, packs: bool) -> None:
    """Nor where the layers are torch's own, as on a GPU."""
    model = build("mixer_s32").eval()
    monkeypatch.setattr(inference, "can_pack", lambda _: packs)
    images = draw(model, 2)
    ready = Inference(model, "bfloat16")
    assert ready.packed == packs
    logits = ready.logits(images)
    assert (logits != logits.bfloat16().float()).any()
    with torch.no_grad():
        expected = model.head(ready.features(images))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert type(model.head) is nn.Linear


@needs_packing
def test_the_model_stays_the_same() -> None:
    """And what is not packed is shared; NaN is not hidden."""
    model = build("mixer_s32").train()
    places = {tensor.data_ptr() for tensor in model.parameters()}
    assert {tensor.data_ptr() for tensor in pack(model, "float32").parameters()} <= places
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    images = draw(model, 2)
    images[1, 0, 0, 0] = torch.nan
    found = Inference(model, "float32").logits(images)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()
    assert model.training
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@needs_packing
def test_a_batch_is_cut_into_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixer_s32").eval()
    images = draw(model, 7)
    whole = Inference(model, "float32")
    assert whole.most >= 7
    monkeypatch.setattr(inference, "LARGEST_ACTIVATION", 3 * 4 * model.config.widest)
    cut = Inference(model, "float32")
    assert cut.most == 3
    torch.testing.assert_close(cut.logits(images), whole.logits(images), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(inference, "LARGEST_ACTIVATION", 1)  # not even one image: one by one
    assert Inference(model, "float32").most == 1


def test_an_operator_that_computes_something_else_is_not_used(monkeypatch):
    can_pack.cache_clear()
    try:
        monkeypatch.setattr(PackedDense, "forward", lambda self, x: torch.zeros(2, 40, 48))
        assert not can_pack("float32")
    finally:
        can_pack.cache_clear()


@needs_packing
@pytest.mark.parametrize("change", ["none", "pyramid", "grouped", "hook", "reader"])
def test_biases_without_effect_are_left_out(change: str) -> None:
    """Those that the LayerNorms take away, see `MixerBlock`; all others are added."""
    variants = {"pyramid": {"pyramid": ((1, 20),)}}
    variants["grouped"] = {"token_mixing": "grouped", "token_groups": 2}
    model = build("mixer_s32", **WIDE, **variants.get(change, {})).eval()
    if change == "hook":
        model.get_submodule("blocks.0").register_forward_hook(lambda *_: None)
    if change == "reader":
        model.get_submodule("blocks.1").layer_norm_1 = nn.Identity()
    images = draw(model, 2)
    before = Inference(model, "float32").logits(images)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("token_mixing.dense_1.bias"):
                parameter.normal_(std=10.0)
        expected = model(images)
    found = Inference(model, "float32").logits(images)
    assert torch.equal(found, before) == (change in ("none", "pyramid"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


class Foreign(nn.Module):
    """A module of somebody else, which reads its layer's weight instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense.weight + self.dense.bias


@needs_packing
def test_layers_of_other_code_and_with_hooks_stay() -> None:
    model = build("mixer_s32").eval()
    model.blocks.append(Foreign())
    seen: list[int] = []
    hooked = model.get_submodule("blocks.0.channel_mixing.dense_1")
    hooked.register_forward_hook(lambda *_: seen.append(1))
    images = draw(model, 2)
    ready = Inference(model, "float32")
    assert ready.packed
    with torch.no_grad():
        expected = model(images)
    seen.clear()
    torch.testing.assert_close(ready.logits(images), expected, rtol=1e-5, atol=2e-5)
    assert seen == [1]


def test_precisions_and_models_that_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixer_s32").eval()
    assert choose_precision(model, "float32") == ("float32", "chosen")
    with pytest.raises(am.UserError, match="'half'"):
        choose_precision(model, "half")
    ready, images = Inference(model.double(), "float32"), draw(model, 2).double()
    assert not ready.packed
    with torch.no_grad():
        assert torch.equal(ready.logits(images), model(images).float())
    monkeypatch.undo()
    small = am.create_model("mixer_s32", image_size=32, num_blocks=1, num_classes=10)
    assert not Inference(small, "float32").packed
    assert choose_precision(small, "auto") == ("float32", "a small model")
