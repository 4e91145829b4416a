"""All model families and named architectures, and the functions that look them up."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from allmlp.errors import UserError, near_names, one_of
from allmlp.models import (
    cycle_mlp,
    gmlp,
    mixer,
    resmlp,
    small_resnet,
    timm_model,
    vision_permutator,
)
from allmlp.models.family import Family, ModelConfig, size_text
from allmlp.models.layers import ImageClassifier
from allmlp.runtime.device import check_fits_memory

# One entry per family. Families that are not all-MLP are there for comparison.
ALL_MLP: tuple[Family, ...] = (
    mixer.FAMILY,
    resmlp.FAMILY,
    gmlp.FAMILY,
    cycle_mlp.FAMILY,
    vision_permutator.FAMILY,
)
FAMILIES = {found.name: found for found in (*ALL_MLP, small_resnet.FAMILY, timm_model.FAMILY)}
_MOST_BLOCKS = 10_000  # building more blocks takes seconds and gigabytes


def family_of(config: object) -> Family:
    for found in FAMILIES.values():
        if type(config) is found.config:
            return found
    raise TypeError(f"no model family has the configuration {type(config).__name__}")


@functools.cache
def architectures() -> dict[str, ModelConfig]:
    """Returns the named all-MLP architectures, at 224 pixels and with 1000 classes."""
    return {name: config for found in ALL_MLP for name, config in found.architectures.items()}


def list_models() -> list[str]:
    """Returns the all-MLP models that `create_model` takes, smallest first within a family."""
    return list(architectures())


def model_config(
    name: str,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    **overrides: Any,
) -> ModelConfig:
    """Returns the configuration that `create_model` would build; same arguments and errors."""
    if name.startswith(timm_model.PREFIX):
        named: ModelConfig = timm_model.timm_config(name)
    else:
        known = {**architectures(), **small_resnet.FAMILY.architectures}
        named = known[one_of("model", name, known)]
    fields = named.__dataclass_fields__
    for field in overrides:
        if field not in fields:
            fix = f"{near_names(field, fields)}Known: {', '.join(fields)}"
            raise UserError(f"model {name} has no setting {field!r}", fix=fix)
    given = {"image_size": image_size, "num_classes": num_classes}
    overrides |= {field: value for field, value in given.items() if value is not None}
    try:
        config = dataclasses.replace(named, **overrides)
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot build {name}: {error}") from error
    if isinstance(config, timm_model.TimmConfig):
        _ = config.measured  # raises if the model does not take this size
    return config


def create_model(
    name: str,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    **overrides: Any,
) -> ImageClassifier:
    """Returns a new model with random weights, in training mode.

    Args:
        name: a name of `list_models()`, for example "mixer_b16", or "timm:NAME".
        image_size: in pixels, an integer or (H, W); None means 224, as in the paper.
        num_classes: outputs of the head; None means 1000, 0 removes the head.
        **overrides: any other field of the configuration, for example `in_channels=1`,
            `stochastic_depth=0.1`, `num_blocks=4`.

    Raises:
        UserError: unknown name or field, or an invalid value.
    """
    return model_from_config(model_config(name, image_size, num_classes, **overrides))


def model_from_config(config: ModelConfig) -> ImageClassifier:
    """Returns a new model with random weights, for a configuration of any family."""
    # Check the numbers first: building an oversized model takes minutes before it fails.
    family, blocks = family_of(config), getattr(config, "num_blocks", 0)
    if blocks > _MOST_BLOCKS:
        raise UserError(f"a model has at most {_MOST_BLOCKS:,} blocks, got {blocks:,}")
    if torch.get_default_device().type != "meta" and family is not timm_model.FAMILY:
        try:
            with torch.device("meta"):
                values = family.build(config).num_parameters
        except (RuntimeError, OverflowError) as error:  # sizes beyond what a tensor can have
            what = f"the model cannot be built: {str(error).splitlines()[0]}"
            raise UserError(what, code="out-of-range") from error
        check_fits_memory(values, f"a model of {values:,} weights")
    return family.build(config)


def random_weights(model: ImageClassifier, seed: int = 0) -> ImageClassifier:
    """Returns a copy with random weights; torch's global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        twin = model_from_config(model.config)
    twin.preprocessing = model.preprocessing
    return twin.to(next(model.parameters()).device).train(model.training)


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Returns the architecture as JSON values: its fields and "family"."""
    return {"family": family_of(config).name, **dataclasses.asdict(config)}


def config_from_json(values: dict[str, Any]) -> ModelConfig:
    """Returns the configuration that `config_to_json` wrote; UserError if it is invalid."""
    fields = dict(values)
    name = one_of("model family", fields.pop("family", None), list(FAMILIES))
    try:
        return FAMILIES[name].config(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"not a {name} architecture: {error}") from error


def architecture_name(config: ModelConfig) -> str | None:
    """Returns the name in `list_models()`, with its variant: "mixer_b16 grown to 4 tiles"."""
    return next((f.name_of(config) for f in ALL_MLP if type(config) is f.config), None)


def in_words(config: ModelConfig) -> str:
    """Describes an architecture: "mixer_b16, 224x224 pixels, 1,000 classes"."""
    name, pixels = architecture_name(config) or config.summary(), size_text(config.image_size)
    classes = f"{config.num_classes:,} classes" if config.num_classes else "no head"
    return f"{name}, {pixels} pixels, {classes}"
