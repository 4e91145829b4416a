"""What several architectures share: stochastic depth, initialisers and the frame of a classifier.

Shapes: N batch, S tokens, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from allmlp.errors import UserError
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.process import keep_freed_memory


class StochasticDepth(nn.Module):
    """Drops a residual branch whole, for each sample on its own, in training only.

    A kept branch is scaled by 1 / (1 - probability), so that its expectation is that of evaluation,
    where nothing is dropped. Source: Huang et al. 2016; the paper's appendix B.

    Args:
        probability: of dropping the branch, 0 <= probability < 1.

    Attributes:
        kept: (N,) 1 for each sample whose branch is kept and 0 for the others, as
            `draw_stochastic_depth` draws it; None draws it here, from torch's global numbers.
    """

    kept: Tensor | None = None

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """Returns `branch`, (N, ...), with whole samples zeroed."""
        if not self.training or self.probability == 0.0:
            return branch
        keep = 1.0 - self.probability
        mask_shape = (branch.shape[0],) + (1,) * (branch.dim() - 1)
        if self.kept is None:
            mask = torch.empty(mask_shape, dtype=branch.dtype, device=branch.device)
            mask.bernoulli_(keep)
        else:
            mask = self.kept.view(mask_shape).to(branch.dtype)
        return branch * (mask / keep)

    def extra_repr(self) -> str:
        """What print(model) shows of it."""
        return f"probability={self.probability:.4g}"


def draw_stochastic_depth(model: nn.Module, num_samples: int, random: torch.Generator) -> Tensor:
    """Returns which branches of which samples are kept, float32 (branches, N).

    Drawn outside of the model and for a whole batch, it is the same whatever share of the batch a
    process or a micro-batch takes, on a CPU and on a GPU, compiled or not.

    Args:
        model: with any number of `StochasticDepth`, whose order is that of the rows.
        num_samples: N.
        random: a generator on the CPU.
    """
    keep = [1.0 - each.probability for each in _drops(model)]
    drawn = torch.rand(len(keep), num_samples, generator=random)
    return (drawn < torch.tensor(keep).view(-1, 1)).float()


def set_stochastic_depth(model: nn.Module, kept: Tensor | None) -> None:
    """Lets the model keep these branches, (branches, N), at its next calls; None: draw again."""
    for row, each in enumerate(_drops(model)):
        each.kept = None if kept is None else kept[row]


def _drops(model: nn.Module) -> list[StochasticDepth]:
    modules = (each for each in model.modules() if isinstance(each, StochasticDepth))
    return [each for each in modules if each.probability > 0.0]


def lecun_normal_(weight: Tensor) -> Tensor:
    """Fills `weight` in place as Flax initialises a kernel, and returns it.

    A normal truncated at two standard deviations, whose variance after truncation is 1 / fan_in.
    fan_in is all but the first axis: (out, in) of a dense layer, (out, in, P, P) of the stem.
    """
    variance_of_truncated_unit_normal = 0.87962566103423978**2
    fan_in = weight[0].numel()
    std = math.sqrt(1.0 / fan_in / variance_of_truncated_unit_normal)
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def is_number(value: Any, least: int = 1) -> bool:
    """Says whether a value is a whole number (and no truth value) of at least so much."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_share(value: Any) -> bool:
    """Says whether a value is a number of at least 0 and below 1: a probability that is not 1."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and 0.0 <= value < 1.0


class ModelConfig(Protocol):
    """What the configurations of all families have, each a frozen dataclass with fields of its own.

    Attributes:
        image_size: (H, W) in pixels.
        num_classes: outputs of the head; 0 for none.
        in_channels: of the input images.
        hidden_dim: C, width of the features that the head reads.
        flops: operations of one image, a multiply-add counted as two.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def image_size(self) -> tuple[int, int]: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def in_channels(self) -> int: ...

    @property
    def hidden_dim(self) -> int: ...

    @property
    def flops(self) -> int: ...

    def summary(self) -> str:
        """Returns the shape in a few words."""
        ...


class ImageClassifier(nn.Module):
    """The frame of every model here: images in, logits or features out, and what travels with it.

    Attributes:
        config: the architecture: `image_size` (H, W), `in_channels`, `num_classes`,
            `flops` of one image, `summary()` and what else the family has.
        head: from the features to the logits; None for a model without classes.
        class_names: one name a class in the order of the logits; None where they are unknown. Any
            sequence of text can be set; of another length than the logits it is a UserError.
        preprocessing: what turns an image file into the input; None until weights bring it.
        source: what `load_model` was given; None for random weights.
        why_one_size: why images of another size than the model's are refused.
    """

    config: Any
    head: nn.Linear | None
    preprocessing: Preprocessing | None = None
    source: str | None = None
    why_one_size: ClassVar[str] = "its token-mixing MLPs have one weight for each patch"

    _class_names: list[str] | None = None

    def __init__(self) -> None:
        super().__init__()
        keep_freed_memory()

    @property
    def class_names(self) -> list[str] | None:
        """See the class."""
        return self._class_names

    @class_names.setter
    def class_names(self, names: Iterable[str] | None) -> None:
        self._class_names = None if names is None else checked_names(names, _num_logits(self))

    def features(self, images: Tensor) -> Tensor:
        """Returns the pooled features (N, C) that the head reads, of images (N, channels, H, W)."""
        raise TypeError(f"{type(self).__name__} defines no features()")

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, num_classes), or the features (N, C) of a model without a head.

        Args:
            images: (N, channels, H, W), in the range that the weights were trained on.

        Raises:
            ValueError: the images have another size or other channels than the model.
        """
        x = self.features(images)
        return x if self.head is None else self.head(x)

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError unless `images` has the shape that this model was built for."""
        height, width = self.config.image_size
        if images.dim() != 4:
            raise ValueError(f"expected images (N, channels, H, W), got {tuple(images.shape)}")
        if images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"the model was built for {self.config.in_channels} input channels, "
                f"the images have {images.shape[1]}"
            )
        if tuple(images.shape[2:]) != (height, width):
            raise ValueError(
                f"the model was built for images of {height}x{width} pixels, got "
                f"{images.shape[2]}x{images.shape[3]}: {self.why_one_size}. "
                "Resize the images or create the model with that image_size"
            )


def checked_names(names: Any, num_classes: int, where: object = "class_names") -> list[str]:
    """Returns class names as a list.

    Raises:
        UserError: they are not `num_classes` names, or not text.
    """
    is_list = isinstance(names, Iterable) and not isinstance(names, str | bytes | Mapping | Set)
    listed = list(names) if is_list else [names]
    wrong = [name for name in listed if not isinstance(name, str)]
    if wrong or not is_list:
        what = f"class names are a list of text, got {(wrong or listed)[0]!r:.200}"
        raise UserError(what, where=where, fix="One name a class, in the order of the logits")
    if len(listed) != num_classes:
        what = f"there are {len(listed):,} class names for {num_classes:,} classes"
        raise UserError(what, where=where, fix="One name a class, in the order of the logits")
    return [str(name) for name in listed]


def _num_logits(model: ImageClassifier) -> int:
    return getattr(getattr(model, "head", None), "out_features", model.config.num_classes)


def classes_of(model: ImageClassifier, *, or_numbers: bool = False) -> list[str]:
    """Returns the model's class names.

    Args:
        model: any.
        or_numbers: call the classes "0", "1", ... where the model carries no names.

    Raises:
        UserError: it carries none, or has no classes at all.
    """
    if not model.class_names:
        head = getattr(model, "head", None)  # an exported file keeps it to itself
        if _num_logits(model) == 0:
            what = "the model has no head: it gives features, not classes"
            raise UserError(what, fix="Load it without num_classes=0, or use model.features()")
        if head is not None and not head.weight.any():
            raise UserError(
                f"the head for {model.config.num_classes} classes is new (all zeros): it has "
                "learned nothing yet",
                fix="Train it first, or load the weights without num_classes",
            )
        if or_numbers:
            return [str(number) for number in range(_num_logits(model))]
        fix = "Set them in Python, once: model = am.load_model(FILE); model.class_names = [...]; "
        fix += "am.save_model(model, 'named.safetensors')"
        if head is None:
            fix = "Export it again from a model that carries them"
        raise UserError("the model carries no class names", where=model.source, fix=fix)
    return checked_names(model.class_names, _num_logits(model))  # somebody may have added one


def preprocessing_of(model: ImageClassifier) -> Preprocessing:
    """Returns the model's preprocessing, or Google's for its image size where it carries none."""
    if model.preprocessing is not None:
        return model.preprocessing
    return Preprocessing(image_size=model.config.image_size, channels=model.config.in_channels)
