"""The recipes: against the paper's tables, typed here once more, and against what documents say."""

import dataclasses
import json
import re
from typing import Any

import pytest
import torch

import allmlp as am
from allmlp.models.catalog import model_config
from allmlp.training.config import AdamW, InceptionCrop, Linear, Sigmoid
from allmlp.training.recipes import FINETUNING, HOLDOUTS, LEARNING_RATES, RECIPES, finetune_for
from conftest import ROOT

# Table 4 of the paper, and Google's biases of the head.
#                   model      epochs  rate   decay  magn. mixup depth  bias
TABLE_4 = {
    "imagenet_b16": ("mixer_b16", 300, 0.001, 0.1, 15, 0.5, 0.1, -6.9),
    "imagenet_l16": ("mixer_l16", 300, 0.001, 0.1, 15, 0.5, 0.1, -6.9),
    "imagenet21k_b16": ("mixer_b16", 300, 0.001, 0.1, 10, 0.2, 0.1, -10),
    "imagenet21k_l16": ("mixer_l16", 300, 0.001, 0.1, 20, 0.5, 0.1, -10),
    "jft_s32": ("mixer_s32", 5, 0.003, 0.03, None, 0, 0, -10),
    "jft_s16": ("mixer_s16", 5, 0.003, 0.03, None, 0, 0, -10),
    "jft_b32": ("mixer_b32", 7, 0.003, 0.03, None, 0, 0, -10),
    "jft_b16": ("mixer_b16", 7, 0.003, 0.03, None, 0, 0, -10),
    "jft_l32": ("mixer_l32", 7, 0.001, 0.03, None, 0, 0, -10),
    "jft_l16": ("mixer_l16", 14, 0.001, 0.03, None, 0, 0, -10),
    "jft_h14": ("mixer_h14", 14, 0.001, 0.03, None, 0, 0, -10),
}

# Appendix C, the ViT paper whose setup it follows, and Google's warm-ups.
#                       steps warm-up  rate, grid, held out
FOUR, THREE = (0.003, 0.01, 0.03, 0.06), (0.003, 0.01, 0.03)
APPENDIX_C = {
    "finetune_imagenet": (20_000, 500, 0.03, FOUR, 0.01),
    "finetune_cifar": (10_000, 500, 0.03, FOUR, 0.02),
    "finetune_pets": (500, 100, 0.03, FOUR, 0.1),
    "finetune_flowers": (500, 100, 0.03, FOUR, 0.1),
    "finetune_vtab": (2_500, 200, 0.01, THREE, 200 / 1000),
}

# What appendix A.2 tried, one thing each, on top of fine-tuning without Inception crops.
APPENDIX_A2: dict[str, dict[str, Any]] = {
    "finetune_mixup": {"augment.mixup": 0.1},
    "finetune_average": {"optimizer.ema_decay": 0.9999},
    "finetune_inception": {"augment.crop": "inception"},
}


def architecture(config: am.TrainConfig, num_classes: int = 10) -> am.ImageClassifier:
    with torch.device("meta"):
        settings = config.model
        return am.create_model(
            settings.name, settings.image_size, num_classes, **settings.overrides
        )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name: str):
    config = am.recipe(name)
    assert config.recipe == name
    assert am.TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    if name in FINETUNING:
        assert config.model.weights == ""
    else:
        assert config.model.weights is None
        assert architecture(config).num_parameters > 10_000
    assert config.data.source == ("digits" if name == "digits" else "")


@pytest.mark.parametrize("name", TABLE_4)
def test_pre_training_is_the_papers_table_4(name: str):
    model, epochs, rate, decay, magnitude, mixup, depth, bias = TABLE_4[name]
    config = am.recipe(name)
    augment, optimizer = config.augment, config.optimizer
    assert (config.model.name, config.epochs, config.steps) == (model, epochs, None)
    assert (augment.randaugment, augment.randaugment_layers) == (magnitude, 2)
    assert (augment.mixup, augment.cutmix, augment.mix_until) == (mixup, 0, 1)
    assert config.model.head_bias == bias
    built = architecture(config).config
    assert (built.stochastic_depth, built.dropout, built.gelu) == (depth, 0, "tanh")
    assert built.image_size == (224, 224)
    assert dataclasses.replace(built, stochastic_depth=0.0) == model_config(model, num_classes=10)
    # What all rows share.
    schedule = Linear(final_lr_fraction=1e-5)
    assert optimizer == AdamW(
        learning_rate=rate, weight_decay=decay, schedule=schedule, warmup=10_000
    )
    assert (config.batch_size, config.loss) == (4096, Sigmoid())
    assert (augment.crop, augment.flip) == (InceptionCrop(area=(0.05, 1)), True)
    assert augment.random_erasing == augment.rotate == augment.scale == augment.elastic == 0


@pytest.mark.parametrize("name", APPENDIX_C)
def test_fine_tuning_is_the_papers_appendix_c(name: str):
    steps, warmup, rate, grid, holdout = APPENDIX_C[name]
    config = am.recipe(name)
    assert (config.steps, config.epochs, config.optimizer.warmup) == (steps, None, warmup)
    assert config.optimizer.learning_rate == rate
    assert rate in grid
    assert LEARNING_RATES[name] == grid
    assert HOLDOUTS[name] == holdout
    assert config.augment.mixup == 0


@pytest.mark.parametrize(("name", "own"), APPENDIX_A2.items())
def test_appendix_a2_is_one_flag_each(name: str, own: dict[str, Any]):
    config = am.recipe(name)
    without = am.recipe("finetune_pets").with_values({"recipe": name, "augment.crop": "none"} | own)
    assert config == without


@pytest.mark.parametrize(
    ("num_images", "steps", "warmup", "mixup"),
    [
        (1, 500, 100, 0.0),
        (19_999, 500, 100, 0.0),
        (20_000, 10_000, 500, 0.1),
        (499_999, 10_000, 500, 0.1),
        (500_000, 20_000, 500, 0.1),
        (300_000_000, 20_000, 500, 0.1),
    ],
)
def test_the_hyper_rule(num_images: int, steps: int, warmup: int, mixup: float):
    config = finetune_for(num_images)
    assert (config.recipe, config.steps) == ("finetune", steps)
    assert (config.optimizer.warmup, config.augment.mixup) == (warmup, mixup)
    assert config.optimizer.learning_rate == 0.01


def test_the_cifar10_models():
    small, best = (architecture(am.recipe(name)) for name in ("cifar10", "cifar10_best"))
    assert (small.num_parameters, best.num_parameters) == (1_123_914, 5_271_818)
    assert (small.config.num_tokens, best.config.num_tokens) == (64, 256)


DOCUMENT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RECIPES)
def test_the_document_has_its_command(name: str):
    words = {"digits": "train", "scratch": "train --data FOLDER", "finetune": "finetune mixer_b16"}
    words["cifar10_compare"] = "paper permutation"  # whose default it is
    default = f"finetune .*--recipe {name}" if name in FINETUNING else f"train {name}"
    assert re.search(rf"^mixer {words.get(name, default)}\b", DOCUMENT, flags=re.MULTILINE)
