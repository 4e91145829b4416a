"""Base classes of the configurations, and `Family`, which describes a model family."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from allmlp.errors import plural
from allmlp.preprocessing import Preprocessing

if TYPE_CHECKING:
    from allmlp.models.layers import ImageClassifier

Tensors = dict[str, Tensor]
Size = tuple[int, int]  # (H, W)
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Fields that all architectures share; every family adds its own.

    Field types are checked: int means a whole number of at least 1, float a probability below 1;
    tuples can be given as lists.

    Args:
        image_size: (H, W) in pixels; a single number means a square.
        num_classes: outputs of the head; 0 removes the head, and the model returns its features.
        in_channels: channels of the input images.

    Raises:
        ValueError: a value is out of range.
    """

    image_size: Size = (224, 224)
    num_classes: int = 1000
    in_channels: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, value := tuple(value))
            rule = _broken_rule(kind, value, least=0 if name == "num_classes" else 1)
            if rule is not None:
                raise ValueError(f"{name} must be {rule}, got {value!r}")

    @property
    def flops(self) -> int:
        """FLOPs per image, counting a multiply-add as two.

        Convolutions and dense layers only; biases, GELU and norms, less than one per cent in total,
        are left out, as is usual.
        """
        raise NotImplementedError

    def summary(self) -> str:
        """Returns a short description: "12 layers, patch 16, 768 channels"."""
        raise NotImplementedError

    def check_divisible(self, unit: Size, words: str) -> None:
        """Raises ValueError unless `unit` divides both image sides; `words` names the unit."""
        sides = list(zip(self.image_size, unit, strict=True))
        if any(side % part for side, part in sides):
            near = [max(1, round(side / part)) * part for side, part in sides]
            raise ValueError(
                f"image size {size_text(self.image_size)} is not divisible by {words}; "
                f"the nearest that is: {near[0]}x{near[1]}"
            )


@dataclass(frozen=True, kw_only=True)
class PatchConfig(ModelConfig):
    """Fields of networks whose tokens are the patches of a single grid throughout.

    Args:
        patch_size: (P_h, P_w) in pixels, which must divide the image; a number means a square.
        hidden_dim: channels per token.
        num_blocks: number of blocks.

    The other fields are those of `ModelConfig`.
    """

    patch_size: int | Size
    hidden_dim: int
    num_blocks: int

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width = self.patch
        if height == width:
            object.__setattr__(self, "patch_size", height)  # one form per shape
        self.check_divisible(self.patch, f"the patch size {size_text(self.patch_size)}")

    @property
    def patch(self) -> Size:
        """(P_h, P_w)."""
        patch = self.patch_size
        return patch if isinstance(patch, tuple) else (patch, patch)

    @property
    def grid(self) -> Size:
        """Patches per column and per row: (H / P_h, W / P_w)."""
        return self.image_size[0] // self.patch[0], self.image_size[1] // self.patch[1]

    @property
    def num_tokens(self) -> int:
        """S = HW / (P_h P_w), the length of the token sequence."""
        return math.prod(self.grid)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens before every block and before the head."""
        return (self.num_tokens,) * (self.num_blocks + 1)

    def flops_with(self, block_macs: int) -> int:
        """Returns `flops`, given the multiply-adds of all blocks."""
        stem = math.prod(self.image_size) * self.in_channels * self.hidden_dim
        return 2 * (stem + block_macs + self.hidden_dim * self.num_classes)

    def summary(self) -> str:
        patch = size_text(self.patch_size)
        return f"{plural(self.num_blocks, 'layer')}, patch {patch}, {self.hidden_dim} channels"


def size_text(size: int | Size) -> str:
    """Returns "16", or "16x8" for height and width."""
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


def is_integer(value: Any, least: int = 1) -> bool:
    """Returns whether a value is an integer (not a bool) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _broken_rule(kind: Any, value: Any, least: int) -> str | None:
    """Returns in words what a field of this type must be, or None if the value is."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        is_one = isinstance(value, str) and value in choices
        return None if is_one else f"one of {', '.join(choices)}"
    numbers = value if isinstance(value, tuple) else ()
    are_whole = bool(numbers) and all(map(is_integer, numbers))
    is_size = are_whole and len(numbers) == 2
    is_fraction = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    pixels = "a number of pixels or (height, width)"
    rules: dict[Any, tuple[bool, str]] = {
        int: (is_integer(value, least), f"a whole number of at least {least}"),
        str: (isinstance(value, str), "a string"),
        float: (is_fraction, "in [0, 1)"),
        Size: (is_size, pixels),
        int | Size: (is_size or is_integer(value), pixels),
        tuple[int, ...]: (are_whole, "whole numbers of at least 1"),
    }
    is_right, rule = rules.get(kind, (True, ""))
    return None if is_right else rule


def _same_shape(config: Any, named: Any) -> str | None:
    """Returns "" if a configuration differs from a named one only in size, classes and channels."""
    free = {"image_size", "num_classes", "in_channels", "stochastic_depth", "layer_scale"}
    fields = [field for field in named.__dataclass_fields__ if field not in free]
    same = all(getattr(config, field) == getattr(named, field) for field in fields)
    return "" if same else None


@dataclass(frozen=True)
class Names:
    """Tensor names that another code base uses for a family."""

    title: str  # the code base
    marker: str  # a pattern for names that only these files have
    outside: str = ""  # "theirs=ours ..." for the modules outside of the blocks
    inside: str = ""  # "theirs=ours ..." for the modules and parameters of a block
    scale_axes: int = 1  # of tensors called alpha and beta; all but the last have length one
    gelu: str | None = None  # that the code base computes, if the configuration has a choice

    def to_ours(self, tensors: Tensors) -> Tensors:
        return {self._renamed(key): _scale(key, v, 1) for key, v in tensors.items()}

    def from_ours(self, tensors: Tensors) -> Tensors:
        axes = self.scale_axes
        return {self._renamed(key, back=True): _scale(key, v, axes) for key, v in tensors.items()}

    def _renamed(self, name: str, back: bool = False) -> str:
        block = name[: match.end()] if (match := re.match(r"blocks\.\d+\.", name)) else ""
        rest = name.removeprefix(block)
        for pair in (self.inside if block else self.outside).split():
            old, new = reversed(pair.split("=")) if back else pair.split("=")
            if f"{rest}.".startswith(f"{old}."):
                return block + new + rest.removeprefix(old)
        return name


def _scale(name: str, value: Tensor, axes: int) -> Tensor:
    return value.reshape(*[1] * (axes - 1), -1) if name.endswith((".alpha", ".beta")) else value


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the rest of the package needs to know about a model family; see `catalog.py`.

    resize: (tensors by our names, old and new configuration, method) modifies the tensors in place;
        returns the new configuration and a description of the method.
    infer: (shapes by our names, (H, W) from a description or None, (H, W) that the user wants or
        None) -> the configuration of weights without a description. KeyError: a tensor is missing;
        ValueError: something does not fit.
    """

    name: str  # as in config.json
    title: str  # for messages and model cards, like the paper
    paper: str
    config: type[Any]
    build: Callable[[Any], ImageClassifier]  # with random weights
    # The named configurations, at 224 pixels and with 1000 classes.
    architectures: Mapping[str, Any] = field(default_factory=dict)
    # (Configuration, a named one) -> suffix of the name, or None if the shapes differ.
    suffix: Callable[[Any, Any], str | None] = _same_shape
    resize: Callable[[Tensors, Any, Any, str], tuple[Any, str]] | None = None
    # A pattern for tensor names that only this family has; "": files need our description.
    marker: str = ""
    infer: Callable[[Shapes, Size | None, Size | None], Any] | None = None
    # Crops of published weights with ImageNet mean and std, bicubic, by architecture; 0.875 by
    # default. None: Google's preprocessing.
    crops: Mapping[str, float] | None = None
    names: tuple[Names, ...] = ()  # of other code bases, whose files can be loaded too

    def name_of(self, config: ModelConfig) -> str | None:
        """Returns the named architecture of this shape, at any image size or class count."""
        for name, named in self.architectures.items():
            words = self.suffix(config, named)
            if words is not None:
                return f"{name}{words}"
        return None

    def published_preprocessing(self, config: ModelConfig) -> Preprocessing:
        """Returns the preprocessing of published weights, for files that do not specify it."""
        size, channels = config.image_size, config.in_channels
        if self.crops is None:
            return Preprocessing(image_size=size, channels=channels)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        is_color = channels == 3
        return Preprocessing(
            image_size=size,
            channels=channels,
            mean=mean if is_color else sum(mean) / 3,
            std=std if is_color else sum(std) / 3,
            crop=self.crops.get(self.name_of(config) or "", 0.875),
            interpolation="bicubic",
        )


def named(config: Any, fields: str, sizes: Mapping[str, Any], **shared: Any) -> dict[str, Any]:
    """Returns the named configurations of a table with a row per name and a column per field."""
    columns = fields.split()
    return {
        name: config(**dict(zip(columns, row, strict=True)), **shared)
        for name, row in sizes.items()
    }


def shape_of(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    """Returns the shape of a tensor, which must have `axes` axes; for `Family.infer`."""
    found = shapes[name]
    if len(found) != axes or math.prod(found) == 0:
        raise ValueError(f"{name} has the shape {found}, {axes} axes are expected")
    return found


def infer_patches(
    shapes: Shapes, num_tokens: int, written: Size | None, asked: Size | None
) -> dict[str, Any]:
    """Infers the fields of a `PatchConfig` from stem, head and blocks; for `Family.infer`."""
    dim, channels, tall, wide = shape_of(shapes, "stem.weight", 4)
    side = math.isqrt(num_tokens)
    for height, width in filter(None, (written, (side * tall, side * wide), asked)):
        is_whole = height % tall == width % wide == 0
        if is_whole and height * width == num_tokens * tall * wide:
            break
    else:
        raise ValueError(
            f"the weights are for {num_tokens} patches of {tall}x{wide} pixels, not a "
            "square, and the file does not say the height and width: give its own image_size"
        )
    return {
        "image_size": (height, width),
        "patch_size": (tall, wide),
        "hidden_dim": dim,
        "num_blocks": max(1, count_blocks(shapes, r"blocks\.(\d{1,6})\.")),
        "num_classes": count_classes(shapes),
        "in_channels": channels,
    }


def infer_maps(
    config: type[Any], tokens: str, hidden: str, field: str
) -> Callable[[Shapes, Size | None, Size | None], Any]:
    """Returns `Family.infer` for blocks with a dense layer `tokens` over the tokens, and another,
    `hidden`, whose number of outputs is the value of `field`."""

    def infer(shapes: Shapes, written: Size | None, asked: Size | None) -> Any:
        num_tokens, _ = shape_of(shapes, f"blocks.0.{tokens}.weight", 2)
        width, _ = shape_of(shapes, f"blocks.0.{hidden}.weight", 2)
        return config(**{field: width}, **infer_patches(shapes, num_tokens, written, asked))

    return infer


def count_classes(shapes: Shapes) -> int:
    """Returns the number of outputs of the head, 0 without a head; for `Family.infer`."""
    has_head = "head.weight" in shapes or "head.bias" in shapes
    return shape_of(shapes, "head.weight", 2)[0] if has_head else 0


def count_blocks(shapes: Shapes, pattern: str) -> int:
    """Returns 1 + the largest number that the group in `pattern` matches in the names."""
    found = (re.match(pattern, name) for name in shapes)
    count = 1 + max((int(match[1]) for match in found if match), default=-1)
    if count > len(shapes):  # a plausible count is verified later, when all names are compared
        what = f"block {count - 1:,} is there, but the file has {len(shapes):,} tensors only"
        raise ValueError(what)
    return count
