"""The state of a run: weights, optimisers, running average, and how far it has come."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allmlp.console import Reporter
from allmlp.data.fingerprint import is_fingerprint_of
from allmlp.data.items import BadImage, Source
from allmlp.errors import UserError
from allmlp.models.layers import ImageClassifier
from allmlp.runtime.device import ComputePolicy
from allmlp.runtime.world import World, copy_full_parameters, parallelize
from allmlp.training.checkpoint import Checkpoints
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import Splits
from allmlp.training.optimizer import build_optimizers, optimizer_tensors, update_average
from allmlp.training.run_folder import RunFolder
from allmlp.training.step import Updater
from allmlp.weights.save import save_model


class RunState:
    """Everything that must be the same for a run to go on as if it had never stopped.

    Attributes:
        step: how many steps are done.
        bad: the training images that could not be decoded, by name.
        finished: whether the run has come to its end, by its length or by early stopping.
        last_checkpoint: the newest that was begun; None before the first.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: ImageClassifier,
        run: RunFolder,
        report: Reporter,
        compute: ComputePolicy,
        world: World,
        num_steps: int,
    ) -> None:
        self.config, self.run_folder, self.report = config, run, report
        self.compute, self.world, self.num_steps = compute, world, num_steps
        self.step, self.finished = 0, False
        self.best: tuple[float, float] | None = None
        self.since_best, self.last_result_at = 0, 0
        self.bad: dict[str, BadImage] = {}
        self.loss_sum, self.loss_count, self.last_rate = 0.0, 0, 0.0
        self.seconds_before, self.started = 0.0, time.perf_counter()
        self.last_checkpoint: Path | None = None
        sharded = world.size > 1 and config.sharding == "full"
        # What is evaluated and kept: the weights themselves, or a copy that is filled for it.
        self.copy = copy.deepcopy(model) if config.optimizer.average or sharded else None
        network = parallelize(model, config.sharding, world)
        self.model = model
        self.optimizers = build_optimizers(model, config.optimizer)
        self.average: dict[str, Tensor] = {}
        if config.optimizer.average:
            self.average = {
                name: each.detach().clone()
                for name, each in model.named_parameters()
                if each.requires_grad
            }
        self.updater = Updater(
            model, network, self.optimizers, config, compute, world, num_steps, report.say
        )
        self.checkpoints = Checkpoints(
            run.checkpoints, max(1, config.keep_checkpoints), world.checkpoint_group, report.say
        )

    def __enter__(self) -> RunState:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoints.close()

    @property
    def mean_loss(self) -> float:
        """Mean training loss of the steps since the last evaluation."""
        return self.loss_sum / max(self.loss_count, 1)

    @property
    def seconds(self) -> float:
        """Time that the run has trained for, before and after every stop."""
        return self.seconds_before + time.perf_counter() - self.started

    def begin(self, surroundings: dict[str, Any], is_old: bool, splits: Splits) -> None:
        """Begins the run, or brings it back to where its newest whole checkpoint was made.

        Args:
            surroundings: what environment.json holds.
            is_old: whether the folder holds this run already.
            splits: its images.

        Raises:
            UserError: the run began with other data.
        """
        found, micro_batch_size = self.checkpoints.newest() if is_old else None, None
        if is_old and found is None:
            self.world.broadcast_from_rank0(self.refuse_to_begin_again)
        if found is not None:
            if not is_fingerprint_of(found.values["data"], splits.train):
                what = "the images are not those that the run began with"
                fix = "Bring them back, or begin a new run: --output FOLDER"
                raise UserError(what, where=self.run_folder.path, fix=fix)
            self.checkpoints.load(found, self.tensors())
            self.step, self.last_checkpoint = found.step, found.path
            self._fill(found.values, splits.train)
            if found.values["world_size"] == self.world.size:
                micro_batch_size = found.values["micro_batch_size"]
            self.report.say(f"resumed  after step {self.step:,} of {self.num_steps:,}")
            was, now = found.values["precision"], self.compute.precision
            if was != now:
                self.report.say(f"note     the run computed in {was} before, and goes on in {now}")
        elif is_old:
            self.report.say("resumed  from the beginning: there is no whole checkpoint yet")
        self.data = surroundings["data"]["fingerprint"]
        if found is not None:
            self.mend_best()
        if is_old:
            for note in self.run_folder.go_back_to(self.step):
                self.report.say(f"note     {note}")
        if found is None:
            self.run_folder.write_keys(splits.keys)
            self.run_folder.write_json("environment.json", surroundings)
        self.updater.choose_micro_batch(micro_batch_size)
        if self.config.tensorboard:
            self.run_folder.open_events(self.step)
        self.started = time.perf_counter()

    def refuse_to_begin_again(self) -> None:
        """Raises UserError where the run has come somewhere, but no checkpoint can be read."""
        folder, best = self.run_folder.checkpoints, self.run_folder.best / "model.safetensors"
        unread = sorted(each.name for each in folder.glob("step-*"))
        if unread:
            what = f"no checkpoint of this run can be read: {', '.join(unread)}, see above"
        elif best.exists() and not folder.is_dir():
            what = "the run has no checkpoints, and cannot go on"
        else:
            return  # it was stopped before the first was whole
        fix = "Its best weights lie in best/. To train anew give another --output"
        raise UserError(what, where=self.run_folder.path, fix=fix)

    def mend_best(self) -> None:
        """Writes the best weights again where somebody removed them, if this is their state."""
        best = self.run_folder.best
        gone = self.world.broadcast_from_rank0(lambda: not (best / "model.safetensors").is_file())
        if not gone or self.last_result_at == 0:
            return
        if self.since_best == 0 and self.last_result_at == self.step:
            model = self.kept_model()
            if self.world.is_main:
                save_model(model, best, overwrite=True)
        elif self.finished:
            what = "the best weights were removed, and the newest checkpoint has others"
            raise UserError(what, where=best, fix="Train anew: --output FOLDER")
        else:
            self.best, self.since_best = None, 0
            self.report.say("note     best/ was removed: the next evaluation is the best so far")

    def _fill(self, values: dict[str, Any], images: Source) -> None:
        self.best = None if values["best"] is None else (values["best"][0], values["best"][1])
        self.since_best, self.last_result_at = values["since_best"], values["last_result_at"]
        for name, what, *index in values["bad"]:
            # Where an older version kept no index, the last image stands in: its class counts.
            at = index[0] if index else -1
            name = images.item_name(at) if index else name  # the images may have been moved
            self.bad[name] = BadImage(at, name, what)
        self.loss_sum, self.loss_count = values["loss_sum"], values["loss_count"]
        self.seconds_before, self.finished = values["seconds"], values["finished"]

    def tensors(self) -> dict[str, Tensor]:
        """Returns every tensor of the state by its name; filled in place they restore it."""
        named = {f"model.{name}": each.detach() for name, each in self.model.named_parameters()}
        named |= {f"model.{name}": each for name, each in _statistics(self.model).items()}
        named |= {f"average.{name}": each for name, each in self.average.items()}
        states = optimizer_tensors(self.model, self.optimizers)
        return named | {f"optimizer.{name}": each for name, each in states.items()}

    def save(self, *, is_best: bool) -> None:
        """Begins to write a checkpoint; training goes on while it is written."""
        if self.config.keep_checkpoints == 0:
            return
        self.world.broadcast_tensors(_statistics(self.model).values())
        values = {
            "config": self.config.to_json(),
            "class_names": self.model.class_names,
            "best": self.best,
            "since_best": self.since_best,
            "last_result_at": self.last_result_at,
            "bad": [[each.name, each.what, each.index] for each in self.bad.values()],
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "seconds": self.seconds,
            "finished": self.finished,
            "data": self.data,
            "precision": self.compute.precision,
            "world_size": self.world.size,
            "micro_batch_size": self.updater.micro_batch_size,
        }
        self.checkpoints.save(self.step, self.tensors(), values, is_best=is_best)
        self.last_checkpoint = self.run_folder.checkpoints / f"step-{self.step:08d}"

    def update(
        self, step: int, images: Tensor, targets: Tensor, kept: Tensor, dropout_seed: int
    ) -> Any:
        """Moves the weights and their average by one batch, see `Updater`."""
        result = self.updater(step, images, targets, kept, dropout_seed)
        if self.average:
            update_average(self.average, self.model, self.config.optimizer.average, step)
        self.step, self.last_rate = step + 1, result.learning_rate
        self.finished = self.step == self.num_steps
        self.loss_sum, self.loss_count = self.loss_sum + result.loss, self.loss_count + 1
        return result

    def note_result(self, result: tuple[float, float] | None) -> bool:
        """Notes an evaluation (accuracy, minus loss); returns whether it is the best so far."""
        self.loss_sum, self.loss_count, self.last_result_at = 0.0, 0, self.step
        is_best = result is None or self.best is None or result > self.best
        if result is not None and is_best:
            self.best = result
        self.since_best = 0 if is_best else self.since_best + 1
        if self.patience_is_over():
            self.finished = True
        return is_best

    def patience_is_over(self) -> bool:
        """Returns whether the last evaluations brought nothing better for too long."""
        patience = self.config.patience
        return patience is not None and self.since_best >= patience

    @torch.no_grad()
    def kept_model(self) -> ImageClassifier:
        """Returns the model that is evaluated and kept, whole, on every process."""
        statistics = _statistics(self.model)
        self.world.broadcast_tensors(statistics.values())
        if self.copy is None:
            return self.model
        for name, target in _statistics(self.copy).items():
            target.copy_(statistics[name])
        weights = {name: each.detach() for name, each in self.model.named_parameters()}
        copy_full_parameters(self.copy, (weights | self.average).items())
        return self.copy


def _statistics(model: torch.nn.Module) -> dict[str, Tensor]:
    """Returns what a model saves beside its parameters: batch normalisation's running means.

    Each process has its own, of its share of a batch; those of the first are the run's.
    """
    saved = model.state_dict().keys()
    return {name: each for name, each in model.named_buffers() if name in saved}
