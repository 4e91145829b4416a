"""Named runs: recipe -> configuration. Their commands and results are in docs/recipes.md."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from allmlp.errors import one_of
from allmlp.training.config import (
    SGD,
    AdamW,
    AugmentSettings,
    Cosine,
    DataSettings,
    InceptionCrop,
    Linear,
    ModelSettings,
    Muon,
    NoCrop,
    PaddedCrop,
    Sigmoid,
    Softmax,
    TrainConfig,
)

# From random weights, in minutes


def digits() -> TrainConfig:
    """A small Mixer on the UCI digits, 1,797 scans of 8x8 pixels."""
    sizes = {"patch_size": 2, "hidden_dim": 48, "num_blocks": 4}
    sizes |= {"tokens_mlp_dim": 32, "channels_mlp_dim": 192}
    moves: dict[str, Any] = {
        "rotate": 7.0,
        "scale": 0.07,
        "shear": 0.07,
        "shift": 0.07,
        "elastic": 0.04,
    }
    return TrainConfig(
        recipe="digits",
        model=ModelSettings(image_size=8, overrides={**sizes, "stochastic_depth": 0.1}),
        data=DataSettings(source="digits"),
        augment=AugmentSettings(crop=NoCrop(), flip=False, **moves),
        optimizer=AdamW(learning_rate=2e-3, weight_decay=0.5, ema_decay=0.995),
        epochs=100,
        batch_size=64,
        evaluate_every=5,
    )


def scratch() -> TrainConfig:
    """Images of your own; without pre-training a Mixer needs tens of thousands to do well."""
    return TrainConfig(
        recipe="scratch",
        model=ModelSettings(image_size=64, overrides={"stochastic_depth": 0.1}),
        data=DataSettings(source=""),
        augment=AugmentSettings(crop=InceptionCrop(area=(0.25, 1.0)), mixup=0.2),
        optimizer=AdamW(learning_rate=1e-3, weight_decay=0.1),
        loss=Softmax(label_smoothing=0.1),
        epochs=50,
        batch_size=64,
        evaluate_every=2,
    )


def _cifar10(recipe: str, learning_rate: float, epochs: int, sizes: dict[str, Any]) -> TrainConfig:
    return TrainConfig(
        recipe=recipe,
        model=ModelSettings(image_size=32, overrides={"num_blocks": 8, **sizes}),
        data=DataSettings(source="", resize="squash"),
        augment=AugmentSettings(
            crop=PaddedCrop(),
            randaugment=9.0,
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
    """1.12 million parameters, as the best Mixer from random weights known to us.

    That is omihub777's (90.83 %, 1,132,170 parameters), with 56 in place of its 64 hidden units in
    the token-mixing MLPs.
    """
    sizes = {"patch_size": 4, "hidden_dim": 128, "tokens_mlp_dim": 56, "channels_mlp_dim": 512}
    return _cifar10("cifar10", 2e-3, 300, {**sizes, "stochastic_depth": 0.1})


def cifar10_best() -> TrainConfig:
    """A larger Mixer that sees finer patches."""
    sizes = {"patch_size": 2, "hidden_dim": 256, "tokens_mlp_dim": 256, "channels_mlp_dim": 1024}
    return _cifar10("cifar10_best", 1e-3, 200, {**sizes, "stochastic_depth": 0.15})


def cifar10_compare() -> TrainConfig:
    """A small Mixer with settings that suit other networks too, to compare them.

    Its optimizer is AdamW, since Muon is for the dense layers of mixer blocks alone.
    """
    sizes = {"patch_size": 4, "hidden_dim": 96, "num_blocks": 6}
    sizes |= {"tokens_mlp_dim": 48, "channels_mlp_dim": 384}
    return TrainConfig(
        recipe="cifar10_compare",
        model=ModelSettings(image_size=32, overrides=sizes),
        data=DataSettings(source="", resize="squash"),
        augment=AugmentSettings(crop=PaddedCrop()),
        optimizer=AdamW(learning_rate=2e-3, weight_decay=0.05, ema_decay=0.99),
        loss=Softmax(label_smoothing=0.1),
        epochs=20,
        batch_size=128,
        evaluate_every=1,
    )


# Pre-training: the paper's Table 4. Weight decay is as the paper prints it: with torch's AdamW it
# is multiplied by the learning rate, as in Google's code, which writes the product. docs/recipes.md
# lists where the paper and Google's code differ, and what is taken here.

_TABLE_4 = {
    # epochs, learning rate, weight decay, RandAugment, mixup, stochastic depth, evaluate every
    "imagenet_b16": (300, 1e-3, 0.1, 15.0, 0.5, 0.1, 5),
    "imagenet_l16": (300, 1e-3, 0.1, 15.0, 0.5, 0.1, 5),
    "imagenet21k_b16": (300, 1e-3, 0.1, 10.0, 0.2, 0.1, 2),
    "imagenet21k_l16": (300, 1e-3, 0.1, 20.0, 0.5, 0.1, 2),
    "jft_s32": (5, 3e-3, 0.03, None, 0.0, 0.0, 1),
    "jft_s16": (5, 3e-3, 0.03, None, 0.0, 0.0, 1),
    "jft_b32": (7, 3e-3, 0.03, None, 0.0, 0.0, 1),
    "jft_b16": (7, 3e-3, 0.03, None, 0.0, 0.0, 1),
    "jft_l32": (7, 1e-3, 0.03, None, 0.0, 0.0, 1),
    "jft_l16": (14, 1e-3, 0.03, None, 0.0, 0.0, 1),
    "jft_h14": (14, 1e-3, 0.03, None, 0.0, 0.0, 1),
}


def _pretraining(recipe: str) -> TrainConfig:
    epochs, rate, weight_decay, randaugment, mixup, depth, evaluate_every = _TABLE_4[recipe]
    data, _, variant = recipe.partition("_")
    return TrainConfig(
        recipe=recipe,
        model=ModelSettings(
            name=f"mixer_{variant}",
            overrides={"stochastic_depth": depth} if depth else {},
            # About the logarithm of a class's fraction (big_vision, `init_head_bias`).
            head_bias=-6.9 if data == "imagenet" else -10.0,
        ),
        data=DataSettings(source=""),
        augment=AugmentSettings(randaugment=randaugment, mixup=mixup),
        optimizer=AdamW(
            learning_rate=rate,
            weight_decay=weight_decay,
            schedule=Linear(final_lr_fraction=1e-5),
            warmup=10_000,
        ),
        loss=Sigmoid(),
        epochs=epochs,
        batch_size=4096,
        evaluate_every=evaluate_every,
        checkpoint_every=1000,
    )


# CycleMLP and Vision Permutator with their authors' settings, the recipe of DeiT; docs/recipes.md
# lists what is missing of their augmentation.

_AUTHORS = {  # epochs, epochs of warm-up, batch size, learning rate
    "cycle_mlp_b1": (300, 5, 1024, 1e-3),
    "vip_s7": (310, 20, 2048, 2e-3),
}


def _imagenet(model: str) -> TrainConfig:
    epochs, warmup_epochs, batch_size, rate = _AUTHORS[model]
    return TrainConfig(
        recipe=f"imagenet_{model}",
        model=ModelSettings(name=model, overrides={"stochastic_depth": 0.1}),
        data=DataSettings(source=""),
        augment=AugmentSettings(
            crop=InceptionCrop(area=(0.08, 1.0)),
            randaugment=9.0,
            random_erasing=0.25,
            mixup=0.8,
            cutmix=1.0,
        ),
        optimizer=AdamW(
            learning_rate=rate,
            weight_decay=0.05,
            clip_norm=0.0,
            schedule=Cosine(final_lr_fraction=1e-5 / rate),
            warmup=warmup_epochs / epochs,
        ),
        loss=Softmax(label_smoothing=0.1),
        epochs=epochs,
        batch_size=batch_size,
        evaluate_every=5,
        checkpoint_every=1000,
    )


# Fine-tuning: the paper's appendix C, Google's code, and the BiT-HyperRule. The recipe names no
# model: the checkpoint brings it. The paper prints the steps; the warm-up is that of Google's codes
# (big_vision and scenic), the learning rate that of vit_jax, or 0.01 where it has none.


def _finetuning(
    recipe: str,
    steps: int = 500,
    warmup: int = 100,
    evaluate_every: int = 100,
    learning_rate: float = 0.03,
    ema_decay: float = 0.0,
    resize: Any = "resmall-crop",
    **augment: Any,
) -> TrainConfig:
    # A checkpoint of one's own brings the stochastic depth that it was pre-trained with.
    overrides = {"stochastic_depth": 0.0}
    return TrainConfig(
        recipe=recipe,
        model=ModelSettings(name="", image_size=None, weights="", overrides=overrides),
        data=DataSettings(source="", resize=resize),
        augment=AugmentSettings(**augment),
        optimizer=SGD(learning_rate=learning_rate, warmup=warmup, ema_decay=ema_decay),
        epochs=None,
        steps=steps,
        batch_size=512,
        evaluate_every=evaluate_every,
    )


def finetune_for(num_images: int) -> TrainConfig:
    """Returns the BiT-HyperRule's settings for this number of training images.

    Instead of the rule's stepwise decay from 0.003 it takes the paper's cosine from 0.01, which is
    big_vision's default. (The paper dropped the rule's mixup for Mixers: no consistent gain.)
    """
    steps, warmup, mixup = 20_000, 500, 0.1
    if num_images < 500_000:
        steps = 10_000
    if num_images < 20_000:
        steps, warmup, mixup = 500, 100, 0.0
    every = max(100, steps // 20)
    return _finetuning("finetune", steps, warmup, every, 0.01, mixup=mixup)


# In some tasks of VTAB the place of an object is the answer: nothing is cut or mirrored.
_WHOLE: dict[str, Any] = {"resize": "squash", "crop": NoCrop(), "flip": False}
FINETUNING: dict[str, Callable[[], TrainConfig]] = {
    "finetune": lambda: finetune_for(1),
    "finetune_imagenet": lambda: _finetuning("finetune_imagenet", 20_000, 500, 1000),
    "finetune_cifar": lambda: _finetuning("finetune_cifar", 10_000, 500, 500),
    "finetune_pets": lambda: _finetuning("finetune_pets"),
    "finetune_flowers": lambda: _finetuning("finetune_flowers"),
    "finetune_vtab": lambda: _finetuning("finetune_vtab", 2500, 200, 500, 0.01, **_WHOLE),
    # What appendix A.2 tried, one thing each.
    "finetune_mixup": lambda: _finetuning("finetune_mixup", mixup=0.1, crop=NoCrop()),
    "finetune_average": lambda: _finetuning("finetune_average", ema_decay=0.9999, crop=NoCrop()),
    "finetune_inception": lambda: _finetuning("finetune_inception"),
}
# The paper's grid of learning rates, and the fraction of the training images that it is judged by.
_GRID = (0.003, 0.01, 0.03, 0.06)
LEARNING_RATES = {**dict.fromkeys(FINETUNING, _GRID), "finetune_vtab": (0.003, 0.01, 0.03)}
HOLDOUTS = {
    **dict.fromkeys(FINETUNING, 0.1),
    "finetune_imagenet": 0.01,
    "finetune_cifar": 0.02,
    "finetune_vtab": 0.2,
}

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "digits": digits,
    "scratch": scratch,
    "cifar10": cifar10,
    "cifar10_best": cifar10_best,
    "cifar10_compare": cifar10_compare,
    **{name: functools.partial(_pretraining, name) for name in _TABLE_4},
    **{f"imagenet_{model}": functools.partial(_imagenet, model) for model in _AUTHORS},
    **FINETUNING,
}


def recipe(name: str) -> TrainConfig:
    """Returns the configuration of a recipe.

    Raises:
        UserError: there is no such recipe.
    """
    return RECIPES[one_of("recipe", name, RECIPES)]().with_values({})  # checked
