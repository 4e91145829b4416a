"""Named runs: functions that return a configuration, each with its command and expected result."""

from __future__ import annotations

from collections.abc import Callable

from mlp_mixer.errors import UserError, near_names
from mlp_mixer.training.config import (
    AugmentSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    TrainConfig,
)


def digits() -> TrainConfig:
    """A small Mixer on the scikit-learn digits, 1,797 real scans of 8x8 pixels."""
    return TrainConfig(
        recipe="digits",
        model=ModelSettings(
            name="mixer_s16",
            image_size=8,
            overrides={
                "patch_size": 2,
                "hidden_dim": 48,
                "num_blocks": 4,
                "tokens_mlp_dim": 32,
                "channels_mlp_dim": 192,
                "stochastic_depth": 0.1,
            },
        ),
        data=DataSettings(source="digits"),
        augment=AugmentSettings(
            crop="none",
            flip=False,
            rotate=7.0,
            scale=0.07,
            shear=0.07,
            shift=0.07,
            elastic=0.04,
        ),
        optimizer=OptimizerSettings(learning_rate=2e-3, weight_decay=0.5, average=0.995),
        epochs=100,
        batch_size=64,
        evaluate_every=5,
    )


def scratch() -> TrainConfig:
    """Your own class folders, from random weights.

    mixer train --data FOLDER --image-size 64

    Without pre-training a Mixer needs tens of thousands of images to do well; with few, expect
    little more than a start.
    """
    return TrainConfig(
        recipe="scratch",
        model=ModelSettings(name="mixer_s16", image_size=64, overrides={"stochastic_depth": 0.1}),
        data=DataSettings(source=""),
        augment=AugmentSettings(crop="inception", crop_area=(0.25, 1.0), flip=True, mixup=0.2),
        optimizer=OptimizerSettings(learning_rate=1e-3, weight_decay=0.1),
        epochs=50,
        batch_size=64,
        label_smoothing=0.1,
        evaluate_every=2,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {"digits": digits, "scratch": scratch}


def recipe(name: str) -> TrainConfig:
    """Returns the configuration of a recipe.

    Raises:
        UserError: there is no such recipe.
    """
    if name not in RECIPES:
        raise UserError(
            f"unknown recipe {name!r}",
            fix=f"{near_names(name, RECIPES)}Known: {', '.join(RECIPES)}",
        )
    return RECIPES[name]()
