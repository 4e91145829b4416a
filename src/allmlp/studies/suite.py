"""A suite: one checkpoint fine-tuned on many tasks, and the mean over them.

Its folder holds
  suite.json      a measurement: what each task reached, the mean, what is missing
  data/           which images of its source each task takes, one or two small files each
  TASK/           the study of each task: the grid and the final runs, see `training.finetune`
The same call again goes on where it was stopped; tasks may be added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allmlp.console import Reporter
from allmlp.data.selections import write_selection
from allmlp.errors import UserError, plural
from allmlp.evaluation.measurement import measurement, read_measurement, write_measurement
from allmlp.io import expand
from allmlp.models.layers import ImageClassifier
from allmlp.runtime.world import World, join_world
from allmlp.studies.suite_result import SuiteResult, suite_result
from allmlp.studies.task_sources import Plan, check_images
from allmlp.studies.vtab_tasks import Task
from allmlp.training.config import TrainConfig
from allmlp.training.finetune import finetune
from allmlp.training.schedule import check_warmup
from allmlp.training.study_folder import (
    FinetuneResult,
    changed_values,
    names_in,
    refuse_other_things,
)
from allmlp.weights.store import load_model

_FILE, _DATA = "suite.json", "data"


@dataclass(frozen=True)
class Suite:
    """What is to be done.

    Attributes:
        kind: "vtab" or "transfer".
        known: all tasks of the suite.
        checkpoint: as `load_model` takes it.
        sources: task -> the name of its data, absolute.
        protocol: its name.
        changes: in which the runs depart from it.
        seeds: of the final runs.
        plan: how a source serves a task.
        config: the settings of a task's runs, without data and output.
        rates: of the grid of a task; a single one is taken as it is.
    """

    kind: str
    known: Mapping[str, Task]
    checkpoint: str
    sources: Mapping[str, str]
    protocol: str
    changes: list[str]
    seeds: list[int]
    plan: Callable[[Task, str], Plan]
    config: Callable[[Task], TrainConfig]
    rates: Callable[[Task], tuple[float, ...]]


def run_suite(suite: Suite, output: str, *, quiet: bool = False) -> SuiteResult:
    """Measures the tasks of a suite that are not measured yet, and returns all that are.

    Every task is checked before the first run: its data, its settings and the model's size.

    Raises:
        UserError: something is wrong with a task, of which all are named; or the folder holds
            something else. Nothing has been written then.
    """
    device = suite.config(next(iter(suite.known.values()))).device
    with join_world(device) as (world, _):
        return _Runner(suite, expand(output), world, quiet).run()


class _Runner:
    def __init__(self, suite: Suite, path: Path, world: World, quiet: bool) -> None:
        self.suite, self.path, self.world, self.quiet = suite, path, world, quiet
        self.report = Reporter(quiet=quiet or not world.is_main)
        model = load_model(suite.checkpoint, quiet=quiet or not world.is_main)
        self.identity: dict[str, Any] = {
            "checkpoint": suite.checkpoint,
            "weights_sha256": weights_digest(model),
            "protocol": suite.protocol,
            "changes": suite.changes,
            "seeds": suite.seeds,
        }
        self.header = measurement(suite.kind, model, {})
        self.sources: dict[str, str] = {}  # also of tasks that were measured before
        self.done: dict[str, dict[str, Any]] = world.broadcast_from_rank0(self.before)
        self.configs = {name: suite.config(suite.known[name]) for name in self.pending()}
        self.check_settings()
        self.plans = self.check_all()

    def pending(self) -> list[str]:
        """The tasks that were asked for and are not measured."""
        return [name for name in self.suite.sources if name not in self.done]

    def before(self) -> dict[str, dict[str, Any]]:
        """What this very suite has measured so far; refuses a folder of something else."""
        there = names_in(self.path, *self.suite.sources.values()) - {_FILE, _DATA, "log.txt"}
        if not (self.path / _FILE).exists():
            refuse_other_things(self.path, there)
            return {}
        values = read_measurement(self.path / _FILE)
        if not values.get("tasks") and not there:
            return {}  # it was stopped before its first run: nothing depends on its settings
        tasks, names = values.get("tasks"), dict(values.get("sources") or {})
        changes = [] if values.get("kind") == self.suite.kind else [f"it is {values.get('kind')}"]
        changes += changed_values(values, self.identity)
        changes += [
            f"the data of {name} is {names[name]} there and {source} here"
            for name, source in self.suite.sources.items()
            if names.get(name, source) != source
        ]
        if changes or not isinstance(tasks, dict):
            what = f"the folder holds another suite: {'; '.join(changes)}"
            fix = "Give another --output; tasks may be added to those that are there"
            raise UserError(what, where=self.path, fix=fix)
        self.sources = names
        return tasks

    def check_settings(self) -> None:
        """Refuses rates, seeds and lengths that no run could have."""
        for name, config in self.configs.items():
            assert config.steps is not None
            check_warmup(config.optimizer, config.steps)
            for rate in self.suite.rates(self.suite.known[name]):
                config.with_value("optimizer.learning_rate", rate)
            for seed in self.suite.seeds:
                config.with_value("seed", seed)

    def check_all(self) -> dict[str, Plan]:
        """Returns how the data serves each task; all that is wrong is said in one error."""
        plans: dict[str, Plan] = {}
        wrong: list[tuple[str, UserError]] = []
        loaded: set[Any] = set()
        for name, config in self.configs.items():
            try:
                plans[name] = self.suite.plan(self.suite.known[name], self.suite.sources[name])
                check_images(plans[name], config.data.max_bad)
                size = config.model.image_size
                if size not in loaded:
                    load_model(self.suite.checkpoint, size, quiet=True)
                    loaded.add(size)
            except UserError as error:
                wrong.append((name, error))
        if len(wrong) == 1:
            name, error = wrong[0]
            raise UserError(f"task {name}: {error.what}", where=error.where, fix=error.fix)
        if wrong:
            many = f"{len(wrong)} of {plural(len(self.configs), 'task')} cannot be run"
            listed = [
                f"{name}: {error.what}" + (f" ({error.where})" if error.where else "")
                for name, error in wrong
            ]
            raise UserError("\n  ".join([f"{many}:", *listed]), fix=wrong[0][1].fix)
        return plans

    def run(self) -> SuiteResult:
        if self.world.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            self.save()  # before anything else is there: whose folder this is
            (self.path / _DATA).mkdir(exist_ok=True)
            self.report.log_to(self.path / "log.txt")
        self.describe()
        names = self.pending()
        try:
            for number, name in enumerate(names):
                self.say(f"\n##### {name}: task {number + 1} of {len(names)} to measure")
                self.done[name] = self.measure(name)
                self.save()
        except (KeyboardInterrupt, SystemExit):
            every = len(self.suite.sources)
            done = f"{every - len(self.pending())} of {plural(every, 'task')} are measured"
            self.say(f"the suite goes on with the same command as before; {done}")
            raise
        result = self.result()
        self.say("")
        for line in result.lines(self.suite.known):
            is_score = line == result.summary()
            self.report.say(line, style="bold green" if is_score else None)
        self.say(f"written  {self.path / _FILE}")
        return result

    def describe(self) -> None:
        """Says what will be done with which images."""
        suite = self.suite
        asked, every = len(suite.sources), len(suite.known)
        self.say(
            f"suite    {suite.protocol}: {asked} of {plural(every, 'task')}, {_seeds(suite.seeds)}"
        )
        if suite.changes:
            self.say(f"changed  not the official protocol: {', '.join(suite.changes)}")
        for name, each in self.done.items():
            self.say(f"done     {name}: {each['accuracy']:.2%}")
        for plan in self.plans.values():
            first, *rest = plan.describe()
            self.say(f"task     {first}")
            for line in rest:
                self.say(f"         {line.strip()}")
        if any(plan.rule != "whole" for plan in self.plans.values()):
            self.say("note     images count in the order of the source; exactly the 1,000 images")
            self.say("         of VTAB-1k are those in the order of tfds")

    def measure(self, name: str) -> dict[str, Any]:
        """Runs the study of a task; returns what suite.json says of it."""
        suite, plan = self.suite, self.plans[name]
        final, grid = ((self.path / _DATA) / f"{name}{end}.json" for end in ("", "-grid"))
        rates = list(suite.rates(plan.task))
        has_grid = len(rates) > 1
        if self.world.is_main:
            write_selection(final, plan.final)
            if plan.grid is not None and has_grid:
                write_selection(grid, plan.grid)
        self.world.barrier()
        values: dict[str, Any] = {
            "model.weights": suite.checkpoint,
            "data.source": str(final),
            "output": str(self.path / name),
        }
        if not has_grid:
            values |= {"data.holdout": 0.0, "optimizer.learning_rate": rates[0]}
        config = self.configs[name].with_values(values)
        result = finetune(
            config,
            grid=rates if has_grid else (),
            seeds=suite.seeds,
            grid_source=str(grid) if plan.grid is not None and has_grid else None,
            quiet=self.quiet,
        )
        return _entry(plan, config, result)

    def save(self) -> None:
        """Writes suite.json."""
        if not self.world.is_main:
            return
        result, suite = self.result(), self.suite
        values = {
            **self.header,
            **self.identity,
            "sources": {**self.sources, **suite.sources},
            "tasks": result.tasks,
            "mean": result.mean,
            "groups": result.groups,
            "partial": result.partial,
            "missing": result.missing,
            "pending": self.pending(),
        }
        write_measurement(self.path / _FILE, values)

    def result(self) -> SuiteResult:
        """What is measured so far."""
        return suite_result(self.path, self.suite.known, self.done, self.suite.changes)

    def say(self, text: str) -> None:
        self.report.say(text)


def weights_digest(model: ImageClassifier) -> str:
    """Returns a sha256 over the names and values of all tensors of a model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _entry(plan: Plan, config: TrainConfig, result: FinetuneResult) -> dict[str, Any]:
    size = config.model.image_size
    if size is None:
        size = load_model(result.folder / "best", quiet=True).config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {
        "accuracy": result.mean,
        "deviation": result.deviation,
        "seeds": list(result.accuracies),
        "accuracies": list(result.accuracies.values()),
        "learning_rate": result.learning_rate,
        "grid": [[rate, reached] for rate, reached in result.grid.items()],
        "images": plan.images,
        "source": plan.source,
        "rule": plan.rule,
        "parts": {name: list(parts) for name, parts in plan.final.splits.items()},
        "labels": None if plan.final.labels is None else plan.final.labels.describe(),
        "classes": plan.num_classes,
        "departs": plan.departs(),
        "group": plan.task.group,
        "image_size": f"{height}x{width}" if height != width else height,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "resize": config.data.resize,
    }


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
