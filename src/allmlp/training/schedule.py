"""The learning rate: a pure function of the step, which starts at step 0 with a rate of 0.

Source: `create_learning_rate_schedule` of big_vision's `utils.py`; the stepwise decay is that of
google-research/task_adaptation and of `bit_hyperrule.py`: the step of the boundary itself still has
the rate before.
"""

from __future__ import annotations

import math

from allmlp.errors import UserError
from allmlp.training.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """Returns the rate of a step: a linear rise to the peak, then cosine, linear or stepwise decay.

    Args:
        settings: with `learning_rate`, `warmup`, `schedule` and what belongs to it.
        step: from 0.
        num_steps: of the whole run.
    """
    warmup = warmup_steps(settings, num_steps)
    progress = (step - warmup) / max(num_steps - warmup, 1)
    progress = min(max(progress, 0.0), 1.0)
    rise = min(1.0, step / warmup) if warmup else 1.0
    if settings.schedule == "steps":
        ends = (round(at * num_steps) if at < 1 else at for at in settings.decay_at)
        scale = settings.decay_factor ** sum(step > end for end in ends)
        return settings.learning_rate * scale * rise
    if settings.schedule == "cosine":
        decay = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        decay = 1.0 - progress
    scale = settings.final + (1.0 - settings.final) * decay
    return settings.learning_rate * scale * rise


def warmup_steps(settings: OptimizerSettings, num_steps: int) -> int:
    """Returns the first step at the full rate, of a run of so many steps."""
    return round(settings.warmup * num_steps if settings.warmup < 1 else settings.warmup)


def check_warmup(settings: OptimizerSettings, num_steps: int) -> None:
    """Checks that a run of so many steps is longer than its warm-up.

    Raises:
        UserError: it would end before a step at the full rate.
    """
    warmup = warmup_steps(settings, num_steps)
    if warmup >= num_steps:
        raise UserError(
            f"optimizer.warmup={settings.warmup:g} is {warmup:,} steps of warm-up, and the whole "
            f"run has {num_steps:,}: it would never reach its learning rate",
            fix="--set optimizer.warmup=0.1 (a tenth of the run), or more epochs",
        )
