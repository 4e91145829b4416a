"""The paper's fine-tuning suites: VTAB-1k (19 tasks) and Avg 5 (the mean of five sets).

VTAB-1k has two official protocols:
  paper         Google's ViT and Mixer: 2,500 steps of 512 images, cosine from the best of three
                rates after 200 steps of warm-up, clipped at norm 1, a random crop and a flip where
                the task allows them, 224 or 448 pixels by the task, three seeds
  lightweight   task_adaptation: 1,000 steps of 64 images, rate 0.01 divided by 10 after steps 300,
                600 and 900, 80 steps of warm-up, no clipping, nothing at random, 224 pixels
Both: SGD with momentum 0.9, a new head of zeros, pictures squashed to the model's size; 800 images
to learn from and 200 to choose the rate by, then all 1,000. The score is the plain mean of the
tasks' test accuracies. Avg 5: the paper's appendix C, see `training.finetuning_recipes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from allmlp.errors import UserError
from allmlp.studies.suite import Suite, SuiteResult, run_suite
from allmlp.studies.task_sources import Plan, named_tasks, plan_1k, plan_whole
from allmlp.studies.vtab_tasks import AVG5, VTAB, Task
from allmlp.training.config import TrainConfig
from allmlp.training.finetuning_recipes import LEARNING_RATES
from allmlp.training.recipes import recipe
from allmlp.training.resume import differences

PROTOCOLS = ("paper", "lightweight")
# Settings that a suite makes itself, and how they are chosen.
_OWN = {
    "optimizer.learning_rate": "--grid LR",
    "seed": "--seeds N",
    "epochs": "--steps N",
    "steps": "--steps N",
    "batch_size": "--batch-size N",
    "model.image_size": "--image-size PIXELS",
    "output": "--output FOLDER",
    "data.source": "--task NAME=SOURCE",
    "data.holdout": "Leave it out",
    "model.weights": "Give another CHECKPOINT",
    "recipe": "Leave it out",
}
SUITES: dict[str, dict[str, Task]] = {"avg5": AVG5}
ImageSize = int | tuple[int, int] | None


def vtab(
    checkpoint: str,
    tasks: Mapping[str, str],
    output: str,
    *,
    protocol: str = "paper",
    image_size: ImageSize = None,
    steps: int | None = None,
    batch_size: int | None = None,
    grid: Sequence[float] = (),
    seeds: Sequence[int] = (),
    changes: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    quiet: bool = False,
) -> SuiteResult:
    """Fine-tunes a checkpoint on tasks of VTAB-1k; goes on where it was stopped.

    Args:
        checkpoint: as `load_model` takes it.
        tasks: task -> the name of its data.
        output: the folder of the suite.
        protocol: "paper" or "lightweight".
        image_size: of every task; None takes the protocol's.
        steps, batch_size: of every run; None takes the protocol's. The warm-up keeps its share.
        grid: learning rates to choose from; none takes the protocol's. One is taken as it is.
        seeds: of the final runs; none takes the protocol's.
        changes: other settings, such as {"device": "cpu"}.
        settings: "section.name=value" each, after these.
        quiet: print nothing.

    Raises:
        UserError: a task, its data, a setting or the folder is wrong; nothing has been run then.
    """
    if protocol not in PROTOCOLS:
        fix = f"Known: {', '.join(PROTOCOLS)}"
        raise UserError(f"unknown protocol {protocol!r}", where="--protocol", fix=fix)
    is_paper = protocol == "paper"

    def official(task: Task) -> TrainConfig:
        return _paper(task) if is_paper else _lightweight()

    def official_rates(task: Task) -> tuple[float, ...]:
        return LEARNING_RATES["finetune_vtab"] if is_paper else (0.01,)

    asked = _Asked(image_size, steps, batch_size, grid, seeds, changes or {}, settings)
    default_seeds = (0, 1, 2) if is_paper else (0,)
    name = f"VTAB-1k, protocol {protocol}"
    return _run(
        *("vtab", VTAB, checkpoint, tasks, output, name, plan_1k),
        *(official, official_rates, default_seeds, asked, quiet),
    )


def transfer(
    checkpoint: str,
    tasks: Mapping[str, str],
    output: str,
    *,
    suite: str = "avg5",
    image_size: ImageSize = None,
    resize: Literal["resmall-crop", "resize-crop", "squash"] = "resmall-crop",
    steps: int | None = None,
    batch_size: int | None = None,
    grid: Sequence[float] = (),
    seeds: Sequence[int] = (),
    changes: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    quiet: bool = False,
) -> SuiteResult:
    """Fine-tunes a checkpoint on the sets of "Avg 5"; goes on where it was stopped.

    The learning rate is chosen on held-out training images; then a run for each seed trains on all
    of them (the paper, appendix C).

    Args:
        checkpoint, tasks, output, steps, batch_size, grid, seeds, changes, settings, quiet: as
            `vtab`; the steps, rates and held-out shares are those of each set's recipe.
        suite: "avg5".
        image_size: None is 224; the paper's Table 2 has 448.
        resize: how a test picture comes to the model's size: "resmall-crop" in the paper's Table 3,
            "resize-crop" in its Table 2.

    Raises:
        UserError: as `vtab`.
    """
    if suite not in SUITES:
        fix = f"Known: {', '.join(SUITES)}; VTAB-1k has a verb of its own: mixer vtab"
        raise UserError(f"unknown suite {suite!r}", where="--suite", fix=fix)
    size = 224 if image_size is None else image_size
    own_size = None if size in (224, 448, (224, 224), (448, 448)) else size
    if own_size is None and isinstance(size, tuple):
        size = size[0]

    def official(task: Task) -> TrainConfig:
        values = {"model.image_size": 224 if own_size else size, "data.resize": resize}
        return recipe(task.recipe).with_values(values)

    asked = _Asked(own_size, steps, batch_size, grid, seeds, changes or {}, settings)
    side = "x".join(map(str, size)) if isinstance(size, tuple) else size
    name = f"Avg 5 at {side} pixels, {resize}"
    return _run(
        *("transfer", SUITES[suite], checkpoint, tasks, output, name, plan_whole),
        *(official, lambda task: LEARNING_RATES[task.recipe], (0, 1, 2), asked, quiet),
    )


def _paper(task: Task) -> TrainConfig:
    values = {
        "augment.crop": "random" if task.crop else "none",
        "augment.flip": task.flip,
        "model.image_size": task.image_size,
    }
    return recipe("finetune_vtab").with_values(values)


def _lightweight() -> TrainConfig:
    values = {
        "steps": 1000,
        "batch_size": 64,
        "evaluate_every": 200,
        "model.image_size": 224,
        "optimizer.learning_rate": 0.01,
        "optimizer.schedule": "steps",
        "optimizer.decay_at": (300.0, 600.0, 900.0),
        "optimizer.warmup": 80.0,
        "optimizer.clip_norm": 0.0,
    }
    return recipe("finetune_vtab").with_values(values)


class _Asked:
    """What the caller asked for beside the protocol, and how it changes that."""

    def __init__(
        self,
        image_size: ImageSize,
        steps: int | None,
        batch_size: int | None,
        grid: Sequence[float],
        seeds: Sequence[int],
        changes: Mapping[str, Any],
        settings: Sequence[str],
    ) -> None:
        self.image_size, self.steps, self.batch_size = image_size, steps, batch_size
        self.grid, self.seeds = tuple(float(each) for each in grid), tuple(seeds)
        self.changes, self.settings = changes, settings
        for name in (*changes, *(each.partition("=")[0].strip() for each in settings)):
            if name in _OWN:
                what = f"{name} cannot be set beside the suite's own"
                raise UserError(what, where="--set", fix=_OWN[name])
        for name, values in (("--grid", self.grid), ("--seeds", self.seeds)):
            if len(set(values)) < len(values):
                listed = " ".join(f"{each:g}" for each in values)
                raise UserError(f"each value counts once, got {listed}", where=name)

    def config(self, official: TrainConfig) -> TrainConfig:
        """The settings of a task's runs."""
        values: dict[str, Any] = dict(self.changes)
        if self.image_size is not None:
            values["model.image_size"] = self.image_size
        if self.batch_size is not None:
            values["batch_size"] = self.batch_size
        if self.steps is not None and self.steps != official.steps:
            values |= self._length(official, self.steps)
        return official.with_values(values, self.settings)

    def _length(self, official: TrainConfig, steps: int) -> dict[str, Any]:
        """Another number of steps, with the warm-up and the decay at the same shares of it."""
        assert official.steps is not None
        optimizer = official.optimizer
        values: dict[str, Any] = {"steps": steps, "evaluate_every": max(1, steps // 5)}
        values["optimizer.warmup"] = optimizer.warmup / official.steps
        if optimizer.schedule == "steps":
            values["optimizer.decay_at"] = tuple(
                each / official.steps for each in optimizer.decay_at
            )
        return values

    def departures(
        self,
        official: Callable[[Task], TrainConfig],
        rates: Callable[[Task], tuple[float, ...]],
        seeds: tuple[int, ...],
        tasks: Sequence[Task],
    ) -> list[str]:
        """In what the runs are not the official protocol."""
        found: dict[str, str] = {}
        for task in tasks:
            config = official(task)
            if self.steps not in (None, config.steps):
                found["steps"] = f"steps {self.steps}"
            if self.batch_size not in (None, config.batch_size):
                found["batch"] = f"batch size {self.batch_size}"
            size = config.model.image_size
            if self.image_size not in (None, size, (size, size)):
                text = str(self.image_size)
                if isinstance(self.image_size, tuple):
                    text = "x".join(map(str, self.image_size))
                found["size"] = f"image size {text}"
            if self.grid and self.grid != rates(task):
                found["grid"] = f"grid {' '.join(f'{each:g}' for each in self.grid)}"
            for each in self.settings:
                if differences(config, config.with_setting(each)):
                    found[each] = each
        if self.seeds and self.seeds != seeds:
            found["seeds"] = f"seeds {' '.join(map(str, self.seeds))}"
        return list(found.values())


def _run(
    kind: str,
    known: Mapping[str, Task],
    checkpoint: str,
    tasks: Mapping[str, str],
    output: str,
    protocol: str,
    plan: Callable[[Task, str], Plan],
    official: Callable[[Task], TrainConfig],
    official_rates: Callable[[Task], tuple[float, ...]],
    official_seeds: tuple[int, ...],
    asked: _Asked,
    quiet: bool,
) -> SuiteResult:
    named = named_tasks([f"{name}={source}" for name, source in tasks.items()], None, known)
    departures = asked.departures(official, official_rates, official_seeds, list(known.values()))
    suite = Suite(
        kind=kind,
        known=known,
        checkpoint=checkpoint,
        sources=named,
        protocol=protocol,
        changes=departures,
        seeds=list(asked.seeds or official_seeds),
        plan=plan,
        config=lambda task: asked.config(official(task)),
        rates=lambda task: asked.grid or official_rates(task),
    )
    return run_suite(suite, output, quiet=quiet)
