"""What a run begins with: how long it is, and its model, new or from trained weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mlp_mixer.errors import UserError
from mlp_mixer.models.catalog import create_model, model_from_config
from mlp_mixer.models.layers import ImageClassifier, preprocessing_of
from mlp_mixer.preprocessing import Preprocessing
from mlp_mixer.training.config import TrainConfig
from mlp_mixer.training.dataset import Splits
from mlp_mixer.training.head import freeze_all_but_head, start_head_bias
from mlp_mixer.weights.store import load_model, with_new_head


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
        best: the folder of the run's own best weights, where it has some: it goes on then, and does
            not need the weights that it began with any more.
        quiet: do not say on standard error what became of trained weights.

    Raises:
        UserError: no such model or weights, or they do not fit the images.
    """
    settings = config.model
    if settings.weights is not None:
        model = _from_weights(config, class_names, best, quiet=quiet)
    else:
        size = settings.image_size
        assert size is not None
        model = create_model(settings.name, size, len(class_names), **settings.overrides)
        if model.config.in_channels not in (1, 3):
            what = f"images have 1 or 3 channels, the model wants {model.config.in_channels}"
            raise UserError(what, where="model.overrides.in_channels")
        model.preprocessing = Preprocessing(
            image_size=model.config.image_size, channels=model.config.in_channels
        )
        if settings.head_bias:
            start_head_bias(model, settings.head_bias)
    if settings.trained == "head":
        freeze_all_but_head(model)
    model.class_names = class_names
    model.preprocessing = dataclasses.replace(
        preprocessing_of(model),
        resize=config.data.resize,
        exif_orientation=config.data.exif_orientation,
    )
    return model


def _from_weights(
    config: TrainConfig, class_names: list[str], best: Path | None, *, quiet: bool
) -> ImageClassifier:
    settings = config.model
    if not settings.weights:
        what = f"the recipe {config.recipe} begins with trained weights, and none are given"
        fix = f"mixer finetune CHECKPOINT --recipe {config.recipe} --data SOURCE"
        raise UserError(what, where="model.weights", fix=fix)
    own = best is not None and (best / "model.safetensors").is_file()
    source = best if own and best is not None else settings.weights
    model = load_model(source, settings.image_size, growth=settings.growth, quiet=quiet or own)
    if model.class_names != class_names:
        # With names of their own or none, the old outputs mean something else: a zero head, as the
        # paper starts fine-tuning.
        model = with_new_head(model, len(class_names))
        if settings.head_bias:
            start_head_bias(model, settings.head_bias)
    if settings.overrides:
        tensors = model.state_dict()
        preprocessing = model.preprocessing
        model = model_from_config(dataclasses.replace(model.config, **settings.overrides))
        model.load_state_dict(tensors, assign=True)
        model.preprocessing = preprocessing
    return model
