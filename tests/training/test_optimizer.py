"""The updates of Google's code, which optimiser moves what, clipping, and the average."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

import allmlp as am
from allmlp.errors import UserError
from allmlp.training.head import freeze_all_but_head
from allmlp.training.losses import loss_function
from allmlp.training.optimizer import build_optimizers, clip, update, update_average
from allmlp.training.schedule import learning_rate
from allmlp.training.settings import OptimizerSettings
from conftest import GOLDEN, tiny_config, tiny_model
from google_layout import official_model, our_layout, our_name

# Google's warm-up is 4 of 12 steps; big_vision's linear decay ends at 1e-5, relative.

pytestmark = pytest.mark.numerics

PRETRAIN = OptimizerSettings(
    learning_rate=3e-3, weight_decay=1.0, schedule="linear", warmup=4 / 12, final=1e-5
)
FINETUNE = OptimizerSettings(
    name="sgd", learning_rate=0.06, weight_decay=0.0, beta1=0.9, warmup=4 / 12
)


@pytest.mark.parametrize(
    ("file", "settings", "loss"),
    [
        ("official_pretrain_updates", PRETRAIN, "sigmoid"),
        ("official_finetune_updates", FINETUNE, "softmax"),
    ],
)
def test_twelve_steps_equal_googles(file: str, settings: OptimizerSettings, loss: str):
    with np.load(GOLDEN / f"{file}.npz") as archive:
        golden = dict(archive)
    before = {k.removeprefix("before:"): v for k, v in golden.items() if k.startswith("before:")}
    sizes = {"hidden_dim": 16, "num_blocks": 2, "tokens_mlp_dim": 8, "channels_mlp_dim": 32}
    model = official_model(before, image_size=(16, 16), patch_size=8, num_classes=5, **sizes)
    images = torch.from_numpy(golden["images_nhwc"]).movedim(-1, -3)
    targets = torch.from_numpy(golden["soft_labels"])
    optimizers = build_optimizers(model, settings)
    losses, norms, rates = [], [], []
    for step in range(12):
        value = loss_function(model(images[step]), targets[step], loss)
        model.zero_grad()
        value.backward()
        norm = clip(model.parameters(), settings.clip_norm)
        rate = learning_rate(settings, step, 12)
        update(optimizers, rate)
        losses.append(value.item())
        norms.append(norm.item())
        rates.append(rate)
    np.testing.assert_allclose(rates, golden["learning_rates"], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-5)
    np.testing.assert_allclose(norms, golden["grad_norms"], rtol=1e-5)
    after = dict(model.named_parameters())
    largest = max(np.abs(golden[f"after:{key}"]).max() for key in before)
    for key in before:
        if "token_mixing/Dense_1/bias" not in key:  # no gradient but rounding
            difference = after[our_name(key)] - our_layout(key, golden[f"after:{key}"])
            assert difference.abs().max() <= 1e-5 * largest, key


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_reaches_kernels_only(name: str):
    """One step with zero gradients: kernels shrink by 1 - rate * decay, all else stays."""
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data.uniform_(0.5, 1.0)
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    settings = OptimizerSettings(name=name, learning_rate=7.0, weight_decay=0.2)
    update(build_optimizers(model, settings), 0.1)
    kernels = 0
    for name, parameter in model.named_parameters():
        is_kernel = name.endswith("weight") and "layer_norm" not in name
        kernels += is_kernel
        factor = 1 - 0.1 * 0.2 if is_kernel else 1.0
        torch.testing.assert_close(parameter.data, before[name] * factor)
    assert kernels == 2 + 4 * 2  # stem, head, four dense layers in each of two blocks


class Untied(torch.nn.Module):
    """A bias for every channel, as token mixing untied between channels has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(5, 2, 3))
        self.bias = torch.nn.Parameter(torch.ones(5, 3))


def test_a_bias_with_two_axes_is_no_kernel():
    model = torch.nn.Module()
    model.blocks = torch.nn.Sequential(torch.nn.Linear(3, 4), Untied())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers = build_optimizers(model, OptimizerSettings(name="muon", weight_decay=0.5))
    shapes = [[p.shape for g in o.param_groups for p in g["params"]] for o in optimizers]
    assert shapes == [[(4, 3)], [(5, 2, 3), (4,), (5, 3)]]
    update(optimizers, 0.1)
    untied = model.get_submodule("blocks.1")
    assert torch.equal(untied.get_parameter("bias").data, torch.ones(5, 3))
    torch.testing.assert_close(untied.get_parameter("weight").data, torch.full((5, 2, 3), 0.95))


def test_muon_moves_the_hidden_matrices_only_and_as_far_as_adam():
    """By 0.2 * rate * sqrt(max(A, B)) times a matrix whose singular values are about 1."""
    model = tiny_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = build_optimizers(model, OptimizerSettings(name="muon", weight_decay=0.0))
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    hidden, others = (
        {names[id(p)] for group in each.param_groups for p in group["params"]}
        for each in (muon, adamw)
    )
    mlps = [f"{mixing}_mixing.dense_{n}" for mixing in ("token", "channel") for n in (0, 1)]
    assert hidden == {f"blocks.{block}.{mlp}.weight" for block in (0, 1) for mlp in mlps}
    assert others == set(names.values()) - hidden
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    update([muon], rate := 1e-3)
    for name, parameter in model.named_parameters():
        moved = before[name] - parameter.detach()
        if name in others:
            assert not moved.any(), name
            continue
        assert parameter.grad is not None
        s = torch.linalg.svdvals(moved / (0.2 * rate * max(parameter.shape) ** 0.5))
        assert s.min() > 0.5, name  # Newton-Schulz in bfloat16 stops at "about"
        assert s.max() < 1.5, name
        rms = moved.square().mean().sqrt()
        # A x B with min(A, B) singular values of about 1 has the RMS 1 / sqrt(max(A, B)).
        assert 0.7 * 0.2 * rate < rms < 1.3 * 0.2 * rate, name
        g_u, _, g_v = torch.linalg.svd(parameter.grad, full_matrices=False)
        polar = g_u @ g_v  # the gradient made orthogonal
        assert torch.nn.functional.cosine_similarity(moved.ravel(), polar.ravel(), 0) > 0.95, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_settings_reach_the_optimisers(name: str):
    momentum = {"momentum": 0.8} if name == "muon" else {}
    settings = OptimizerSettings(name=name, beta1=0.7, beta2=0.95, **momentum)
    *muon, adamw = build_optimizers(tiny_model(), settings)
    assert all(group["betas"] == (0.7, 0.95) for group in adamw.param_groups)
    assert [group["momentum"] for each in muon for group in each.param_groups] == [0.8] * len(muon)
    assert all(group["nesterov"] for each in muon for group in each.param_groups)
    assert len(muon) == (name == "muon")


def test_muon_without_matrices_to_move_is_refused():
    settings = OptimizerSettings(name="muon")
    with pytest.raises(UserError, match=r"muon has nothing to move(.|\n)*optimizer.name=adamw"):
        build_optimizers(torch.nn.Linear(2, 3), settings)
    probe = tiny_model()
    freeze_all_but_head(probe)
    with pytest.raises(UserError, match="muon has nothing to move"):
        build_optimizers(probe, settings)


@pytest.mark.parametrize("most", [0.5, 1e6])
def test_clipping_returns_the_norm_before(most: float):
    a, b, idle = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, -4.0])
    norm = clip(iter([a, b, idle]), most)
    assert norm.shape == ()
    assert norm.item() == pytest.approx(5.0)
    scale = min(1.0, most / 5.0)
    torch.testing.assert_close(a.grad, torch.tensor([3.0 * scale, 0.0]))
    torch.testing.assert_close(b.grad, torch.tensor([0.0, -4.0 * scale]))
    assert idle.grad is None


def test_the_average_follows_the_weights():
    model = tiny_model()
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    average = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    update_average(average, model, decay=0.9, step=0)  # 1/10 at first
    update_average(average, model, decay=0.9, step=1000)
    for mean in average.values():
        torch.testing.assert_close(mean, torch.full_like(mean, 1 - 0.1 * 0.9))
    assert all((parameter == 1).all() for parameter in model.parameters())


def test_the_average_has_the_bits_of_torchs_average_over_modules():
    """Whatever the order of the names, and over many steps, the decay rising to its own."""
    model, decay = tiny_model(), 0.8
    torch.manual_seed(1)
    theirs = [torch.randn_like(parameter) for parameter in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    mapped = {name: mean.clone() for name, mean in zip(names, theirs, strict=True)}
    average = {name: mapped[name] for name in reversed(names)}
    for step in range(60):
        for parameter in model.parameters():
            parameter.data.normal_()
        update_average(average, model, decay, step)
        rising = min(decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(rising)(theirs, list(model.parameters()), step)
    for name, mean in zip(names, theirs, strict=True):
        assert torch.equal(average[name].view(torch.int32), mean.view(torch.int32)), name


def test_the_public_names():
    assert am.TrainConfig().optimizer == OptimizerSettings()


def test_no_clipping(class_folder, tmp_path):
    """0 is none: the same as a norm that no gradient reaches, unlike one that each does."""
    names = {0.0: "none", 1e9: "large", 1e-3: "small"}
    for norm, name in names.items():
        sgd = {"name": "sgd", "weight_decay": 0.0, "learning_rate": 0.1, "clip_norm": norm}
        config = tiny_config(str(class_folder), tmp_path / name)
        config = config.with_values({f"optimizer.{key}": value for key, value in sgd.items()})
        am.train(config, quiet=True)
    weights = (tmp_path / each / "best" / "model.safetensors" for each in names.values())
    found = [each.read_bytes() for each in weights]
    assert found[0] == found[1]
    assert found[0] != found[2]
