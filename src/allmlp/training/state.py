"""The state of a run: weights, optimizers, moving average, progress."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allmlp.console import Reporter
from allmlp.data.source import BadImage
from allmlp.errors import UserError
from allmlp.models.layers import ImageClassifier
from allmlp.runtime.device import ComputePolicy
from allmlp.runtime.world import World, full_tensor, parallelize
from allmlp.training.checkpoint import Checkpoints
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import Splits
from allmlp.training.optim import build_optimizers, optimizer_tensors
from allmlp.training.run_folder import TRAINING_IMAGES, RunFolder, first_weights, other_images
from allmlp.training.step import Updater
from allmlp.weights.save import save_model


@dataclass(eq=False)
class Run:
    """A run: its constants, and all that it needs to resume as if it had never stopped."""

    config: TrainConfig
    splits: Splits
    folder: RunFolder
    report: Reporter
    compute: ComputePolicy
    world: World
    num_steps: int
    model: ImageClassifier

    def __post_init__(self) -> None:
        config, model, world, say = self.config, self.model, self.world, self.report.say
        self.step, self.finished = 0, False  # completed steps; at full length or stopped early
        self.best: tuple[float, float] | None = None
        self.since_best, self.last_result_at = 0, 0
        self.bad = {image.name: image for image in self.splits.bad}  # training images only
        self.named_bad = self.folder.bad_files()
        self.loss_sum, self.loss_count, self.last_rate = 0.0, 0, 0.0
        self.seconds_before, self.started = 0.0, time.perf_counter()
        self.last_checkpoint: Path | None = None
        self.write_best: Callable[[], None] | None = None  # of the next save
        decay, compute = config.optimizer.ema_decay, self.compute
        # What is evaluated and saved: the model itself, or a copy filled on demand.
        is_sharded = world.size > 1 and config.sharding == "full"
        self.copy = copy.deepcopy(model) if decay or is_sharded else None
        network = parallelize(model, config.sharding, world, compute.precision)
        self.optimizers = build_optimizers(model, config.optimizer)
        self.updater = Updater(
            *(model, network, self.optimizers, config, compute, world, self.num_steps, say)
        )
        named = model.named_parameters() if decay else ()
        self.average = {name: p.detach().clone() for name, p in named if p.requires_grad}
        keep = max(1, config.keep_checkpoints)
        self.checkpoints = Checkpoints(self.folder.checkpoints, keep, world, say)

    @property
    def mean_loss(self) -> float:
        return self.loss_sum / max(self.loss_count, 1)

    @property
    def seconds(self) -> float:
        """Training time of the run, including the time before it was resumed."""
        return self.seconds_before + time.perf_counter() - self.started

    def name_bad(self, bad: Iterable[BadImage]) -> None:
        """Prints and lists images that are new."""
        for image in bad:
            if image.name not in self.named_bad:
                self.named_bad.add(image.name)
                self.folder.log_bad_file(image)
                self.report.say(f"skipped  {image.name}: {image.what}", style="yellow")

    def begin(self, details: dict[str, Any], is_old: bool) -> None:
        """Starts the run, with this environment.json, or restores its newest whole checkpoint."""
        folder, splits, say = self.folder, self.splits, self.report.say
        found = self.checkpoints.newest() if is_old else None
        if found is not None:
            values = found.values
            known = functools.partial(splits.has_fingerprint, values["data"], "train")
            if not self.world.broadcast_from_rank0(known):
                raise other_images(folder.path)
            self.checkpoints.load(found, self.tensors())
            self.step, self.last_checkpoint = found.step, found.path
            self.best = None if values["best"] is None else (values["best"][0], values["best"][1])
            self.since_best, self.last_result_at = values["since_best"], values["last_result_at"]
            for _, what, index in values["bad"]:
                name = splits.train.item_name(index)  # the images may have been moved
                self.bad.setdefault(name, BadImage(index, name, what))
            self.loss_sum, self.loss_count = values["loss_sum"], values["loss_count"]
            self.seconds_before, self.finished = values["seconds"], values["finished"]
            if values["world_size"] == self.world.size:
                self.updater.micro_batch_size = values["micro_batch_size"]
            say(f"resumed  after step {self.step:,} of {self.num_steps:,}")
            was, now = values["precision"], self.compute.precision
            if was != now:
                say(f"note     the run computed in {was} before, and continues in {now}")
            if details["weights"] and first_weights(folder.path) not in (None, details["weights"]):
                say(f"note     {self.config.model.weights} has changed since the run began with it")
        elif is_old:
            self.world.broadcast_from_rank0(self.check_nothing_is_lost)
            say("resumed  from the beginning: there is no complete checkpoint yet")
        if folder.is_unlocked:
            what = "its file system has no locks (Lustre: mount it with -o flock)"
            say(f"note     {what}; do not run two in it", style="yellow")
        self.data = details["data"]["fingerprint"]
        if is_old:
            folder.rewind(self.step)
        if found is None:
            folder.write(TRAINING_IMAGES, "".join(f"{key}\n" for key in splits.keys))
            folder.write("environment.json", details)
        folder.loggers.tell("start", self.config.to_json(), folder.path, self.step)
        self.started = time.perf_counter()

    def check_nothing_is_lost(self) -> None:
        unread = sorted(path.name for path in self.folder.checkpoints.glob("step-*"))
        if unread:
            what = f"no checkpoint of this run can be read: {', '.join(unread)}, see above"
            fix = "Its best weights are in best/. To train anew choose another output folder"
            raise UserError(what, where=self.folder.path, fix=fix)

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors of the state by name; filling them in place restores it."""
        named = {f"model.{name}": tensor.detach() for name, tensor in self.model.named_parameters()}
        named |= {f"model.{name}": tensor for name, tensor in _statistics(self.model).items()}
        named |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        states = optimizer_tensors(self.model, self.optimizers)
        return named | {f"optimizer.{name}": tensor for name, tensor in states.items()}

    def write(self, *, is_best: bool) -> None:
        """Starts writing best/ and a checkpoint; training continues in the meantime."""
        first, self.write_best = self.write_best, None
        if self.config.keep_checkpoints == 0:
            self.checkpoints.save(self.step, None, {}, first=first)
            return
        self.world.broadcast_tensors(_statistics(self.model).values())
        names = ("best", "since_best", "last_result_at", "loss_sum", "loss_count")
        values = {
            **{name: getattr(self, name) for name in (*names, "seconds", "finished", "data")},
            "config": self.config.to_json(),
            "class_names": self.model.class_names,
            "bad": [[image.name, image.what, image.index] for image in self.bad.values()],
            "precision": self.compute.precision,
            "world_size": self.world.size,
            "micro_batch_size": self.updater.micro_batch_size,
        }
        self.checkpoints.save(self.step, self.tensors(), values, is_best=is_best, first=first)
        self.last_checkpoint = self.folder.checkpoints / f"step-{self.step:08d}"

    def note_result(self, result: tuple[float, float] | None) -> bool:
        """Records an evaluation (score, minus loss); returns whether it is the best so far."""
        self.loss_sum, self.loss_count, self.last_result_at = 0.0, 0, self.step
        is_best = result is None or self.best is None or result > self.best
        if result is not None and is_best:
            self.best = result
        self.since_best = 0 if is_best else self.since_best + 1
        self.finished |= self.is_out_of_patience
        return is_best

    @property
    def is_out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.since_best >= patience

    @torch.no_grad()
    def keep_best(self, model: ImageClassifier, card: str) -> None:
        """Copies the best model, which the next save writes to best/ before its checkpoint."""
        values = {id(value): value.to("cpu", copy=True) for value in model.buffers()}
        for p in model.parameters():
            values[id(p)] = nn.Parameter(p.to("cpu", copy=True), p.requires_grad)
        copied, folder = copy.deepcopy(model, values), self.folder

        def write() -> None:
            save_model(copied, folder.best, overwrite=True)
            folder.write("best/README.md", card)

        self.write_best = write

    @torch.no_grad()
    def kept_model(self) -> ImageClassifier:
        """Returns the full model that is evaluated and saved, on every process."""
        statistics = _statistics(self.model)
        self.world.broadcast_tensors(statistics.values())
        if self.copy is None:
            return self.model
        for name, target in _statistics(self.copy).items():
            target.copy_(statistics[name])
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        weights |= self.average
        for name, target in self.copy.named_parameters():
            target.copy_(full_tensor(weights[name]))
        return self.copy


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a model saves, such as running means; those of rank 0 count."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}
