"""The settings of a run: checked dataclasses, to and from JSON, and `--set section.name=value`.

A mistake names the key and, where there is one, the nearest known key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from allmlp.errors import UserError
from allmlp.training.settings import (
    IDLE,
    AugmentSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    refuse_idle,
)
from allmlp.training.values import build, fits, literal, refuse_key, require

VERSION = 1  # of config.json


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a run depends on.

    Args:
        recipe: the name of the recipe that it started from.
        model, data, augment, optimizer: the sections, see `allmlp.training.settings`.
        epochs: passes over the training images; None where `steps` says how long the run is.
        steps: updates of the weights; None where `epochs` says how long the run is.
        batch_size: images a step, over all processes.
        micro_batch_size: images that pass through the model at once on a process, whose gradients
            are added up; None takes as many as fit into memory.
        loss: "softmax" or "sigmoid" cross-entropy (the paper pre-trains with sigmoid).
        label_smoothing: share of each target spread over all classes; softmax only.
        evaluate_every: epochs between evaluations on the validation images, or steps where the run
            is given in steps.
        patience: evaluations without a new best one after which the run ends; None for none.
        keep_checkpoints: newest full states to keep, beside that of the best evaluation; 0 writes
            none, and the run cannot be resumed.
        checkpoint_every: steps between them; None saves at every evaluation.
        seed: of the weights, the order of the images and every random number.
        device: "auto", "cpu", "cuda".
        num_threads: processor threads of a step; None lets torch choose, but takes one for a small
            model, where handing work around costs more than it saves.
        precision: of the products; weights, LayerNorm and the residual stream stay float32.
            "auto" takes bfloat16 where the processor is fast at it and the model is not small.
        compile: torch.compile: "on", "off", or "auto": on a GPU, for runs long enough.
        sharding: of the state over the processes: "none" (DDP) or "full" (FSDP2).
        tensorboard: write its event files too; takes the extra of that name.
        output: the run folder; None makes runs/<date>_<recipe>.
    """

    recipe: str = "digits"
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    epochs: int | None = 100
    steps: int | None = None
    batch_size: int = 64
    micro_batch_size: int | None = None
    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0
    evaluate_every: int = 5
    patience: int | None = None
    keep_checkpoints: int = 2
    checkpoint_every: int | None = None
    seed: int = 0
    device: str = "auto"
    num_threads: int | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    sharding: Literal["none", "full"] = "none"
    tensorboard: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        numbers = ("epochs", "steps", "patience", "checkpoint_every", "micro_batch_size")
        for name in (*numbers, "num_threads", "batch_size", "evaluate_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        if (self.epochs is None) == (self.steps is None):
            what = f"epochs={self.epochs} and steps={self.steps}: one of them says how long to run"
            raise UserError(what, fix="--epochs N or --steps N")
        require(self.keep_checkpoints >= 0, "keep_checkpoints", self.keep_checkpoints, "at least 0")
        refuse_idle(self, "")
        require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2**63")
        if self.patience is not None and self.data.holdout == 0.0:
            what = f"patience={self.patience} has no effect without validation images"
            raise UserError(what, fix="--set patience=null, or --holdout 0.1")
        smoothing = self.label_smoothing
        require(0.0 <= smoothing < 1.0, "label_smoothing", smoothing, "at least 0 and below 1")
        if self.optimizer.name == "muon" and self.model.trained == "head":
            what = "Muon moves the matrices of the blocks, and model.trained=head leaves them alone"
            raise UserError(what, fix="--set optimizer.name=adamw")
        if self.optimizer.name == "muon" and self.sharding == "full":
            what = "Muon needs whole matrices, and sharding=full gives every process a part of each"
            raise UserError(what, fix="--sharding none, or --set optimizer.name=adamw")

    def to_json(self) -> dict[str, Any]:
        """Returns every setting as JSON values; `from_json` reads them back."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> TrainConfig:
        """Returns the configuration of such values; what is absent takes its default.

        Raises:
            UserError: an unknown key, a value of the wrong type, with the key's path, or a version
                that is newer than this program.
        """
        values = dict(values)
        version = values.pop("version", VERSION)
        if version != VERSION:
            what = f"the settings have version {version!r}, this program knows {VERSION}"
            raise UserError(what, fix="Install the allmlp that wrote them, or a newer one")
        return build(TrainConfig, values)

    def with_setting(self, assignment: str) -> TrainConfig:
        """Returns the configuration with one "section.name=value" changed.

        Raises:
            UserError: as `with_values`.
        """
        return self.with_values({}, [assignment])

    def with_value(self, key: str, value: Any) -> TrainConfig:
        """Returns the configuration with one setting changed.

        Args:
            key: its path, "section.name".
            value: of the setting's type.

        Raises:
            UserError: as `with_values`.
        """
        return self.with_values({key: value})

    def with_values(
        self, changes: Mapping[str, Any], assignments: Iterable[str] = ()
    ) -> TrainConfig:
        """Returns the configuration with settings changed together: only the result must be valid.

        A setting of before that has no effect beside the changes, such as `augment.crop_area` with
        `augment.crop=none`, gives way to its default; one among the changes is refused.

        Args:
            changes: path of a setting, "section.name" -> value of its type.
            assignments: "section.name=value", from first to last, after the changes.

        Raises:
            UserError: no such setting, or a value of the wrong type or out of range.
        """
        changes = dict(changes)
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                what = f"--set takes section.name=value, got {assignment!r}"
                raise UserError(what, fix="for example --set optimizer.learning_rate=0.002")
            key, text = key.strip(), text.strip()
            value = literal(text)
            # A folder may be called 2024: a number only where the setting is one.
            is_text = not fits(TrainConfig, key, value) and fits(TrainConfig, key, text)
            changes[key] = text if is_text else value
        values = self.to_json()
        del values["version"]
        # Another model first: it takes the recipe's own sizes away, never those asked for.
        for key in sorted(changes, key=lambda key: key not in ("model.weights", "model.name")):
            self._put(values, key, changes[key])
        for key, other in (("epochs", "steps"), ("steps", "epochs")):
            if changes.get(key) is not None and other not in changes:
                values[other] = None  # one takes the place of the other
                is_other = getattr(self, key) is None and isinstance(changes[key], int)
                if is_other and "evaluate_every" not in changes:  # it has the length's unit
                    values["evaluate_every"] = max(1, changes[key] // 20)
        if changes.get("model.trained") == "head" and "model.overrides" not in changes:
            for name in values["model"]["overrides"]:  # nothing is dropped where nothing is trained
                if f"model.overrides.{name}" not in changes:
                    values["model"]["overrides"][name] = 0.0
        for section, settings in IDLE.items():
            target = values[section] if section else values
            if section in changes or not isinstance(target, dict):
                continue  # it was given whole
            for each in settings:
                key = f"{section}.{each.name}" if section else each.name
                if key not in changes and each.is_idle(SimpleNamespace(**target)):
                    target[each.name] = each.value
        return build(TrainConfig, values)

    def _put(self, values: dict[str, Any], key: str, value: Any) -> None:
        """Changes one setting among the JSON values."""
        target, names = values, key.split(".")
        if names[:2] == ["model", "overrides"] and len(names) == 3:
            target, names = target["model"]["overrides"], names[2:]
        for depth, name in enumerate(names[:-1]):
            if not isinstance(target.get(name), dict):
                refuse_key(".".join(names[: depth + 1]), target)
            target = target[name]
        if names[-1] not in target and target is not values["model"]["overrides"]:
            refuse_key(key, target)
        is_other = value is not None and value != getattr(self.model, names[-1], None)
        if key in ("model.name", "model.weights") and is_other:
            # The recipe's own sizes belong to its own model; they would hide the one asked for.
            kept = ["dropout", "stochastic_depth"]
            kept += ["gelu", "in_channels"] if key == "model.name" else []
            overrides = values["model"]["overrides"].items()
            values["model"]["overrides"] = {k: v for k, v in overrides if k in kept}
        if key == "model.weights" and is_other and self.model.weights is None:
            values["model"] |= {"name": "", "image_size": None}  # the weights bring their own
        target[names[-1]] = value
