"""A suite: a checkpoint fine-tuned on many tasks, and the mean over them; see `vtab`, `avg5`.

The folder holds
  suite.json      a measurement: result of each task, the mean, missing tasks
  data/           which images of its source each task uses, one or two small files each
  TASK/           the study of each task, see `finetuning`

The official index ranges of VTAB-1k refer to the order in tfds, which users' files do not share.
The rule that was used is reported with every result:
    own        the source has at most 1,000 training images: all of them
    official   the suite's index ranges, in the source's order
    first      the ranges do not fit: the first 800 training images, then 200 others
    whole      all training images (Avg 5)
"""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.console import Reporter
from allmlp.data.source import Source
from allmlp.data.source_spec import part_of
from allmlp.data.sources import names_source, open_splits, open_subset
from allmlp.data.sources.hub import PREFIX
from allmlp.data.sources.subset_file import (
    LabelRule,
    SubsetFile,
    is_applied,
    split_and_part,
    write_subset_file,
)
from allmlp.errors import UserError, one_of, plural
from allmlp.evaluation.features import weights_hash
from allmlp.evaluation.result_file import measurement, read_measurement, save_result
from allmlp.io import expand, read_json
from allmlp.options import assigned, given_settings
from allmlp.paper.options import SuiteOptions
from allmlp.paper.study import formatted
from allmlp.runtime.world import join_world
from allmlp.studies import FinetuneResult, finetune
from allmlp.sweep import study_folder
from allmlp.training.config import Steps, TrainConfig
from allmlp.training.dataset import check_readable
from allmlp.training.optim import check_warmup
from allmlp.training.run_folder import identity
from allmlp.weights.load import load_model

_TRAIN, _CHOOSE = 800, 200


@dataclass(frozen=True)
class Task:
    """A task of a suite, with the official sizes and splits of its data."""

    name: str
    num_classes: int
    group: str = ""  # natural, specialised or structured; "" in Avg 5
    tfds: str = ""  # data set name
    parts: tuple[str, ...] = ()  # train, validation (for the rate) and test, in tfds order
    image_size: int = 224
    crop: bool = True  # whether random crops are allowed in training
    flip: bool = True
    labels: LabelRule | None = None  # turns a number into classes
    number: str = ""  # input of the rule
    recipe: str = "finetune_vtab"
    images: Mapping[str, int] = field(default_factory=dict)  # train and test, if all are used


# Settings that a suite controls -> the option to use instead.
_OWN = {"optimizer.learning_rate": "grid", "seed": "seeds", "epochs": "steps", "steps": "steps"}
_OWN |= {name: name for name in ("batch_size", "output", "recipe")}
_OWN |= {"model.image_size": "image_size", "data.source": "task", "data.holdout": "grid"}
_OWN |= {"model.weights": "the checkpoint"}


@dataclass(frozen=True)
class Suite:
    kind: str  # of the measurement
    known: Mapping[str, Task]
    protocol: str
    config: Callable[[Task], TrainConfig]
    rates: Callable[[Task], tuple[float, ...]]  # if there is only one, no grid is run
    seeds: tuple[int, ...]
    plan: Callable[[Task, str], Plan]  # task, source -> the images


# The data of a task


@dataclass(frozen=True)
class Plan:
    """How a source is used for a task."""

    source: str  # can be opened from any folder
    rule: str  # see the module docstring
    final: SubsetFile  # for the final runs
    grid: SubsetFile | None  # for the grid; None holds out a fraction of the training images
    images: dict[str, int | None]  # of "train", "held_out" (part of it) and "test"
    num_classes: int
    departs: list[str]  # known differences from the task's official data
    notes: list[str]

    def describe(self) -> list[str]:
        """Returns a description, line by line."""
        parts, images = self.final.splits, self.images
        text = f"{images['train']:,} images to train ({', '.join(parts['train'])})"
        if self.grid is not None:
            chosen = ", ".join(self.grid.splits["validation"])
            text += f", {images['held_out']:,} of them to select the rate ({chosen})"
        text += f", {images['test']:,} to test ({', '.join(parts['test'])})"
        lines = [self.source, f"images by the rule {self.rule}: {text}", *self.notes]
        return lines + [f"differs from the task: {', '.join(self.departs)}"] * bool(self.departs)


def plan_1k(task: Task, source: str) -> Plan:
    """Plans a VTAB-1k task on a source: 800 training, 200 validation images, and test."""
    opened, classes, notes = _open(task, source)
    rule, train, validation, test = _parts(task, opened, source)
    final = SubsetFile(source, {"train": (train, validation), "test": (test,)}, classes)
    grid = SubsetFile(source, {"train": (train,), "validation": (validation,)}, classes)
    return _checked(task, rule, final, grid, notes)


def plan_whole(task: Task, source: str) -> Plan:
    """Plans a task on a source: all of its training images, and its test set.

    Validation images are used for training, too, e.g. the paper's 2,040 images of Flowers-102. If
    the source has no test images, as with ImageNet, they are the test set.
    """
    opened, classes, notes = _open(task, source)
    test = _test_split(opened, source)
    train = tuple(name for name in ("train", "validation") if name in opened and name != test)
    final = SubsetFile(source, {"train": train, "test": (test,)}, classes)
    return _checked(task, "whole", final, None, notes)


def _open(task: Task, source: str) -> tuple[Mapping[str, Source], Any, list[str]]:
    """Returns the splits of a source, the label rule to apply, and notes."""
    rule = task.labels
    opened = open_splits(source, labels="classes" if rule is None else "numbers")
    if "train" not in opened:
        fix = f"Known there: {', '.join(opened)}. Give a source that has both"
        raise UserError("the data has no train split", where=source, fix=fix)
    if rule is None:
        return opened, None, []
    names = {name for images in opened.values() for name in images.class_names}
    if is_applied(rule, sorted(names)):
        note = f"labels: the classes 0 to {rule.num_classes - 1}, used directly"
        return open_splits(source), None, [note]
    return opened, rule, [f"labels: {task.number}, {rule.describe()}"]


def _test_split(opened: Mapping[str, Source], source: str) -> str:
    for name in ("test", "validation"):
        if name in opened:
            return name
    fix = "Give a source with train and test: SOURCE/train/<class>, SOURCE/test/<class>"
    raise UserError("the data has no images to measure on", where=source, fix=fix)


def _parts(task: Task, opened: Mapping[str, Source], source: str) -> tuple[str, str, str, str]:
    """Returns the rule, and the splits for training, validation and testing."""
    number = len(opened["train"])
    is_small = number <= _TRAIN + _CHOOSE
    if not is_small and all(_fits(opened, part) for part in task.parts):
        train, validation, test = task.parts
        return "official", train, validation, test
    has_test = bool({"test", "validation"} & opened.keys())
    test = _test_split(opened, source) if is_small or has_test else f"train[{_TRAIN + _CHOOSE}:]"
    chosen = ""
    if "validation" in opened and test == "test":  # never choose the rate on test images
        many = min(_CHOOSE, len(opened["validation"]))
        chosen = f"validation[:{many}]" if number <= _TRAIN or many == _CHOOSE else ""
    if not is_small:
        rest = f"train[{_TRAIN}:{_TRAIN + _CHOOSE}]"
        return "first", f"train[:{_TRAIN}]", chosen or rest, test
    if chosen and number <= _TRAIN:
        return "own", "train", chosen, test
    cut = number - max(1, number // 5)
    return "own", f"train[:{cut}]", f"train[{cut}:]", test


def _fits(opened: Mapping[str, Source], text: str) -> bool:
    split, part = split_and_part(text)
    if split not in opened:
        return False
    try:
        return not part or len(part_of(opened[split], part, text)) > 0
    except UserError:
        return False


def _checked(
    task: Task, rule: str, final: SubsetFile, grid: SubsetFile | None, notes: list[str]
) -> Plan:
    splits = open_subset(final)
    train, classes = splits["train"], len(splits["train"].class_names)
    present = len(np.unique(train.labels))
    if classes < 2:
        what = f"there is only one class, {train.class_names[0]!r}; a task needs two"
        raise UserError(what, where=final.source)
    if present < classes:
        notes.append(f"{present} of the {classes} classes are among the training images")
    held_out = None if grid is None else len(open_subset(grid)["validation"])
    images = {"train": len(train), "held_out": held_out, "test": len(splits["test"])}
    departs = []
    if classes != task.num_classes:
        departs.append(f"{classes} classes, not {task.num_classes}")
    if rule == "first":
        departs.append("not the suite's index ranges")
    for name, number in (task.images if rule == "whole" else {"train": _TRAIN + _CHOOSE}).items():
        if images[name] != number:
            departs.append(f"{images[name]:,} {name} images, not {number:,}")
    return Plan(final.source, rule, final, grid, images, classes, departs, notes)


def named_tasks(
    assignments: Iterable[str], given: str | Mapping[str, Any] | None, known: Mapping[str, Task]
) -> dict[str, str]:
    """Returns task -> source, in the suite's order; `given` is such a mapping or a file of it."""
    named: Any = given or {}
    folder = os.getcwd()
    if isinstance(given, str):
        file = expand(given)
        named, folder = read_json(file), str(file.absolute().parent)
        is_mapping = isinstance(named, dict)
        if not is_mapping or not all(isinstance(name, str) and name for name in named.values()):
            fix = 'Write it as {"pets": "FOLDER", "cifar100": "hf:owner/name"}'
            what = "not an object of tasks and the names of their data"
            raise UserError(what, where=file, fix=fix)
    tasks = {name: resolved(str(source), folder) for name, source in named.items()}
    for name, source in assigned(assignments, "task").items():
        if name in tasks:
            what = f"the task {name} is named twice: {tasks[name]}, {source}"
            raise UserError(what, where="task", fix="Leave one of them out")
        tasks[name] = resolved(source, os.getcwd())
    if not tasks:
        fix = f"task: NAME=SOURCE, or tasks: FILE.json. Known: {', '.join(known)}"
        raise UserError("no task is named", where=given or "task", fix=fix)
    for name in tasks:
        one_of("task", name, known)
    return {name: tasks[name] for name in known if name in tasks}


def resolved(source: str, folder: str) -> str:
    """Makes the path in a data name absolute, relative to the folder."""
    path = os.path.expanduser(source)
    if names_source(source) or (source.startswith(PREFIX) and not os.path.exists(path)):
        return source
    return os.path.join(folder, path)


@dataclass(frozen=True)
class SuiteResult:
    """Result of a suite."""

    folder: Path  # of the suite
    tasks: dict[str, dict[str, Any]]  # task -> its entry in suite.json
    mean: float | None  # accuracy over these tasks; None until the first is finished
    groups: dict[str, float]  # group -> mean over its tasks
    missing: list[str]  # the suite's other tasks
    changes: list[str]  # deviations of the runs from the official protocol

    def summary(self) -> str:
        """Returns "mean of 3 of 19 tasks, partial: 41.20%"."""
        assert self.mean is not None
        many, total = len(self.tasks), plural(len(self.tasks) + len(self.missing), "task")
        of = f"{many} of {total}, partial" if self.missing else total
        return f"mean of {of}: {self.mean:.2%}"

    def lines(self) -> list[str]:
        """Returns the table, the group means, and the deviations from the official protocol."""
        columns = {
            "task": "{task}",
            "rule": "{rule}",
            "train": "{images[train]:,}",
            "test": "{images[test]:,}",
            "classes": "{classes}",
            "pixels": "{image_size}",
            "rate": "{learning_rate:g}",
            "top-1": "{accuracy:.2%}",
            "+-": "{deviation:.2%}",
        }
        rows = ({"task": name, **task} for name, task in self.tasks.items())
        lines = [*formatted(columns, rows), ""]
        lines += [f"{group:<12} {mean:.2%}" for group, mean in self.groups.items()]
        lines += [f"missing  {', '.join(self.missing)}"] * bool(self.missing)
        departs = {name: task["departs"] for name, task in self.tasks.items() if task["departs"]}
        lines += [f"note     {name}: {', '.join(how)}" for name, how in departs.items()]
        if self.missing or self.changes or departs:
            lines.append("note     not comparable with published means")
        return lines


def suite_result(
    folder: Path,
    known: Mapping[str, Task],
    done: Mapping[str, dict[str, Any]],
    changes: list[str],
) -> SuiteResult:
    """Aggregates the finished tasks; `done` maps a task to its entry in suite.json."""
    tasks = {name: done[name] for name in known if name in done}
    by_group: dict[str, list[float]] = {}
    for name, task in tasks.items():
        by_group.setdefault(known[name].group, []).append(float(task["accuracy"]))
    accuracies = [float(task["accuracy"]) for task in tasks.values()]
    mean = statistics.fmean(accuracies) if accuracies else None
    groups = {group: statistics.fmean(own) for group, own in by_group.items() if group}
    missing = [name for name in known if name not in tasks]
    return SuiteResult(folder, tasks, mean, groups, missing, changes)


def run_suite(
    suite: Suite, checkpoint: str, options: SuiteOptions, *, quiet: bool = False
) -> SuiteResult:
    """Fine-tunes a checkpoint on the named tasks; the result includes earlier tasks.

    All tasks are checked before the first run: data, settings and model size. All problems are
    reported at once, before anything is written.
    """
    sources = named_tasks(options.task, options.tasks, suite.known)
    for name in assigned(options.settings):
        if name in _OWN:
            what = f"{name} is chosen by the suite"
            raise UserError(what, where="set", fix=f"Use {_OWN[name]}")
    configs = {name: _config(suite.config(suite.known[name]), options) for name in sources}
    rates = {name: options.grid or suite.rates(suite.known[name]) for name in sources}
    seeds, changes = options.seeds or suite.seeds, _changes(suite, options)
    folder = study_folder(
        options.output, ("suite.json", "data", *suite.known), list(sources.values())
    )
    file = folder / "suite.json"
    with join_world(options.device or "auto") as (world, _):
        report = Reporter(quiet=quiet or not world.is_main)
        say = report.say
        model = load_model(checkpoint, quiet=quiet or not world.is_main)
        header = measurement(suite.kind, model, {}) | {
            "checkpoint": checkpoint,
            "weights_sha256": weights_hash(model),
            "protocol": suite.protocol,
            "changes": changes,
            "seeds": list(seeds),
        }
        before, done = world.broadcast_from_rank0(lambda: _before(file, header))
        plans = _check_all(suite, checkpoint, sources, configs, rates, seeds)

        def save() -> SuiteResult:
            result = suite_result(folder, suite.known, done, changes)
            values = {
                **header,
                "sources": {**before, **sources},
                "tasks": result.tasks,
                "mean": result.mean,
                "groups": result.groups,
                "partial": bool(result.missing),
                "missing": result.missing,
            }
            if world.is_main:
                save_result(file, values)
            return result

        if world.is_main:
            (folder / "data").mkdir(parents=True, exist_ok=True)
            report.log_to(folder / "log.txt")
        result = save()  # before the first run, to claim the folder
        of = f"{len(plans)} of {plural(len(suite.known), 'task')}"
        say(f"suite    {suite.protocol}: {of}, seeds {', '.join(map(str, seeds))}")
        if changes:
            say(f"changed  not the official protocol: {', '.join(changes)}")
        for name, plan in plans.items():
            say(f"task     {name}: " + "\n         ".join(plan.describe()))
        for number, (name, plan) in enumerate(plans.items(), 1):
            say(f"\n##### {name}: task {number} of {len(plans)}")
            grid = rates[name] if len(rates[name]) > 1 else ()
            prescribed = plan.grid if grid else None
            files = {folder / "data" / f"{name}.json": plan.final}
            if prescribed is not None:
                files[folder / "data" / f"{name}-grid.json"] = prescribed
            for path, subset in files.items() if world.is_main else ():
                write_subset_file(path, subset)
            world.barrier()
            final, *chosen_on = map(str, files)
            values = {"model.weights": checkpoint, "data.source": final}
            values |= {"output": str(folder / name)}
            if not grid:
                values |= {"data.holdout": 0.0, "optimizer.learning_rate": rates[name][0]}
            config = configs[name].with_values(values)
            source = chosen_on[0] if chosen_on else None
            found = finetune(config, grid=grid, seeds=seeds, grid_source=source, quiet=quiet)
            done[name] = _entry(plan, config, found)
            result = save()
        for line in ["", *result.lines()]:
            say(line)
        say(result.summary(), style="bold green")
        say(f"written  {file}")
        return result


def _config(official: TrainConfig, options: SuiteOptions) -> TrainConfig:
    """Settings of a task's runs; warm-up and decay keep their fractions of the steps."""
    names = {"device": "device", "batch_size": "batch_size"}
    names |= {"num_workers": "data.num_workers", "image_size": "model.image_size"}
    values = given_settings(options, names)
    if options.steps is not None and options.steps != official.steps:
        assert official.steps is not None
        optimizer, length = official.optimizer, official.steps
        values |= {"steps": options.steps, "evaluate_every": max(1, options.steps // 5)}
        values["optimizer.warmup"] = optimizer.warmup / length
        if isinstance(optimizer.schedule, Steps):
            at = optimizer.schedule.decay_at
            values["optimizer.decay_at"] = tuple(step / length for step in at)
    return official.with_values(values, options.settings)


def _changes(suite: Suite, options: SuiteOptions) -> list[str]:
    """Deviations of the runs from the official protocol."""
    found: dict[str, str] = {}
    for task in suite.known.values():
        official = suite.config(task)
        before, now = identity(official), identity(_config(official, options))
        found |= {key: f"{key}={now[key]}" for key in now if now[key] != before.get(key)}
        if options.grid and options.grid != suite.rates(task):
            found["grid"] = f"grid {' '.join(f'{rate:g}' for rate in options.grid)}"
    if options.seeds and options.seeds != suite.seeds:
        found["seeds"] = f"seeds {' '.join(map(str, options.seeds))}"
    return list(found.values())


def _before(
    file: Path, header: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Sources and entries of tasks that the same suite measured before."""
    values = read_measurement(file) if file.exists() else dict(header)
    if values.get("weights_sha256") != header["weights_sha256"]:
        what = "the folder holds a suite of another checkpoint, or its weights have changed"
        raise UserError(what, where=file.parent, fix="Give another output")
    if any(values.get(name) != header[name] for name in ("kind", "protocol", "changes", "seeds")):
        return {}, {}  # other runs; they remain in the folders of their tasks
    return dict(values.get("sources") or {}), dict(values.get("tasks") or {})


def _check_all(
    suite: Suite,
    checkpoint: str,
    sources: Mapping[str, str],
    configs: Mapping[str, TrainConfig],
    rates: Mapping[str, tuple[float, ...]],
    seeds: tuple[int, ...],
) -> dict[str, Plan]:
    """Returns the plan of each task; all problems are collected in a single error."""
    plans: dict[str, Plan] = {}
    wrong: dict[str, UserError] = {}
    loads = functools.cache(lambda size: load_model(checkpoint, size, quiet=True) and None)
    for name, config in configs.items():
        try:
            assert config.steps is not None
            check_warmup(config.optimizer, config.steps)
            for rate in rates[name]:
                config.with_value("optimizer.learning_rate", rate)
            for seed in seeds:
                config.with_value("seed", seed)
            plans[name] = suite.plan(suite.known[name], sources[name])
            for split in open_subset(plans[name].final).values():
                check_readable(split, config.data.max_bad)
            loads(config.model.image_size)
        except UserError as error:
            wrong[name] = error
    if wrong:
        lines = [f"{len(wrong)} of {plural(len(configs), 'task')} cannot be run:"]
        for name, error in wrong.items():
            where = f" ({error.where})" if error.where else ""
            lines.append(f"{name}: {error.what}{where}")
        raise UserError("\n  ".join(lines), fix=next(iter(wrong.values())).fix)
    return plans


def _entry(plan: Plan, config: TrainConfig, result: FinetuneResult) -> dict[str, Any]:
    """The entry of a task in suite.json; its data/TASK.json lists the images used."""
    size = config.model.image_size
    return {
        "accuracy": result.mean,
        "deviation": result.deviation,
        "seeds": list(result.accuracies),
        "accuracies": list(result.accuracies.values()),
        "learning_rate": result.learning_rate,
        "grid": [[rate, accuracy] for rate, accuracy in result.grid.items()],
        "images": plan.images,
        "source": plan.source,
        "rule": plan.rule,
        "classes": plan.num_classes,
        "departs": plan.departs,
        "image_size": "x".join(map(str, size)) if isinstance(size, tuple) else size,
        "resize": config.data.resize,
    }
