"""The learning rate as a pure function of the step."""

from __future__ import annotations

import itertools
import math

import pytest

from allmlp.errors import UserError
from allmlp.training.schedule import check_warmup, learning_rate, warmup_steps
from allmlp.training.settings import OptimizerSettings


@pytest.mark.parametrize("warmup", [0.1, 10])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedule(schedule: str, warmup: float):
    settings = OptimizerSettings(learning_rate=2.0, schedule=schedule, warmup=warmup, final=0.01)
    rates = [learning_rate(settings, step, 100) for step in range(101)]
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == 2.0
    assert rates[100] == pytest.approx(0.02)
    assert rates[55] == pytest.approx(2.0 * (0.01 + 0.99 * 0.5))
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    left = {"linear": 1 / 90, "cosine": 0.5 * (1 + math.cos(math.pi * 89 / 90))}[schedule]
    assert rates[99] == pytest.approx(2.0 * (0.01 + 0.99 * left))  # the last step of the run
    assert learning_rate(settings, 500, 100) == pytest.approx(0.02)


def test_steps_and_a_share_are_told_apart():
    paper = OptimizerSettings(warmup=10_000)  # Table 4, whatever the length of the run
    assert [warmup_steps(paper, n) for n in (12_000, 92_897)] == [10_000, 10_000]
    assert learning_rate(paper, 9_999, 92_897) < learning_rate(paper, 10_000, 92_897) == 1e-3
    share = OptimizerSettings(warmup=0.25)
    assert [warmup_steps(share, n) for n in (8, 100)] == [2, 25]
    assert warmup_steps(OptimizerSettings(warmup=1), 100) == 1


def test_no_warmup_starts_at_the_top():
    settings = OptimizerSettings(learning_rate=2.0, warmup=0.0)
    assert learning_rate(settings, 0, 10) == 2.0
    assert learning_rate(settings, 5, 10) == pytest.approx(1.0)


@pytest.mark.parametrize(("warmup", "num_steps"), [(10_000, 10_000), (58, 12), (0.9, 3)])
def test_a_run_within_its_warmup_is_refused(warmup: float, num_steps: int):
    with pytest.raises(UserError) as caught:
        check_warmup(OptimizerSettings(warmup=warmup), num_steps)
    assert f"optimizer.warmup={warmup}" in caught.value.what
    assert f"run has {num_steps:,}" in caught.value.what
    assert caught.value.fix is not None
    assert "--set optimizer.warmup=0.1" in caught.value.fix


@pytest.mark.parametrize(("warmup", "num_steps"), [(9_999, 10_000), (0.1, 1), (0.0, 1)])
def test_a_run_beyond_its_warmup_is_accepted(warmup: float, num_steps: int):
    settings = OptimizerSettings(warmup=warmup)
    check_warmup(settings, num_steps)
    assert learning_rate(settings, num_steps - 1, num_steps) == settings.learning_rate


def test_stepwise_decay():
    """As task_adaptation and bit_hyperrule.py: the boundary's own step has the rate before."""
    settings = OptimizerSettings(learning_rate=2.0, schedule="steps", warmup=8)
    rates = [learning_rate(settings, step, 100) for step in range(101)]
    assert (rates[0], rates[4], rates[8]) == (0.0, 1.0, 2.0)
    at = [rates[step] for step in (30, 31, 60, 61, 90, 91, 100)]
    assert at == pytest.approx([2.0, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    in_steps = OptimizerSettings(schedule="steps", warmup=0, decay_at=(5, 7), decay_factor=0.5)
    assert [learning_rate(in_steps, step, 10) / 1e-3 for step in range(4, 10)] == pytest.approx(
        [1, 1, 0.5, 0.5, 0.25, 0.25]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay_at": (0.5,)}, r"optimizer.decay_at=\(0.5,\) has no effect with cosine decay"),
        ({"decay_factor": 0.5}, "optimizer.decay_factor=0.5 has no effect with cosine decay"),
        ({"schedule": "steps", "final": 0.1}, "optimizer.final=0.1 has no effect with stepwise"),
        ({"schedule": "steps", "decay_factor": 1.0}, "decay_factor must be above 0 and below 1"),
        ({"schedule": "steps", "decay_at": ()}, "optimizer.decay_at must be ascending shares"),
        ({"schedule": "steps", "decay_at": (0.6, 0.3)}, "decay_at must be ascending"),
        ({"schedule": "steps", "decay_at": (0.5, 20.0)}, "decay_at must be ascending"),
        ({"schedule": "steps", "decay_at": (2.5,)}, "decay_at must be ascending"),
        ({"schedule": "steps", "decay_at": (0.0,)}, "decay_at must be ascending"),
    ],
)
def test_a_decay_that_cannot_be(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        OptimizerSettings(**changes)
