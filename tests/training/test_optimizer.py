"""The updates of Google's code, step by step, and the schedules."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import mlp_mixer as mm
from conftest import GOLDEN, tiny_model
from google_layout import official_model, our_layout, our_name
from mlp_mixer.training.config import OptimizerSettings
from mlp_mixer.training.optimizer import (
    build_optimizer,
    learning_rate,
    loss_function,
    update_average,
)

# Google's warm-up is 4 of 12 steps; big_vision's linear decay ends at 1e-5, relative.
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
    optimizer = build_optimizer(model, settings)
    losses, norms, rates = [], [], []
    for step in range(12):
        value = loss_function(model(images[step]), targets[step], loss)
        optimizer.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        rate = learning_rate(settings, step, 12)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
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


def test_decay_reaches_kernels_only():
    """One step with zero gradients: kernels shrink by 1 - rate * decay, all else stays."""
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data.uniform_(0.5, 1.0)
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    build_optimizer(model, OptimizerSettings(learning_rate=0.1, weight_decay=0.2)).step()
    kernels = 0
    for name, parameter in model.named_parameters():
        is_kernel = name.endswith("weight") and "layer_norm" not in name
        kernels += is_kernel
        factor = 1 - 0.1 * 0.2 if is_kernel else 1.0
        torch.testing.assert_close(parameter.data, before[name] * factor)
    assert kernels == 2 + 4 * 2  # stem, head, four dense layers in each of two blocks


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedule(schedule: str):
    settings = OptimizerSettings(learning_rate=2.0, schedule=schedule, warmup=0.1, final=0.01)
    rates = [learning_rate(settings, step, 100) for step in range(101)]
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(2.0)
    assert rates[100] == pytest.approx(0.02)
    assert rates[55] == pytest.approx(2.0 * (0.01 + 0.99 * 0.5))
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(settings, 500, 100) == pytest.approx(0.02)


def test_no_warmup_starts_at_the_top():
    settings = OptimizerSettings(learning_rate=2.0, warmup=0.0)
    assert learning_rate(settings, 0, 10) == 2.0
    assert learning_rate(settings, 5, 10) == pytest.approx(1.0)


def test_the_average_follows_the_weights():
    average, model = tiny_model(), tiny_model()
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    for parameter in average.parameters():
        torch.nn.init.zeros_(parameter)
    update_average(average, model, decay=0.9, step=0)  # 1/10 at first
    update_average(average, model, decay=0.9, step=1000)
    for parameter in average.parameters():
        torch.testing.assert_close(parameter.data, torch.full_like(parameter, 1 - 0.1 * 0.9))
    assert all((parameter == 1).all() for parameter in model.parameters())


def test_losses():
    logits, targets = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.8, 0.2]])
    log_sum = math.log(math.exp(2) + math.exp(-1))
    softmax = log_sum - 0.8 * 2 + 0.2 * 1
    assert loss_function(logits, targets, "softmax").item() == pytest.approx(softmax)
    smoothed = log_sum - (0.9 * 0.8 + 0.05) * 2 + (0.9 * 0.2 + 0.05) * 1
    assert loss_function(logits, targets, "softmax", 0.1).item() == pytest.approx(smoothed)

    def log_sigmoid(x: float) -> float:
        return -math.log(1 + math.exp(-x))

    pairs = zip((2.0, -1.0), (0.8, 0.2), strict=True)
    each = [-t * log_sigmoid(x) - (1 - t) * log_sigmoid(-x) for x, t in pairs]
    assert loss_function(logits, targets, "sigmoid").item() == pytest.approx(sum(each))


def test_the_public_names():
    assert mm.TrainConfig().optimizer == OptimizerSettings()
