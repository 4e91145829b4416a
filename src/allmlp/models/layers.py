"""Shared by all networks: stochastic depth, initialisation, and the base classes of classifiers.

Shapes: N batch, S tokens, C channels, H W pixels.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from allmlp.decision import Decision
from allmlp.errors import UserError
from allmlp.names import HUB_NAME, NAME
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.process import keep_freed_memory


class StochasticDepth(nn.Module):
    """Drops whole residual branches per sample, in training only (Huang et al. 2016).

    Kept branches are scaled by 1 / (1 - probability), so that the expectation matches evaluation.
    """

    # (N,) with 1 for samples that keep the branch, from `draw_stochastic_depth`; None: draw here.
    kept: Tensor | None = None

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:  # (N, ...) -> (N, ...)
        if not self.training or self.probability == 0.0:
            return branch
        keep = 1.0 - self.probability
        mask_shape = (branch.shape[0],) + (1,) * (branch.dim() - 1)
        if self.kept is None:
            mask = branch.new_empty(mask_shape).bernoulli_(keep)
        else:
            mask = self.kept.view(mask_shape).to(branch.dtype)
        return branch * (mask / keep)

    def extra_repr(self) -> str:
        return f"probability={self.probability:.4g}"


def draw_stochastic_depth(model: nn.Module, num_samples: int, random: torch.Generator) -> Tensor:
    """Draws which branches every sample keeps, float32 (branches, N): outside the model for a whole
    batch, so the result is the same for any processes, micro-batches, device and compilation."""
    keep = [1.0 - drop.probability for drop in _drops(model)]
    drawn = torch.rand(len(keep), num_samples, generator=random)
    return (drawn < torch.tensor(keep).view(-1, 1)).float()


def set_stochastic_depth(model: nn.Module, kept: Tensor | None) -> None:
    """Sets the branches, (branches, N), to keep from now on; None: draw in every call."""
    for row, drop in enumerate(_drops(model)):
        drop.kept = None if kept is None else kept[row]


def _drops(model: nn.Module) -> list[StochasticDepth]:
    drops = (module for module in model.modules() if isinstance(module, StochasticDepth))
    return [drop for drop in drops if drop.probability > 0.0]


def lecun_normal_(weight: Tensor) -> Tensor:
    """Fills `weight`, (out, in, ...), in place with Flax's lecun-normal, and returns it: a normal
    truncated at two standard deviations, with variance 1 / fan_in after truncation."""
    variance_of_truncated_unit_normal = 0.87962566103423978**2
    fan_in = weight[0].numel()
    std = math.sqrt(1.0 / fan_in / variance_of_truncated_unit_normal)
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Classifier(Protocol):
    """Anything with logits and a description of them: an `ImageClassifier` or an exported file,
    which takes pixels as well, has no weights and runs on the CPU."""

    config: Any
    preprocessing: Preprocessing | None
    decision: Decision

    @property
    def class_names(self) -> list[str] | None: ...
    @property
    def source(self) -> str | None: ...
    @property
    def runtime(self) -> str | None: ...  # name and version, for an exported file
    @property
    def precision(self) -> str | None: ...  # of an exported file
    @property
    def device(self) -> torch.device: ...
    @property
    def num_parameters(self) -> int: ...
    def __call__(self, images: Tensor) -> Tensor: ...


def _public(name: str) -> Any:
    """A public function of a higher floor, which a method of the networks is a shortcut to."""
    return getattr(importlib.import_module(NAME), name)


class ImageClassifier(nn.Module):
    """Base class of all models: images to logits or features, plus the metadata of the weights.

    Residual blocks live under `blocks.` or `network.`.

    Attributes:
        config: the architecture, a `ModelConfig`.
        head: features to logits; None for a model without classes.
        class_names: one name per class, in the order of the logits; None if unknown. Any sequence
            of strings can be assigned; UserError if its length differs from the number of logits.
        preprocessing: from an image file to the input; None until weights are loaded.
        decision: from the logits to probabilities and answers.
        source: what `load_model` was given; None for random weights.
        why_one_size: why images of a different size than the model's are an error.
    """

    config: Any
    head: nn.Linear | None
    preprocessing: Preprocessing | None = None
    decision: Decision = Decision()
    source: str | None = None
    runtime: str | None = None  # torch
    precision: str | None = None  # chosen by who computes
    why_one_size: ClassVar[str] = "its token-mixing MLPs have one weight for each patch"

    _class_names: list[str] | None = None

    def __init__(self) -> None:
        super().__init__()
        keep_freed_memory()

    @property
    def class_names(self) -> list[str] | None:
        return self._class_names

    @class_names.setter
    def class_names(self, names: Iterable[str] | None) -> None:
        self._class_names = None if names is None else checked_names(names, num_logits(self))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def features(self, images: Tensor) -> Tensor:
        """Returns the pooled features (N, C) that the head reads; takes and raises as `forward`."""
        raise TypeError(f"{type(self).__name__} defines no features()")

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, num_classes), or the features (N, C) of a model without a head.

        Args:
            images: (N, channels, H, W), in the value range of the training images.

        Raises:
            ValueError: the images have another size or number of channels than the model.
        """
        x = self.features(images)
        return x if self.head is None else self.head(x)

    # Named as in huggingface_hub's ModelHubMixin, which would be imported with every network.
    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, **options: Any):
        """Returns `am.load_model(source, **options)`, if it is a `cls`.

        Args:
            source: any source of `load_model`, or owner/name on the hub.
            revision: branch, tag or commit on the hub.
            **options: of `load_model`, such as `image_size` and `num_classes`.
        """
        text = str(source)
        if re.fullmatch(HUB_NAME, text) and not Path(text).exists():
            text = f"hf:{text}"
        model = _public("load_model")(f"{text}@{revision}" if revision else text, **options)
        if not isinstance(model, cls):
            what = f"{source} is a {type(model).__name__}, not a {cls.__name__}"
            raise UserError(what, fix="am.load_model(...) loads every kind", code="wrong-type")
        return model

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the model to a folder, as `am.save_model`, and replaces one that is there."""
        return _public("save_model")(self, folder, overwrite=True)

    def push_to_hub(self, repo: str, *, token: str | None = None, **options: Any) -> Any:
        """Uploads the model to owner/name on the hub, as `am.push`."""
        return _public("push")(self, repo, token=token, **options)

    def biases_without_effect(self) -> list[nn.Parameter]:
        """Returns biases that change no logit, which inference with packed weights skips."""
        return []

    def transform(self, image: Any) -> Tensor:
        """Returns the model's input, float32 (channels, H, W), prepared as `am.predict` does.

        Args:
            image: a PIL image, an encoded image (bytes), or uint8 pixels, (H, W) or (H, W, 3).
        """
        from allmlp.data.image import encoded_image  # decoders, which a model does without
        from allmlp.data.transforms import model_input

        return model_input(encoded_image(image), "the image", preprocessing_of(self))[0][0]

    def _repr_html_(self) -> str:
        from allmlp.models.notebook import model_html

        return model_html(self)

    def check_images(self, images: Tensor) -> None:
        check_image_shape(images, self.config, self.why_one_size)


def check_image_shape(images: Tensor, config: Any, why_one_size: str) -> None:
    """Raises ValueError unless `images` has the shape that the model was built for."""
    height, width = config.image_size
    if images.dim() != 4:
        raise ValueError(f"expected images (N, channels, H, W), got {tuple(images.shape)}")
    _, channels, high, wide = images.shape
    if channels != config.in_channels:
        wanted = f"the model was built for {config.in_channels} input channels"
        raise ValueError(f"{wanted}, the images have {channels}")
    if (high, wide) != (height, width):
        wanted = f"the model was built for images of {height}x{width} pixels, got {high}x{wide}"
        fix = "Resize the images or create the model with that image_size"
        raise ValueError(f"{wanted}: {why_one_size}. {fix}")


class PatchClassifier(ImageClassifier):
    """Stem, blocks of constant width, norm, mean over tokens, head.

    Subclasses define the blocks, and the norm and its name.
    """

    last_norm: ClassVar[str] = "pre_head_layer_norm"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        patch, dim = config.patch, config.hidden_dim
        self.stem = nn.Conv2d(config.in_channels, dim, kernel_size=patch, stride=patch)
        self.blocks = nn.Sequential(*(self.block(index) for index in range(config.num_blocks)))
        self.add_module(self.last_norm, self.norm())
        self.head = nn.Linear(dim, config.num_classes) if config.num_classes else None
        if not self.stem.weight.is_meta:  # drawing there would import the compiler (seconds)
            self.initialize()

    def block(self, index: int) -> nn.Module:
        """Returns a new block, (N, S, C) -> (N, S, C)."""
        raise NotImplementedError

    def norm(self) -> nn.Module:
        """Returns the layer before the mean over tokens."""
        return nn.LayerNorm(self.config.hidden_dim, eps=1e-6)

    def initialize(self) -> None:
        """Draws new weights as Flax does: lecun-normal kernels, zero biases, zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                lecun_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)

    def features(self, images: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, C)
        """Returns the input of the head: the mean over tokens of the normalised last layer."""
        self.check_images(images)
        x = self.stem(images).flatten(2).transpose(1, 2)  # (N, S, C), row-major over the grid
        # Under autocast the stem returns bfloat16, but the residual stream stays in the weights'
        # float32. Channels must be contiguous, or every LayerNorm would copy the tokens.
        x = x.to(self.stem.weight.dtype).contiguous()
        return self.get_submodule(self.last_norm)(self.blocks(x)).mean(dim=1)


def is_hidden_kernel(name: str, parameter: Tensor) -> bool:
    """Returns whether a parameter is a matrix in a residual block, which Muon orthogonalises."""
    is_kernel = parameter.dim() == 2 and not name.endswith("bias")
    return is_kernel and name.startswith(("blocks.", "network."))


def num_logits(model: Classifier) -> int:
    """Returns the outputs of the head, which may have been replaced, not the configuration's."""
    head = getattr(model, "head", ...)  # not of an exported file
    if head is None:
        return 0
    return head.out_features if isinstance(head, nn.Linear) else model.config.num_classes


def checked_names(names: Any, num_classes: int, where: object = "class_names") -> list[str]:
    """Returns class names as a list; UserError if they are invalid."""
    is_list = isinstance(names, Iterable) and not isinstance(names, str | bytes | Mapping | Set)
    listed = list(names) if is_list else [names]
    wrong = listed if not is_list else [name for name in listed if not isinstance(name, str)]
    if wrong or len(listed) != num_classes:
        what = f"there are {len(listed):,} class names for {num_classes:,} classes"
        if wrong:
            what = f"class names must be a list of strings, got {wrong[0]!r:.200}"
        raise UserError(what, where=where, fix="One name per class, in the order of the logits")
    return [str(name) for name in listed]


def classes_of(model: Classifier, *, or_numbers: bool = False) -> list[str]:
    """Returns the class names of a model; without any, "0", "1", ... if `or_numbers`."""
    count = num_logits(model)
    if model.class_names:
        return checked_names(model.class_names, count)  # the list may have been modified
    check_trained(model)
    if or_numbers:
        return [str(number) for number in range(count)]
    fix = "Set class_names to a file of them; convert stores them with the weights"
    if not isinstance(model, ImageClassifier):
        fix = "Export it again from a model that carries them"
    raise UserError("the model carries no class names", where=model.source, fix=fix)


def check_trained(model: Classifier) -> None:
    """Raises UserError for a model without a head, or with a head of zeros."""
    count, weight = num_logits(model), getattr(getattr(model, "head", None), "weight", None)
    if count == 0:
        what = "the model has no head: it gives features, not classes"
        raise UserError(what, fix="Load it without num_classes=0, or use model.features()")
    if weight is not None and not weight.any():
        what = f"the head for {count} classes is new (all zeros): it has learned nothing yet"
        raise UserError(what, fix="Train it first, or load the weights without num_classes")


def preprocessing_of(model: Classifier) -> Preprocessing:
    """Returns the model's preprocessing, or Google's for its image size if it has none."""
    if model.preprocessing is not None:
        return model.preprocessing
    size, channels = model.config.image_size, model.config.in_channels
    if channels not in (1, 3):  # not an image
        return Preprocessing(image_size=size, channels=channels, mean=0.0, std=1.0, kind="arrays")
    return Preprocessing(image_size=size, channels=channels)


def flops_text(flops: int) -> str:
    """Returns "25.2 GFLOPs", or "2.77 MFLOPs" for small numbers."""
    return f"{flops / 1e9:.3g} GFLOPs" if flops >= 1e8 else f"{flops / 1e6:.3g} MFLOPs"
