"""Any timm model behind the interface of our models: "timm:NAME".

Our dense head replaces timm's classifier, so that training, fine-tuning and few-shot find the same
`head` in every model. timm is an optional dependency, imported only when such a model is named.
Source: Wightman, PyTorch Image Models, github.com/huggingface/pytorch-image-models, 1.0.

Shapes: N batch, C features, H W pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from allmlp.errors import UserError, near_names, one_of
from allmlp.models.family import Family, ModelConfig, Size, size_text
from allmlp.models.layers import ImageClassifier

PREFIX = "timm:"
_MATCHING = (
    "With a CPU build of torch, torchvision must be one too: pip install torchvision "
    "--index-url https://download.pytorch.org/whl/cpu (docs/timm.md)"
)


class TimmModel(ImageClassifier):
    """A timm model without its classifier, plus our own head, which starts at zero.

    On the meta device only the parameters are left out. Constants that no weights file contains
    (window indices, frequencies) are real, so that weights can be assigned.
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
        """Returns the input of timm's classifier: `forward_head` with `pre_logits`."""
        self.check_images(images)
        backbone: Any = self.backbone
        x = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
        return x.flatten(1)


@dataclass(frozen=True, kw_only=True)
class TimmConfig(ModelConfig):
    """The architecture of a timm model, in addition to the fields of `ModelConfig`.

    Args:
        name: timm's name without the tag of the weights, or a name in `HAND_BUILT`.
        dropout: timm's `drop_rate`, before the head.
        stochastic_depth: timm's `drop_path_rate`.

    An unknown name raises only when the model is built.
    """

    name: str
    dropout: float = 0.0
    stochastic_depth: float = 0.0

    @property
    def measured(self) -> Measured:
        """Properties measured on the meta device; UserError if this image size is not supported."""
        return _measured(self.name, self.image_size, self.in_channels)

    @property
    def hidden_dim(self) -> int:
        return self.measured.width

    @property
    def flops(self) -> int:
        """As `ModelConfig.flops`, from torch's counter, which includes attention."""
        return self.measured.flops + 2 * self.hidden_dim * self.num_classes

    def summary(self) -> str:
        return f"timm's {self.name}, {self.hidden_dim} features"


def import_timm() -> Any:
    """Returns the timm module; UserError if it cannot be imported."""
    try:
        return importlib.import_module("timm")
    except Exception as error:  # a mismatched torchvision raises other errors
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        fix = f"pip install {absent}. {_MATCHING}" if absent else _MATCHING
        raise UserError(f"timm cannot be imported: {first_line(error)}", fix=fix) from error


def timm_config(name: str) -> TimmConfig:
    """Returns the configuration of "timm:NAME" at timm's default size, with 1000 classes."""
    name = name.removeprefix(PREFIX)
    if "." in name:
        what = f"{PREFIX}{name} names weights; a model with random weights has no tag"
        fix = f"{PREFIX}{name.partition('.')[0]}, or allmlp.load_model for the weights"
        raise UserError(what, fix=fix)
    import_timm()
    if name in HAND_BUILT:
        return TimmConfig(name=name, image_size=HAND_BUILT[name][0])
    return TimmConfig(name=name, image_size=tuple(known_to_timm(name).input_size[1:]))


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
        raise UserError(what, fix="Use the model of that family without distillation")
    return found


def build_backbone(config: TimmConfig) -> nn.Module:
    """Returns timm's model without classifier; on the meta device only constants take memory."""
    if torch.get_default_device().type != "meta":
        return _built(config)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        with register_module_parameter_registration_hook(_to_meta):
            model = _built(config)
        if any(buffer.is_meta for buffer in model.buffers()):  # also created on meta
            model = _built(config)
            for module in model.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    module.register_parameter(name, _to_meta(module, name, parameter))
    return model


def _to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> Any:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


def _built(config: TimmConfig) -> nn.Module:
    # Not every model accepts the last two, so they are passed only if set.
    optional = {"drop_rate": config.dropout, "drop_path_rate": config.stochastic_depth}
    settings: dict[str, Any] = {"num_classes": 0, "in_chans": config.in_channels}
    settings |= {key: value for key, value in optional.items() if value}
    timm, name, size = import_timm(), config.name, config.image_size
    own = None if name in HAND_BUILT else known_to_timm(name)
    try:
        if own is None:
            _, build = HAND_BUILT[name]
            return build(**settings)
        model = timm.create_model(name, **settings)
        if own.fixed_input_size and size != tuple(own.input_size[1:]):
            if not hasattr(model, "set_input_size"):
                return timm.create_model(name, img_size=size, **settings)
            model.set_input_size(size)
        return model
    except Exception as error:  # timm raises anything for unsupported settings
        given = ", ".join(f"{key}={value}" for key, value in settings.items())
        raise UserError(f"timm cannot build {name} ({given}): {first_line(error)}") from error


def resize_timm(model: TimmModel, image_size: Size) -> None:
    """Resizes a model with its weights in place, if timm can."""
    config = replace(model.config, image_size=image_size)
    if config.name not in HAND_BUILT and known_to_timm(config.name).fixed_input_size:
        backbone: Any = model.backbone
        try:
            backbone.set_input_size(image_size)
        except Exception as error:  # many models have no such method
            own, new = size_text(model.config.image_size), size_text(image_size)
            what = f"timm cannot bring the weights of {config.name} from {own} to {new} pixels"
            fix = f"Keep {own}, or take other weights of this name"
            raise UserError(f"{what}: {first_line(error)}", fix=fix) from error
    _ = config.measured  # raises if the model does not take this size
    model.config = config


class Measured(NamedTuple):
    """Properties of a timm model without its classifier."""

    flops: int
    width: int  # C, of the features
    unpooled: tuple[int, ...] | None  # shape of `forward_features` for one image, if a tensor


@functools.lru_cache(maxsize=64)
def _measured(name: str, image_size: Size, in_channels: int) -> Measured:
    from torch.utils.flop_counter import FlopCounterMode

    config = TimmConfig(name=name, image_size=image_size, num_classes=0, in_channels=in_channels)
    # Leave the caller's random state unchanged, whether or not the result was cached.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone: Any = build_backbone(config).to("meta").eval().requires_grad_(False)
        image = torch.empty(1, in_channels, *image_size, device="meta")
        counter = FlopCounterMode(display=False)
        try:
            with torch.no_grad(), counter:
                x = backbone.forward_features(image)
                width = backbone.forward_head(x, pre_logits=True).flatten(1).shape[1]
        except Exception as error:
            what = f"timm's {name} takes no images of {size_text(image_size)} pixels"
            raise UserError(f"{what}: {first_line(error)}") from error
    shape = tuple(x.shape) if isinstance(x, Tensor) else None
    return Measured(counter.get_total_flops(), width, shape)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error message, truncated to a readable length."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]


# --- sizes of the paper's comparison systems that timm does not register, built from its parts ---


def _bit(layers: tuple[int, ...], width: int, **settings: Any) -> nn.Module:
    """BiT's ResNet-v2 (Kolesnikov et al. 2020), built as timm builds the registered sizes."""
    resnetv2 = importlib.import_module("timm.models.resnetv2")
    timm_layers = importlib.import_module("timm.layers")
    return resnetv2.ResNetV2(
        layers=layers,
        width_factor=width,
        stem_type="fixed",
        conv_layer=partial(timm_layers.StdConv2d, eps=1e-8),
        **settings,
    )


def _nfnet_f4_plus(**settings: Any) -> nn.Module:
    """NFNet-F4+ (Brock et al. 2021; deepmind-research, nfnets/base.py)."""
    nfnet = importlib.import_module("timm.models.nfnet")
    config = nfnet._dm_nfnet_cfg(depths=(5, 10, 30, 15), channels=(384, 768, 2048, 2048))
    # timm's helper has 128, the stem of the narrower F4; it is half the width of the first stage.
    return nfnet.NormFreeNet(dataclasses.replace(config, stem_chs=192), **settings)


def _halonet_h4(**settings: Any) -> nn.Module:
    """HaloNet-H4 (Vaswani et al. 2021): block 12, halo 2, r_v 1, r_b 3, depths 3, 3, 12, 3."""
    byobnet = importlib.import_module("timm.models.byobnet")
    stages = zip((3, 3, 12, 3), (64, 128, 256, 512), (1, 2, 2, 2), strict=True)
    config = byobnet.ByoModelCfg(
        blocks=tuple(
            byobnet.ByoBlockCfg(type="self_attn", d=depth, c=3 * dim, s=stride, gs=0, br=1 / 3)
            for depth, dim, stride in stages
        ),
        stem_chs=64,
        stem_type="7x7",
        stem_pool="maxpool",
        num_features=1280,
        self_attn_layer="halo",
        self_attn_kwargs={"block_size": 12, "halo_size": 2},
    )
    return byobnet.ByobNet(config, **settings)


# The source's image size, and a function of timm's settings: num_classes, in_chans, drop_rate, ...
HAND_BUILT: dict[str, tuple[Size, Callable[..., nn.Module]]] = {
    "bit_r50x2": ((224, 224), partial(_bit, (3, 4, 6, 3), 2)),
    "bit_r152x1": ((224, 224), partial(_bit, (3, 8, 36, 3), 1)),
    "bit_r200x3": ((224, 224), partial(_bit, (3, 24, 36, 3), 3)),
    "nfnet_f4_plus": ((512, 512), _nfnet_f4_plus),
    "halonet_h4": ((384, 384), _halonet_h4),
}


FAMILY = Family(
    name="timm",
    title="a model of timm",
    paper="see its page in timm, github.com/huggingface/pytorch-image-models",
    config=TimmConfig,
    build=TimmModel,
)
