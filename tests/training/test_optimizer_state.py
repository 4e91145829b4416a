"""The optimisers' state by name: what it is before the first step, and that training goes on."""

from __future__ import annotations

import pytest
import torch

import allmlp as am
from allmlp.training.head import freeze_all_but_head
from allmlp.training.losses import loss_function
from allmlp.training.optimizer import build_optimizers, clip, optimizer_tensors, update
from allmlp.training.schedule import learning_rate
from allmlp.training.settings import OptimizerSettings
from conftest import tiny_model

SETTINGS = {
    "adamw": OptimizerSettings(learning_rate=0.01, warmup=2),
    "sgd": OptimizerSettings(name="sgd", learning_rate=0.1, weight_decay=0.0, warmup=2),
    "sgd without momentum": OptimizerSettings(
        name="sgd", learning_rate=0.1, weight_decay=0.0, beta1=0.0, warmup=2
    ),
    "muon": OptimizerSettings(name="muon", learning_rate=0.01, warmup=2),
}


def learn(
    model: am.ImageClassifier,
    optimizers: list[torch.optim.Optimizer],
    settings: OptimizerSettings,
    steps: range,
) -> None:
    """Steps of a run of ten, each with a batch of its own."""
    for step in steps:
        random = torch.Generator().manual_seed(step)
        images = torch.randn((4, 3, 8, 8), generator=random)
        targets = torch.softmax(torch.randn((4, 7), generator=random), dim=1)
        model.zero_grad()
        loss_function(model(images), targets, "softmax").backward()
        clip(model.parameters(), settings.clip_norm)
        update(optimizers, learning_rate(settings, step, 10))


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: t.detach().view(torch.int32).ravel().tolist() for name, t in tensors.items()}


def everything(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **optimizer_tensors(model, optimizers)}


CASES = [(name, is_probe) for name in SETTINGS for is_probe in (False, True)]
CASES.remove(("muon", True))  # refused: it has nothing to move


@pytest.mark.parametrize("saved_after", [0, 4])
@pytest.mark.parametrize(("name", "is_probe"), CASES)
def test_going_on_from_the_tensors_repeats_the_bits(name: str, is_probe: bool, saved_after: int):
    settings = SETTINGS[name]

    def begin(seed: int) -> tuple[am.ImageClassifier, list[torch.optim.Optimizer]]:
        model = tiny_model()
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        if is_probe:
            freeze_all_but_head(model)
        return model, build_optimizers(model, settings)

    straight, first, second = begin(1), begin(1), begin(2)
    learn(*straight, settings, range(10))
    learn(*first, settings, range(saved_after))
    saved = {name: tensor.detach().clone() for name, tensor in everything(*first).items()}
    learn(*second, settings, range(2))  # whatever it holds is overwritten
    with torch.no_grad():
        for key, tensor in everything(*second).items():
            tensor.copy_(saved.pop(key))
    assert not saved
    learn(*second, settings, range(saved_after, 10))
    assert bits(everything(*second)) == bits(everything(*straight))
    before, after = (bits(dict(each[0].named_parameters())) for each in (begin(1), straight))
    moved = {key for key in before if before[key] != after[key]}
    assert {"head.weight", "head.bias"} <= moved
    assert ("stem.weight" in moved) == (not is_probe)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_state_is_that_which_torch_would_make(name: str):
    """A run from our zeros has the bits of one whose state torch makes in the first step."""
    ours, theirs = tiny_model(), tiny_model()
    optimizers, lazy = (build_optimizers(model, SETTINGS[name]) for model in (ours, theirs))
    for optimizer in lazy:
        optimizer.state.clear()
    assert optimizer_tensors(theirs, lazy) == {}
    learn(ours, optimizers, SETTINGS[name], range(5))
    learn(theirs, lazy, SETTINGS[name], range(5))
    assert bits(everything(ours, optimizers)) == bits(everything(theirs, lazy))


def test_the_tensors_and_their_names():
    model = tiny_model()
    model.head.weight.data.fill_(-0.0)
    model.head.weight.grad = torch.full_like(model.head.weight, 3.0)
    before = bits(dict(model.named_parameters()))
    optimizers = build_optimizers(model, SETTINGS["muon"])
    assert bits(dict(model.named_parameters())) == before
    assert (model.head.weight.grad == 3.0).all()
    assert model.stem.weight.grad is None
    tensors = optimizer_tensors(model, optimizers)
    of_adam = {"exp_avg", "exp_avg_sq", "step"}
    expected = set()
    for name, parameter in model.named_parameters():
        is_hidden = name.startswith("blocks.") and parameter.dim() == 2
        expected |= {f"{name}.{key}" for key in ({"momentum_buffer"} if is_hidden else of_adam)}
    assert tensors.keys() == expected
    assert not any(tensor.any() for tensor in tensors.values())
    learn(model, optimizers, SETTINGS["muon"], range(3))
    assert tensors["head.bias.step"] == 3.0  # the very tensors, not copies
    assert tensors["blocks.0.token_mixing.dense_0.weight.momentum_buffer"].any()


def test_parameters_replaced_after_building_are_noticed():
    model = tiny_model()
    optimizers = build_optimizers(model, SETTINGS["adamw"])
    model.head.bias = torch.nn.Parameter(torch.zeros(7))
    with pytest.raises(AssertionError, match="replaced"):
        optimizer_tensors(model, optimizers)


def test_a_linear_probe_has_state_for_the_head_alone():
    model = tiny_model()
    freeze_all_but_head(model)
    optimizers = build_optimizers(model, SETTINGS["adamw"])
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(model.head.weight), id(model.head.bias)]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    learn(model, optimizers, SETTINGS["adamw"], range(3))
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved == ["head.weight", "head.bias"]
