""" "Avg 5": the mean over ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers (the paper, appendix C).

The learning rate is chosen on held-out training images, then one run per seed trains on all of
them. Steps, learning rates and held-out fractions are those of the recipe for each data set.
"""

from __future__ import annotations

from typing import Any

from allmlp.options import make
from allmlp.paper.options import Avg5Options
from allmlp.paper.suite import Suite, SuiteResult, Task, plan_whole, run_suite
from allmlp.training.config import TrainConfig
from allmlp.training.recipes import LEARNING_RATES, recipe

AVG5: dict[str, Task] = {
    name: Task(name, classes, recipe=recipe, images={"train": train, "test": test})
    for name, classes, recipe, train, test in (
        ("imagenet", 1000, "finetune_imagenet", 1_281_167, 50_000),
        ("cifar10", 10, "finetune_cifar", 50_000, 10_000),
        ("cifar100", 100, "finetune_cifar", 50_000, 10_000),
        ("pets", 37, "finetune_pets", 3_680, 3_669),
        ("flowers102", 102, "finetune_flowers", 2_040, 6_149),
    )
}


def avg5(
    checkpoint: str, options: Avg5Options | None = None, *, quiet: bool = False, **fields: Any
) -> SuiteResult:
    """Fine-tunes a checkpoint on the data sets of "Avg 5", or resumes the suite."""
    options = make(Avg5Options, options, fields)
    size = options.image_size or 224
    official = size if size in (224, 448, (224, 224), (448, 448)) else 224

    def config(task: Task) -> TrainConfig:
        values = {"model.image_size": official, "data.resize": options.resize}
        return recipe(task.recipe).with_values(values)

    side = "x".join(map(str, size)) if isinstance(size, tuple) else size
    suite = Suite(
        kind="avg5",
        known=AVG5,
        protocol=f"Avg 5 at {side} pixels, {options.resize}",
        config=config,
        rates=lambda task: LEARNING_RATES[task.recipe],
        seeds=(0, 1, 2),
        plan=plan_whole,
    )
    return run_suite(suite, checkpoint, options, quiet=quiet)
