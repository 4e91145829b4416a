"""VTAB-1k and "Avg 5": a checkpoint fine-tuned on many tasks, and the mean over them.

VTAB-1k (Zhai et al. 2019) has 19 tasks of 800 training images and 200 to choose the learning rate;
the final runs train on all 1,000. Its two protocols are Google's for ViT and Mixer ("paper") and
that of task_adaptation ("lightweight"). "Avg 5" (the paper, appendix C) is the mean over ImageNet,
CIFAR-10, CIFAR-100, Pets and Flowers, each by its recipe. docs/transfer.md lists the settings, the
rules by which a source's images are chosen, and the files.
"""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.console import Reporter
from allmlp.data.source import Source
from allmlp.data.source_spec import part_of
from allmlp.data.sources import names_source, open_splits, open_subset
from allmlp.data.sources.hub import PREFIX
from allmlp.data.sources.subset_file import (
    SubsetFile,
    is_applied,
    split_and_part,
    write_subset_file,
)
from allmlp.errors import UserError, one_of, plural
from allmlp.evaluation.features import weights_hash
from allmlp.evaluation.result_file import measurement, read_measurement, save_result
from allmlp.io import expand, read_json
from allmlp.models.family import size_text
from allmlp.options import assigned, given_settings, make
from allmlp.paper.options import SHARED, Avg5Options, SuiteOptions, VtabOptions
from allmlp.paper.studies import formatted
from allmlp.paper.tasks import AVG5, VTAB, Task
from allmlp.runtime.world import join_world
from allmlp.studies import FinetuneResult, finetune
from allmlp.sweep import study_folder
from allmlp.training.config import Steps, TrainConfig
from allmlp.training.dataset import check_readable
from allmlp.training.optim import check_warmup
from allmlp.training.recipes import LEARNING_RATES, recipe
from allmlp.training.run_folder import identity
from allmlp.weights.load import load_model

_TRAIN, _CHOOSE = 800, 200

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


# The data of a task


@dataclass(frozen=True)
class Plan:
    """How a source is used for a task."""

    rule: str  # own, official or first of docs/transfer.md, or whole: all images of Avg 5
    final: SubsetFile  # for the final runs; its source can be opened from any folder
    grid: SubsetFile | None  # for the grid; None holds out a fraction of the training images
    images: dict[str, int | None]  # of "train", "held_out" (part of it) and "test"
    num_classes: int
    departs: list[str]  # known differences from the task's official data
    notes: list[str]

    def describe(self) -> list[str]:
        parts, images = self.final.splits, self.images
        text = f"{images['train']:,} images to train ({', '.join(parts['train'])})"
        if self.grid is not None:
            chosen = ", ".join(self.grid.splits["validation"])
            text += f", {images['held_out']:,} of them to select the rate ({chosen})"
        text += f", {images['test']:,} to test ({', '.join(parts['test'])})"
        lines = [self.final.source, f"images by the rule {self.rule}: {text}", *self.notes]
        return lines + [f"differs from the task: {', '.join(self.departs)}"] * bool(self.departs)


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
    chosen = None  # from the validation images; never choose the rate on test images
    if "validation" in opened and test == "test":
        chosen = f"validation[:{min(_CHOOSE, len(opened['validation']))}]"
    if not is_small:
        chosen = chosen if chosen == f"validation[:{_CHOOSE}]" else None
        return "first", f"train[:{_TRAIN}]", chosen or f"train[{_TRAIN}:{_TRAIN + _CHOOSE}]", test
    if chosen and number <= _TRAIN:
        return "own", "train", chosen, test
    cut = number - max(1, number // 5)
    return "own", f"train[:{cut}]", f"train[{cut}:]", test


def _fits(opened: Mapping[str, Source], text: str) -> bool:
    split, part = split_and_part(text)
    try:
        return split in opened and (not part or len(part_of(opened[split], part, text)) > 0)
    except UserError:
        return False


def plan_of(task: Task, source: str) -> Plan:
    """Plans a task: of VTAB-1k 800 training images, 200 to choose the rate, and test; of Avg 5 all
    training and validation images, and test, which validation is where there is no test split."""
    opened, labels, notes = _open(task, source)
    grid = None
    if task.parts:
        rule, train, validation, test = _parts(task, opened, source)
        trained: tuple[str, ...] = (train, validation)
        grid = SubsetFile(source, {"train": (train,), "validation": (validation,)}, labels)
    else:
        rule, test = "whole", _test_split(opened, source)
        trained = tuple(name for name in ("train", "validation") if name in opened and name != test)
    final = SubsetFile(source, {"train": trained, "test": (test,)}, labels)
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
    for name, number in (task.images or {"train": _TRAIN + _CHOOSE}).items():
        if images[name] != number:
            departs.append(f"{images[name]:,} {name} images, not {number:,}")
    return Plan(rule, final, grid, images, classes, departs, notes)


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
    known: Mapping[str, Task]  # all tasks of the suite
    tasks: dict[str, dict[str, Any]]  # finished task -> its entry in suite.json
    changes: list[str]  # deviations of the runs from the official protocol

    @property
    def mean(self) -> float | None:
        """Accuracy over the finished tasks; None until the first is finished."""
        accuracies = [task["accuracy"] for task in self.tasks.values()]
        return statistics.fmean(accuracies) if accuracies else None

    @property
    def groups(self) -> dict[str, float]:
        """Group -> mean over its finished tasks."""
        found: dict[str, list[float]] = {}
        for name, task in self.tasks.items():
            found.setdefault(self.known[name].group, []).append(task["accuracy"])
        return {group: statistics.fmean(own) for group, own in found.items() if group}

    @property
    def missing(self) -> list[str]:
        return [name for name in self.known if name not in self.tasks]

    def to_json(self) -> dict[str, Any]:
        return {
            "tasks": self.tasks,
            "mean": self.mean,
            "groups": self.groups,
            "partial": bool(self.missing),
            "missing": self.missing,
            "changes": self.changes,
        }

    def summary(self) -> str:
        """Returns "mean of 3 of 19 tasks, partial: 41.20%"."""
        assert self.mean is not None
        total = plural(len(self.known), "task")
        of = f"{len(self.tasks)} of {total}, partial" if self.missing else total
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


def run_suite(
    official: Suite, checkpoint: str, options: SuiteOptions, *, quiet: bool = False
) -> SuiteResult:
    """Fine-tunes a checkpoint on the named tasks; the result includes earlier tasks.

    All tasks are checked before the first run: data, settings and model size. All problems are
    reported at once, before anything is written.
    """
    sources = named_tasks(options.task, options.tasks, official.known)
    for name in assigned(options.settings):
        if name in _OWN:
            what = f"{name} is chosen by the suite"
            raise UserError(what, where="set", fix=f"Use {_OWN[name]}")
    suite = replace(
        official,
        config=lambda task: _config(official.config(task), options),
        rates=lambda task: options.grid or official.rates(task),
        seeds=options.seeds or official.seeds,
    )
    changes = _changes(official, suite)
    own = ("suite.json", "data", *suite.known)
    folder = study_folder(options.output, own, sources.values())
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
            "seeds": list(suite.seeds),
        }
        before, done = world.broadcast_from_rank0(lambda: _before(file, header))
        plans = _check_all(suite, checkpoint, sources)

        def save() -> SuiteResult:
            tasks = {name: done[name] for name in suite.known if name in done}
            result = SuiteResult(folder, suite.known, tasks, changes)
            if world.is_main:
                named = {"sources": {**before, **sources}}
                save_result(file, {**header, **named, **result.to_json()})
            return result

        if world.is_main:
            (folder / "data").mkdir(parents=True, exist_ok=True)
            report.log_to(folder / "log.txt")
        result = save()  # before the first run, to claim the folder
        of = f"{len(plans)} of {plural(len(suite.known), 'task')}"
        say(f"suite    {suite.protocol}: {of}, seeds {', '.join(map(str, suite.seeds))}")
        if changes:
            say(f"changed  not the official protocol: {', '.join(changes)}")
        for name, plan in plans.items():
            say(f"task     {name}: " + "\n         ".join(plan.describe()))
        for number, (name, plan) in enumerate(plans.items(), 1):
            say(f"\n##### {name}: task {number} of {len(plans)}")
            rate, *others = suite.rates(suite.known[name])
            grid = [rate, *others] if others else []
            files = {folder / "data" / f"{name}.json": plan.final}
            if plan.grid is not None and grid:
                files[folder / "data" / f"{name}-grid.json"] = plan.grid
            for path, subset in files.items() if world.is_main else ():
                write_subset_file(path, subset)
            world.barrier()
            final, grid_source = [*map(str, files), None][:2]
            values = {"model.weights": checkpoint, "data.source": final}
            values |= {"output": str(folder / name)}
            if not grid:
                values |= {"data.holdout": 0.0, "optimizer.learning_rate": rate}
            config = suite.config(suite.known[name]).with_values(values)
            found = finetune(
                config, grid=grid, seeds=suite.seeds, grid_source=grid_source, quiet=quiet
            )
            done[name] = _entry(plan, config, found)
            result = save()
        for line in ["", *result.lines()]:
            say(line)
        say(result.summary(), style="bold green")
        say(f"written  {file}")
        return result


def _config(official: TrainConfig, options: SuiteOptions) -> TrainConfig:
    """Settings of a task's runs; warm-up and decay keep their fractions of the steps."""
    values = given_settings(options, SHARED)
    if options.steps is not None and options.steps != official.steps:
        assert official.steps is not None
        optimizer, length = official.optimizer, official.steps
        values |= {"evaluate_every": max(1, options.steps // 5)}
        values["optimizer.warmup"] = optimizer.warmup / length
        if isinstance(optimizer.schedule, Steps):
            at = optimizer.schedule.decay_at
            values["optimizer.decay_at"] = tuple(step / length for step in at)
    return official.with_values(values, options.settings)


def _changes(official: Suite, suite: Suite) -> list[str]:
    """Deviations of the runs from the official protocol."""
    found: dict[str, str] = {}
    for task in suite.known.values():
        before, now = identity(official.config(task)), identity(suite.config(task))
        found |= {key: f"{key}={now[key]}" for key in now if now[key] != before.get(key)}
        if suite.rates(task) != official.rates(task):
            found["grid"] = f"grid {' '.join(f'{rate:g}' for rate in suite.rates(task))}"
    if suite.seeds != official.seeds:
        found["seeds"] = f"seeds {' '.join(map(str, suite.seeds))}"
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


def _check_all(suite: Suite, checkpoint: str, sources: Mapping[str, str]) -> dict[str, Plan]:
    """Returns the plan of each task; all problems are collected in a single error."""
    plans: dict[str, Plan] = {}
    wrong: dict[str, UserError] = {}
    loads = functools.cache(lambda size: load_model(checkpoint, size, quiet=True) and None)
    for name, source in sources.items():
        task = suite.known[name]
        try:
            config = suite.config(task)
            assert config.steps is not None
            check_warmup(config.optimizer, config.steps)
            for rate in suite.rates(task):
                config.with_value("optimizer.learning_rate", rate)
            for seed in suite.seeds:
                config.with_value("seed", seed)
            plans[name] = plan_of(task, source)
            for split in open_subset(plans[name].final).values():
                check_readable(split, config.data.max_bad)
            loads(config.model.image_size)
        except UserError as error:
            wrong[name] = error
    if wrong:
        lines = [f"{len(wrong)} of {plural(len(sources), 'task')} cannot be run:"]
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
        "source": plan.final.source,
        "rule": plan.rule,
        "classes": plan.num_classes,
        "departs": plan.departs,
        "image_size": size_text(size) if isinstance(size, tuple) else size,
        "resize": config.data.resize,
    }


# The two suites

_LIGHTWEIGHT = {
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


def vtab(
    checkpoint: str | None = None,
    options: VtabOptions | None = None,
    *,
    quiet: bool = False,
    **fields: Any,
) -> SuiteResult | None:
    """Fine-tunes a checkpoint on tasks of VTAB-1k, or resumes; None if it only lists them."""
    options = make(VtabOptions, options, fields)
    if options.list_tasks:
        return None
    if checkpoint is None:
        fix = "mixer paper vtab CHECKPOINT --task NAME=SOURCE --output FOLDER"
        raise UserError("no checkpoint is named", fix=fix, code="missing")
    is_paper = options.protocol == "paper"

    def config(task: Task) -> TrainConfig:
        own = {"model.image_size": task.image_size, "augment.flip": task.flip}
        own |= {"augment.crop": "random" if task.crop else "none"}
        return recipe("finetune_vtab").with_values(own if is_paper else _LIGHTWEIGHT)

    suite = Suite(
        kind="vtab",
        known=VTAB,
        protocol=f"VTAB-1k, protocol {options.protocol}",
        config=config,
        rates=lambda _: LEARNING_RATES["finetune_vtab"] if is_paper else (0.01,),
        seeds=(0, 1, 2) if is_paper else (0,),
    )
    return run_suite(suite, checkpoint, options, quiet=quiet)


def avg5(
    checkpoint: str, options: Avg5Options | None = None, *, quiet: bool = False, **fields: Any
) -> SuiteResult:
    """Fine-tunes a checkpoint on the data sets of "Avg 5", or resumes the suite."""
    options = make(Avg5Options, options, fields)
    size = options.image_size or 224
    official = size if size in (224, 448, (224, 224), (448, 448)) else 224
    # The paper crops small images, too.
    crops = options.resize != "squash" and "data.resize" not in assigned(options.settings)

    def config(task: Task) -> TrainConfig:
        values: dict[str, Any] = {"model.image_size": official, "data.resize": options.resize}
        values |= {"data.crop": 0.875} if crops else {}
        return recipe(task.recipe).with_values(values)

    suite = Suite(
        kind="avg5",
        known=AVG5,
        protocol=f"Avg 5 at {size_text(size)} pixels, {options.resize}{', small too' * crops}",
        config=config,
        rates=lambda task: LEARNING_RATES[task.recipe],
        seeds=(0, 1, 2),
    )
    return run_suite(suite, checkpoint, options, quiet=quiet)


def show(result: SuiteResult | None, _: VtabOptions) -> None:
    """Prints the list of tasks, if requested; a suite has already printed its result."""
    if result is not None:
        return
    columns = {
        "task": "{name}",
        "group": "{group}",
        "classes": "{num_classes}",
        "pixels": "{image_size}",
        "crop": "{crop}",
        "flip": "{flip}",
        "train": "{parts[0]}",
        "choose": "{parts[1]}",
        "test": "{parts[2]}",
        "tfds": "{tfds}",
    }
    lines = formatted(columns, map(vars, VTAB.values()))
    lines += ["", "Labels that are made from numbers; the classes themselves will do as well:"]
    for task in VTAB.values():
        if task.labels is not None:
            lines.append(f"  {task.name:<21} {task.number}: {task.labels.describe()}")
    lines += ["", "Give the data of a task as --task NAME=SOURCE or in a file, --tasks tasks.json."]
    print("\n".join(lines))
