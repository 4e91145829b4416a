"""One training loop that reads from top to bottom: a config in, a run folder out."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import NoReturn

import torch

from allmlp import plots
from allmlp.console import ProgressBar, Reporter
from allmlp.data.augment import mix
from allmlp.data.batches import Batch, on_device
from allmlp.data.items import BadImage
from allmlp.data.loader import most_workers, training_batches
from allmlp.data.sampler import step_generator
from allmlp.data.source_names import parse_name
from allmlp.data.sources import read_from
from allmlp.data.transforms import normalize
from allmlp.data.workers import check_guard
from allmlp.errors import UserError, named_memory_errors
from allmlp.io import check_not_inputs, check_output_folder
from allmlp.models.layers import draw_stochastic_depth
from allmlp.runtime.device import ComputePolicy, check_fits_memory, choose_policy, torch_settings
from allmlp.runtime.world import World, join_world
from allmlp.training.card import model_card
from allmlp.training.config import TrainConfig
from allmlp.training.cost import duration, training_memory
from allmlp.training.dataset import Augmentation, Splits, open_training_data, refuse_too_many
from allmlp.training.losses import one_hot
from allmlp.training.measure import measure
from allmlp.training.recipes import recipe
from allmlp.training.resume import check_same_images, config_of, goes_on
from allmlp.training.run_folder import RunFolder, check_tensorboard, environment, planned_path
from allmlp.training.schedule import check_warmup
from allmlp.training.start import build_model, length
from allmlp.training.state import RunState
from allmlp.training.step import DivergedError, NotFiniteError
from allmlp.training.stopping import NoBatchCame, StopRequest, end
from allmlp.training.summary import TrainResult, announce, finish, resume_command
from allmlp.weights.save import save_model

LOG_EVERY, SHORT = 10, 200  # steps; a run of fewer than `SHORT` logs every one
_REDRAW_EVERY = 30.0  # seconds


def resume(run: str | Path, *, quiet: bool = False) -> TrainResult:
    """Continues a run from its newest whole checkpoint, as if it had never stopped.

    Args:
        run: its folder.
        quiet: print nothing.

    Raises:
        UserError: it is no run folder of ours, or as `train`.
    """
    return train(config_of(run), quiet=quiet)


@named_memory_errors()
def train(
    config: TrainConfig | str = "digits", *, quiet: bool = False, in_study: bool = False
) -> TrainResult:
    """Trains a model and returns what it reached; a run that was stopped goes on where it was.

    Args:
        config: a configuration, or the name of a recipe.
        quiet: print nothing; log.txt is written all the same.
        in_study: it is one of many runs: do not say what to type next.

    Raises:
        UserError: a setting or the data is unusable (nothing has been written then), or the run
            had to stop: too many bad images, or a loss or gradient that is not finite
            (`DivergedError`).
    """
    config = recipe(config) if isinstance(config, str) else config
    check_guard(config.data.num_workers)
    with contextlib.ExitStack() as afterwards:
        world, device = afterwards.enter_context(join_world(config.device))
        # Check everything before anything is written.
        if world.size > 1 and config.output is None:
            what = "several processes share one run folder, and a restart must find it again"
            raise UserError(what, where="--output", fix="Give it a name: --output runs/NAME")
        if config.tensorboard:
            check_tensorboard()
        if config.batch_size % world.size:
            what = (
                f"a batch of {config.batch_size} images cannot be shared by {world.size} processes"
            )
            raise UserError(what, where="--batch-size", fix=f"A multiple of {world.size}")
        workers = config.data.num_workers
        if workers is not None and workers > most_workers():
            what = f"num_workers must be at most {most_workers()} on this machine, got {workers}"
            raise UserError(what, where="--num-workers")
        path = world.broadcast_from_rank0(lambda: planned_path(config))
        is_old = world.broadcast_from_rank0(lambda: goes_on(path, config))
        try:
            splits = open_training_data(config.data)
        except UserError as error:
            if is_old and not Path(parse_name(config.data.source).base).expanduser().exists():
                fix = f"Was it moved? mixer train --resume {path} --data WHERE_IT_IS"
                raise UserError(error.what, where=error.where, fix=fix) from error
            raise
        if is_old:
            world.broadcast_from_rank0(lambda: check_same_images(path, config, splits))
        elif world.is_main:
            check_output_folder(path)
            check_not_inputs([path], read_from(config.data.source))
        num_steps = length(config, splits)
        check_warmup(config.optimizer, num_steps)
        # The caller's random numbers and threads stay as they are.
        devices = [device] if device.type == "cuda" else []
        afterwards.enter_context(torch.random.fork_rng(devices))
        torch.manual_seed(config.seed)
        best, quiet_weights = path / "best", quiet or not world.is_main
        names = splits.train.class_names
        model = build_model(config, names, best if is_old else None, quiet=quiet_weights)
        model = model.to(device)
        flops = model.config.flops
        compute = choose_policy(
            device,
            config.precision,
            config.compile,
            operations=3 * flops * config.batch_size // world.size,
            num_steps=num_steps,
        )
        trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        half = compute.precision == "bfloat16"
        need = training_memory(
            model.config, trained, config, bfloat16=half, num_processes=world.size
        )
        what = f"training {trained:,} weights with {config.optimizer.name}"
        check_fits_memory(need.state // 4, what, device)
        afterwards.enter_context(
            torch_settings(
                device,
                compute.precision,
                config.num_threads,
                step_operations=3 * flops * config.batch_size,
            )
        )
        surroundings = environment(config, splits, device)
        report = Reporter(quiet=quiet or not world.is_main)
        run = RunFolder(path, config, writes=world.is_main)
        afterwards.callback(run.close)
        if world.is_main:
            report.log_to(run.path / "log.txt")
        announce(report, config, splits, model, run, compute, num_steps, world)
        state = afterwards.enter_context(
            RunState(config, model, run, report, compute, world, num_steps)
        )
        state.begin(surroundings, is_old, splits)
        Trainer(config, splits, run, report, compute, world, state).run()
        return finish(config, splits, run, report, device, world, in_study=in_study)


class Trainer:
    """A run while it trains: what happens at each step, and between them."""

    def __init__(
        self,
        config: TrainConfig,
        splits: Splits,
        run: RunFolder,
        report: Reporter,
        compute: ComputePolicy,
        world: World,
        state: RunState,
    ) -> None:
        self.config, self.splits, self.run_folder = config, splits, run
        self.report, self.compute, self.world, self.state = report, compute, world, state
        self.model, self.num_steps = state.model, state.num_steps
        assert self.model.preprocessing is not None
        self.preprocessing = self.model.preprocessing
        self.steps_per_epoch = len(splits.train) / config.batch_size
        self.epochs = config.epochs or self.num_steps / self.steps_per_epoch
        state.bad |= {each.name: each for each in splits.bad}
        self.bad = state.bad
        self.named = {each.name for each in run.named_bad_files()}
        self.new_bad: list[BadImage] = []
        self.started, self.first_step = time.perf_counter(), state.step
        self.last_line = self.last_drawn = 0.0  # seconds
        self.said_estimate = False

    def run(self) -> None:
        """Trains to the end; best/ holds the best weights whenever this is interrupted."""
        config, state = self.config, self.state
        if state.finished:
            return
        augment, due = config.augment, self.evaluation_steps()
        batches = training_batches(
            self.splits.train,
            self.preprocessing,
            Augmentation(augment, self.preprocessing),
            seed=config.seed,
            batch_size=config.batch_size,
            start=state.step,
            stop=self.num_steps,
            rank=self.world.rank,
            world_size=self.world.size,
            with_neighbour=self.world.size > 1 and bool(augment.mixup or augment.cutmix),
            num_workers=config.data.num_workers,
            timeout=config.data.timeout,
            pin_memory=self.compute.device.type == "cuda",
        )
        self.name_bad(self.splits.bad)
        with (
            contextlib.closing(batches),
            StopRequest(saves=config.keep_checkpoints > 0) as stop,
            self.report.progress(self.num_steps, "steps", state.step) as bar,
        ):
            try:
                for step, batch in enumerate(on_device(batches, self.compute.device), state.step):
                    self.note_bad(batch)
                    self.train_step(step, batch)
                    self.show_step(bar, step)
                    is_best = False
                    if step + 1 in due:
                        is_best = self.evaluate()
                    number = self.world.all_reduce_max(stop.signal)
                    if self.save_is_due(step + 1 in due) or is_best or number or state.finished:
                        state.save(is_best=is_best)
                    if number:
                        self.end(number)
                    if state.finished:
                        break
            except NoBatchCame:
                # Not in the middle of an evaluation, which would be left out when the run goes on;
                # and of several processes only this one may be waiting.
                between = state.step not in due or state.step == state.last_result_at
                if state.step and between and self.world.size == 1:
                    state.save(is_best=False)
                self.end(stop.signal)

    def end(self, number: int) -> NoReturn:
        """Ends the run as the signal wants it, and says how to go on."""
        self.state.checkpoints.wait()
        self.report.say(f"\nstopped after step {self.state.step:,} of {self.num_steps:,}")
        if self.config.keep_checkpoints:
            self.report.say(f"to go on: {resume_command(self.run_folder, self.world)}")
        else:
            self.report.say("the run keeps no checkpoints and cannot go on")
        end(number)

    def evaluation_steps(self) -> set[int]:
        """Returns the numbers of steps done after which the validation images are looked at."""
        every = self.config.evaluate_every
        if self.config.epochs is None:
            return {*range(every, self.num_steps, every), self.num_steps}
        epochs = range(every, self.config.epochs, every)
        return {round(epoch * self.steps_per_epoch) for epoch in epochs} | {self.num_steps}

    def save_is_due(self, was_evaluated: bool) -> bool:
        """Returns whether the full state is to be saved after this step."""
        every = self.config.checkpoint_every
        if every is None:
            return was_evaluated
        return self.state.step % every == 0 or self.state.step == self.num_steps

    def train_step(self, step: int, batch: Batch) -> None:
        """Moves the weights by one batch.

        Raises:
            UserError: the loss or the gradient is not finite; the weights are left as they were.
        """
        config, random = self.config, step_generator(self.config.seed, step)
        masks, dropout_seed = torch.Generator(), int(random.integers(2**62))
        masks.manual_seed(dropout_seed)
        images = normalize(batch.images, self.preprocessing)
        targets = one_hot(batch.labels, len(self.splits.train.class_names))
        augment, share = config.augment, config.batch_size // self.world.size
        if step < round(augment.mix_until * self.num_steps):
            images, targets = mix(
                *(images, targets, random),
                mixup_strength=augment.mixup,
                cutmix_strength=augment.cutmix,
            )
        images, targets = images[:share], targets[:share]  # without the neighbour
        if step == 0 and self.world.is_main:
            names = self.splits.train.class_names
            figure = plots.training_batch(images, targets, self.preprocessing, names)
            plots.save(figure, self.run_folder.plots / "train_batch.png")
        kept = draw_stochastic_depth(self.model, config.batch_size, masks)
        kept = kept[:, self.world.rank * share : (self.world.rank + 1) * share]
        kept = kept.to(self.compute.device)
        try:
            result = self.state.update(step, images, targets, kept, dropout_seed + self.world.rank)
        except NotFiniteError as error:
            found = error.result
            self.stop(
                f"step {step}: loss {found.loss}, gradient norm {found.gradient_norm} at learning "
                f"rate {found.learning_rate:g}; stopped before the weights were changed"
            )
        if self.num_steps < SHORT or step % LOG_EVERY == 0 or step + 1 == self.num_steps:
            self.run_folder.log_step(
                {
                    "step": step,
                    "epoch": round(step / self.steps_per_epoch, 4),
                    "loss": result.loss,
                    "learning_rate": result.learning_rate,
                    "gradient_norm": result.gradient_norm,
                    "seconds": round(self.state.seconds, 3),
                }
            )

    def stop(self, what: str) -> NoReturn:
        """Ends the run that has diverged; what best/ and checkpoints/ hold stays."""
        self.state.checkpoints.wait()
        last = self.state.last_checkpoint
        what += f"; the last good checkpoint is {last}" if last else "; there is no checkpoint yet"
        rate = self.config.optimizer.learning_rate / 3
        fix = f"A lower rate, in a new run: --learning-rate {rate:.1g}"
        raise DivergedError(what, where=self.run_folder.path, fix=fix)

    def show_step(self, bar: ProgressBar, step: int) -> None:
        """Moves the progress bar on; where there is none, says a line every half minute."""
        seconds, done = time.perf_counter() - self.started, step + 1 - self.first_step
        speed = done * self.config.batch_size / seconds
        rate = self.state.last_rate
        note = f"loss {self.state.mean_loss:.3f}  rate {rate:.2g}  {speed:,.0f} images/s"
        total = math.ceil(self.epochs - 1e-9)
        epoch = min(int(self.epochs * step / self.num_steps + 1e-9) + 1, total)
        bar.advance(1, note, f"epoch {epoch}/{total}")
        left = (self.num_steps - step - 1) * seconds / done
        if not self.said_estimate and seconds > 10 and done >= 10:
            self.said_estimate = True
            if left > 60:
                self.report.say(f"speed    {speed:,.0f} images/s: about {duration(left)} to go")
        if not self.report.console.is_terminal and seconds - self.last_line > 30:
            left_text = f"{duration(left)} to go"
            self.report.say(f"step {step + 1:,} of {self.num_steps:,}   {note}   {left_text}")
            self.last_line = seconds

    def note_bad(self, batch: Batch) -> None:
        """Names each undecodable image once, and stops the run where there are too many."""
        for each in batch.bad:
            if each.name not in self.bad:
                self.bad[each.name] = each
                self.new_bad.append(each)
        self.name_bad(batch.bad)
        refuse_too_many(list(self.bad.values()), self.splits.train, self.config.data.max_bad)

    def name_bad(self, bad: list[BadImage]) -> None:
        """Says and lists the images that were not named before."""
        for each in bad:
            if each.name not in self.named:
                self.named.add(each.name)
                self.run_folder.log_bad_file(each)
                self.report.say(f"skipped  {each.name}: {each.what}", style="yellow")

    def share_bad(self) -> None:
        """Lets all processes know what each of them could not decode."""
        for found in self.world.gather(self.new_bad):
            self.name_bad(found)
            self.bad.update({each.name: each for each in found})
        self.new_bad = []

    def evaluate(self) -> bool:
        """Measures on the validation images, writes a line, keeps the best weights; is it the best?

        Without validation images the last weights are the best.
        """
        config, state, validation = self.config, self.state, self.splits.validation
        self.share_bad()
        kept, folder = state.kept_model(), self.run_folder.best
        epoch, loss = state.step / self.steps_per_epoch, state.mean_loss
        result = None
        if validation is not None:
            result = measure(kept, validation, config, self.compute, self.world)
            self.name_bad(result.bad)
            refuse_too_many(result.bad, validation, config.data.max_bad)
            if not math.isfinite(result.loss):
                what = f"step {state.step - 1}: the validation loss is {result.loss}"
                self.stop(f"{what}; the run has diverged")
        is_best = state.note_result(None if result is None else (result.top1, -result.loss))
        if is_best and self.world.is_main:
            save_model(kept, folder, overwrite=True)
            self.run_folder.write_card(model_card(kept, config, self.splits, result, None))
        # Of --epochs, whose steps are rounded to whole ones: the last ends the last epoch.
        shown = self.epochs * state.step / self.num_steps
        total = f"{self.epochs:.1f}".removesuffix(".0")
        text = f"epoch {shown:5.1f}/{total}   loss {loss:.4f}"
        if result is not None:
            values: dict[str, float] = {"epoch": round(epoch, 3), "step": state.step}
            values["training_loss"] = round(loss, 6)
            values |= {f"validation_{name}": round(value, 6) for name, value in result.metrics()}
            values |= {"seconds": round(state.seconds, 1), "best": int(is_best)}
            self.run_folder.log_evaluation(values)
            text += f"   validation {result.top1:7.2%}, loss {result.loss:.4f}"
            self.redraw()
        self.report.say(f"{text}   {state.seconds:6.1f} s{'   best' * (is_best and bool(result))}")
        if state.patience_is_over():
            self.report.say(f"stopped early: no better result in {config.patience} evaluations")
        self.last_line = time.perf_counter() - self.started
        return is_best

    def redraw(self) -> None:
        """Draws the curves so far, now and then."""
        seconds = time.perf_counter() - self.started
        if self.world.is_main and seconds - self.last_drawn > _REDRAW_EVERY:
            self.run_folder.draw_curves()
            self.last_drawn = time.perf_counter() - self.started
