"""The settings of a run: checked dataclasses, to and from JSON, and `--set section.name=value`.

Every value is one somebody chose; nothing is ignored silently. A mistake names the key and, where
there is one, the nearest known key.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from mlp_mixer.errors import UserError
from mlp_mixer.training.values import build, literal, refuse_key, require


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which network to build.

    Args:
        name: of `list_models()`.
        image_size: pixels, a number or (H, W).
        overrides: other fields of its configuration, as `create_model` takes them.
    """

    name: str = "mixer_s16"
    image_size: int | tuple[int, int] = 224
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("name", "image_size", "num_classes"):
            if name in self.overrides:
                other = "is that of the data" if name == "num_classes" else f"is model.{name}"
                raise UserError(f"model.overrides.{name} {other}", fix="Leave it out here")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images to learn from.

    Args:
        source: as `mlp_mixer.data.sources` describes.
        holdout: share of every class to hold out for validation; only where the data brings no
            validation images, and then None holds out a tenth.
        fraction: share of the training images to use, drawn at random; a smaller one is part of a
            larger one (the paper's figure 2).
        fraction_seed: of that draw.
        without: a list of images to leave out, as `mixer data check --drop-list` writes it.
        resize: how evaluation fits a picture to the model, see `mlp_mixer.preprocessing`.
        exif_orientation: turn photographs upright by their EXIF tag; the paper's code does not.
        max_bad: the largest share of undecodable images at which a run goes on.
        num_workers: processes that decode; None chooses by the size of the data.
        timeout: seconds without a batch after which a worker is taken for hanging; 0 for never.
    """

    source: str = "digits"
    holdout: float | None = None
    fraction: float = 1.0
    fraction_seed: int = 0
    without: str | None = None
    resize: Literal["resize-crop", "resmall-crop", "squash"] = "resmall-crop"
    exif_orientation: bool = True
    max_bad: float = 0.01
    num_workers: int | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        fits = self.holdout is None or 0.0 < self.holdout < 1.0
        require(fits, "data.holdout", self.holdout, "above 0 and below 1")
        require(0.0 <= self.max_bad <= 1.0, "data.max_bad", self.max_bad, "from 0 to 1")
        workers = self.num_workers
        require(workers is None or workers >= 0, "data.num_workers", workers, "at least 0")
        require(0.0 < self.fraction <= 1.0, "data.fraction", self.fraction, "above 0, at most 1")
        require(self.fraction_seed >= 0, "data.fraction_seed", self.fraction_seed, "at least 0")
        if self.fraction == 1.0 and self.fraction_seed != 0:
            what = f"data.fraction_seed={self.fraction_seed} has no effect with all of the images"
            raise UserError(what, fix="--set data.fraction=0.1")
        require(self.timeout >= 0.0, "data.timeout", self.timeout, "at least 0")


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """What happens to training images at random; the order is that of the fields.

    Args:
        crop: "inception" cuts out a random rectangle, "none" resizes as evaluation does, "padded"
            does so and moves the picture by whole pixels (for small ones).
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
    """

    crop: Literal["inception", "padded", "none"] = "inception"
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

    def __post_init__(self) -> None:
        if self.crop != "inception" and self.crop_area != (0.05, 1.0):
            what = f"augment.crop_area={self.crop_area} has no effect with augment.crop={self.crop}"
            raise UserError(what, fix="--set augment.crop=inception")
        if self.crop != "padded" and self.crop_padding != 0.125:
            what = f"augment.crop_padding={self.crop_padding} has no effect with "
            raise UserError(f"{what}augment.crop={self.crop}", fix="--set augment.crop=padded")
        if self.randaugment is None and self.randaugment_layers != 2:
            what = f"augment.randaugment_layers={self.randaugment_layers} has no effect without "
            raise UserError(f"{what}augment.randaugment", fix="--set augment.randaugment=15")
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
        name: "adamw" (Adam with decoupled decay) or "sgd" (with momentum).
        learning_rate: at the end of the warm-up.
        weight_decay: decoupled, times the learning rate; on kernels only.
        beta1, beta2: of Adam; beta1 is the momentum of SGD.
        clip_norm: global norm to which the gradient is clipped.
        schedule: "cosine" or "linear", from the warm-up's end down to `final` times the rate.
        warmup: share of all steps over which the rate rises linearly.
        final: learning rate at the last step, relative.
        average: decay of the running average of the weights, which is what is then evaluated and
            kept (Polyak averaging); 0 keeps the weights themselves.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup: float = 0.1
    final: float = 0.0
    average: float = 0.0

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "above 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0")
        require(self.clip_norm > 0, "optimizer.clip_norm", self.clip_norm, "above 0")
        for name in ("beta1", "beta2", "warmup", "average"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"optimizer.{name}", value, "at least 0 and below 1")
        require(0.0 <= self.final <= 1.0, "optimizer.final", self.final, "from 0 to 1")
        for name, value, unused in (
            ("weight_decay", self.weight_decay, 0.0),
            ("beta2", self.beta2, 0.999),
        ):
            if self.name == "sgd" and value != unused:
                what = f"optimizer.{name}={value} has no effect with sgd"
                raise UserError(what, fix=f"--set optimizer.{name}={unused}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a run depends on.

    Args:
        recipe: the name of the recipe that it started from.
        model, data, augment, optimizer: the sections above.
        epochs: passes over the training images.
        batch_size: images a step.
        loss: "softmax" or "sigmoid" cross-entropy (the paper pre-trains with sigmoid).
        label_smoothing: share of each target spread over all classes; softmax only.
        evaluate_every: epochs between evaluations on the validation images.
        seed: of the weights, the order of the images and every random number.
        device: "auto", "cpu", "cuda".
        num_threads: processor threads of a step; None lets torch choose, but takes one for a small
            model, where handing work around costs more than it saves.
        output: the run folder; None makes runs/<date>_<recipe>.
    """

    recipe: str = "digits"
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    epochs: int = 100
    batch_size: int = 64
    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0
    evaluate_every: int = 5
    seed: int = 0
    device: str = "auto"
    num_threads: int | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "evaluate_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2**63")
        threads = self.num_threads
        require(threads is None or threads >= 1, "num_threads", threads, "at least 1")
        smoothing = self.label_smoothing
        require(0.0 <= smoothing < 1.0, "label_smoothing", smoothing, "at least 0 and below 1")
        if self.loss == "sigmoid" and smoothing > 0:
            raise UserError(
                f"label_smoothing={smoothing} has no effect with the sigmoid loss",
                fix="--set label_smoothing=0 or --set loss=softmax",
            )

    def to_json(self) -> dict[str, Any]:
        """Returns every setting as JSON values; `from_json` reads them back."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> TrainConfig:
        """Returns the configuration of such values; what is absent takes its default.

        Raises:
            UserError: an unknown key or a value of the wrong type, with the key's path.
        """
        return build(TrainConfig, values)

    def with_setting(self, assignment: str) -> TrainConfig:
        """Returns the configuration with one "section.name=value" changed.

        Raises:
            UserError: no such key, or a value of the wrong type or out of range.
        """
        key, equals, text = assignment.partition("=")
        if not equals:
            what = f"--set takes section.name=value, got {assignment!r}"
            raise UserError(what, fix="for example --set optimizer.learning_rate=0.002")
        key, text = key.strip(), text.strip()
        try:
            return self.with_value(key, literal(text))
        except UserError as error:
            try:
                return self.with_value(key, text)  # a folder may be called 2024
            except UserError:
                raise error from None

    def with_value(self, key: str, value: Any) -> TrainConfig:
        """Returns the configuration with one setting changed.

        Args:
            key: its path, "section.name".
            value: of the setting's type.

        Raises:
            UserError: no such key, or a value of the wrong type or out of range.
        """
        values = self.to_json()
        target, names = values, key.split(".")
        if names[:2] == ["model", "overrides"] and len(names) == 3:
            target, names = target["model"]["overrides"], names[2:]
        for depth, name in enumerate(names[:-1]):
            if not isinstance(target.get(name), dict):
                refuse_key(".".join(names[: depth + 1]), target)
            target = target[name]
        if names[-1] not in target and target is not values["model"]["overrides"]:
            refuse_key(key, target)
        if key == "model.name" and value != self.model.name:
            # The recipe's own sizes belong to its own model; they would hide the one asked for.
            kept = ("dropout", "stochastic_depth", "gelu", "in_channels")
            overrides = self.model.overrides.items()
            values["model"]["overrides"] = {k: v for k, v in overrides if k in kept}
        target[names[-1]] = value
        return build(TrainConfig, values)
