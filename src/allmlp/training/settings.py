"""The sections of a run's settings: checked dataclasses.

Every value is one somebody chose; one that would have no effect is refused, never ignored. What a
recipe chose gives way: see `TrainConfig.with_values`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from allmlp.errors import UserError
from allmlp.training.values import require


class Idle(NamedTuple):
    """A setting that has no effect under some values of its section, and is `value` then.

    Attributes:
        name: of the setting.
        value: of a setting without effect.
        is_idle: given the section, whether the setting has no effect.
        why: it has none; {0} is the section.
    """

    name: str
    value: Any
    is_idle: Callable[[Any], bool]
    why: str


_CROP, _NAME, _DECAY = "with augment.crop={0.crop}", "with {0.name}", "with {0.schedule} decay"
_MIX, _AUGMENT = "without mixup and cutmix", "without augment.randaugment"
_SEED = "without data.permutation"
# Section, "" for the settings outside of any, -> what depends on its other settings.
IDLE: dict[str, tuple[Idle, ...]] = {
    "": (
        Idle("label_smoothing", 0.0, lambda s: s.loss == "sigmoid", "with the sigmoid loss"),
        Idle("checkpoint_every", None, lambda s: s.keep_checkpoints == 0, "where none are kept"),
    ),
    "data": (
        Idle("fraction_seed", 0, lambda s: s.fraction == 1.0, "with all of the images"),
        Idle("permutation_patch", None, lambda s: s.permutation != "patches", "without patches"),
        Idle("permutation_seed", 0, lambda s: s.permutation in (None, "none"), _SEED),
    ),
    "augment": (
        Idle("mix_until", 1.0, lambda s: not (s.mixup or s.cutmix), _MIX),
        Idle("crop_area", (0.05, 1.0), lambda s: s.crop != "inception", _CROP),
        Idle("crop_padding", 0.125, lambda s: s.crop != "padded", _CROP),
        Idle("randaugment_layers", 2, lambda s: s.randaugment is None, _AUGMENT),
    ),
    "optimizer": (
        Idle("weight_decay", 0.0, lambda s: s.name == "sgd", _NAME),
        Idle("beta2", 0.999, lambda s: s.name == "sgd", _NAME),
        Idle("momentum", 0.95, lambda s: s.name != "muon", _NAME),
        Idle("sharpness_from", 0.0, lambda s: not s.sharpness, "without sharpness"),
        Idle("decay_at", (0.3, 0.6, 0.9), lambda s: s.schedule != "steps", _DECAY),
        Idle("decay_factor", 0.1, lambda s: s.schedule != "steps", _DECAY),
        Idle("final", 0.0, lambda s: s.schedule == "steps", "with stepwise decay"),
    ),
}


def refuse_idle(settings: object, section: str) -> None:
    """Raises UserError for a setting that was given and has no effect."""
    for each in IDLE[section]:
        value = getattr(settings, each.name)
        if value != each.value and each.is_idle(settings):
            key = f"{section}.{each.name}" if section else each.name
            what = f"{key}={value} has no effect {each.why.format(settings)}"
            raise UserError(what, fix=f"Leave {key} out")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which network to train.

    Args:
        name: of `list_models()`; "" where `weights` bring the architecture.
        image_size: pixels, a number or (H, W); None keeps that of the `weights`.
        overrides: other fields of its configuration, as `create_model` takes them; beside
            `weights` only dropout and stochastic_depth, which need no other tensors.
        weights: trained weights to begin from, as `load_model` takes them; None draws new ones.
        growth: how `weights` reach another image size, as `load_model` takes it.
        trained: "all" parameters, or the "head" alone: a linear probe on frozen features.
        head_bias: what the biases of a new head begin with; about the logarithm of a class's share
            with the sigmoid loss, so that training need not unlearn a guess of one half.
    """

    name: str = "mixer_s16"
    image_size: int | tuple[int, int] | None = 224
    overrides: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    growth: Literal["auto", "block-diagonal", "resample"] = "auto"
    trained: Literal["all", "head"] = "all"
    head_bias: float = 0.0

    def __post_init__(self) -> None:
        for name in ("name", "image_size", "num_classes"):
            if name in self.overrides:
                other = "is that of the data" if name == "num_classes" else f"is model.{name}"
                raise UserError(f"model.overrides.{name} {other}", fix="Leave it out here")
        if self.weights is None:
            require(bool(self.name), "model.name", self.name, "a name of `mixer models`")
            require(self.image_size is not None, "model.image_size", None, "a number of pixels")
            if self.growth != "auto":
                what = f"model.growth={self.growth} has no effect without weights to grow"
                raise UserError(what, fix="--set model.weights=CHECKPOINT")
            if self.trained == "head":
                what = "model.trained=head would leave random weights behind the head as they are"
                raise UserError(what, fix="--set model.weights=CHECKPOINT, or model.trained=all")
            return
        if self.name:
            what = f"model.name={self.name} has no effect: the weights bring their architecture"
            raise UserError(what, where=f"model.weights={self.weights}", fix="--set model.name=")
        if self.growth != "auto" and self.image_size is None:
            what = f"model.growth={self.growth} has no effect at the weights' own image size"
            raise UserError(what, fix="--image-size PIXELS")
        if self.trained == "head" and any(self.overrides.values()):
            name = next(each for each, value in self.overrides.items() if value)
            what = f"model.overrides.{name} has no effect on features that are not trained"
            raise UserError(what, fix=f"--set model.overrides.{name}=0")
        others = sorted(set(self.overrides) - {"dropout", "stochastic_depth"})
        if others:
            what = f"model.overrides.{others[0]} cannot be changed: it is that of the weights"
            raise UserError(what, where=f"model.weights={self.weights}", fix="Leave it out")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images to learn from.

    Args:
        source: as `allmlp.data.sources` describes.
        holdout: share of every class to hold out for validation; None takes the validation images
            that the data brings, or else a tenth; 0 trains on all of the training images and
            validates on none, so that the last weights are kept and not the best.
        fraction: share of the training images to use, drawn at random; a smaller one is part of a
            larger one (the paper's figure 2).
        fraction_seed: of that draw.
        without: a list of images to leave out, as `mixer data check --drop-list` writes it.
        resize: how evaluation fits a picture to the model, see `allmlp.preprocessing`.
        crop: share of the resized picture's side that it keeps, of small images too (the paper's
            is 0.875); None is that of the weights, or 0.875, with small images enlarged whole.
        exif_orientation: turn photographs upright by their EXIF tag; the paper's code does not.
        permutation: of the pixels of every picture, see `allmlp.preprocessing` (figure 4 of the
            paper); None is none, and that of the `weights` where the run begins with some.
        permutation_patch: side of the patches in pixels, for "patches".
        permutation_seed: of the draw.
        max_bad: the largest share of undecodable images at which a run goes on; up to 5 images stop
            none, unless this is 0, they are half of a split or all images of a class.
        num_workers: processes that decode; None chooses by the size of the data.
        timeout: seconds without a batch after which a worker is taken for hanging; 0 for never.
    """

    source: str = "digits"
    holdout: float | None = None
    fraction: float = 1.0
    fraction_seed: int = 0
    without: str | None = None
    resize: Literal["resize-crop", "resmall-crop", "squash"] = "resmall-crop"
    crop: float | None = None
    exif_orientation: bool = True
    permutation: Literal["none", "patches", "pixels"] | None = None
    permutation_patch: int | None = None
    permutation_seed: int = 0
    max_bad: float = 0.01
    num_workers: int | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        fits = self.holdout is None or 0.0 <= self.holdout < 1.0
        require(fits, "data.holdout", self.holdout, "at least 0 and below 1")
        fits = self.crop is None or 0.0 < self.crop <= 1.0
        require(fits, "data.crop", self.crop, "above 0 and at most 1")
        if self.crop is not None and self.resize == "squash":
            what = f"data.crop={self.crop:g} has no effect with data.resize=squash"
            raise UserError(what, fix="--set data.resize=resmall-crop")
        require(0.0 <= self.max_bad <= 1.0, "data.max_bad", self.max_bad, "from 0 to 1")
        workers = self.num_workers
        require(workers is None or workers >= 0, "data.num_workers", workers, "at least 0")
        require(0.0 < self.fraction <= 1.0, "data.fraction", self.fraction, "above 0, at most 1")
        require(self.fraction_seed >= 0, "data.fraction_seed", self.fraction_seed, "at least 0")
        refuse_idle(self, "data")
        require(self.timeout >= 0.0, "data.timeout", self.timeout, "at least 0")
        patch, seed = self.permutation_patch, self.permutation_seed
        require(patch is None or patch > 0, "data.permutation_patch", patch, "at least 1")
        require(seed >= 0, "data.permutation_seed", seed, "at least 0")
        if patch is None and self.permutation == "patches":
            what = "data.permutation=patches needs data.permutation_patch"
            raise UserError(what, fix="--set data.permutation_patch=16")


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """What happens to training images at random; the order is that of the fields.

    Args:
        crop: "inception" cuts out a random rectangle, "none" resizes as evaluation does, "padded"
            does so and moves the picture by whole pixels (for small ones), "random" squashes it to
            8/7 of the model's size (one over the model's `crop`) and cuts out a random part.
        crop_area: the rectangle's smallest and largest share of the picture.
        crop_padding: how far "padded" moves at most, share of the picture's side.
        flip: mirror every other picture left to right.
        rotate: largest angle, degrees.
        scale: largest relative change of width and height.
        shear: largest slant, pixels a pixel.
        shift: largest move, share of the picture's side.
        elastic: standard deviation of a smooth random warp, share of the picture's side.
        randaugment: magnitude of RandAugment, about 0 to 20; None for none.
        randaugment_layers: operations a picture.
        erasing: probability of noise in a random rectangle.
        mixup: strength p of mixup, 0 for none.
        cutmix: strength of cutmix, 0 for none; with mixup as well a coin decides each step.
        mix_until: share of the run after which there is no mixup and no cutmix any more.
    """

    crop: Literal["inception", "padded", "random", "none"] = "inception"
    crop_area: tuple[float, float] = (0.05, 1.0)
    crop_padding: float = 0.125
    flip: bool = True
    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    elastic: float = 0.0
    randaugment: float | None = None
    randaugment_layers: int = 2
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_until: float = 1.0

    def __post_init__(self) -> None:
        require(0.0 < self.mix_until <= 1.0, "augment.mix_until", self.mix_until, "in (0, 1]")
        refuse_idle(self, "augment")
        low, high = self.crop_area
        rule = "two shares, 0 < smallest <= largest <= 1"
        require(0.0 < low <= high <= 1.0, "augment.crop_area", self.crop_area, rule)
        require(0.0 <= self.rotate <= 180.0, "augment.rotate", self.rotate, "from 0 to 180")
        for name in ("scale", "shear", "shift", "elastic", "crop_padding"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"augment.{name}", value, "at least 0 and below 1")
        magnitude, layers = self.randaugment, self.randaugment_layers
        fits = magnitude is None or 0.0 <= magnitude <= 30.0
        require(fits, "augment.randaugment", magnitude, "from 0 to 30")
        require(1 <= layers <= 16, "augment.randaugment_layers", layers, "from 1 to 16")
        require(0.0 <= self.erasing <= 1.0, "augment.erasing", self.erasing, "from 0 to 1")
        for name in ("mixup", "cutmix"):
            require(
                getattr(self, name) >= 0.0, f"augment.{name}", getattr(self, name), "at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How the weights move.

    Args:
        name: "adamw" (Adam with decoupled decay), "sgd" (with momentum), or "muon": momentum made
            orthogonal for the matrices of the mixer blocks, Adam for everything else.
        learning_rate: at the end of the warm-up; Muon's updates are scaled to take Adam's rates.
        weight_decay: decoupled, times the learning rate; on kernels only.
        beta1, beta2: of Adam; beta1 is the momentum of SGD.
        momentum: of Muon.
        clip_norm: global norm to which the gradient is clipped; 0 for none.
        schedule: "cosine" or "linear", from the warm-up's end down to `final` times the rate; or
            "steps", which multiplies the rate by `decay_factor` behind each of `decay_at`.
        warmup: how long the rate rises linearly: below 1 a share of all steps, else steps.
        final: learning rate at the last step, relative.
        decay_at: of "steps", ascending: below 1 shares of all steps, else steps.
        decay_factor: of "steps".
        average: decay of the running average of the weights, which is what is then evaluated and
            kept (Polyak averaging); 0 keeps the weights themselves.
        sharpness: radius rho of sharpness-aware minimisation, 0 for none: the gradient is taken
            where the loss is worst within rho of the weights, at twice the cost.
        sharpness_from: share of the run before which there is none of it.
    """

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.95
    clip_norm: float = 1.0
    schedule: Literal["cosine", "linear", "steps"] = "cosine"
    warmup: float = 0.1
    final: float = 0.0
    decay_at: tuple[float, ...] = (0.3, 0.6, 0.9)
    decay_factor: float = 0.1
    average: float = 0.0
    sharpness: float = 0.0
    sharpness_from: float = 0.0

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "above 0")
        for name in ("weight_decay", "warmup", "sharpness"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name}", value, "at least 0")
        require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "at least 0")
        for name in ("beta1", "beta2", "momentum", "average", "sharpness_from"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"optimizer.{name}", value, "at least 0 and below 1")
        is_whole = self.warmup < 1 or self.warmup == round(self.warmup)
        rule = "a share below 1 or a whole number of steps"
        require(is_whole, "optimizer.warmup", self.warmup, rule)
        require(0.0 <= self.final <= 1.0, "optimizer.final", self.final, "from 0 to 1")
        refuse_idle(self, "optimizer")
        if self.schedule == "steps":
            self._check_decay()

    def _check_decay(self) -> None:
        at, factor = self.decay_at, self.decay_factor
        require(0.0 < factor < 1.0, "optimizer.decay_factor", factor, "above 0 and below 1")
        is_share = all(0.0 < each < 1.0 for each in at)
        is_step = all(each >= 1.0 and each == round(each) for each in at)
        rises = all(a < b for a, b in itertools.pairwise(at))
        rule = "ascending shares below 1, or ascending whole numbers of steps"
        require(bool(at) and (is_share or is_step) and rises, "optimizer.decay_at", at, rule)
