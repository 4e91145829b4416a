"""The initial model of a run: new, or from trained weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from allmlp.console import Reporter
from allmlp.data.classes import matched_names
from allmlp.data.source import Source, array_shape
from allmlp.data.sources.arrays import statistics
from allmlp.decision import Decision
from allmlp.errors import UserError, plural
from allmlp.models.catalog import create_model, model_from_config
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.preprocessing import Preprocessing
from allmlp.training.config import TrainConfig
from allmlp.weights.load import load_model, with_new_head


def build_model(
    config: TrainConfig,
    class_names: list[str],
    best: Path | None = None,
    *,
    rows: Source | None = None,
    quiet: bool = False,
) -> ImageClassifier:
    """Returns the model of a run, for the statistics of its training images `rows` if these are
    arrays and its weights not trained on such. best/ of a resumed run replaces weights that may be
    gone."""
    settings, data = config.model, config.data
    rows = rows if rows is not None and array_shape(rows) else None
    if settings.weights is not None:
        model, class_names = _from_weights(config, class_names, best, quiet=quiet)
    else:
        assert settings.image_size is not None
        model = create_model(
            settings.name, settings.image_size, len(class_names), **settings.overrides
        )
        if settings.head_bias:
            nn.init.constant_(head_of(model).bias, settings.head_bias)
    kind, channels = getattr(model.preprocessing, "kind", "images"), model.config.in_channels
    if kind == "images" and (rows is None or settings.weights) and channels not in (1, 3):
        what = f"images have 1 or 3 channels, the model takes {channels}"
        raise UserError(what, where=settings.weights or "model.overrides.in_channels")
    if settings.train_only != "all":
        model.requires_grad_(False)
        head_of(model).requires_grad_(True)
    model.class_names = class_names
    model.decision = Decision()  # that of earlier weights does not hold for new ones
    changes: dict[str, Any] = {"resize": data.resize, "exif_orientation": data.exif_orientation}
    if data.crop is not None:
        changes |= {"crop": data.crop, "crop_small": True}
    if data.permutation is not None:
        names = ("permutation", "permutation_patch", "permutation_seed")
        changes |= {name: getattr(data, name) for name in names}
    if rows is not None and kind != "arrays":
        mean, std = statistics(rows)
        if len(mean) != channels:
            what = f"the model takes {plural(channels, 'channel')}, and rows have {len(mean)}"
            raise UserError(what, where=rows.name, code="shape")
        changes |= {"kind": "arrays", "channels": channels, "mean": mean, "std": std}
        model.preprocessing = Preprocessing(image_size=model.config.image_size)
    try:
        model.preprocessing = dataclasses.replace(preprocessing_of(model), **changes)
    except ValueError as error:
        raise UserError(str(error), where="data.permutation") from error
    return model


def head_of(model: nn.Module) -> nn.Linear:
    return cast(nn.Linear, model.head)


def _from_weights(
    config: TrainConfig, class_names: list[str], best: Path | None, *, quiet: bool
) -> tuple[ImageClassifier, list[str]]:
    """Returns the model with its head in the order of the classes, and its names for them."""
    settings = config.model
    if not settings.weights:
        what = f"the recipe {config.recipe} begins with trained weights, and none are given"
        fix = f"mixer finetune CHECKPOINT --recipe {config.recipe} --data SOURCE"
        raise UserError(what, where="model.weights", fix=fix)
    source = settings.weights
    if best is not None:
        source, quiet = str(best), True
    method = settings.resize_weights
    model = load_model(source, settings.image_size, resize_weights=method, quiet=quiet)
    model, names, new = _with_head_for(model, class_names, Reporter(quiet=quiet, stderr=True))
    if settings.head_bias:
        with torch.no_grad():
            head_of(model).bias[new] = settings.head_bias
    if settings.overrides:  # from `ModelSettings`; these do not change the tensors
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


def _with_head_for(
    model: ImageClassifier, class_names: list[str], report: Reporter
) -> tuple[ImageClassifier, list[str], list[int]]:
    """Returns the model with one head row per class, its class names, and the new rows: zeros."""
    known, had = model.class_names or [], model.config.num_classes
    names = matched_names(class_names, known)
    place = {name: at for at, name in enumerate(known)}
    kept = [row for row, name in enumerate(names) if name in place]
    new = [row for row, name in enumerate(names) if name not in place]
    if names != known:
        trained, model = model, with_new_head(model, len(names))
        if kept:
            rows = [place[names[row]] for row in kept]
            with torch.no_grad():
                head_of(model).weight[kept] = head_of(trained).weight[rows]
                head_of(model).bias[kept] = head_of(trained).bias[rows]
    some = ", ".join(names[row] for row in new[:8]) + ", ..." * (len(new) > 8)
    of = f"{had:,}" if known or not had else f"{had:,} without names"
    added = f", {len(new):,} new, zeros: {some}" if new else ""
    report.say(
        f"head     kept {len(kept):,} of {of} rows, for {plural(len(names), 'class')}{added}"
    )
    return model, names, new
