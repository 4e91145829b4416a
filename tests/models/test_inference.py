"""The fast path without gradients: packed dense layers equal torch's own, and touch nothing."""

import pytest
import torch
from torch import Tensor, nn

import allmlp as am
from allmlp.models import inference
from allmlp.models.inference import Inference, PackedDense, can_pack, choose_precision, pack

pytestmark = pytest.mark.numerics
needs_packing = pytest.mark.skipif(
    not can_pack("float32"), reason="this torch or processor has no packed products"
)
needs_bfloat16 = pytest.mark.skipif(
    not can_pack("bfloat16"), reason="this processor has no fast bfloat16"
)
MODELS = {
    "mixer": ("mixer_s32", {"num_blocks": 2}),
    "exact GELU": ("mixer_s32", {"num_blocks": 2, "gelu": "exact"}),
    "untied": ("mixer_s32", {"num_blocks": 1, "hidden_dim": 64, "token_mixing": "untied"}),
    "grouped": ("mixer_s32", {"num_blocks": 1, "token_mixing": "grouped", "token_groups": 2}),
    "pyramid": ("mixer_s32", {"num_blocks": 2, "pyramid": ((1, 20),)}),
    "cycle": ("cycle_mlp_b1", {"depths": (1, 1, 1, 1)}),
    "permutator": ("vip_s14", {"depths": (1, 1, 1, 1)}),
    "gated": ("gmixer_24", {"num_blocks": 1}),
    "resmlp": ("resmlp_12", {"num_blocks": 1}),
    "gmlp": ("gmlp_ti16", {"num_blocks": 1}),
}


def build(name: str) -> am.ImageClassifier:
    torch.manual_seed(0)
    catalog_name, overrides = MODELS[name]
    model = am.create_model(catalog_name, num_classes=10, **overrides).eval()
    with torch.no_grad():
        model.head.weight.normal_(std=0.1)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def draw(model: am.ImageClassifier, count: int) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *model.config.image_size, generator=random)


@pytest.fixture(autouse=True)
def packs_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "SMALL_STEP", 0)


@needs_packing
@pytest.mark.parametrize("name", MODELS)
def test_packed_float32_equals_the_plain_model(name: str) -> None:
    model = build(name)
    images = draw(model, 3)
    ready = Inference(model, "float32")
    assert ready.packed
    with torch.no_grad():
        logits, features = model(images), model.features(images)
    torch.testing.assert_close(ready.logits(images), logits, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ready.features(images), features, rtol=1e-5, atol=2e-5)


@needs_bfloat16
@pytest.mark.parametrize("name", ["mixer", "exact GELU", "cycle", "permutator"])
def test_packed_bfloat16_is_as_near_to_float32_as_autocast(name: str) -> None:
    model = build(name)
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
    model = build("mixer")
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
    model = build("mixer").train()
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
    model = build("mixer")
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
@pytest.mark.parametrize("change", ["mixer", "pyramid", "grouped", "hook", "reader"])
def test_biases_without_effect_are_left_out(change: str) -> None:
    """Those that the LayerNorms take away, see `MixerBlock`; all others are added."""
    model = build(change if change in MODELS else "mixer")
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
    assert torch.equal(found, before) == (change in ("mixer", "pyramid"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


class Foreign(nn.Module):
    """A module of somebody else, which reads its layer's weight instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense.weight + self.dense.bias


@needs_packing
def test_layers_of_other_code_and_with_hooks_stay() -> None:
    model = build("mixer")
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
    model = build("mixer")
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
