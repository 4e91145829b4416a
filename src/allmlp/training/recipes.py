"""Named runs: functions that return a configuration, each with its command and expected result.

Here are those that need no pre-trained weights and little time; the paper's pre-training and
fine-tuning have files of their own, and `RECIPES` names them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from allmlp.errors import one_of
from allmlp.training.config import (
    AdamW,
    AugmentSettings,
    Cosine,
    DataSettings,
    InceptionCrop,
    ModelSettings,
    Muon,
    NoCrop,
    PaddedCrop,
    Softmax,
    TrainConfig,
)
from allmlp.training.finetuning_recipes import FINETUNING
from allmlp.training.pretraining_recipes import PRETRAINING
from allmlp.training.sibling_recipes import SIBLINGS


def digits() -> TrainConfig:
    """A small Mixer on the UCI digits, 1,797 real scans of 8x8 pixels.

    mixer train

    Expected: 98.4 % (the mean of seeds 0, 1, 2 on one hard split), 99.4 % (each on its own split);
    benchmarks/digits.md.
    """
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
            crop=NoCrop(),
            flip=False,
            rotate=7.0,
            scale=0.07,
            shear=0.07,
            shift=0.07,
            elastic=0.04,
        ),
        optimizer=AdamW(learning_rate=2e-3, weight_decay=0.5, ema_decay=0.995),
        epochs=100,
        batch_size=64,
        evaluate_every=5,
    )


def scratch() -> TrainConfig:
    """Your own class folders, from random weights.

    mixer train --data FOLDER --image-size 64

    Expected: little more than a start with few images, for without pre-training a Mixer needs tens
    of thousands; 37.5 % on 34 classes of flowers with 10 images each (benchmarks/flowers.md).
    """
    return TrainConfig(
        recipe="scratch",
        model=ModelSettings(name="mixer_s16", image_size=64, overrides={"stochastic_depth": 0.1}),
        data=DataSettings(source=""),
        augment=AugmentSettings(crop=InceptionCrop(area=(0.25, 1.0)), mixup=0.2),
        optimizer=AdamW(learning_rate=1e-3, weight_decay=0.1),
        loss=Softmax(label_smoothing=0.1),
        epochs=50,
        batch_size=64,
        evaluate_every=2,
    )


def _cifar10(recipe: str, *, learning_rate: float, epochs: int, **sizes: Any) -> TrainConfig:
    """Returns what the two CIFAR-10 recipes share, with their own model and length."""
    return TrainConfig(
        recipe=recipe,
        model=ModelSettings(name="mixer_s16", image_size=32, overrides={"num_blocks": 8, **sizes}),
        data=DataSettings(source="", resize="squash"),
        augment=AugmentSettings(
            crop=PaddedCrop(),
            randaugment=9,
            random_erasing=0.25,
            mixup=0.8,
            cutmix=1.0,
            mix_until=0.92,
        ),
        optimizer=Muon(
            learning_rate=learning_rate,
            weight_decay=0.05,
            schedule=Cosine(final_lr_fraction=0.01),
            warmup=0.03,
            ema_decay=0.9995,
        ),
        loss=Softmax(label_smoothing=0.1),
        epochs=epochs,
        batch_size=1024,
        evaluate_every=10,
    )


def cifar10() -> TrainConfig:
    """A Mixer of 1.12 million parameters on CIFAR-10: patch 4, 8 layers, 128 channels.

    mixer train cifar10 --data 'cifar10_*.parquet' --output runs/cifar10

    Expected: the 300 epochs have not been run; 12 epochs without RandAugment, mixup and cutmix gave
    69.0 % of the test images (benchmarks/cifar10.md).

    CIFAR-10 may also be class folders, a list or shards. The size is that of the best Mixer from
    random weights known to us (omihub777, 90.83 %, 1,132,170 parameters), with 56 in place of
    its 64 hidden units in the token-mixing MLPs.
    """
    return _cifar10(
        "cifar10",
        patch_size=4,
        hidden_dim=128,
        tokens_mlp_dim=56,
        channels_mlp_dim=512,
        stochastic_depth=0.1,
        learning_rate=2e-3,
        epochs=300,
    )


def cifar10_best() -> TrainConfig:
    """A larger Mixer on CIFAR-10 that sees finer patches: patch 2, 8 layers, 256 channels.

    mixer train cifar10_best --data 'cifar10_*.parquet' --output runs/cifar10_best

    Expected: not measured yet.
    """
    return _cifar10(
        "cifar10_best",
        patch_size=2,
        hidden_dim=256,
        tokens_mlp_dim=256,
        channels_mlp_dim=1024,
        stochastic_depth=0.15,
        learning_rate=1e-3,
        epochs=200,
    )


def cifar10_compare() -> TrainConfig:
    """A small Mixer on CIFAR-10 with settings that suit other networks too, to compare them.

    mixer paper permutation --data 'cifar10_*.parquet' --output runs/permute --steps 1000

    Expected: benchmarks/permutation.md and benchmarks/ablations.md.

    The optimizer is AdamW, since Muon is for the dense layers of mixer blocks alone, and there is
    nothing that only a long run profits from.
    """
    overrides: dict[str, Any] = {
        "patch_size": 4,
        "hidden_dim": 96,
        "num_blocks": 6,
        "tokens_mlp_dim": 48,
        "channels_mlp_dim": 384,
    }
    return TrainConfig(
        recipe="cifar10_compare",
        model=ModelSettings(name="mixer_s16", image_size=32, overrides=overrides),
        data=DataSettings(source="", resize="squash"),
        augment=AugmentSettings(crop=PaddedCrop()),
        optimizer=AdamW(learning_rate=2e-3, weight_decay=0.05, ema_decay=0.99),
        loss=Softmax(label_smoothing=0.1),
        epochs=20,
        batch_size=128,
        evaluate_every=1,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    **{
        build.__name__: build for build in (digits, scratch, cifar10, cifar10_best, cifar10_compare)
    },
    **PRETRAINING,
    **SIBLINGS,
    **FINETUNING,
}


def recipe(name: str) -> TrainConfig:
    """Returns the configuration of a recipe.

    Raises:
        UserError: there is no such recipe.
    """
    return RECIPES[one_of("recipe", name, RECIPES)]()
