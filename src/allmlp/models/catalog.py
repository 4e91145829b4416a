"""Every named architecture, and the two functions that use the names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from allmlp.errors import UserError, near_names
from allmlp.models.ablations import build_mixer
from allmlp.models.cycle_mlp import CycleMLP, CycleMLPConfig
from allmlp.models.layers import ImageClassifier, ModelConfig
from allmlp.models.mixer import MixerConfig
from allmlp.models.small_resnet import SmallResNet, SmallResNetConfig
from allmlp.models.timm_model import PREFIX, TimmConfig, TimmModel, timm_config
from allmlp.models.vision_permutator import VisionPermutator, VisionPermutatorConfig
from allmlp.runtime.device import check_fits_memory


def _mixer(patch: int, dim: int, blocks: int, tokens_dim: int, channels_dim: int) -> MixerConfig:
    return MixerConfig(
        patch_size=patch,
        hidden_dim=dim,
        num_blocks=blocks,
        tokens_mlp_dim=tokens_dim,
        channels_mlp_dim=channels_dim,
    )


def _cycle(
    depths: tuple[int, ...], dims: tuple[int, ...], mlp_ratios: tuple[int, ...]
) -> CycleMLPConfig:
    return CycleMLPConfig(depths=depths, dims=dims, mlp_ratios=mlp_ratios)


def _permutator(
    patch: int,
    depths: tuple[int, ...],
    dims: tuple[int, ...],
    segments: tuple[int, ...],
    downsamples: tuple[bool, ...] = (False, False, False),
) -> VisionPermutatorConfig:
    return VisionPermutatorConfig(
        patch_size=patch,
        depths=depths,
        dims=dims,
        mlp_ratios=(3, 3, 3, 3),
        segments=segments,
        downsamples=downsamples,
    )


_NARROW, _WIDE = (64, 128, 320, 512), (96, 192, 384, 768)
_FIRST = (True, False, False)

ARCHITECTURES: dict[str, ModelConfig] = {
    # Table 1 of the paper; S/8 is Google's later release (SAM-trained, not in the paper).
    #                    P     C   L  D_S   D_C
    "mixer_s32": _mixer(32, 512, 8, 256, 2048),
    "mixer_s16": _mixer(16, 512, 8, 256, 2048),
    "mixer_s8": _mixer(8, 512, 8, 256, 2048),
    "mixer_b32": _mixer(32, 768, 12, 384, 3072),
    "mixer_b16": _mixer(16, 768, 12, 384, 3072),
    "mixer_l32": _mixer(32, 1024, 24, 512, 4096),
    "mixer_l16": _mixer(16, 1024, 24, 512, 4096),
    "mixer_h14": _mixer(14, 1280, 32, 640, 5120),
    # CycleMLP, from its authors' code.
    #                       depths         dims     hidden units of an MLP over its channels
    "cycle_mlp_b1": _cycle((2, 2, 4, 2), _NARROW, (4, 4, 4, 4)),
    "cycle_mlp_b2": _cycle((2, 3, 10, 3), _NARROW, (4, 4, 4, 4)),
    "cycle_mlp_b3": _cycle((3, 4, 18, 3), _NARROW, (8, 8, 4, 4)),
    "cycle_mlp_b4": _cycle((3, 8, 27, 3), _NARROW, (8, 8, 4, 4)),
    "cycle_mlp_b5": _cycle((3, 4, 24, 3), _WIDE, (4, 4, 4, 4)),
    # Vision Permutator, from its authors' code.
    #                     P   depths         dims                  segments
    "vip_s14": _permutator(14, (4, 3, 8, 3), (384,) * 4, (16,) * 4),
    "vip_s7": _permutator(7, (4, 3, 8, 3), (192, 384, 384, 384), (32, 16, 16, 16), _FIRST),
    "vip_m7": _permutator(
        7, (4, 3, 14, 3), (256, 256, 512, 512), (32, 32, 16, 16), (False, True, False)
    ),
    "vip_l7": _permutator(7, (8, 8, 16, 4), (256, 512, 512, 512), (32, 16, 16, 16), _FIRST),
}

# Networks of another kind, to compare with; `create_model` takes their names too.
COMPARISONS: dict[str, ModelConfig] = {"small_resnet": SmallResNetConfig()}

# The name of a configuration's class, as config.json has it -> (configuration, what builds it).
FAMILIES: dict[str, tuple[type[Any], Callable[[Any], ImageClassifier]]] = {
    "mixer": (MixerConfig, build_mixer),
    "cycle_mlp": (CycleMLPConfig, CycleMLP),
    "vision_permutator": (VisionPermutatorConfig, VisionPermutator),
    "small_resnet": (SmallResNetConfig, SmallResNet),
    "timm": (TimmConfig, TimmModel),
}


_MOST_BLOCKS = 10_000  # whose objects alone take seconds and gigabytes


def list_models() -> list[str]:
    """Returns the all-MLP models that `create_model` takes, smallest first within a family."""
    return list(ARCHITECTURES)


def model_config(
    name: str,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    **overrides: Any,
) -> ModelConfig:
    """Returns the configuration that `create_model` would build.

    Args:
        name: a name of `list_models()`.
        image_size: pixels, a number or (H, W); None keeps the paper's 224.
        num_classes: outputs of the head; None keeps 1000, 0 means no head.
        **overrides: any other field of the configuration, by its name.

    Raises:
        UserError: the name or a field is unknown, or a value does not fit.
    """
    if name.startswith(PREFIX):
        return timm_config(name, image_size, num_classes, **overrides)
    known = ARCHITECTURES | COMPARISONS
    if name not in known:
        raise UserError(
            f"unknown model {name!r}",
            fix=f"{near_names(name, known)}Known: {', '.join(known)}",
        )
    config = known[name]
    fields = [field.name for field in dataclasses.fields(config)]
    for field in overrides:
        if field == "pretrained":  # as timm and torchvision call it
            fix = 'Trained weights have names of their own: am.load_model("mixer_b16.i21k"); '
            fix += "`mixer models --weights` lists them"
            raise UserError("create_model draws random weights: it has no 'pretrained'", fix=fix)
        if field not in fields:
            raise UserError(
                f"model {name} has no setting {field!r}",
                fix=f"{near_names(field, fields)}Known: {', '.join(fields)}",
            )
    if image_size is not None:
        overrides["image_size"] = image_size
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    try:
        return dataclasses.replace(config, **overrides)
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot build {name}: {error}") from error


def create_model(
    name: str,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    **overrides: Any,
) -> ImageClassifier:
    """Returns a new model with random weights, in training mode.

    Args:
        name: a name of `list_models()`, for example "mixer_b16".
        image_size: pixels, a number or (H, W); None keeps the paper's 224.
        num_classes: outputs of the head; None keeps 1000, 0 leaves the head out.
        **overrides: any other field of the configuration, for example `in_channels=1`,
            `stochastic_depth=0.1`, `num_blocks=4`.

    Raises:
        UserError: the name or a field is unknown, or a value does not fit.
    """
    return model_from_config(model_config(name, image_size, num_classes, **overrides))


def model_from_config(config: ModelConfig) -> ImageClassifier:
    """Returns a new model with random weights for a configuration of any family.

    Raises:
        UserError: it has too many blocks, or its weights are larger than all memory.
    """
    _refuse_too_large(config)
    for config_type, model_type in FAMILIES.values():
        if type(config) is config_type:
            return model_type(config)
    raise TypeError(f"no model family has the configuration {type(config).__name__}")


def random_weights(model: ImageClassifier, seed: int = 0) -> ImageClassifier:
    """Returns random weights for the same architecture, preprocessing, device and mode.

    torch's global random numbers stay unchanged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            twin = model_from_config(model.config)
        except TypeError as error:
            what = f"cannot build a {type(model).__name__} with random weights: {error}"
            raise UserError(what) from error
    twin.preprocessing = model.preprocessing
    return twin.to(next(model.parameters()).device).train(model.training)


def _refuse_too_large(config: ModelConfig) -> None:
    """Looks at the numbers alone: building what does not fit takes minutes before it fails."""
    blocks = getattr(config, "num_blocks", 0)
    if blocks > _MOST_BLOCKS:
        raise UserError(f"a model has at most {_MOST_BLOCKS:,} blocks, got {blocks:,}")
    values = 0
    if isinstance(config, MixerConfig):
        values = config.num_parameters
    elif isinstance(config, CycleMLPConfig | VisionPermutatorConfig):  # of the MLPs alone
        stages = zip(config.depths, config.dims, config.mlp_ratios, strict=True)
        values = sum(2 * depth * ratio * dim**2 for depth, dim, ratio in stages)
    if torch.get_default_device().type != "meta":
        check_fits_memory(values, f"a model of {values:,} weights")


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Returns the architecture as JSON values: its fields and "family"."""
    family = next(name for name, (kind, _) in FAMILIES.items() if kind is type(config))
    return {"family": family, **dataclasses.asdict(config)}


def config_from_json(values: dict[str, Any]) -> ModelConfig:
    """Returns the configuration that `config_to_json` wrote.

    Raises:
        UserError: an unknown family, an unknown or missing field, or a value that does not fit.
    """
    fields = dict(values)
    family = fields.pop("family", None)
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"unknown model family {family!r}", fix=f"Known: {', '.join(FAMILIES)}")
    for name, value in fields.items():
        if isinstance(value, list):  # JSON has no tuples
            fields[name] = tuple(value)
    try:
        return FAMILIES[family][0](**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"not a {family} architecture: {error}") from error


def architecture_name(config: ModelConfig) -> str | None:
    """Returns the name of `list_models()` that has this shape, whatever the size and classes.

    A model that has grown by tiles has wider token-mixing MLPs: "mixer_b16 grown to 4 tiles". A
    variant of appendix A.1 says so: "mixer_b16 (untied token mixing)".
    """
    for name, named in ARCHITECTURES.items():
        if type(named) is not type(config):
            continue
        if not isinstance(config, MixerConfig) or not isinstance(named, MixerConfig):
            fields = {field.name for field in dataclasses.fields(named)} - _FREE
            if all(getattr(config, field) == getattr(named, field) for field in fields):
                return name
            continue
        tiles, rest = divmod(config.tokens_mlp_dim, named.tokens_mlp_dim)
        if rest == 0 and all(getattr(config, field) == getattr(named, field) for field in _SHAPE):
            name = name if tiles == 1 else f"{name} grown to {tiles} tiles"
            return f"{name} ({config.variant})" if config.variant else name
    return None


_FREE = {"image_size", "num_classes", "in_channels", "stochastic_depth"}
_SHAPE = ("patch_size", "hidden_dim", "num_blocks", "channels_mlp_dim")
