"""What every model can do, one test each; small in depth and width, not in kind.

A new family adds its small sizes to `small`, and passes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import allmlp as am
from allmlp.models.catalog import model_config
from allmlp.models.cycle_mlp import CycleMLPConfig
from allmlp.models.family import PatchConfig
from allmlp.models.layers import draw_stochastic_depth, set_stochastic_depth
from allmlp.models.vision_permutator import VisionPermutatorConfig
from allmlp.runtime.device import can_compile
from conftest import check_every_gradient
from staged_models import enliven

pytestmark = pytest.mark.numerics

NAMES = am.list_models()
# The variants of appendix A.1, and the network to compare with.
MIXERS: dict[str, dict[str, Any]] = {
    "untied pyramid": {"token_mixing": "untied", "pyramid": ((1, 3),)},
    "grouped": {"token_mixing": "grouped", "token_groups": 4},
    "grouped pyramid": {"token_mixing": "grouped", "token_groups": 2, "pyramid": ((0, 2),)},
    "views": {"token_mixing": "views", "token_groups": 4},
    "views pyramid": {"token_mixing": "views", "token_groups": 8, "pyramid": ((0, 2), (1, 1))},
    "rectangular patches": {"patch_size": (16, 64)},
    "sequence": {"patch_size": (1, 4), "in_channels": 5, "image_size": (1, 24)},
}
OTHERS = {
    **{name: ("mixer_s32", settings) for name, settings in MIXERS.items()},
    "sequence gmlp": ("gmlp_ti16", {"patch_size": (1, 8), "image_size": (1, 24)}),
    "small_resnet": ("small_resnet", {"width": 8, "num_stages": 2}),
}
ALL = [*NAMES, *OTHERS]
FIRST_OF_FAMILY = ("mixer_s32", "gmixer_24", "resmlp_12", "gmlp_ti16", "cycle_mlp_b1", "vip_s7")
KINDS = [*FIRST_OF_FAMILY, *OTHERS]  # made small, the others of a family are the same network


def small(name: str) -> tuple[int, dict[str, Any]]:
    """The image size, and the overrides that make an architecture small and keep its kind."""
    config = model_config(name)
    if isinstance(config, am.MixerConfig):
        widths = {"hidden_dim": 16, "tokens_mlp_dim": 6, "channels_mlp_dim": 24, "num_blocks": 2}
        return 2 * config.patch_size, widths
    if isinstance(config, PatchConfig):
        hidden = "mlp_dim" if name.startswith("gmlp") else "channels_mlp_dim"
        return 2 * config.patch_size, {"hidden_dim": 16, "num_blocks": 2, hidden: 24}
    if isinstance(config, CycleMLPConfig):
        return 32, {"depths": (1, 1, 2, 1), "dims": (8, 10, 12, 16)}
    if not isinstance(config, VisionPermutatorConfig):
        return 8, {}
    dims = tuple(dim // 32 for dim in config.dims)
    halves = {"segments": (2, 2, 2, 2), "depths": (1, 1, 2, 1)}
    return 4 * config.patch_size, {"dims": dims, **halves}


def build(name: str, num_classes: int = 5, **changes: Any) -> am.ImageClassifier:
    name, settings = OTHERS.get(name, (name, {}))
    size, overrides = small(name)
    torch.manual_seed(0)
    settings = {"image_size": size, **overrides, **settings, **changes}
    return enliven(am.create_model(name, num_classes=num_classes, **settings))


def draw(model: am.ImageClassifier, num: int = 3) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(num, model.config.in_channels, *model.config.image_size)


def gradients(model: am.ImageClassifier, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the loss on labels 0, 1, 2, ...; also under autocast."""
    model.zero_grad()
    F.cross_entropy(model(images), torch.arange(len(images)) % 5).backward()
    named = model.named_parameters()
    return {name: value.grad.clone() for name, value in named if value.grad is not None}


@pytest.mark.parametrize("name", ALL)
def test_forward(name: str):
    model = build(name).eval()
    images = draw(model)
    logits, features = model(images), model.features(images)
    assert logits.shape == (3, 5)
    assert features.shape == (3, model.config.hidden_dim)
    assert torch.isfinite(logits).all()
    assert torch.equal(model.head(features), logits)
    torch.testing.assert_close(model(images[1:]), logits[1:], atol=1e-5, rtol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    headless = build(name, num_classes=0)
    assert headless.head is None
    assert torch.equal(headless(images), headless.features(images))


@pytest.mark.parametrize("name", KINDS)
def test_backward_reaches_every_parameter(name: str):
    model = build(name).double()
    gradients(model, draw(model).double())
    check_every_gradient(model)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_in_double_precision(name: str):
    """Against differences, for the images and for every parameter."""
    model = build(name, num_classes=2).double()
    images = draw(model, 1).double().requires_grad_()
    shapes = {parameter: tensor.shape for parameter, tensor in model.named_parameters()}

    def logits(images: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        pairs = zip(shapes.items(), parts, strict=True)
        tensors = {parameter: part.view(shape) for (parameter, shape), part in pairs}
        return torch.func.functional_call(model, tensors, images)

    flat = torch.cat([value.detach().flatten() for value in model.parameters()]).requires_grad_()
    assert torch.autograd.gradcheck(logits, (images, flat), fast_mode=True)


@pytest.mark.parametrize("name", KINDS)
def test_save_and_load(name: str, tmp_path: Path):
    model = build(name).eval()
    model.class_names = list("abcde")
    images = draw(model)
    for target in (tmp_path / "folder", tmp_path / "alone.safetensors"):
        am.save_model(model, target)
        loaded = am.load_model(target, quiet=True)
        assert (loaded.config, loaded.class_names) == (model.config, model.class_names)
        assert torch.equal(loaded(images), model(images))
    other = am.load_model(tmp_path / "folder", num_classes=3, quiet=True)
    assert torch.equal(other(images), torch.zeros(3, 3))
    assert torch.equal(other.features(images), model.features(images))
    headless = am.load_model(tmp_path / "folder", num_classes=0, quiet=True)
    assert torch.equal(headless(images), model.features(images))


@pytest.mark.parametrize("name", FIRST_OF_FAMILY)
def test_odd_sizes_or_the_refusal(name: str, tmp_path: Path):
    size, overrides = small(name)
    path = am.save_model(build(name).eval(), tmp_path / "model").parent
    if isinstance(model_config(name), CycleMLPConfig):
        odd = am.load_model(path, image_size=(size + 5, size - 3), quiet=True)
        assert odd(draw(odd)).shape == (3, 5)
    else:
        with pytest.raises(am.UserError, match="not divisible by"):
            am.create_model(name, size + 1, 5, **overrides)
        with pytest.raises(am.UserError, match="not divisible by"):
            am.load_model(path, image_size=size + 1, quiet=True)
    wide = am.load_model(path, image_size=(size, 2 * size), quiet=True)
    assert wide(draw(wide)).shape == (3, 5)
    grey = build(name, in_channels=1)
    assert grey(draw(grey)).shape == (3, 5)
    for shape, message in (
        ((1, 3, size, size), f"built for images of {size}x{2 * size} pixels, got {size}x{size}"),
        ((1, 1, size, 2 * size), "built for 3 input channels, the images have 1"),
        ((3, size, size), r"expected images \(N, channels, H, W\), got"),
    ):
        with pytest.raises(ValueError, match=message):
            wide(torch.zeros(shape))


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16(name: str):
    """Products in bfloat16: logits and gradients near those of float32, which stay float32."""
    model = build(name)
    images = draw(model, 8)
    exact = model(images).detach()
    wanted = gradients(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images).detach().float()
        found = gradients(model, images)
        assert model.features(images).dtype == torch.float32  # of the residual stream
    assert 0 < (logits - exact).abs().max() < 0.06 * exact.abs().max()
    largest = max(gradient.norm() for gradient in wanted.values())
    most = 0.1 if name == "small_resnet" else 0.05  # its convolutions alone make up the gradient
    for parameter, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - wanted[parameter]).norm() < most * largest, parameter


@pytest.mark.parametrize("name", FIRST_OF_FAMILY)
def test_stochastic_depth(name: str):
    model = build(name, stochastic_depth=0.5).train()
    images = draw(model, 16)
    kept = draw_stochastic_depth(model, 16, torch.Generator().manual_seed(0))
    assert kept.shape[1] == 16
    assert 0 < kept.mean() < 1
    set_stochastic_depth(model, kept)
    dropped = model(images)
    assert torch.equal(model(images), dropped)
    set_stochastic_depth(model, torch.ones_like(kept))
    whole = model(images)
    assert (whole - dropped).abs().max() > 1e-3
    set_stochastic_depth(model, None)
    torch.testing.assert_close(model.eval()(images), build(name).eval()(images))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # inside of torch
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", FIRST_OF_FAMILY)
def test_compile(name: str):
    """As one graph, forwards and backwards; with kernels for one family, which take a minute."""
    model = build(name)
    images = draw(model)
    wanted, exact = gradients(model, images), model(images)
    torch._dynamo.reset()  # other tests have compiled the same code for other shapes
    backend = "inductor" if name == "mixer_s32" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(images), exact, atol=1e-4, rtol=1e-4)
    F.cross_entropy(compiled(images), torch.arange(3)).backward()
    model.zero_grad()
    F.cross_entropy(compiled(images), torch.arange(3)).backward()
    for parameter, tensor in model.named_parameters():
        torch.testing.assert_close(tensor.grad, wanted[parameter], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_operations_and_words(name: str):
    """The operations are those that torch counts; and what is said of a model at full size."""
    for model in (build(name), build(name, num_classes=0)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(draw(model, 1))
        assert counter.get_total_flops() == model.config.flops
    if name in NAMES:
        config = model_config(name)
        assert config.flops > 1e9
        assert config.summary()
        twice = model_config(name, (448, 224))
        assert 1.9 * config.flops < twice.flops < 3 * config.flops
