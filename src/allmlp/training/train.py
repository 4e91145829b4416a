"""Training, top to bottom: setup, loop, step (details in `step.py`), evaluation."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from allmlp import plots
from allmlp.console import ProgressBar, Reporter
from allmlp.data.augment import mix
from allmlp.data.loader import CPU, Batch, choose_workers, most_workers, training_batches
from allmlp.data.sampler import STEP, Order, generator
from allmlp.data.source import BadImage, check_one_label
from allmlp.data.source_spec import parse_name
from allmlp.data.sources import read_from
from allmlp.data.transforms import check_input, normalize
from allmlp.data.workers import check_guard
from allmlp.decision import Decision
from allmlp.errors import UserError, between, named_memory_errors, plural
from allmlp.evaluation.features import frozen_features
from allmlp.evaluation.metrics import Evaluation, metric_of
from allmlp.evaluation.probe import fit_probe, log_loss
from allmlp.io import check_not_inputs, check_output_folder
from allmlp.models.layers import draw_stochastic_depth, preprocessing_of
from allmlp.runtime.device import (
    check_fits_memory,
    choose_policy,
    copied,
    cores_of_process,
    torch_settings,
)
from allmlp.runtime.world import World, join_world
from allmlp.training import run_folder
from allmlp.training.card import Outcome, model_card
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import Augmentation, Splits, check_number_bad, open_training_data
from allmlp.training.loggers import Logger, Loggers, tracker
from allmlp.training.model import build_model, head_of
from allmlp.training.optim import balance_weights, check_warmup, state_copies, update_average
from allmlp.training.recipes import for_data, recipe
from allmlp.training.report import (
    TrainResult,
    announce,
    duration,
    finish,
    measure,
    predictor_of,
    resume_command,
)
from allmlp.training.signals import NoBatchCame, StopRequest, end, ending_at_once
from allmlp.training.state import Run
from allmlp.training.step import StepResult, unchanged_buffers
from allmlp.weights.download import cache_folder

LOG_EVERY, SHORT = 10, 200  # in steps; shorter runs than `SHORT` log every step
_STOP_ASKED = 1  # by a callback; below the numbers of the signals
_REDRAW_EVERY = 30.0  # seconds
_LONG_STEP = 5.0  # seconds of a step that is timed once


class DivergedError(UserError):
    """A run stopped because its loss or gradient became non-finite."""


def resume(
    run: str | Path, *, quiet: bool = False, callbacks: Sequence[Logger] = ()
) -> TrainResult:
    """Resumes a run from its newest complete checkpoint, as if it had never stopped.

    Args:
        run: the run folder.
        quiet: print nothing.
        callbacks: as in `train`.

    Raises:
        UserError: not a run folder, or as in `train`.
    """
    return train(run_folder.config_of(run), quiet=quiet, callbacks=callbacks)


@named_memory_errors()
def train(
    config: TrainConfig | str = "digits",
    *,
    quiet: bool = False,
    in_study: bool = False,
    callbacks: Sequence[Logger] = (),
    dry_run: bool = False,
    splits: Splits | None = None,
) -> TrainResult:
    """Trains a model and returns its results; the same call resumes an interrupted run.

    Args:
        config: a configuration, or the name of a recipe.
        quiet: print nothing; log.txt is written anyway.
        in_study: the run is part of a study: do not print what to do next.
        callbacks: told about the run in the main process, see `Logger`; `config.log` adds trackers.
        dry_run: check everything and measure `expected_seconds`, but train and write nothing.
        splits: the images of `config.data`, if they are listed already.

    Raises:
        UserError: a setting or the data is unusable (nothing has been written then), or the run had
            to stop: too many bad images, or a non-finite loss or gradient (`DivergedError`).
    """
    config = recipe(config) if isinstance(config, str) else config.with_values({})  # validates it
    check_guard(config.data.num_workers)
    with contextlib.ExitStack() as stack:
        world, device = stack.enter_context(join_world(config.device))
        # All checks happen before anything is written.
        config, path, is_old, splits = _open(config, world, splits)
        num_steps = max(1, round(config.images_seen(len(splits.train)) / config.batch_size))
        is_probe = config.model.train_only == "probe"
        if is_probe:  # one pass over the images
            num_steps = math.ceil(len(splits.train) / config.batch_size)
        else:
            check_warmup(config.optimizer, num_steps)

        # Leave the caller's random state and thread count unchanged.
        gpus = [] if device.type == "cpu" else [device]
        stack.enter_context(torch.random.fork_rng(gpus, device_type=device.type))
        torch.manual_seed(config.seed)
        is_quiet = quiet or not world.is_main
        best = world.broadcast_from_rank0(lambda: run_folder.best_of(path)) if is_old else None
        names = splits.train.class_names
        model = build_model(config, names, best, rows=splits.train, quiet=is_quiet).to(device)
        check_input(splits.train, preprocessing_of(model))
        if splits.train.is_multi_label:
            model.decision = Decision(labels="multi")
        operations = 3 * model.config.flops * config.batch_size
        own = operations // world.size
        compute = choose_policy(
            device, config.precision, config.compile, operations=own, num_steps=num_steps
        )
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shards = world.size if config.sharding == "full" else 1
        what = f"training {trained:,} weights with {config.optimizer.name}"
        check_fits_memory(trained * state_copies(config.optimizer) // shards, what, device)
        threads = torch_settings(
            *(device, compute.precision, config.num_threads), step_operations=operations
        )
        stack.enter_context(threads)
        details = world.broadcast_from_rank0(
            lambda: run_folder.environment(config, splits, device, best)
        )

        # Files are written from here on, but not in a dry run.
        report = Reporter(quiet=is_quiet)
        writes = world.is_main and not dry_run
        named = replace(config, output=str(path)) if dry_run else config
        folder = run_folder.RunFolder(path, named, writes=writes)
        stack.callback(folder.close)
        if writes:
            report.log_to(folder.path / "log.txt")
            folder.loggers = Loggers([*map(tracker, config.trackers), *callbacks], report.say)
        trainer = Trainer(config, splits, folder, report, compute, world, num_steps, model)
        stack.callback(trainer.checkpoints.close)
        announce(trainer, in_study=in_study)
        if not dry_run:
            trainer.begin(details, is_old)
        elif is_old and (newest := trainer.checkpoints.peek()):  # the time of what is left
            trainer.step, trainer.finished = newest.step, newest.values["finished"]
        with ending_at_once(end if dry_run else trainer.end):
            seconds = None if quiet and not dry_run else trainer.expected_seconds()
        if dry_run:
            report.say("dry run  nothing was trained or written")
            return TrainResult(folder.path, None, None, seconds)
        if not trainer.finished:
            trainer.name_bad(splits.bad)
            fit = trainer.probe if is_probe else trainer.train
            fit()
        trainer.checkpoints.wait_on_all()  # for the best weights, which are measured now
        return replace(finish(trainer, in_study=in_study), expected_seconds=seconds)


def _open(
    config: TrainConfig, world: World, splits: Splits | None
) -> tuple[TrainConfig, Path, bool, Splits]:
    """Returns settings that fit the data, the run folder, whether it holds this run, the images."""
    if world.size > 1 and config.output is None:
        what = "several processes share one run folder, and a restart must find it again"
        raise UserError(what, where="output", fix="Give it a name, such as runs/NAME")
    if config.batch_size % world.size:
        what = f"a batch of {config.batch_size} images does not divide by {world.size} processes"
        raise UserError(what, where="batch_size", fix=f"A multiple of {world.size}")
    between("data.num_workers", config.data.num_workers, 0, most_workers())
    for name in config.trackers:
        tracker(name)  # is it installed?
    path = world.broadcast_from_rank0(lambda: run_folder.planned_path(config))
    is_old = world.broadcast_from_rank0(lambda: run_folder.can_resume(path))
    try:
        splits = open_training_data(config.data, splits, world)
    except UserError as error:
        if is_old and not Path(parse_name(config.data.source).base).expanduser().exists():
            fix = f"Was it moved? mixer train --resume {path} --data WHERE_IT_IS"
            raise UserError(error.what, where=error.where, fix=fix) from error
        raise
    config = for_data(config, splits.train)
    if config.data.balance == "sampler":
        check_one_label([splits.train], "balance=sampler")
    if splits.validation is not None and config.data.fold is None:
        # Does the metric apply, as to an image with all its labels?
        names, labels = splits.train.class_names, splits.validation.labels
        labels = np.array([labels.any(axis=0)]) if splits.train.is_multi_label else labels[:1]
        nothing = np.zeros((1, len(names)), np.float32)
        metric_of(config.best_by, Evaluation("", names, labels, np.arange(1), nothing))
    if is_old:
        world.broadcast_from_rank0(lambda: run_folder.check_same(path, config, splits))
    elif world.is_main:
        check_output_folder(path)
        check_not_inputs([path], read_from(config.data.source))
    return config, path, is_old, splits


class Trainer(Run):
    """The training loop: everything that happens in a step and between steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        train = self.splits.train
        self.preprocessing = preprocessing_of(self.model)
        self.steps_per_epoch = len(train) / self.config.batch_size
        self.epochs = self.config.epochs or self.num_steps / self.steps_per_epoch
        if self.config.data.balance == "weights":
            weights = torch.from_numpy(balance_weights(train)).float().to(self.compute.device)
            kind = "positive_weights" if train.is_multi_label else "class_weights"
            self.updater.weights = {kind: weights}
        self.asked = 0  # for a stop, by any process, as of the last known step
        self.begun, self.first_step = time.perf_counter(), 0
        self.last_line = self.last_drawn = 0.0  # seconds

    def train(self) -> None:
        """Trains to the end; if interrupted at any time, best/ holds the best weights so far."""
        config, world = self.config, self.world
        self.begun, self.first_step = time.perf_counter(), self.step  # after the time estimate
        self.updater.choose_micro_batch()
        due, device = self.evaluation_steps(), self.compute.device
        batches = self.batches(self.num_steps, config.data.num_workers, device)
        with (
            contextlib.closing(batches),
            StopRequest(saves=config.keep_checkpoints > 0) as stop,
            self.report.progress(self.num_steps, "steps", self.step) as bar,
        ):

            def asked() -> int:
                return stop.signal or _STOP_ASKED * self.folder.loggers.stop_asked

            self.updater.asked = asked
            try:
                for step, batch in enumerate(batches, self.step):
                    self.note_bad(batch.bad)
                    self.train_step(step, batch)
                    self.show_step(bar, step)
                    is_due = step + 1 in due
                    is_best = self.evaluate() if is_due else False
                    # On GPUs the answers came with the step before; to ask anew would wait.
                    asks = world.size == 1 or is_due or self.updater.refused is None
                    number = world.all_reduce_max(asked()) if asks else self.asked
                    if number == _STOP_ASKED and not self.finished:
                        self.report.say("stopped early: a callback asked for it")
                        self.finished = True
                        is_best = is_best if is_due else self.evaluate()
                    number = 0 if number == _STOP_ASKED else number
                    every = config.checkpoint_every
                    is_save_due = is_due if every is None else self.step % every == 0
                    if is_save_due or is_best or number or self.finished:
                        self.save(is_best=is_best)
                    if number:
                        self.end(number)
                    if self.finished:
                        break
            except NoBatchCame:
                # Not during an evaluation, which the resumed run would then skip, and not with
                # several processes, as this may be the only one waiting.
                between_steps = self.step not in due or self.step == self.last_result_at
                if self.step and between_steps and world.size == 1:
                    self.save(is_best=False)
                self.end(stop.signal)

    def batches(
        self, stop: int, num_workers: int | None, device: torch.device
    ) -> Generator[Batch, None, None]:
        """Yields this process's batches from the present step to `stop` - 1."""
        config, world, augment = self.config, self.world, self.config.augment
        order = Order(
            seed=config.seed,
            batch_size=config.batch_size,
            rank=world.rank,
            world_size=world.size,
            with_neighbour=world.size > 1 and bool(augment.mixup or augment.cutmix),
            balanced=config.data.balance == "sampler",
        )
        return training_batches(
            self.splits.train,
            self.preprocessing,
            Augmentation(augment, self.preprocessing),
            order,
            range(self.step, stop),
            num_workers=num_workers,
            timeout=config.data.timeout,
            device=device,
        )

    def inputs(self, step: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor, int]:
        config, world = self.config, self.world
        random, masks = generator(config.seed, STEP, step), torch.Generator()
        dropout_seed = int(random.integers(2**62))
        masks.manual_seed(dropout_seed)
        images = normalize(batch.images, self.preprocessing)
        names = self.splits.train.class_names
        targets = batch.labels.float()
        if batch.labels.dim() == 1:
            targets = torch.nn.functional.one_hot(batch.labels, len(names)).float()
        augment, own = config.augment, config.batch_size // world.size
        if step < round(augment.mix_until * self.num_steps):
            strengths = {"mixup_strength": augment.mixup, "cutmix_strength": augment.cutmix}
            images, targets = mix(images, targets, random, **strengths)
        images, targets = images[:own], targets[:own]  # drop the extra image for mixing
        depth = draw_stochastic_depth(self.model, config.batch_size, masks)
        depth = depth[:, world.rank * own : (world.rank + 1) * own]
        depth = copied(depth, self.compute.device)
        return images, targets, depth, dropout_seed + world.rank

    def expected_seconds(self) -> float | None:
        """Returns how long the rest takes, by a few gradients; None if nothing is left to do."""
        config, device = self.config, self.compute.device
        steps = self.num_steps - self.step
        if self.finished:
            return None
        self.updater.choose_micro_batch()
        # Of two batches the second, as a loader process has to start; it may hang, as in the run.
        workers = choose_workers(config.data.num_workers, self.splits.train, self.preprocessing, 1)
        with contextlib.closing(self.batches(self.step + 2, min(1, workers), CPU)) as batches:
            batch, begun = next(batches), time.perf_counter()
            next(batches)
        decoding = time.perf_counter() - begun
        batch, times = batch.to(device), list[float]()
        with unchanged_buffers(self.model):
            for _ in range(3):
                begun = time.perf_counter_ns()
                self.updater.gradient(*self.inputs(self.step, batch)).item()  # waits for a GPU
                times.append(self.world.all_reduce_max(time.perf_counter_ns() - begun) / 1e9)
                if times[0] > _LONG_STEP and not self.compute.compiles:
                    break
        computing, cores = min(times), cores_of_process()
        # Loader processes decode during the step, as far as the step leaves them cores.
        threads = torch.get_num_threads() if device.type == "cpu" else 0

        def seconds(computing: float) -> float:
            if not workers:
                return computing + decoding
            shared = (computing * threads + decoding) / cores
            return max(computing, decoding / min(workers, cores), shared)

        trains_all = config.model.train_only == "all"
        forward = seconds(computing / 3 if trains_all else computing) / config.batch_size
        validation, test = (len(part or ()) for part in (self.splits.validation, self.splits.test))
        evaluations = 1 + sum(at > self.step for at in self.evaluation_steps())
        if config.optimizer.sam_rho:  # the gradient is computed twice
            computing *= 2.0 - config.optimizer.sam_start
        total = steps * seconds(computing) + (evaluations * validation + test) * forward
        work = f"{plural(steps, 'step')} of {total / steps:.2g} s, including evaluations"
        if config.model.train_only == "probe":
            work = f"{plural(len(self.splits.train), 'image')} to compute features of"
        self.report.say(f"time     about {duration(total)} ({work}), measured on this machine")
        return total

    def probe(self) -> None:
        """Fits the head to frozen features, which are those of `mixer evaluate`."""
        train, say = self.splits.train, self.report.say
        asked = "float32" if self.config.precision == "auto" else self.config.precision
        predictor = predictor_of(self, self.model, min(64, max(1, len(train) // 4)), asked)
        with self.report.progress(len(train), "images") as bar:
            found = frozen_features(
                *(predictor, train, cache_folder() / "features"),
                lambda batch: bar.advance(len(batch)),
            )
        for note in found.notes:
            say(f"note     {note}")
        labels = train.labels[found.indices]
        if len(np.unique(labels)) < 2:
            what = "fewer than two classes have images that can be decoded"
            raise UserError(what, where=train.name)
        probe = fit_probe(found.values, labels, len(train.class_names))
        again = ", features from the cache" if found.from_cache else ""
        say(f"probe    l2 {probe.l2:g}, the best of five folds of the training images{again}")
        head, trained = head_of(self.model), dict(self.model.named_parameters())
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(probe.weight).float())
            head.bias.copy_(torch.from_numpy(probe.bias).float())
            for name, average in self.average.items():
                average.copy_(trained[name])
        self.note_bad(found.bad)
        self.step, self.finished, self.loss_count = self.num_steps, True, 1
        self.loss_sum = log_loss(probe.logits(found.values), torch.from_numpy(labels)).item()
        self.evaluate()
        self.write(is_best=True)

    def train_step(self, step: int, batch: Batch) -> None:
        images, targets, depth, dropout_seed = self.inputs(step, batch)
        if step == 0 and self.world.is_main:
            names = self.splits.train.class_names
            figure = plots.training_batch(images, targets, self.preprocessing, names)
            plots.save(figure, self.folder.plots / "train_batch.png")
        self.note_results(self.updater(step, images, targets, depth, dropout_seed))
        if self.average:
            update_average(self.average, self.model, self.config.optimizer.ema_decay, self.step)
        self.step += 1
        self.finished = self.step == self.num_steps

    def note_results(self, results: list[StepResult]) -> None:
        """Logs steps; a non-finite loss or gradient ends the run."""
        for result in results:
            step, loss = result.step, result.loss
            norm, rate = result.gradient_norm, result.learning_rate
            if not result.is_finite:
                what = f"step {step}: loss {loss}, gradient norm {norm} at learning rate {rate:g}"
                self.stop(f"{what}; stopped before the weights were changed")
            self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
            self.last_rate, self.asked = rate, result.asked
            if self.num_steps < SHORT or step % LOG_EVERY == 0 or step + 1 == self.num_steps:
                epoch = round(step / self.steps_per_epoch, 4)
                values = {"step": step, "epoch": epoch, "loss": loss}
                values |= {"learning_rate": rate, "gradient_norm": norm}
                self.folder.log_step({**values, "seconds": round(self.seconds, 3)})

    def save(self, *, is_best: bool) -> None:
        """Saves the run, whose steps are then known to be finite."""
        self.note_results(self.updater.results())
        self.write(is_best=is_best)

    def evaluation_steps(self) -> set[int]:
        every, last = self.config.evaluate_every, self.num_steps
        if self.config.epochs is None:
            return {*range(every, last, every), last}
        epochs = range(every, self.config.epochs, every)
        return {round(epoch * self.steps_per_epoch) for epoch in epochs} | {last}

    def evaluate(self) -> bool:
        """Evaluates, logs and keeps the weights if they are the best; returns whether they are."""
        config, validation = self.config, self.splits.validation
        self.note_results(self.updater.results())
        for found in self.world.gather(self.bad):  # images that a process could not decode
            self.bad |= found
            self.name_bad(found.values())
        kept, loss, result = self.kept_model(), self.mean_loss, None
        figures: dict[str, float] = {}
        if validation is not None:
            result = measure(kept, validation, self)
            self.name_bad(result.bad)
            check_number_bad(result.bad, validation, config.data.max_bad)
            figures = dict(result.figures())
            if not math.isfinite(figures["loss"]):
                what = f"step {self.step - 1}: the validation loss is {figures['loss']}"
                self.stop(f"{what}; the run has diverged")
        score, keeps_last = None, result is None or config.data.fold is not None
        if result is not None and not keeps_last:  # of equal ones, the one with the lower loss
            metric = metric_of(config.best_by)
            value = figures.get(metric.name, 0.0)  # no labelled image can be decoded
            score = metric.score(value), -figures["loss"]
        is_best = self.note_result(score)
        if is_best and self.world.is_main:
            self.keep_best(kept, model_card(Outcome(config, self.splits, kept, result)))
        # Epochs are rounded to whole steps, but the last step always ends the last epoch.
        shown = self.epochs * self.step / self.num_steps
        total = f"{self.epochs:.1f}".removesuffix(".0")
        text = f"epoch {shown:5.1f}/{total}   loss {loss:.4f}"
        if result is not None:
            epoch = round(self.step / self.steps_per_epoch, 3)
            values = {"epoch": epoch, "step": self.step, "training_loss": round(loss, 6)}
            values |= {f"validation_{name}": round(value, 6) for name, value in figures.items()}
            values |= {"seconds": round(self.seconds, 1), "best": int(is_best)}
            self.folder.log_evaluation(values)
            text += f"   validation {result.summary()}, loss {figures['loss']:.4f}"
            seconds = time.perf_counter() - self.begun
            if self.world.is_main and seconds - self.last_drawn > _REDRAW_EVERY:
                self.folder.draw_curves()
                self.last_drawn = time.perf_counter() - self.begun
        text += f"   {self.seconds:6.1f} s{'   best' * (is_best and not keeps_last)}"
        self.report.say(text)
        if self.is_out_of_patience and self.step < self.num_steps:
            self.report.say(f"stopped early: no better result in {config.patience} evaluations")
        self.last_line = time.perf_counter() - self.begun
        return is_best

    def show_step(self, bar: ProgressBar, step: int) -> None:
        """Advances the progress bar; without a terminal, prints a line every half minute."""
        seconds, done = time.perf_counter() - self.begun, step + 1 - self.first_step
        speed = f"{done * self.config.batch_size / seconds:,.0f} images/s"
        note = f"loss {self.mean_loss:.3f}  rate {self.last_rate:.2g}  {speed}"
        total = math.ceil(self.epochs - 1e-9)
        epoch = min(int(self.epochs * step / self.num_steps + 1e-9) + 1, total)
        bar.advance(1, note, f"epoch {epoch}/{total}")
        if not self.report.console.is_terminal and seconds - self.last_line > 30:
            left = duration((self.num_steps - step - 1) * seconds / done)
            self.report.say(f"step {step + 1:,} of {self.num_steps:,}   {note}   {left} to go")
            self.last_line = seconds

    def note_bad(self, found: list[BadImage]) -> None:
        """Reports undecodable images once, and stops the run if there are too many."""
        self.bad = {image.name: image for image in found} | self.bad
        self.name_bad(found)
        check_number_bad(list(self.bad.values()), self.splits.train, self.config.data.max_bad)

    def end(self, number: int) -> NoReturn:
        """Exits as the signal would have, and prints how to resume the run."""
        self.checkpoints.wait()
        self.report.say(f"\nstopped after step {self.step:,} of {self.num_steps:,}")
        keeps = self.config.keep_checkpoints > 0
        how = f"to resume: {resume_command(self)}"
        self.report.say(how if keeps else "the run keeps no checkpoints and cannot be resumed")
        end(number)

    def stop(self, what: str) -> NoReturn:
        """Stops a diverged run; best/ and checkpoints/ are kept."""
        self.checkpoints.wait()
        last = self.last_checkpoint
        what += f"; the last good checkpoint is {last}" if last else "; there is no checkpoint yet"
        fix = f"A lower learning_rate, in a new run: {self.config.optimizer.learning_rate / 3:.1g}"
        raise DivergedError(what, where=self.folder.path, fix=fix, code="diverged")
