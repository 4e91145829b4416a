"""Recipes: named settings. docs/recipes.md has their commands and results."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from allmlp.errors import UserError, one_of
from allmlp.training.config import AugmentSettings, NoCrop, Sigmoid, Softmax, TrainConfig

if TYPE_CHECKING:
    from allmlp.data.source import Source

Settings = dict[str, Any]  # that differ from the defaults of `TrainConfig`


def _mixer(patch: int, hidden: int, blocks: int, tokens: int, channels: int) -> Settings:
    sizes = {"patch_size": patch, "hidden_dim": hidden, "num_blocks": blocks}
    return {**sizes, "tokens_mlp_dim": tokens, "channels_mlp_dim": channels}


# From random weights, in minutes

DIGITS: Settings = {
    "model.image_size": 8,
    "model.overrides": {**_mixer(2, 48, 4, 32, 192), "stochastic_depth": 0.1},
    "augment.crop": "none",
    "augment.flip": False,
    "augment.rotate": 7.0,
    "augment.scale": 0.07,
    "augment.shear": 0.07,
    "augment.shift": 0.07,
    "augment.elastic": 0.04,
    "optimizer.learning_rate": 2e-3,
    "optimizer.weight_decay": 0.5,
    "optimizer.ema_decay": 0.995,
}
SCRATCH: Settings = {
    "data.source": "",
    "model.image_size": 64,
    "model.overrides": {"stochastic_depth": 0.1},
    "augment.crop.area": (0.25, 1.0),
    "augment.mixup": 0.2,
    "loss.label_smoothing": 0.1,
    "epochs": 50,
    "evaluate_every": 2,
}
_ROWS = {"hidden_dim": 64, "num_blocks": 4, "tokens_mlp_dim": 64, "channels_mlp_dim": 128}
ARRAYS: Settings = {  # sequences and other grids; `for_arrays` sets their sizes
    "data.source": "",
    "model.overrides": {**_ROWS, "dropout": 0.1, "stochastic_depth": 0.1},
    "augment.crop": "none",
    "augment.flip": False,
    "augment.mixup": 0.2,
    "optimizer.learning_rate": 2e-3,
    "optimizer.ema_decay": 0.99,
    "epochs": 200,
    "evaluate_every": 20,
    "batch_size": 16,
}
_CIFAR10: Settings = {
    "data.source": "",
    "data.resize": "squash",
    "model.image_size": 32,
    "augment.crop": "padded",
    "loss.label_smoothing": 0.1,
}
_STRONG: Settings = {
    **_CIFAR10,
    "augment.randaugment": 9.0,
    "augment.random_erasing": 0.25,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.mix_until": 0.92,
    "optimizer": "muon",
    "optimizer.weight_decay": 0.05,
    "optimizer.schedule.final_lr_fraction": 0.01,
    "optimizer.warmup": 0.03,
    "optimizer.ema_decay": 0.9995,
    "batch_size": 1024,
    "evaluate_every": 10,
}


# 1.12 million parameters, as the best Mixer from random weights known to us: omihub777's (90.83 %,
# 1,132,170 parameters), with 56 instead of its 64 hidden units in the token-mixing MLPs.
CIFAR10: Settings = {
    **_STRONG,
    "model.overrides": {**_mixer(4, 128, 8, 56, 512), "stochastic_depth": 0.1},
    "optimizer.learning_rate": 2e-3,
    "epochs": 300,
}
CIFAR10_BEST: Settings = {  # larger, with finer patches
    **_STRONG,
    "model.overrides": {**_mixer(2, 256, 8, 256, 1024), "stochastic_depth": 0.15},
    "epochs": 200,
}
# For comparing networks: AdamW, because Muon applies only to the dense layers of mixer blocks.
CIFAR10_COMPARE: Settings = {
    **_CIFAR10,
    "model.overrides": _mixer(4, 96, 6, 48, 384),
    "optimizer.learning_rate": 2e-3,
    "optimizer.weight_decay": 0.05,
    "optimizer.ema_decay": 0.99,
    "epochs": 20,
    "batch_size": 128,
    "evaluate_every": 1,
}
# What a CPU trains in an hour or two; chosen with short runs, see benchmarks/cifar10.md.
CIFAR10_CPU: Settings = {
    **_CIFAR10,
    "model.overrides": _mixer(4, 128, 6, 64, 256),
    "augment.cutmix": 1.0,
    "augment.mix_until": 0.85,
    "optimizer": "muon",
    "optimizer.learning_rate": 1e-2,
    "optimizer.weight_decay": 0.05,
    "optimizer.warmup": 200,
    "optimizer.ema_decay": 0.999,
    "epochs": 72,
    "batch_size": 128,
    "evaluate_every": 3,
}

# Pre-training: the paper's Table 4. Weight decay is as printed there; torch's AdamW multiplies it
# by the learning rate, and Google's code specifies the product. docs/recipes.md lists where the
# paper and Google's code differ, and which value is used here.

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


def _pretraining(recipe: str) -> Settings:
    epochs, rate, weight_decay, randaugment, mixup, depth, evaluate_every = _TABLE_4[recipe]
    data, _, variant = recipe.partition("_")
    return {
        "data.source": "",
        "model.name": f"mixer_{variant}",
        "model.overrides": {"stochastic_depth": depth} if depth else {},
        # About the logarithm of the fraction of a class (big_vision, `init_head_bias`).
        "model.head_bias": -6.9 if data == "imagenet" else -10.0,
        "augment.randaugment": randaugment,
        "augment.mixup": mixup,
        "optimizer.learning_rate": rate,
        "optimizer.weight_decay": weight_decay,
        "optimizer.warmup": 10_000,
        "optimizer.schedule": {"name": "linear", "final_lr_fraction": 1e-5},
        "loss": "sigmoid",
        "epochs": epochs,
        "batch_size": 4096,
        "evaluate_every": evaluate_every,
        "checkpoint_every": 1000,
    }


# The other families with their authors' settings, variants of the DeiT recipe; docs/recipes.md
# lists what is missing or differs.


def _imagenet(
    model: str, epochs: int, warmup_epochs: int, batch_size: int, rate: float
) -> Settings:
    return {
        "data.source": "",
        "model.name": model,
        "model.overrides": {"stochastic_depth": 0.1},
        "augment.crop.area": (0.08, 1.0),
        "augment.randaugment": 9.0,
        "augment.random_erasing": 0.25,
        "augment.mixup": 0.8,
        "augment.cutmix": 1.0,
        "optimizer.learning_rate": rate,
        "optimizer.weight_decay": 0.05,
        "optimizer.clip_norm": 0.0,
        "optimizer.schedule.final_lr_fraction": 1e-5 / rate,
        "optimizer.warmup": warmup_epochs / epochs,
        "loss.label_smoothing": 0.1,
        "epochs": epochs,
        "batch_size": batch_size,
        "checkpoint_every": 1000,
    }


_GMLP = {
    "model.overrides": {"stochastic_depth": 0.05},
    "augment.random_erasing": 0.0,
    "optimizer.clip_norm": 1.0,
    "optimizer.warmup": 10_000,
}


# Fine-tuning: the paper's appendix C, Google's code, and the BiT-HyperRule. The recipe names no
# model, as the checkpoint brings it. The paper gives the steps; the warm-up is from Google's code
# (big_vision and scenic), the learning rate from vit_jax, or 0.01 where it has none.


def _finetuning(steps: int = 500, warmup: int = 100, evaluate_every: int = 100) -> Settings:
    return {
        "data.source": "",
        "model.weights": "",
        # Your own checkpoints would bring the stochastic depth of their pre-training.
        "model.overrides": {"stochastic_depth": 0.0},
        "optimizer": "sgd",
        "optimizer.learning_rate": 0.03,
        "optimizer.warmup": warmup,
        "steps": steps,
        "batch_size": 512,
        "evaluate_every": evaluate_every,
    }


# In some VTAB tasks the position of an object is the answer, so no crops or flips.
_WHOLE = {"data.resize": "squash", "augment.crop": "none", "augment.flip": False}
FINETUNING: dict[str, Settings] = {
    "finetune": _finetuning() | {"optimizer.learning_rate": 0.01},
    "finetune_imagenet": _finetuning(20_000, 500, 1000),
    "finetune_cifar": _finetuning(10_000, 500, 500),
    "finetune_pets": _finetuning(),
    "finetune_flowers": _finetuning(),
    "finetune_vtab": _finetuning(2500, 200, 500) | {"optimizer.learning_rate": 0.01, **_WHOLE},
    # The ablations of appendix A.2, one change each.
    "finetune_mixup": _finetuning() | {"augment.mixup": 0.1, "augment.crop": "none"},
    "finetune_average": _finetuning() | {"optimizer.ema_decay": 0.9999, "augment.crop": "none"},
    "finetune_inception": _finetuning(),
}
# The paper's grid of learning rates, and the fraction of training images held out to choose one.
_GRID = (0.003, 0.01, 0.03, 0.06)
LEARNING_RATES = {**dict.fromkeys(FINETUNING, _GRID), "finetune_vtab": (0.003, 0.01, 0.03)}
HOLDOUTS = dict.fromkeys(FINETUNING, 0.1)
HOLDOUTS |= {"finetune_imagenet": 0.01, "finetune_cifar": 0.02, "finetune_vtab": 0.2}

RECIPES: dict[str, Settings] = {
    "digits": DIGITS,
    "scratch": SCRATCH,
    "arrays": ARRAYS,
    "cifar10": CIFAR10,
    "cifar10_best": CIFAR10_BEST,
    "cifar10_compare": CIFAR10_COMPARE,
    "cifar10_cpu": CIFAR10_CPU,
    **{name: _pretraining(name) for name in _TABLE_4},
    "imagenet_cycle_mlp_b1": _imagenet("cycle_mlp_b1", 300, 5, 1024, 1e-3),
    "imagenet_vip_s7": _imagenet("vip_s7", 310, 20, 2048, 2e-3),
    "imagenet_resmlp_12": _imagenet("resmlp_12", 400, 5, 1024, 1e-3),
    "imagenet_gmlp_s16": _imagenet("gmlp_s16", 300, 0, 4096, 1e-3) | _GMLP,
    **FINETUNING,
}


def recipe(name: str) -> TrainConfig:
    """Returns the configuration of a recipe.

    Raises:
        UserError: unknown recipe.
    """
    one_of("recipe", name, RECIPES)
    return TrainConfig().with_values({"recipe": name, **RECIPES[name]})


def for_multi_label(config: TrainConfig) -> TrainConfig:
    """Returns the settings for several labels per image: sigmoid, and mean average precision."""
    chooses = config.data.holdout != 0.0 and config.data.fold is None
    if config.best_by == "top1" and chooses:
        config = config.with_value("best_by", "mean_average_precision")
    if isinstance(config.loss, Sigmoid) or config.model.train_only == "probe":
        return config
    usual = recipe(config.recipe).loss if config.recipe in RECIPES else Softmax()
    if config.loss != usual:
        what = f"loss.label_smoothing={config.loss.label_smoothing:g} with several labels per image"
        raise UserError(what, where="loss", fix="loss=sigmoid", code="multi-label")
    return config.with_value("loss", "sigmoid")


def for_data(config: TrainConfig, images: Source) -> TrainConfig:
    """Returns the settings for the kind of the data: several labels per image, rows of arrays."""
    from allmlp.data.source import array_shape  # numpy, which --help does not need

    config = for_multi_label(config) if images.is_multi_label else config
    shape = array_shape(images)
    return config if shape is None else for_arrays(config, shape)


def for_arrays(config: TrainConfig, shape: tuple[int, int, int]) -> TrainConfig:
    """Returns the settings for rows of arrays, (C, H, W), whose only augmentation is mixup."""
    from allmlp.models.catalog import architectures  # torch, which --help does not need
    from allmlp.models.family import PatchConfig

    (channels, height, width), own = shape, config.augment
    usual = recipe(config.recipe) if config.recipe in RECIPES else TrainConfig()
    plain = AugmentSettings(crop=NoCrop(), flip=False, mixup=own.mixup, mix_until=own.mix_until)
    for field in fields(plain):
        value, allowed = getattr(own, field.name), getattr(usual.augment, field.name)
        if value not in (allowed, getattr(plain, field.name)):
            what = f"augment.{field.name}={value}: of all augmentation, arrays have only mixup"
            raise UserError(what, fix="Leave it out", code="arrays")
    if config.model.image_size not in (usual.model.image_size, None, (height, width)):
        what = f"model.image_size={config.model.image_size}, and the rows are {height}x{width}"
        raise UserError(what, fix="Leave it out: arrays are not resized", code="arrays")
    overrides = dict(config.model.overrides)
    if config.model.weights is None:
        overrides["in_channels"] = channels
        if isinstance(architectures().get(config.model.name), PatchConfig):
            overrides.setdefault("patch_size", patch_for(height, width))
    model = replace(config.model, image_size=(height, width), overrides=overrides)
    return replace(config, augment=plain, model=model)


TOKENS = 32


def patch_for(height: int, width: int) -> tuple[int, int]:
    """Returns the patch size that makes about `TOKENS` tokens; of equal ones the squarest."""
    talls, wides = ([n for n in range(1, side + 1) if side % n == 0] for side in (height, width))
    wanted = math.log(height * width / TOKENS)

    def misfit(patch: tuple[int, int]) -> tuple[float, float]:
        tall, wide = map(math.log, patch)
        return abs(wanted - tall - wide), abs(tall - wide)

    return min(itertools.product(talls, wides), key=misfit)


LARGE = 20_000  # images, from which the hyper-rule takes more steps and mixup


def finetune_for(num_images: int) -> TrainConfig:
    """Returns the BiT-HyperRule's settings for so many training images, with the paper's cosine
    from 0.01, big_vision's default, for the rule's steps from 0.003."""
    if num_images < LARGE:
        return recipe("finetune")
    steps = 10_000 if num_images < 500_000 else 20_000
    changes = {"steps": steps, "optimizer.warmup": 500, "augment.mixup": 0.1}
    return recipe("finetune").with_values({**changes, "evaluate_every": steps // 20})
