"""One training loop that reads from top to bottom: a config in, a run folder out."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from typing import NoReturn

import torch

from mlp_mixer.console import ProgressBar, Reporter
from mlp_mixer.data.augment import mix
from mlp_mixer.data.batches import Batch, on_device
from mlp_mixer.data.items import BadImage
from mlp_mixer.data.loader import training_batches
from mlp_mixer.data.sampler import step_generator
from mlp_mixer.data.transforms import normalize
from mlp_mixer.errors import UserError
from mlp_mixer.evaluation.accuracy import evaluate
from mlp_mixer.evaluation.pictures import save_figure
from mlp_mixer.models.catalog import create_model
from mlp_mixer.models.device import choose_device
from mlp_mixer.models.layers import ImageClassifier
from mlp_mixer.preprocessing import Preprocessing
from mlp_mixer.training.card import model_card
from mlp_mixer.training.config import TrainConfig
from mlp_mixer.training.dataset import (
    Augmentation,
    Splits,
    open_training_data,
    refuse_too_many,
)
from mlp_mixer.training.optimizer import (
    build_optimizer,
    learning_rate,
    loss_function,
    one_hot,
    update_average,
)
from mlp_mixer.training.pictures import training_batch
from mlp_mixer.training.recipes import recipe
from mlp_mixer.training.run_folder import RunFolder, check_unused, environment, planned_path
from mlp_mixer.training.summary import TrainResult, announce, finish
from mlp_mixer.weights.store import save_model

LOG_EVERY = 10  # steps
SMALL_STEP = 2e9  # floating-point operations


def train(config: TrainConfig | str = "digits", *, quiet: bool = False) -> TrainResult:
    """Trains a model from random weights and returns what it reached.

    Args:
        config: a configuration, or the name of a recipe.
        quiet: print nothing; log.txt is written all the same.

    Raises:
        UserError: a setting or the data is unusable (nothing has been written then), or the run
            had to stop: too many bad images, or a loss or gradient that is not finite.
    """
    config = recipe(config) if isinstance(config, str) else config
    # Check everything before anything is written.
    device = choose_device(config.device)
    path = planned_path(config)
    check_unused(path)
    splits = open_training_data(config.data)
    threads = torch.get_num_threads()
    with torch.random.fork_rng(), contextlib.ExitStack() as afterwards:
        # The caller's random numbers and threads stay as they are.
        afterwards.callback(torch.set_num_threads, threads)
        torch.manual_seed(config.seed)
        model = build_model(config, splits.train.class_names).to(device)
        set_threads(config, model)
        surroundings = environment(config, splits.train, device)
        run, report = RunFolder(path, config), Reporter(quiet=quiet)
        report.log_to(run.path / "log.txt")
        run.write_json("environment.json", surroundings)
        announce(report, config, splits, model, run, device)
        try:
            Trainer(config, splits, model, run, report, device).run()
        except KeyboardInterrupt:
            report.say(f"\nstopped by hand; what was reached so far lies in {run.path}")
            raise
        return finish(config, splits, run, report, device)


def set_threads(config: TrainConfig, model: ImageClassifier) -> None:
    """Sets torch's processor threads to the configured number, or to 1 for a small model.

    A step of a small model is hundreds of tiny operations, and torch's threads meet after each.
    Where another process takes one of the cores, every meeting waits for the scheduler: such a step
    was measured 130 times slower on two threads than on one (docs/decisions.md, 9).
    """
    operations = 3 * model.config.flops * config.batch_size
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif operations < SMALL_STEP:
        torch.set_num_threads(1)


def build_model(config: TrainConfig, class_names: list[str]) -> ImageClassifier:
    """Returns the new model of a run, with the class names and preprocessing that it will carry."""
    settings = config.model
    model = create_model(settings.name, settings.image_size, len(class_names), **settings.overrides)
    if model.config.in_channels not in (1, 3):
        what = f"images are read with 1 or 3 channels, the model wants {model.config.in_channels}"
        raise UserError(what, where="model.overrides.in_channels")
    model.class_names = class_names
    model.preprocessing = Preprocessing(
        image_size=model.config.image_size,
        resize=config.data.resize,
        channels=model.config.in_channels,
        exif_orientation=config.data.exif_orientation,
    )
    return model


class Trainer:
    """The state of a run while it trains: model, optimiser, step and the best so far."""

    def __init__(
        self,
        config: TrainConfig,
        splits: Splits,
        model: ImageClassifier,
        run: RunFolder,
        report: Reporter,
        device: torch.device,
    ) -> None:
        self.config, self.splits, self.model = config, splits, model
        self.run_folder, self.report, self.device = run, report, device
        assert model.preprocessing is not None
        self.preprocessing = model.preprocessing
        self.optimizer = build_optimizer(model, config.optimizer)
        # What is evaluated and kept: the weights themselves, or their running average.
        self.kept = copy.deepcopy(model) if config.optimizer.average else model
        self.steps_per_epoch = len(splits.train) / config.batch_size
        self.num_steps = max(1, round(config.epochs * self.steps_per_epoch))
        self.best = (-1.0, -math.inf)
        self.bad = {each.name: each for each in splits.bad}  # of the training images
        self.named = set(self.bad)
        self.started = time.perf_counter()
        self.last_line = 0.0  # seconds

    def run(self) -> None:
        """Trains to the end; best/ holds the best weights whenever this is interrupted."""
        config, train = self.config, self.splits.train
        evaluate_at = self.evaluation_steps()
        losses: list[float] = []
        batches = training_batches(
            train,
            self.preprocessing,
            Augmentation(config.augment, self.preprocessing),
            seed=config.seed,
            batch_size=config.batch_size,
            start=0,
            stop=self.num_steps,
            num_workers=config.data.num_workers,
            timeout=config.data.timeout,
            pin_memory=self.device.type == "cuda",
        )
        for each in self.splits.bad:
            self.run_folder.log_bad_file(each)
        with self.report.progress(self.num_steps, "steps") as bar:
            for step, batch in enumerate(on_device(batches, self.device)):
                self.note_bad(batch)
                losses.append(self.train_step(step, batch))
                self.show_step(bar, step, losses)
                if step + 1 in evaluate_at:
                    self.evaluate(step, sum(losses) / len(losses))
                    losses.clear()

    def evaluation_steps(self) -> set[int]:
        """Returns the numbers of steps done after which the validation images are looked at."""
        every = self.config.evaluate_every
        epochs = range(every, self.config.epochs, every)
        return {round(epoch * self.steps_per_epoch) for epoch in epochs} | {self.num_steps}

    def train_step(self, step: int, batch: Batch) -> float:
        """Moves the weights by one batch and returns its loss.

        Raises:
            UserError: the loss or the gradient is not finite; the weights are left as they were.
        """
        config, random = self.config, step_generator(self.config.seed, step)
        torch.manual_seed(int(random.integers(2**63)))  # dropout and stochastic depth of this step
        images = normalize(batch.images, self.preprocessing)
        targets = one_hot(batch.labels, len(self.splits.train.class_names))
        augment = config.augment
        images, targets = mix(
            images, targets, random, mixup_strength=augment.mixup, cutmix_strength=augment.cutmix
        )
        if step == 0:
            names = self.splits.train.class_names
            figure = training_batch(images, targets, self.preprocessing, names)
            save_figure(figure, self.run_folder.plots / "train_batch.png")

        self.model.train()
        loss = loss_function(self.model(images), targets, config.loss, config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip_norm)
        rate = learning_rate(config.optimizer, step, self.num_steps)
        value, norm_value = loss.item(), norm.item()
        if not (math.isfinite(value) and math.isfinite(norm_value)):
            self.stop(
                f"step {step}: loss {value}, gradient norm {norm_value} at learning rate {rate:g}; "
                "stopped before the weights were changed"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.kept is not self.model:
            update_average(self.kept, self.model, config.optimizer.average, step)
        if step % LOG_EVERY == 0 or step + 1 == self.num_steps:
            self.run_folder.log_step(
                {
                    "step": step,
                    "epoch": round(step / self.steps_per_epoch, 4),
                    "loss": value,
                    "learning_rate": rate,
                    "gradient_norm": norm_value,
                    "seconds": round(time.perf_counter() - self.started, 3),
                }
            )
        return value

    def stop(self, what: str) -> NoReturn:
        """Ends the run that has diverged; what best/ holds stays."""
        rate = self.config.optimizer.learning_rate / 3
        raise UserError(
            what, where=self.run_folder.path, fix=f"A lower rate: --learning-rate {rate:.1g}"
        )

    def show_step(self, bar: ProgressBar, step: int, losses: list[float]) -> None:
        """Moves the progress bar on; where there is none, says a line every half minute."""
        seconds = time.perf_counter() - self.started
        speed = (step + 1) * self.config.batch_size / seconds
        epoch = int(step / self.steps_per_epoch) + 1
        note = f"loss {sum(losses) / len(losses):.3f}  {speed:,.0f} images/s"
        bar.advance(1, note, f"epoch {epoch}/{self.config.epochs}")
        if not self.report.console.is_terminal and seconds - self.last_line > 30:
            self.report.say(f"step {step + 1:,} of {self.num_steps:,}   {note}   {seconds:.0f} s")
            self.last_line = seconds

    def note_bad(self, batch: Batch) -> None:
        """Names each undecodable image once, and stops the run where there are too many."""
        for each in self.name_bad(batch.bad):
            self.bad[each.name] = each
        most = self.config.data.max_bad
        refuse_too_many(list(self.bad.values()), len(self.splits.train), most)

    def name_bad(self, bad: list[BadImage]) -> list[BadImage]:
        """Says and lists the images that were not named before, and returns them."""
        new = list({each.name: each for each in bad if each.name not in self.named}.values())
        for each in new:
            self.named.add(each.name)
            self.run_folder.log_bad_file(each)
            self.report.say(f"skipped  {each.name}: {each.what}", style="yellow")
        return new

    def evaluate(self, step: int, training_loss: float) -> None:
        """Measures on the validation images, writes a line, and keeps the best weights."""
        config, seconds = self.config, time.perf_counter() - self.started
        result = evaluate(
            self.kept,
            self.splits.validation,
            batch_size=config.batch_size,
            num_workers=config.data.num_workers,
            allow_missing_classes=True,
            device=str(self.device),
            timeout=config.data.timeout,
        )
        self.name_bad(result.bad)
        refuse_too_many(result.bad, len(self.splits.validation), config.data.max_bad)
        if not math.isfinite(result.loss):
            self.stop(f"step {step}: the validation loss is {result.loss}; the run has diverged")
        is_best = (result.top1, -result.loss) > self.best
        epoch = (step + 1) / self.steps_per_epoch
        values: dict[str, float] = {"epoch": round(epoch, 3), "step": step + 1}
        values["training_loss"] = round(training_loss, 6)
        values |= {f"validation_{name}": round(value, 6) for name, value in result.metrics()}
        values |= {"seconds": round(seconds, 1), "best": int(is_best)}
        self.run_folder.log_evaluation(values)
        if is_best:
            self.best = (result.top1, -result.loss)
            folder = str(self.run_folder.best)
            card = model_card(self.kept, config, self.splits, folder, result, None)
            save_model(self.kept, self.run_folder.best)
            self.run_folder.write_card(card)
        self.report.say(
            f"epoch {epoch:5.1f}/{config.epochs}   loss {training_loss:.4f}   validation "
            f"{result.top1:7.2%}, loss {result.loss:.4f}   {seconds:6.1f} s{'   best' * is_best}"
        )
        self.last_line = time.perf_counter() - self.started
