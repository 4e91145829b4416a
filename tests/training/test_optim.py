"""Losses, learning rate, Google's updates, what optimizers move, state, average and SAM."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn.utils import clip_grad_norm_

import allmlp as am
from allmlp.errors import UserError
from allmlp.training.config import SGD, AdamW, Linear, Muon, Optimizer, Sigmoid, Softmax
from allmlp.training.optim import (
    Float32Muon,
    balance_weights,
    build_optimizers,
    check_warmup,
    learning_rate,
    loss_function,
    operations,
    power,
    sam_ascent,
    update,
)
from conftest import GOLDEN, tiny_model
from google_layout import official_model, our_layout, our_name

pytestmark = pytest.mark.numerics
LOSSES = [Softmax(), Softmax(label_smoothing=0.1), Sigmoid()]


# Losses


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_and_parts_of_a_batch(loss: Softmax | Sigmoid):
    random = torch.Generator().manual_seed(0)
    logits, other = torch.randn((2, 7, 5), generator=random, dtype=torch.float64)
    logits, targets = logits.requires_grad_(), torch.softmax(2 * other, dim=1)
    whole = loss_function(logits, targets, loss)
    (gradient,) = torch.autograd.grad(whole, logits)
    if isinstance(loss, Sigmoid):
        expected = (torch.sigmoid(logits) - targets) / 7
    else:
        smoothing = loss.label_smoothing
        expected = (torch.softmax(logits, 1) - (1 - smoothing) * targets - smoothing / 5) / 7
    torch.testing.assert_close(gradient, expected)
    parts = [loss_function(logits[p], targets[p], loss) for p in (slice(0, 4), slice(4, 7))]
    torch.testing.assert_close((4 * parts[0] + 3 * parts[1]) / 7, whole)


@pytest.mark.parametrize("loss", LOSSES)
def test_class_weights(loss: Softmax | Sigmoid):
    """A mixed target counts as its parts, each with its class's weight, also in micro-batches."""
    labels = np.array([0] * 19 + [1] * 5 + [3])  # no image of class 2
    counts = np.bincount(labels, minlength=4)
    weights = balance_weights(SimpleNamespace(class_counts=lambda: counts, is_multi_label=False))
    assert weights[[0, 1, 3]] == pytest.approx(
        compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    )
    assert weights[labels].mean() == pytest.approx(1.0)
    random = torch.Generator().manual_seed(0)
    logits = torch.randn((25, 4), generator=random, dtype=torch.float64, requires_grad=True)
    own = torch.eye(4, dtype=torch.float64)
    targets = torch.lerp(own[labels], own[labels[::-1].copy()], 0.3)
    expected = sum(
        weights[c] * t * loss_function(logits[n : n + 1], own[c : c + 1], loss) / 25
        for n, row in enumerate(targets)
        for c, t in enumerate(row)
    )
    given = torch.from_numpy(weights)
    found = loss_function(logits, targets, loss, given)
    torch.testing.assert_close(found, expected)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], expected_gradient)
    parts = [slice(0, 10), slice(10, 25)]
    found = [loss_function(logits[p], targets[p], loss, given) for p in parts]
    torch.testing.assert_close(found[0] * 10 / 25 + found[1] * 15 / 25, expected)
    plain = loss_function(logits, targets, loss, torch.ones_like(given))
    torch.testing.assert_close(plain, loss_function(logits, targets, loss))


# The learning rate


@pytest.mark.parametrize("warmup", [0.1, 10])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedule(schedule: str, warmup: float):
    values = {"name": schedule, "final_lr_fraction": 0.01}
    config = am.TrainConfig().with_values(
        {"optimizer.schedule": values, "optimizer.learning_rate": 2.0, "optimizer.warmup": warmup}
    )
    rates = [learning_rate(config.optimizer, step, 100) for step in range(101)]
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == 2.0
    assert rates[100] == pytest.approx(0.02)
    assert rates[55] == pytest.approx(2.0 * (0.01 + 0.99 * 0.5))
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    left = {"linear": 1 / 90, "cosine": 0.5 * (1 + math.cos(math.pi * 89 / 90))}[schedule]
    assert rates[99] == pytest.approx(2.0 * (0.01 + 0.99 * left))  # the last step of the run
    assert learning_rate(config.optimizer, 500, 100) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("warmup", "num_steps", "fits"),
    [
        (10_000, 10_000, False),
        (58, 12, False),
        (0.9, 3, False),
        (9_999, 10_000, True),
        (0.1, 1, True),
    ],
)
def test_a_run_is_longer_than_its_warmup(warmup: float, num_steps: int, fits: bool):
    optimizer = AdamW(warmup=warmup)
    if fits:
        check_warmup(optimizer, num_steps)
        assert learning_rate(optimizer, num_steps - 1, num_steps) == optimizer.learning_rate
    else:
        with pytest.raises(UserError, match=f"optimizer.warmup={warmup}"):
            check_warmup(optimizer, num_steps)


# Updates

# Google's warm-up is 4 of 12 steps; big_vision's linear decay ends at 1e-5, relative.
PRETRAIN = AdamW(
    learning_rate=3e-3, weight_decay=1.0, schedule=Linear(final_lr_fraction=1e-5), warmup=4 / 12
)
FINETUNE = SGD(learning_rate=0.06, momentum=0.9, warmup=4 / 12)


@pytest.mark.parametrize(
    ("file", "settings", "loss"),
    [
        ("official_pretrain_updates", PRETRAIN, Sigmoid()),
        ("official_finetune_updates", FINETUNE, Softmax()),
    ],
)
def test_twelve_steps_equal_googles(file: str, settings: Optimizer, loss: Softmax | Sigmoid):
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
        norm = clip_grad_norm_(model.parameters(), settings.clip_norm)
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


@pytest.mark.parametrize("kind", [AdamW, Muon])
@pytest.mark.parametrize("mixing", ["shared", "untied"])  # whose biases have two axes
def test_decay_reaches_kernels_only(kind: type[AdamW], mixing: str):
    """One step with zero gradients: kernels shrink by 1 - rate * decay, all else stays."""
    model = tiny_model(token_mixing=mixing)
    for parameter in model.parameters():
        parameter.data.uniform_(0.5, 1.0)
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    update(build_optimizers(model, kind(learning_rate=7.0, weight_decay=0.2)), 0.1)
    kernels = 0
    for name, parameter in model.named_parameters():
        is_kernel = name.endswith("weight") and "layer_norm" not in name
        kernels += is_kernel
        factor = 1 - 0.1 * 0.2 if is_kernel else 1.0
        torch.testing.assert_close(parameter.data, before[name] * factor)
    assert kernels == 2 + 4 * 2  # stem, head, four dense layers in each of two blocks


def test_muon_takes_the_hidden_matrices_only():
    model = tiny_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = build_optimizers(model, Muon(weight_decay=0.0, momentum=0.8, beta2=0.95))
    assert (muon.param_groups[0]["momentum"], muon.param_groups[0]["nesterov"]) == (0.8, True)
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)
    hidden, others = (
        {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (muon, adamw)
    )
    mlps = [f"{mixing}_mixing.dense_{n}" for mixing in ("token", "channel") for n in (0, 1)]
    assert hidden == {f"blocks.{block}.{mlp}.weight" for block in (0, 1) for mlp in mlps}
    assert others == set(names.values()) - hidden


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_in_float32_is_that_of_pytorch_up_to_bfloat16(nesterov: bool):
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((8, 24), (24, 8), (12, 12))]
    pairs = [[nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2)]
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.5, "momentum": 0.9}
    options |= {"nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
    theirs, ours = torch.optim.Muon(pairs[0], **options), Float32Muon(pairs[1], **options)
    for _ in range(5):
        for one, other in zip(*pairs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        theirs.step()
        ours.step()
    for before, one, other in zip(start, *pairs, strict=True):
        moved = one.detach() - before
        assert (other.detach() - one.detach()).norm() < 0.02 * moved.norm()
        momenta = [o.state[p]["momentum_buffer"] for o, p in ((theirs, one), (ours, other))]
        torch.testing.assert_close(*momenta)


# Sharpness-aware minimisation


def test_the_second_gradient_is_that_at_the_worst_point():
    """Of quadratics, whose gradients are known everywhere; the norm is over all parameters."""
    a, rho = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64), 0.7
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    bias = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))

    def backward() -> None:
        weight.grad = bias.grad = None
        (weight @ a @ weight / 2 + 5 * bias.square().sum() / 2).backward()

    backward()
    before, first = weight.detach().clone(), torch.tensor([1.0, -3.0, 15.0], dtype=torch.float64)
    point = before + rho * first[:2] / first.norm()
    with sam_ascent(iter([weight, bias]), rho):
        torch.testing.assert_close(weight.detach(), point)
        backward()
    torch.testing.assert_close(weight.grad, a @ point)
    torch.testing.assert_close(bias.grad, 5 * (3.0 + rho * first[2:] / first.norm()))
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_come_back_bit_for_bit(fails: bool):
    """Also values that adding and subtracting would not bring back: -0, tiny ones, huge ones."""
    model = tiny_model()
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([-0.0, 1e-30, 1e30, 1.0, 0.1, 3e-39, -7.0]))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    bits = lambda: [p.detach().view(torch.int32).clone() for p in model.parameters()]  # noqa: E731
    before = bits()
    with pytest.raises(KeyError) if fails else torch.enable_grad():  # noqa: SIM117
        with sam_ascent(model.parameters(), 0.1):
            assert not any(map(torch.equal, bits(), before))
            if fails:
                raise KeyError
    assert all(map(torch.equal, bits(), before))


def test_operations_and_images():
    assert operations(636, 10, AdamW()) == 3 * 636 * 10
    assert operations(636, 10, AdamW(sam_rho=0.1, sam_start=0.75)) == round(3.75 * 6360)
    assert power(operations(25_200_000_000, 144_000, AdamW())) == "1.1e16"
    assert am.recipe("digits").images_seen(1293) == 100 * 1293
    assert am.recipe("finetune_pets").images_seen(3680) == 500 * 512
