"""Whose names a file's tensors have, which architecture they make, and what does not fit.

Shapes: P patch side, C channels, S tokens, D_S and D_C hidden units, L blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from allmlp.errors import UserError
from allmlp.models.catalog import architecture_name, model_from_config
from allmlp.models.layers import ModelConfig
from allmlp.models.mixer import MixerConfig
from allmlp.weights import google, siblings, timm

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def _as_it_is(tensors: Tensors) -> Tensors:
    return dict(tensors)


@dataclass(frozen=True)
class Layout:
    """One way of naming and laying out a model's tensors.

    Attributes:
        title: how it is called in messages.
        knows: whether a name is one of this layout.
        to_ours, from_ours: between its names and layout and ours.
        gelu: of models whose weights are so named.
        is_loose: whether names and shapes leave a choice (numbers, axes of length one); they are
            then compared by our names.
        family: of the models that have such names, as in `catalog.FAMILIES`.
    """

    title: str
    knows: Callable[[str], bool]
    to_ours: Callable[[Tensors], Tensors]
    from_ours: Callable[[Tensors], Tensors]
    gelu: Literal["tanh", "exact"]
    is_loose: bool = False
    family: str = "mixer"


_OUR_NAMES = re.compile(
    r"(?:stem|pre_head_layer_norm|head|blocks\.\d+\.(?:layer_norm_[01]|"
    r"(?:token|channel)_mixing\.dense_[01]))\.(?:weight|bias)"
)
OURS = Layout("allmlp", lambda n: bool(_OUR_NAMES.fullmatch(n)), _as_it_is, _as_it_is, "tanh")
_IN_TIMM_MODEL = re.compile(r"backbone\..+|head\.(?:weight|bias)")


_RESNET_NAMES = re.compile(
    r"stem\.weight|(?:norm|head)\.(?:weight|bias)|"
    r"blocks\.\d+\.(?:norm_[01]\.(?:weight|bias)|(?:conv_[01]|shortcut)\.weight)"
)


def _is_small_resnet(name: str) -> bool:
    return bool(_RESNET_NAMES.fullmatch(name))


def _is_in_timm_model(name: str) -> bool:
    return bool(_IN_TIMM_MODEL.fullmatch(name))


LAYOUTS = (
    OURS,
    Layout("Google", google.is_second, google.to_ours, google.from_ours, "tanh"),
    Layout(
        "Google, first generation",
        google.is_first,
        google.to_ours,
        google.first_from_ours,
        "tanh",
        is_loose=True,
    ),
    Layout("timm", timm.is_timm, timm.to_ours, timm.from_ours, "exact"),
    Layout("CycleMLP", siblings.is_cycle_mlp, _as_it_is, _as_it_is, "exact", family="cycle_mlp"),
    Layout(
        "Vision Permutator",
        siblings.is_permutator,
        _as_it_is,
        _as_it_is,
        "exact",
        family="vision_permutator",
    ),
    Layout("small ResNet", _is_small_resnet, _as_it_is, _as_it_is, "exact", family="small_resnet"),
    Layout("timm model", _is_in_timm_model, _as_it_is, _as_it_is, "exact", family="timm"),
)


def layout_of(tensors: Tensors, path: Path) -> Layout:
    """Returns the layout that knows most of the names.

    Raises:
        UserError: none knows any.
    """
    best = max(LAYOUTS, key=lambda layout: sum(map(layout.knows, tensors)))
    if not any(map(best.knows, tensors)):
        first = ", ".join(list(tensors)[:4])
        what = f"no MLP-Mixer: none of the {len(tensors)} tensors has a name of one ({first}, ...)"
        fix = "Google's, timm's and our own names are known, CycleMLP's and Vision Permutator's"
        raise UserError(what, where=path, fix=fix)
    return best


def infer_config(
    shapes: Shapes,
    layout: Layout,
    path: Path,
    image_size: tuple[int, int] | None = None,
    said_size: tuple[int, int] | None = None,
) -> ModelConfig:
    """Returns the architecture that the shapes of a file's tensors speak of.

    Args:
        shapes: by our names and layout.
        layout: whose file it is; it decides the GELU.
        path: for messages.
        image_size: (H, W) that was asked for. It settles the weights' own size where the number of
            tokens is not a square; otherwise the grid is taken to be square.
        said_size: (H, W) that somebody wrote beside the file, which comes first where it fits.

    Raises:
        UserError: a tensor that is needed is missing, or the shapes make no model of the layout's
            family.
    """
    if layout.family in ("timm", "small_resnet"):
        what = f"these are weights of a {layout.title}, and the file does not say of which"
        raise UserError(what, where=path, fix="Bring the config.json that was written beside it")
    if layout.family == "cycle_mlp":
        return siblings.infer_cycle_mlp(shapes, path, said_size)
    if layout.family == "vision_permutator":
        return siblings.infer_permutator(shapes, path, said_size)

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None:
            key = next(iter(layout.from_ours({name: torch.empty((1,) * dimensions)})))
            what = f"no MLP-Mixer: the names are {layout.title}'s, but {key} is missing"
            raise UserError(what, where=path)
        if len(found) != dimensions:
            what = f"no MLP-Mixer: {name} has the shape {found}, {dimensions} axes are expected"
            raise UserError(what, where=path)
        return found

    dim, channels, patch, patch_width = shape("stem.weight", 4)
    if patch != patch_width:
        raise UserError(f"the patch is {patch}x{patch_width} pixels, not square", where=path)
    numbers = (re.match(r"blocks\.(\d{1,6})\.", name) for name in shapes)
    blocks = {int(found[1]) for found in numbers if found}
    num_blocks = max(blocks, default=0) + 1
    if num_blocks > len(shapes):  # check_shapes names what is missing of a likely number
        what = f"block {max(blocks):,} is there, but the file has {len(shapes):,} tensors only"
        raise UserError(what, where=path)
    tokens_mlp_dim, num_tokens = shape("blocks.0.token_mixing.dense_0.weight", 2)
    channels_mlp_dim, _ = shape("blocks.0.channel_mixing.dense_0.weight", 2)
    has_head = "head.weight" in shapes or "head.bias" in shapes
    num_classes = shape("head.weight", 2)[0] if has_head else 0
    own_size = _size_of(num_tokens, patch, said_size, image_size, path)
    try:
        return MixerConfig(
            image_size=own_size,
            patch_size=patch,
            hidden_dim=dim,
            num_blocks=num_blocks,
            tokens_mlp_dim=tokens_mlp_dim,
            channels_mlp_dim=channels_mlp_dim,
            num_classes=num_classes,
            in_channels=channels,
            gelu=layout.gelu,
        )
    except ValueError as error:
        raise UserError(f"no MLP-Mixer: {error}", where=path) from error


def _size_of(
    num_tokens: int,
    patch: int,
    said: tuple[int, int] | None,
    asked: tuple[int, int] | None,
    path: Path,
) -> tuple[int, int]:
    def fits(size: tuple[int, int] | None) -> bool:
        if size is None or size[0] % patch or size[1] % patch:
            return False
        return size[0] * size[1] == num_tokens * patch**2

    side = math.isqrt(num_tokens)
    for size in (said, (side * patch, side * patch), asked):
        if size is not None and fits(size):
            return size
    raise UserError(
        f"the weights are for {num_tokens} patches of {patch}x{patch} pixels, which is no square: "
        "the file does not say the height and width",
        where=path,
        fix="Give their own image size as image_size=(H, W), on the command line --image-size HxW",
    )


def check_shapes(config: ModelConfig, layout: Layout, tensors: Tensors, path: Path) -> None:
    """Compares a file's tensors, by its own names, with what an architecture wants.

    Raises:
        UserError: names each tensor that is missing, extra, misshapen or not of floating point.
    """
    if layout.is_loose:
        tensors, layout = layout.to_ours(tensors), OURS
    num_blocks = getattr(config, "num_blocks", 0)
    if num_blocks > len(tensors):  # before a description's million blocks are built
        what = f"the description says {num_blocks:,} blocks, the file has {len(tensors)} "
        raise UserError(f"{what}tensors", where=path)
    try:
        with torch.device("meta"):
            wanted = layout.from_ours(model_from_config(config).state_dict())
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond what a tensor can have
        first = str(error).splitlines()[0]
        raise UserError(f"the architecture cannot be built: {first}", where=path) from error
    expected = {name: tuple(value.shape) for name, value in wanted.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    problems = [f"missing: {name} {expected[name]}" for name in expected if name not in found]
    problems += [f"extra: {name} {found[name]}" for name in found if name not in expected]
    problems += [
        f"misshapen: {name} is {found[name]}, the architecture wants {expected[name]}"
        for name in expected
        if name in found and expected[name] != found[name]
    ]
    problems += [
        f"not floating point: {name} is {str(tensors[name].dtype).removeprefix('torch.')}"
        for name in expected
        if name in found
        and wanted[name].is_floating_point()
        and not tensors[name].is_floating_point()
    ]
    if problems:
        more = [f"... and {len(problems) - 20} more"] * (len(problems) > 20)
        shown = "\n  ".join(problems[:20] + more)
        what = f"the tensors do not fit the architecture ({describe(config)}):\n  {shown}"
        fix = "Is it the right file, and the right config.json beside it?"
        raise UserError(what, where=path, fix=fix)


def describe(config: ModelConfig) -> str:
    """Returns an architecture in words: "mixer_b16, 224x224 pixels, 1,000 classes"."""
    name = architecture_name(config)
    height, width = config.image_size
    classes = f"{config.num_classes:,} classes" if config.num_classes else "no head"
    return f"{name or config.summary()}, {height}x{width} pixels, {classes}"


def precisely(config: ModelConfig, format: str) -> list[str]:
    """Returns what another program will do differently with a model in its own format."""
    if not isinstance(config, MixerConfig):
        return []
    gelu = {"google": ("tanh", "Google's code"), "timm": ("exact", "timm")}.get(format)
    if gelu is None or gelu[0] == config.gelu:
        return []
    what = f"{gelu[1]} computes the {gelu[0]} GELU, this model the {config.gelu} one"
    return [f"{what}: its logits will differ in the fourth digit"]
