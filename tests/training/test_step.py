"""A step on a GPU waits for no result but that of the step before; on a CPU, with the same code."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import allmlp as am
from allmlp.models.layers import draw_stochastic_depth
from allmlp.runtime.device import ComputePolicy, Transfer
from allmlp.runtime.world import World
from allmlp.training.optim import build_optimizers
from allmlp.training.step import StepResult, Updater
from conftest import tiny_config, tiny_model, user_error
from runs import check_same

CPU, STEPS = torch.device("cpu"), 5


def updater(on_device: bool, **changes: object) -> Updater:
    model = tiny_model(stochastic_depth=0.2)
    config = tiny_config("digits", Path("none"), batch_size=4, **changes)
    optimizers = build_optimizers(model, config.optimizer)
    compute = ComputePolicy(CPU, "float32", False, "")
    made = Updater(model, model, optimizers, config, compute, World(), STEPS, pytest.fail)
    made.micro_batch_size = 2
    if on_device:
        made.guard_on_device()
    return made


def step(made: Updater, number: int, scale: float = 1.0) -> list[StepResult]:
    random = torch.Generator().manual_seed(number)
    images = scale * torch.randn(4, 3, 8, 8, generator=random)
    targets = torch.eye(7)[torch.randint(7, (4,), generator=random)]
    return made(number, images, targets, draw_stochastic_depth(made.model, 4, random), number)


def weights(made: Updater) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in made.parameters]


def test_gradients_are_clipped():
    for most in (1e-3, 0.0):
        made = updater(False, optimizer__clip_norm=most)
        step(made, 0)
        norm = torch.stack([p.grad.norm() for p in made.parameters if p.grad is not None]).norm()
        assert (norm < 1.01e-3) == (most > 0)


def test_sam_starts_when_it_is_asked_for(monkeypatch):
    made, counts = updater(False, optimizer__sam_rho=0.05, optimizer__sam_start=0.5), []
    gradient = made.gradient
    monkeypatch.setattr(made, "gradient", lambda *a: (counts.append(number), gradient(*a))[1])
    for number in range(STEPS):
        step(made, number)
    assert [counts.count(number) for number in range(STEPS)] == [1] * (STEPS // 2) + [2] * (
        STEPS - STEPS // 2
    )


def moments_of(made: Updater) -> list[torch.Tensor]:
    return [value for state in made.optimizers[0].state.values() for value in state.values()]


class Waits(TorchDispatchMode):
    """Notes what would wait for a GPU: values that the program asks for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        for kind, name in ((torch.Tensor, "tolist"), (Transfer, "wait")):
            monkeypatch.setattr(kind, name, self.noted(getattr(kind, name)))

    def noted(self, function: Any) -> Any:
        return lambda owner: (self.found.append(function.__name__), function(owner))[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("_local_scalar_dense.default", "nonzero.default", "equal.default"):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_a_step_waits_once_and_one_step_late(monkeypatch, sam_rho):
    made = updater(True, optimizer__sam_rho=sam_rho)
    with Waits(monkeypatch) as waits:
        assert step(made, 0) == []
        assert waits.found == []
        (result,) = step(made, 1)
        assert waits.found == ["wait"]
    assert result.step == 0
    assert [result.step for result in made.results()] == [1]
    assert made.results() == []


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_no_step_after_a_non_finite_one_changes_a_weight(scale):
    made = updater(True)
    step(made, 0)
    before = weights(made)
    moments = [value.clone() for value in moments_of(made)]
    (first,) = step(made, 1, scale)
    (second,) = step(made, 2)
    (third,) = made.results()
    assert [r.is_finite for r in (first, second, third)] == [True, False, True]
    assert second.step == 1
    assert all(map(torch.equal, weights(made), before))
    assert moments
    assert all(map(torch.equal, moments, moments_of(made)))


def test_muon_waits_as_it_cannot_refuse():
    made = updater(False, optimizer="muon")
    assert made.refused is None
    assert not all(group.get("fused") for o in made.optimizers for group in o.param_groups)
    before = weights(made)
    (result,) = step(made, 0, float("nan"))
    assert not result.is_finite
    assert all(map(torch.equal, weights(made), before))


def test_a_run_that_reads_a_step_late_is_the_same(class_folder: Path, tmp_path: Path, monkeypatch):
    """Logs, evaluations, checkpoints; a non-finite step is named and nothing after it is saved."""

    def config(name: str) -> am.TrainConfig:
        return tiny_config(str(class_folder), tmp_path / name, checkpoint_every=1)

    plain = am.train(config("plain"), quiet=True).run_folder
    create = Updater.__post_init__
    late = lambda self: (create(self), self.guard_on_device())  # noqa: E731
    monkeypatch.setattr(Updater, "__post_init__", late)
    check_same(am.train(config("late"), quiet=True).run_folder, plain)
    gradient, calls = Updater.gradient, itertools.count()

    def poisoned(self: Updater, images: torch.Tensor, *others: Any) -> torch.Tensor:
        scale = float("nan") if next(calls) == 3 else 1.0
        return gradient(self, images * scale, *others)

    monkeypatch.setattr(Updater, "gradient", poisoned)
    last = "the last good checkpoint is ", "step-00000003"
    with user_error("diverged", "step 3: loss nan", *last):
        am.train(config("poisoned").with_value("checkpoint_every", 3), quiet=True)
