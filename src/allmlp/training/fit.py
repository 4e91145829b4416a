"""Settings of a fine-tuning run that fit the number of its images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from allmlp.errors import one_of, plural
from allmlp.runtime.device import choose_device
from allmlp.runtime.process import num_processes
from allmlp.training.config import TrainConfig, setting_names
from allmlp.training.dataset import Splits, split_data
from allmlp.training.recipes import FINETUNING, LARGE, finetune_for, recipe

LEAST_EPOCHS, MOST_EPOCHS = 30, 100
# Random weights per training image above which a run is warned about. The recipes that work have
# 55 (digits: 98.4 %) and 25 (CIFAR-10: 69 % after 12 epochs, still rising); S/16 on 340 flowers had
# 51,000 (37.5 %); the limit is about the geometric mean of 55 and 51,000, which is 1,700.
MOST_WEIGHTS = 1000


def finetune_config(
    weights: str,
    data: str,
    settings: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    *,
    recipe_name: str | None = None,
    in_grid: bool = False,
) -> TrainConfig:
    """Returns the settings of a fine-tuning run, with batch, length and warm-up for its images.

    Args:
        weights: the checkpoint to begin with.
        data: the source of the images; all of them are listed, none is decoded.
        settings: path of a setting -> value; these win.
        assignments: "section.name=value", applied after the settings.
        recipe_name: a recipe of docs/recipes.md that is used as it is; by default the settings
            follow from the number of training images.
        in_grid: the learning rate is chosen on held-out training images.

    Raises:
        UserError: an unknown recipe, a wrong setting, or data without training images.
    """
    given = {**(settings or {}), "model.weights": weights, "data.source": data}
    return fitted_config(given, assignments, recipe_name, in_grid)[0]


def fitted_config(
    settings: Mapping[str, Any], assignments: Iterable[str], recipe_name: str | None, in_grid: bool
) -> tuple[TrainConfig, Splits | None]:
    """Returns the settings as `finetune_config` does, and the images if they were listed for it."""
    assignments = list(assignments)
    own = setting_names(settings, assignments)
    base = recipe(one_of("recipe", recipe_name or "finetune", FINETUNING))
    config = base.with_values(settings, assignments)
    changes: dict[str, Any] = {}
    splits, has_length = None, bool(own & {"epochs", "steps"})
    if recipe_name is None:
        splits = split_data(replace(config.data, holdout=None) if in_grid else config.data)
        num_images, device = len(splits.train), choose_device(config.device).type
        batch = config.batch_size if "batch_size" in own else None
        batch, epochs = fitting(num_images, device, batch)
        base, changes = finetune_for(num_images), {"batch_size": batch}
        if epochs is not None and not has_length:
            changes["epochs"] = epochs
    if has_length or "epochs" in changes:  # a fraction fits into every length
        changes["optimizer.warmup"] = base.optimizer.warmup / (base.steps or 1)
    return base.with_values(changes).with_values(settings, assignments), splits


def fitting(
    num_images: int, device: str = "cpu", batch_size: int | None = None
) -> tuple[int, int | None]:
    """Returns batch size and epochs that fit (docs/training.md); None if the recipe's steps do."""
    base = finetune_for(num_images)
    steps, most, processes = base.steps or 0, base.batch_size, num_processes()
    if batch_size is None:
        share = num_images // (4 if device == "cpu" else 2)
        fraction = min(most, 1 << max(0, share.bit_length() - 1))
        batch_size = most if fraction == most else max(1, fraction // processes) * processes
    epochs = math.ceil(steps * batch_size / num_images)
    epochs = min(max(epochs, LEAST_EPOCHS), MOST_EPOCHS)
    fits = num_images >= LARGE or epochs >= steps * most / num_images
    return batch_size, None if fits else epochs


def describe_fit(config: TrainConfig, num_images: int, device: str = "cpu") -> str | None:
    """Returns why the run has these epochs, if they are those that fit the images."""
    base, (batch, epochs) = finetune_for(num_images), fitting(num_images, device, config.batch_size)
    if config.recipe != base.recipe or epochs is None or config.epochs != epochs:
        return None
    passes = (base.steps or 0) * base.batch_size / num_images
    return (
        f"{plural(num_images, 'training image')}: {plural(epochs, 'epoch')} in batches of {batch}; "
        f"the recipe's {base.length} of {base.batch_size} would be {passes:,.0f} passes"
    )
