"""Any model of timm, in the frame that every model here has: "timm:NAME".

timm's classifier is left out and our dense head put in its place, so that training, fine-tuning and
few-shot find the same `head` everywhere. timm is not a dependency: it is imported when such a model
is named. Source: Wightman, PyTorch Image Models, github.com/huggingface/pytorch-image-models, 1.0.

Shapes: N batch, C features, H W pixels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from allmlp.errors import UserError, near_names, one_of
from allmlp.models.family import Family, ModelConfig, Size
from allmlp.models.layers import ImageClassifier
from allmlp.models.timm_sizes import HAND_BUILT

PREFIX = "timm:"
_MATCHING = (
    "With a CPU build of torch, torchvision must be one too: pip install torchvision "
    "--index-url https://download.pytorch.org/whl/cpu (docs/timm.md)"
)


class TimmModel(ImageClassifier):
    """A model of timm without its classifier, and our own head, zero until weights come.

    On the meta device only the parameters are left out. Constants that no weights file holds
    (indices of windows, frequencies) are real, so that weights can be assigned to it.
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
        """Returns what timm's classifier would read: `forward_head` with `pre_logits`."""
        self.check_images(images)
        backbone: Any = self.backbone
        x = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
        return x.flatten(1)


@dataclass(frozen=True, kw_only=True)
class TimmConfig(ModelConfig):
    """The architecture of a model of timm, beside the fields of `ModelConfig`.

    Args:
        name: timm's, without a tag of weights, or one of `timm_sizes.py`.
        dropout: timm's `drop_rate`, before the head.
        stochastic_depth: timm's `drop_path_rate`.

    Raises:
        ValueError: a value is out of range. Whether timm knows the name shows when it is built.
    """

    name: str
    dropout: float = 0.0
    stochastic_depth: float = 0.0

    @property
    def measured(self) -> Measured:
        """What a model without memory shows; UserError if it takes no images of this size."""
        return _measured(self.name, self.image_size, self.in_channels)

    @property
    def hidden_dim(self) -> int:
        """C, the width of the features that the head reads."""
        return self.measured.width

    @property
    def flops(self) -> int:
        """Operations of one image, a multiply-add counted as two, by torch's counter: convolutions
        and matrix products, also attention's."""
        return self.measured.flops + 2 * self.hidden_dim * self.num_classes

    def summary(self) -> str:
        """Returns the architecture in a few words: "timm's resnet18, 512 features"."""
        return f"timm's {self.name}, {self.hidden_dim} features"


def import_timm() -> Any:
    """Returns the module timm, or raises UserError."""
    try:
        return importlib.import_module("timm")
    except Exception as error:  # also of a torchvision for another torch: RuntimeError, OSError
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        what = f"timm cannot be imported: {first_line(error)}"
        if absent == "timm":
            what = "models named timm:... need timm, which is not installed"
        fix = f"pip install {absent}. {_MATCHING}" if absent else _MATCHING
        raise UserError(what, fix=fix) from error


def timm_config(name: str) -> TimmConfig:
    """Returns the configuration of "timm:NAME", at timm's own size with 1000 classes."""
    name = name.removeprefix(PREFIX)
    if "." in name:
        what = f"{PREFIX}{name} names weights; a model with random weights has no tag"
        fix = f"{PREFIX}{name.partition('.')[0]}, or allmlp.load_model for the weights"
        raise UserError(what, fix=fix)
    return TimmConfig(name=name, image_size=own_image_size(name))


def own_image_size(name: str) -> Size:
    """Returns the (H, W) that timm builds an architecture for."""
    import_timm()
    own = HAND_BUILT.get(name)
    return tuple(known_to_timm(name).input_size[1:]) if own is None else own.image_size


def known_to_timm(name: str) -> Any:
    """Returns timm's `PretrainedCfg` of "NAME" or "NAME.TAG"."""
    timm = import_timm()
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        fix = near_names(base, [*timm.list_models(), *HAND_BUILT])
        fix += f"timm {timm.__version__} has {len(timm.list_models()):,} models"
        raise UserError(f"timm has no model {base!r}", fix=fix)
    if tag:
        tags = timm.list_models(f"{base}.*", pretrained=True)
        one_of(f"weights of {base}", tag, [known.partition(".")[2] for known in tags])
    found = timm.get_pretrained_cfg(name)
    if found is None:
        raise UserError(f"timm does not describe its model {base!r}, so it cannot be used here")
    if isinstance(found.classifier, tuple | list):
        what = f"timm's {name} has {len(found.classifier)} classifiers, one is meant"
        raise UserError(what, fix="Take the model of that family without distillation")
    return found


def build_backbone(config: TimmConfig) -> nn.Module:
    """Returns timm's model without a classifier, with random weights, for the image size; under
    `torch.device("meta")` without memory for its parameters, but with real constants."""
    if torch.get_default_device().type != "meta":
        return _built(config)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        with _parameters_on_meta():
            model = _built(config)
        if any(buffer.is_meta for buffer in model.buffers()):  # made where the parameters were
            model = _built(config)
            with _parameters_on_meta():
                for module in model.modules():
                    for name, parameter in list(module.named_parameters(recurse=False)):
                        module.register_parameter(name, parameter)
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Moves every parameter that a module registers in the block to the meta device."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        del module, name
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook: Any = to_meta  # torch's types forget that it may return another parameter
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _built(config: TimmConfig) -> nn.Module:
    settings: dict[str, Any] = {"num_classes": 0, "in_chans": config.in_channels}
    # Not every model has these two: only those that are set are passed.
    settings |= {"drop_rate": config.dropout} if config.dropout else {}
    settings |= {"drop_path_rate": config.stochastic_depth} if config.stochastic_depth else {}
    timm, name = import_timm(), config.name
    own = None if name in HAND_BUILT else known_to_timm(name)
    try:
        if own is None:
            return HAND_BUILT[name].build(**settings)
        model = timm.create_model(name, **settings)
        if own.fixed_input_size and config.image_size != tuple(own.input_size[1:]):
            if hasattr(model, "set_input_size"):
                model.set_input_size(config.image_size)
            else:
                model = timm.create_model(name, img_size=config.image_size, **settings)
        return model
    except Exception as error:  # whatever timm raises for settings that a model does not have
        given = ", ".join(f"{key}={value}" for key, value in settings.items())
        raise UserError(f"timm cannot build {name} ({given}): {first_line(error)}") from error


def resized(model: TimmModel, image_size: Size) -> TimmModel:
    """Brings a model with its weights to another image size, in place, and returns it: convolutions
    take any; of other networks timm resizes position embeddings (bicubic) where it knows how."""
    config = replace(model.config, image_size=image_size)
    if config.name not in HAND_BUILT and known_to_timm(config.name).fixed_input_size:
        own, new = ("x".join(map(str, size)) for size in (model.config.image_size, image_size))
        what = f"timm cannot bring the weights of {config.name} from {own} to {new} pixels"
        backbone: Any = model.backbone
        if not hasattr(backbone, "set_input_size"):
            raise UserError(what, fix=f"Keep {own}, or take other weights of this name")
        try:
            backbone.set_input_size(image_size)
        except Exception as error:
            raise UserError(f"{what}: {first_line(error)}") from error
    _ = config.measured  # an image of that size passes
    model.config = config
    return model


class Measured(NamedTuple):
    """What a model of timm without its classifier shows of itself."""

    flops: int
    width: int  # C, of the features that the head reads
    unpooled: tuple[int, ...] | None  # shape of one image's `forward_features`, if it is a tensor


@functools.lru_cache(maxsize=64)
def _measured(name: str, image_size: Size, in_channels: int) -> Measured:
    from torch.utils.flop_counter import FlopCounterMode

    config = TimmConfig(name=name, image_size=image_size, num_classes=0, in_channels=in_channels)
    # The caller's random numbers stay the same, whether this was measured before or not.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone: Any = build_backbone(config).to("meta").eval().requires_grad_(False)
        image = torch.empty(1, in_channels, *image_size, device="meta")
        counter = FlopCounterMode(display=False)
        try:
            with torch.no_grad(), counter:
                x = backbone.forward_features(image)
                width = backbone.forward_head(x, pre_logits=True).flatten(1).shape[1]
        except Exception as error:
            what = f"timm's {name} takes no images of {image_size[0]}x{image_size[1]} pixels"
            raise UserError(f"{what}: {first_line(error)}") from error
    shape = tuple(x.shape) if isinstance(x, Tensor) else None
    return Measured(counter.get_total_flops(), width, shape)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, cut to a readable length."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]


FAMILY = Family(
    name="timm",
    title="a model of timm",
    paper="see its page in timm, github.com/huggingface/pytorch-image-models",
    config=TimmConfig,
    build=TimmModel,
)
