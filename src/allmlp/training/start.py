"""What a run begins with: how long it is, and its model, new or from trained weights."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from allmlp.console import Reporter
from allmlp.errors import UserError, plural
from allmlp.models.catalog import create_model, model_from_config
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.preprocessing import Preprocessing
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import Splits
from allmlp.training.head import freeze_all_but_head, start_head_bias
from allmlp.training.manifest import verify
from allmlp.weights.load import load_model, with_new_head


def length(config: TrainConfig, splits: Splits) -> int:
    """Returns the number of steps of the whole run."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return max(1, round(config.epochs * len(splits.train) / config.batch_size))


def build_model(
    config: TrainConfig, class_names: list[str], best: Path | None = None, *, quiet: bool = False
) -> ImageClassifier:
    """Returns the model of a run, with the class names and preprocessing that it will carry.

    Args:
        config: of the run.
        class_names: of the training images.
        best: best/ of the run folder where the run goes on. With a whole checkpoint beside it, it
            stands in for the weights that the run began with, which may be gone by now.
        quiet: do not say on standard error what became of trained weights.

    Raises:
        UserError: no such model or weights, or they do not fit the images.
    """
    settings = config.model
    if settings.weights is not None:
        model, class_names = _from_weights(config, class_names, best, quiet=quiet)
    else:
        size = settings.image_size
        assert size is not None
        model = create_model(settings.name, size, len(class_names), **settings.overrides)
        _check_channels(model, "model.overrides.in_channels")
        model.preprocessing = Preprocessing(
            image_size=model.config.image_size, channels=model.config.in_channels
        )
        if settings.head_bias:
            start_head_bias(model, settings.head_bias)
    if settings.trained == "head":
        freeze_all_but_head(model)
    model.class_names = class_names
    data = config.data
    changes: dict[str, Any] = {"resize": data.resize, "exif_orientation": data.exif_orientation}
    if data.crop is not None:
        changes |= {"crop": data.crop, "crop_small": True}
    if data.permutation is not None:
        names = ("permutation", "permutation_patch", "permutation_seed")
        changes |= {name: getattr(data, name) for name in names}
    try:
        model.preprocessing = dataclasses.replace(preprocessing_of(model), **changes)
    except ValueError as error:
        raise UserError(str(error), where="data.permutation") from error
    return model


def _check_channels(model: ImageClassifier, where: str) -> None:
    if model.config.in_channels not in (1, 3):
        what = f"images have 1 or 3 channels, the model wants {model.config.in_channels}"
        raise UserError(what, where=where)


def _from_weights(
    config: TrainConfig, class_names: list[str], best: Path | None, *, quiet: bool
) -> tuple[ImageClassifier, list[str]]:
    """Returns the model with its head in the order of the classes, and what it calls them."""
    settings = config.model
    if not settings.weights:
        what = f"the recipe {config.recipe} begins with trained weights, and none are given"
        fix = f"mixer finetune CHECKPOINT --recipe {config.recipe} --data SOURCE"
        raise UserError(what, where="model.weights", fix=fix)
    source, is_own = settings.weights, False
    if best is not None and _can_replace_first_weights(best):
        source, is_own = str(best), True
    report = Reporter(quiet=quiet or is_own, stderr=True)
    model = load_model(
        source, settings.image_size, resize_weights=settings.growth, quiet=quiet or is_own
    )
    _check_channels(model, source)
    model, names, new = _with_head_for(model, class_names, report)
    if settings.head_bias and not new and not is_own:
        what = f"model.head_bias={settings.head_bias} has no effect: the head is kept"
        raise UserError(what, where=source, fix="--set model.head_bias=0")
    if settings.head_bias and new:
        start_head_bias(model, settings.head_bias, new)
    if settings.overrides:  # those of `ModelSettings`, which need no other tensors
        trained, preprocessing = model.state_dict(), model.preprocessing
        try:
            architecture = dataclasses.replace(model.config, **settings.overrides)
        except (TypeError, ValueError) as error:
            raise UserError(str(error), where="model.overrides") from error
        with torch.device("meta"):
            model = model_from_config(architecture)
        model.load_state_dict(trained, assign=True)
        model.preprocessing = preprocessing
    return model, names


def _can_replace_first_weights(best: Path) -> bool:
    """Whether the run has its own weights, and a whole checkpoint that fills what has moved on.

    Without such a checkpoint the run begins again, with the weights that it began with.
    """
    if not (best / "model.safetensors").is_file():
        return False
    for folder in sorted((best.parent / "checkpoints").glob("step-*"), reverse=True):
        try:
            verify(folder)
        except UserError:
            continue
        return True
    return False


def _with_head_for(
    model: ImageClassifier, class_names: list[str], report: Reporter
) -> tuple[ImageClassifier, list[str], list[int]]:
    """Returns the model with a row of the head for each class, those that it knows as they are.

    Classes are matched by name. Those that the weights do not know begin with zeros, as the paper
    starts fine-tuning.

    Returns:
        The model; the classes, by its own names where it knows them; and the new rows.
    """
    known, had = model.class_names or [], model.config.num_classes
    # A model of ImageNet calls a class "n01440764 tench"; folders have the WordNet id alone.
    full = {name[:9]: name for name in known if re.match(r"n\d{8} ", name)}
    names = [full.get(name, name) for name in class_names]
    place = {name: at for at, name in enumerate(known)}
    kept = [row for row, name in enumerate(names) if name in place]
    new = [row for row, name in enumerate(names) if name not in place]
    if names != known:
        trained, model = model, with_new_head(model, len(names))
        if kept:
            assert trained.head is not None
            assert model.head is not None
            rows = [place[names[row]] for row in kept]
            with torch.no_grad():
                model.head.weight[kept] = trained.head.weight[rows]
                model.head.bias[kept] = trained.head.bias[rows]
    if not kept:
        which = "other classes" if known else "classes without names"
        was = f"the weights had {had:,} {which}" if had else "the weights had none"
        report.say(f"head     new, all zeros, for {plural(len(names), 'class')}; {was}")
    elif len(kept) == len(names) == had:
        report.say(f"head     kept: the weights know these {plural(len(names), 'class')}")
    else:
        some = ", ".join(names[row] for row in new[:8]) + ", ..." * (len(new) > 8)
        added = f"{len(new):,} new, zeros: {some}" if new else "none new"
        report.say(f"head     kept {len(kept):,} of {plural(had, 'class')}, {added}")
    return model, names, new
