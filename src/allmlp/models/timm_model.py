"""Any model of timm, in the frame that every model here has: "timm:NAME".

timm's own classifier is left out and a dense head of ours is put in its place, so that training,
fine-tuning, linear probes and few-shot find the same `head` everywhere. A classifier that is a 1x1
convolution (BiT) becomes the dense layer with the same numbers. timm is no dependency: it is
imported when such a model is named.
Source: Wightman, PyTorch Image Models, github.com/huggingface/pytorch-image-models, 1.0.

Shapes: N batch, C features, H W pixels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from allmlp.errors import UserError, near_names
from allmlp.models.comparison_systems import HAND_BUILT
from allmlp.models.layers import ImageClassifier

PREFIX = "timm:"
_MATCHING = (
    "Beside a CPU build of torch, torchvision must be one too: pip install torchvision "
    "--index-url https://download.pytorch.org/whl/cpu (docs/timm.md)"
)


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """The architecture of a model of timm.

    Args:
        name: timm's, without a tag of weights, or one of ours (`comparison_systems.HAND_BUILT`).
        image_size: (H, W) in pixels, one number for a square.
        num_classes: outputs of the head; 0 leaves the head out: the model returns its features.
        in_channels: channels of the input images.
        dropout: timm's `drop_rate`, before the head.
        stochastic_depth: timm's `drop_path_rate`.

    Raises:
        ValueError: a value is out of range. Whether timm knows the name is seen when it is built.
    """

    name: str
    image_size: tuple[int, int] = (224, 224)
    num_classes: int = 1000
    in_channels: int = 3
    dropout: float = 0.0
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        if not isinstance(self.name, str):
            raise ValueError(f"name must be a text, got {self.name!r}")
        numbers = {"height": self.image_size[0], "width": self.image_size[1]}
        for name, value in {**numbers, "in_channels": self.in_channels}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if type(self.num_classes) is not int or self.num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {self.num_classes!r}")
        for name in ("dropout", "stochastic_depth"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def hidden_dim(self) -> int:
        """C, the width of the features that the head reads."""
        return _measured(self.name, self.image_size, self.in_channels)[1]

    @property
    def flops(self) -> int:
        """Operations of one image, a multiply-add counted as two.

        What torch's counter counts: convolutions and products of matrices, attention's as well.
        """
        backbone, width = _measured(self.name, self.image_size, self.in_channels)
        return backbone + 2 * width * self.num_classes

    def summary(self) -> str:
        """Returns the architecture in a few words: "timm's resnet18, 512 features"."""
        return f"timm's {self.name}, {self.hidden_dim} features"


class TimmModel(ImageClassifier):
    """A model of timm without its classifier, and our own head: zeros until weights come.

    On the meta device only the parameters are left out. Constants that no weights file holds
    (indices of windows, frequencies) are there, so that weights can be assigned to it.

    Raises:
        UserError: timm is absent, does not know the name, or cannot build it.
    """

    config: TimmConfig
    why_one_size = "timm builds it for one size"

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config)
        self.head = nn.Linear(config.hidden_dim, config.num_classes) if config.num_classes else None
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, C)
        """Returns what timm's classifier would read: `forward_head` with `pre_logits`.

        Raises:
            ValueError: the images have another size or other channels than the model.
        """
        self.check_images(images)
        return _features(self.backbone, images)


def import_timm() -> Any:
    """Returns the module timm.

    Raises:
        UserError: it is not installed, or it or the torchvision that it needs cannot be imported.
    """
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name == "timm":
            what = "models named timm:... need timm, which is not installed"
            raise UserError(what, fix=f"pip install timm. {_MATCHING}") from error
        raise UserError(f"timm cannot be imported: {error}", fix=f"pip install {error.name}") from (
            error
        )
    except Exception as error:  # torchvision for another torch: RuntimeError, OSError, ...
        what = f"timm cannot be imported: {_first_line(error)}"
        raise UserError(what, fix=_MATCHING) from error


def timm_config(
    name: str,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    **overrides: Any,
) -> TimmConfig:
    """Returns the configuration of "timm:NAME", after timm has built it without memory.

    Args:
        name: with or without the prefix; a tag of weights is refused.
        image_size: pixels, a number or (H, W); None is what timm builds it for.
        num_classes: None is 1000, also where timm's default has no head.
        **overrides: `in_channels`, `dropout`, `stochastic_depth`.

    Raises:
        UserError: timm is absent or has no such model, or it does not take that size or setting.
    """
    name = name.removeprefix(PREFIX)
    if "." in name:
        what = f"{PREFIX}{name} names weights; a model with random weights has no tag"
        fix = f"{PREFIX}{name.partition('.')[0]}, or allmlp.load_model for the weights"
        raise UserError(what, fix=fix)
    known = ("in_channels", "dropout", "stochastic_depth")
    for field in overrides:
        if field not in known:
            what = f"a model of timm has no setting {field!r}"
            raise UserError(what, fix=f"{near_names(field, known)}Known: {', '.join(known)}")
    size: Any = own_image_size(name) if image_size is None else image_size
    try:
        height, width = (size, size) if isinstance(size, int) else size
        classes = 1000 if num_classes is None else num_classes
        config = TimmConfig(name=name, image_size=(height, width), num_classes=classes, **overrides)
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot build {PREFIX}{name}: {error}") from error
    _ = config.flops  # an image of that size goes through
    return config


def own_image_size(name: str) -> tuple[int, int]:
    """Returns (H, W) that timm builds an architecture for.

    Raises:
        UserError: timm is absent or has no such model.
    """
    if name in HAND_BUILT:
        import_timm()
        return HAND_BUILT[name].image_size
    found = known_to_timm(name).input_size
    return found[1], found[2]


def known_to_timm(name: str) -> Any:
    """Returns what timm says of "NAME" or "NAME.TAG" and its weights, its `PretrainedCfg`.

    Raises:
        UserError: timm is absent, or has no such model or tag.
    """
    timm = import_timm()
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        fix = near_names(base, [*timm.list_models(), *HAND_BUILT])
        fix += f"timm {timm.__version__} has {len(timm.list_models()):,} models"
        raise UserError(f"timm has no model {base!r}", fix=fix)
    tags = [each.partition(".")[2] for each in timm.list_models(f"{base}.*", pretrained=True)]
    if tag and tag not in tags:
        listed = ", ".join(tags) or "none"
        fix = f"{near_names(tag, tags)}Its weights: {listed}"
        raise UserError(f"timm has no weights {tag!r} of {base}", fix=fix)
    found = timm.get_pretrained_cfg(name)
    if found is None:  # an architecture of which timm describes nothing
        raise UserError(f"timm does not describe its model {base!r}, so it cannot be used here")
    return found


def build_backbone(config: TimmConfig) -> nn.Module:
    """Returns timm's model without a classifier, with random weights, for the image size.

    Under `torch.device("meta")` its parameters take no memory, and its constants are real.

    Raises:
        UserError: as `TimmModel`.
    """
    if torch.get_default_device().type != "meta":
        return _built(config)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        with _parameters_on_meta():
            model = _built(config)
        if any(each.is_meta for each in model.buffers()):  # made where the parameters were
            model = _built(config)
            with _parameters_on_meta():
                for module in model.modules():
                    for name, each in list(module.named_parameters(recurse=False)):
                        module.register_parameter(name, each)
    return model


def _built(config: TimmConfig) -> nn.Module:
    settings: dict[str, Any] = {"num_classes": 0, "in_chans": config.in_channels}
    # Not every model has these two; what is not asked for is not named.
    settings |= {"drop_rate": config.dropout} if config.dropout else {}
    settings |= {"drop_path_rate": config.stochastic_depth} if config.stochastic_depth else {}
    timm, own_size = import_timm(), own_image_size(config.name)
    try:
        if config.name in HAND_BUILT:
            return HAND_BUILT[config.name].build(**settings)
        said = known_to_timm(config.name)
        if isinstance(said.classifier, tuple | list):
            what = f"timm's {config.name} has {len(said.classifier)} classifiers, one is meant"
            raise UserError(what, fix="Take the model of that family without distillation")
        model = timm.create_model(config.name, **settings)
        if config.image_size != own_size and said.fixed_input_size:
            if hasattr(model, "set_input_size"):
                model.set_input_size(config.image_size)
            else:
                settings["img_size"] = config.image_size
                model = timm.create_model(config.name, **settings)
        return model
    except UserError:
        raise
    except Exception as error:  # whatever timm raises for settings that a model does not have
        said = ", ".join(f"{key}={value}" for key, value in settings.items())
        what = f"timm cannot build {config.name} ({said}): {_first_line(error)}"
        raise UserError(what) from error


def resized(model: TimmModel, image_size: tuple[int, int]) -> TimmModel:
    """Brings a model with its weights to another image size, in place, and returns it.

    Convolutional networks take any size as they are. Of the others timm resizes what depends on it
    (position embeddings, bicubic) where it knows how.

    Args:
        model: with weights.
        image_size: (H, W) in pixels.

    Raises:
        UserError: timm cannot bring the model to that size.
    """
    config = replace(model.config, image_size=image_size)
    name, height, width = config.name, *image_size
    if name not in HAND_BUILT and known_to_timm(name).fixed_input_size:
        own = f"{model.config.image_size[0]}x{model.config.image_size[1]}"
        if not hasattr(model.backbone, "set_input_size"):
            what = f"timm cannot bring the weights of {name} from {own} to {height}x{width} pixels"
            fix = "mixer_* models of this package can be grown" if "mixer" in name else None
            raise UserError(what, fix=fix or f"Keep {own}, or take other weights of this name")
        try:
            model.backbone.set_input_size(image_size)  # pyright: ignore[reportCallIssue]
        except Exception as error:
            what = f"timm cannot bring {name} from {own} to {height}x{width} pixels"
            raise UserError(f"{what}: {_first_line(error)}") from error
    _ = config.flops  # an image of that size goes through
    model.config = config
    return model


def _features(backbone: Any, images: Tensor) -> Tensor:
    x = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    return x.flatten(1)


@functools.lru_cache(maxsize=64)
def _measured(name: str, image_size: tuple[int, int], in_channels: int) -> tuple[int, int]:
    """Returns the operations of one image without the head, and C; built without memory.

    Raises:
        UserError: the model cannot be built, or an image of that size does not go through it.
    """
    from torch.utils.flop_counter import FlopCounterMode

    config = TimmConfig(name=name, image_size=image_size, num_classes=0, in_channels=in_channels)
    # Random numbers of the caller stay as they are, whether this was measured before or not.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone = build_backbone(config).to("meta").eval().requires_grad_(False)
        image = torch.empty(1, in_channels, *image_size, device="meta")
        counter = FlopCounterMode(display=False)
        try:
            with torch.no_grad(), counter:
                width = _features(backbone, image).shape[1]
        except Exception as error:
            what = f"timm's {name} takes no images of {image_size[0]}x{image_size[1]} pixels"
            raise UserError(f"{what}: {_first_line(error)}") from error
    return counter.get_total_flops(), width


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Lets every parameter that modules take up go to the meta device."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        del module, name
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook: Any = to_meta  # torch's types forget that it may return another parameter
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]
