"""A suite: one checkpoint fine-tuned on many tasks, and the mean over them; see `vtab`, `avg5`.

The folder holds
  suite.json      a measurement: what each task reached, the mean, what is missing
  data/           which images of its source each task takes, one or two small files each
  TASK/           the study of each task, see `finetuning`

The index ranges of VTAB-1k go by the order of tfds, and a user's files come in another. The rule
that was used is reported with every result:
    own        the source has at most 1,000 training images: all of them
    official   the suite's index ranges, in the source's own order
    first      the ranges do not fit: the first 800 training images, then 200 others
    whole      all training images (Avg 5)
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.console import Reporter, table
from allmlp.data.label_rule import LabelRule, is_applied
from allmlp.data.source import Source
from allmlp.data.source_spec import part_of
from allmlp.data.sources import names_source, open_splits, open_subset
from allmlp.data.sources.hub import PREFIX
from allmlp.data.sources.subset_file import SubsetFile, split_and_part, write_subset_file
from allmlp.errors import UserError, one_of, plural
from allmlp.evaluation.features import weights_hash
from allmlp.evaluation.result_file import measurement, read_measurement, write_measurement
from allmlp.finetuning import FinetuneResult, finetune
from allmlp.io import expand, read_json
from allmlp.options import Repeated
from allmlp.paper.study import PaperOptions
from allmlp.runtime.world import World, join_world
from allmlp.sweep import study_folder
from allmlp.training.config import Steps, TrainConfig
from allmlp.training.dataset import check_readable
from allmlp.training.optim import check_warmup
from allmlp.training.resume import identity
from allmlp.weights.load import load_model

GROUPS = ("natural", "specialised", "structured")
_TRAIN, _CHOOSE = 800, 200


@dataclass(frozen=True)
class Task:
    """A task of a suite, with the official numbers and parts of its data."""

    name: str
    group: str  # one of `GROUPS`; "" in Avg 5
    num_classes: int
    tfds: str  # its data set
    train: str  # parts in the order of tfds
    validation: str
    test: str
    pixels: tuple[int, int]  # typical width and height
    crop: bool = True  # whether training may crop
    flip: bool = True
    labels: LabelRule | None = None  # makes its classes of a number
    number: str = ""  # that the rule takes
    recipe: str = "finetune_vtab"
    images: Mapping[str, int] = field(default_factory=dict)  # train and test, if all are taken

    @property
    def image_size(self) -> int:
        """224 for small images, 448 for others; see `vtab`."""
        width, height = self.pixels
        return 224 if width * height < 96 * 96 else 448


@dataclass(frozen=True, kw_only=True)
class SuiteOptions(PaperOptions):
    """What all suites have in common."""

    task: Repeated = field(default=(), metadata={"metavar": "NAME=SOURCE"})
    """The data of a task, NAME=SOURCE; may be given many times. Any source that training reads."""
    tasks: str | None = None
    """A JSON file of the same, {"pets": "FOLDER"}; its paths are relative to its folder."""
    grid: tuple[float, ...] = field(default=(), metadata={"metavar": "LR ..."})
    """Learning rates to choose from; a single one is taken without a grid."""


# Settings that a suite makes itself.
_OWN = {"optimizer.learning_rate": "grid", "seed": "seeds", "epochs": "steps", "steps": "steps"}
_OWN |= {name: name for name in ("batch_size", "output", "recipe")}
_OWN |= {"model.image_size": "image_size", "data.source": "task", "data.holdout": "grid"}
_OWN |= {"model.weights": "the checkpoint"}


@dataclass(frozen=True)
class Suite:
    """A suite and its official protocol."""

    kind: str  # of the measurement
    known: Mapping[str, Task]
    protocol: str
    config: Callable[[Task], TrainConfig]
    rates: Callable[[Task], tuple[float, ...]]  # a single one is taken without a grid
    seeds: tuple[int, ...]
    plan: Callable[[Task, str], Plan]  # task, source -> the images


# The data of a task


@dataclass(frozen=True)
class Plan:
    """How a source serves a task."""

    task: Task
    source: str  # its name, as it can be opened from any folder
    rule: str  # see the module
    final: SubsetFile  # of the final runs
    grid: SubsetFile | None  # of the grid; None holds a fraction of the training images out
    images: dict[str, int | None]  # of "train", "held_out" (a part of these) and "test"
    num_classes: int
    notes: tuple[str, ...]

    def departs(self) -> list[str]:
        """Returns how the data differs from the official one of the task, as far as known."""
        found = []
        if self.num_classes != self.task.num_classes:
            found.append(f"{self.num_classes} classes, not {self.task.num_classes}")
        if self.rule == "first":
            found.append("not the suite's index ranges")
        expected = {"train": _TRAIN + _CHOOSE} if self.rule != "whole" else self.task.images
        for name, number in expected.items():
            if self.images[name] != number:
                found.append(f"{self.images[name]:,} {name} images, not {number:,}")
        return found

    def describe(self) -> list[str]:
        """Returns lines for the screen."""
        parts, images = self.final.splits, self.images
        text = f"{images['train']:,} images to train ({', '.join(parts['train'])})"
        if self.grid is not None:
            chosen = ", ".join(self.grid.splits["validation"])
            text += f", {images['held_out']:,} of them to choose by ({chosen})"
        text += f", {images['test']:,} to test ({', '.join(parts['test'])})"
        lines = [f"{self.task.name}: {self.source}", f"{_RULES[self.rule]}: {text}"]
        return lines + list(self.notes)


_RULES = {
    "own": "the source's own splits",
    "official": "the suite's index ranges",
    "first": "the first images, since the suite's index ranges do not fit",
    "whole": "all of the source",
}


def plan_1k(task: Task, source: str) -> Plan:
    """Returns how a source gives a task 800 images to train, 200 to choose by, and its test."""
    opened, classes, notes = _open(task, source)
    rule, train, validation, test = _parts(task, opened, source)
    final = SubsetFile(source, {"train": (train, validation), "test": (test,)}, classes)
    grid = SubsetFile(source, {"train": (train,), "validation": (validation,)}, classes)
    return _checked(task, rule, final, grid, notes)


def plan_whole(task: Task, source: str) -> Plan:
    """Returns how a source gives a task all of its training images, and its test.

    The validation images are trained on too, as the paper's 2,040 of Flowers-102; of a source
    without test images, as ImageNet, they are the test.
    """
    opened, classes, notes = _open(task, source)
    test = _test_split(opened, source)
    train = tuple(name for name in ("train", "validation") if name in opened and name != test)
    final = SubsetFile(source, {"train": train, "test": (test,)}, classes)
    return _checked(task, "whole", final, None, notes)


def _open(task: Task, source: str) -> tuple[Mapping[str, Source], Any, list[str]]:
    """The splits of a source, the label rule that they need, and notes."""
    rule = task.labels
    opened = open_splits(source, labels="classes" if rule is None else "numbers")
    if "train" not in opened:
        fix = f"Known there: {', '.join(opened)}. Give a source that has both"
        raise UserError("the data has no train split", where=source, fix=fix)
    if rule is None:
        return opened, None, []
    names = {name for images in opened.values() for name in images.class_names}
    if is_applied(rule, sorted(names)):
        note = f"labels: the classes 0 to {rule.num_classes - 1}, taken as they are"
        return open_splits(source), None, [note]
    return opened, rule, [f"labels: {task.number}, {rule.describe()}"]


def _test_split(opened: Mapping[str, Source], source: str) -> str:
    for name in ("test", "validation"):
        if name in opened:
            return name
    fix = "Give a source with train and test: SOURCE/train/<class>, SOURCE/test/<class>"
    raise UserError("the data has no images to measure on", where=source, fix=fix)


def _parts(task: Task, opened: Mapping[str, Source], source: str) -> tuple[str, str, str, str]:
    """The rule, and the parts to train on, to choose by and to test on."""
    number = len(opened["train"])
    is_small = number <= _TRAIN + _CHOOSE
    official = (task.train, task.validation, task.test)
    if not is_small and all(_fits(opened, part) for part in official):
        return "official", *official
    has_test = bool({"test", "validation"} & opened.keys())
    test = _test_split(opened, source) if is_small or has_test else f"train[{_TRAIN + _CHOOSE}:]"
    chosen = ""
    if "validation" in opened and test == "test":  # what is tested on is not chosen by
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
    train, test = splits["train"], splits["test"]
    classes, present = len(train.class_names), len(np.unique(train.labels))
    if classes < 2:
        what = f"there is only one class, {train.class_names[0]!r}; a task needs two"
        raise UserError(what, where=final.source)
    if classes != task.num_classes:
        notes.append(f"{classes} classes, where the task has {task.num_classes}")
    if present < classes:
        notes.append(f"{present} of the {classes} classes are among the training images")
    if rule in ("own", "first") and len(train) != _TRAIN + _CHOOSE:
        notes.append(f"{len(train):,} training images, where the task has 1,000")
    held_out = None if grid is None else len(open_subset(grid)["validation"])
    images: dict[str, int | None] = {"train": len(train), "held_out": held_out, "test": len(test)}
    return Plan(task, final.source, rule, final, grid, images, classes, tuple(notes))


def named_tasks(
    assignments: Iterable[str], file: str | None, known: Mapping[str, Task]
) -> dict[str, str]:
    """Returns task -> source, in the suite's order; a file's paths are relative to its folder."""
    tasks = {} if file is None else _read_tasks(expand(file))
    for assignment in assignments:
        name, _, source = (part.strip() for part in assignment.partition("="))
        if not source:
            what = f"task takes NAME=SOURCE, got {assignment!r}"
            raise UserError(what, where="task", fix="task: pets=FOLDER")
        if name in tasks:
            what = f"the task {name} is named twice: {tasks[name]}, {source}"
            raise UserError(what, where="task", fix="Leave one of them out")
        tasks[name] = resolved(source)
    if not tasks:
        fix = f"task: NAME=SOURCE, or tasks: FILE.json. Known: {', '.join(known)}"
        raise UserError("no task is named", where=file or "task", fix=fix)
    for name in tasks:
        one_of("task", name, known)
    return {name: tasks[name] for name in known if name in tasks}


def _read_tasks(path: Path) -> dict[str, str]:
    sources = read_json(path)
    named: dict[str, Any] = sources if isinstance(sources, dict) else {"": None}
    if not all(isinstance(source, str) and source.strip() for source in named.values()):
        fix = 'Write it as {"pets": "FOLDER", "cifar100": "hf:owner/name"}'
        raise UserError("not an object of tasks and the names of their data", where=path, fix=fix)
    folder = str(path.absolute().parent)
    return {name: resolved(source, folder) for name, source in named.items()}


def resolved(source: str, folder: str | None = None) -> str:
    """Returns a name of data with its path made absolute: relative to `folder`, or to here."""
    path = os.path.expanduser(source)
    if names_source(source) or (source.startswith(PREFIX) and not os.path.exists(path)):
        return source
    return os.path.join(os.getcwd() if folder is None else folder, path)


# What a suite reached


@dataclass(frozen=True)
class SuiteResult:
    """What a suite reached.

    Attributes:
        folder: of the suite.
        tasks: task -> "accuracy" (mean over the seeds), "deviation", "seeds", "learning_rate",
            "images", "source" and more, as suite.json has them.
        mean: over these tasks; None where there are none.
        groups: group -> mean over its tasks.
        missing: the suite's other tasks.
        changes: how the runs differ from the official protocol.
    """

    folder: Path
    tasks: dict[str, dict[str, Any]]
    mean: float | None
    groups: dict[str, float]
    missing: list[str]
    changes: list[str]

    def summary(self) -> str:
        """Returns "mean of 3 of 19 tasks, partial: 41.20%"."""
        assert self.mean is not None
        many, total = len(self.tasks), plural(len(self.tasks) + len(self.missing), "task")
        of = f"{many} of {total}, partial" if self.missing else total
        return f"mean of {of}: {self.mean:.2%}"

    def lines(self, known: Mapping[str, Task]) -> list[str]:
        """Returns the table, the means of the groups and what is missing."""
        lines = [*_task_table(self.tasks), ""]
        for group, mean in self.groups.items():
            members = [name for name, task in known.items() if task.group == group]
            have = sum(name in self.tasks for name in members)
            lines.append(f"{group:<12} {mean:.2%} ({have} of {plural(len(members), 'task')})")
        lines.append(self.summary())
        if self.missing:
            lines.append(f"missing  {', '.join(self.missing)}")
        departs = {name: task["departs"] for name, task in self.tasks.items() if task["departs"]}
        lines += [f"note     {name}: {', '.join(how)}" for name, how in departs.items()]
        why = ["tasks are missing"] * bool(self.missing)
        why += ["the protocol is changed"] * bool(self.changes)
        why += ["the data is not the official one"] * bool(departs)
        if why:
            lines.append(f"note     not comparable with published means: {' and '.join(why)}")
        return lines


def suite_result(
    folder: Path,
    known: Mapping[str, Task],
    done: Mapping[str, dict[str, Any]],
    changes: list[str],
) -> SuiteResult:
    """Returns what the finished tasks come to; `done` has task -> its entry of suite.json."""
    tasks = {name: done[name] for name in known if name in done}
    found = {name: float(task["accuracy"]) for name, task in tasks.items()}
    groups: dict[str, float] = {}
    for group in GROUPS:
        if values := [found[name] for name in found if known[name].group == group]:
            groups[group] = statistics.fmean(values)
    mean = statistics.fmean(found.values()) if found else None
    missing = [name for name in known if name not in tasks]
    return SuiteResult(folder, tasks, mean, groups, missing, changes)


def _task_table(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            *(name, task["rule"], f"{task['images']['train']:,}", f"{task['images']['test']:,}"),
            *(str(task["classes"]), str(task["image_size"]), f"{task['learning_rate']:g}"),
            f"{task['accuracy']:.2%}",
            "-" if task["deviation"] is None else f"{task['deviation']:.2%}",
            str(len(task["seeds"])),
        ]
        for name, task in tasks.items()
    ]
    header = ["task", "rule", "train", "test", "classes", "pixels", "rate", "top-1", "+-", "runs"]
    return table(header, rows, left=2)


# Running a suite


def run_suite(
    suite: Suite, checkpoint: str, options: SuiteOptions, *, quiet: bool = False
) -> SuiteResult:
    """Fine-tunes a checkpoint on the named tasks; returns these and earlier ones alike.

    Every task is checked before the first run: its data, its settings and the model's size. What is
    wrong with any of them is reported at once, and nothing is written.
    """
    sources = named_tasks(options.task, options.tasks, suite.known)
    for setting in options.settings:
        name = setting.partition("=")[0].strip()
        if name in _OWN:
            what = f"{name} is chosen by the suite"
            raise UserError(what, where="set", fix=f"Use {_OWN[name]}")
    config = {name: _config(suite.config(suite.known[name]), options) for name in sources}
    own = ("suite.json", "data", *suite.known)
    path = study_folder(options.output, own, sources.values())
    with join_world(options.device or "auto") as (world, _):
        return _Run(suite, checkpoint, options, sources, config, path, world, quiet).run()


def _config(official: TrainConfig, options: SuiteOptions) -> TrainConfig:
    """The settings of a task's runs; warm-up and decay keep their fractions of the steps."""
    names = {"device": "device", "batch_size": "batch_size"}
    names |= {"num_workers": "data.num_workers", "image_size": "model.image_size"}
    given = {key: getattr(options, name) for name, key in names.items()}
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
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
    """How the runs differ from the official protocol."""
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


@dataclass
class _Run:
    suite: Suite
    checkpoint: str
    options: SuiteOptions
    sources: dict[str, str]
    configs: dict[str, TrainConfig]
    path: Path
    world: World
    quiet: bool

    def __post_init__(self) -> None:
        suite, options, world = self.suite, self.options, self.world
        quiet = self.quiet or not world.is_main
        self.report = Reporter(quiet=quiet)
        self.changes, self.seeds = _changes(suite, options), list(options.seeds or suite.seeds)
        model = load_model(self.checkpoint, quiet=quiet)
        self.header = measurement(suite.kind, model, {}) | {
            "checkpoint": self.checkpoint,
            "weights_sha256": weights_hash(model),
            "protocol": suite.protocol,
            "changes": self.changes,
            "seeds": self.seeds,
        }
        self.all_sources, self.done = world.broadcast_from_rank0(self.before)
        self.plans = self.check_all()

    def before(self) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """The sources and entries of tasks that the same suite measured before."""
        if not (self.path / "suite.json").exists():
            return {}, {}
        values = read_measurement(self.path / "suite.json")
        if values.get("weights_sha256") != self.header["weights_sha256"]:
            what = "the folder holds a suite of another checkpoint, or its weights have changed"
            raise UserError(what, where=self.path, fix="Give another output")
        same = ("kind", "protocol", "changes", "seeds")
        if any(values.get(name) != self.header[name] for name in same):
            return {}, {}  # other runs: these stay in the folders of their tasks
        return dict(values.get("sources") or {}), dict(values.get("tasks") or {})

    def rates(self, name: str) -> tuple[float, ...]:
        return self.options.grid or self.suite.rates(self.suite.known[name])

    def check_all(self) -> dict[str, Plan]:
        """Returns how the data serves each task; all that is wrong is one error."""
        plans: dict[str, Plan] = {}
        wrong: list[tuple[str, UserError]] = []
        loaded: set[Any] = set()
        for name, config in self.configs.items():
            try:
                assert config.steps is not None
                check_warmup(config.optimizer, config.steps)
                for rate in self.rates(name):
                    config.with_value("optimizer.learning_rate", rate)
                for seed in self.seeds:
                    config.with_value("seed", seed)
                plans[name] = self.suite.plan(self.suite.known[name], self.sources[name])
                for split in open_subset(plans[name].final).values():
                    check_readable(split, config.data.max_bad)
                size = config.model.image_size
                if size not in loaded:
                    load_model(self.checkpoint, size, quiet=True)
                    loaded.add(size)
            except UserError as error:
                wrong.append((name, error))
        if wrong:
            lines = [f"{len(wrong)} of {plural(len(self.configs), 'task')} cannot be run:"]
            for name, error in wrong:
                where = f" ({error.where})" if error.where else ""
                lines.append(f"{name}: {error.what}{where}")
            raise UserError("\n  ".join(lines), fix=wrong[0][1].fix)
        return plans

    def run(self) -> SuiteResult:
        """Fine-tunes on each task; the finished runs of each are skipped."""
        if self.world.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            self.save()  # before anything else is there: whose folder this is
            (self.path / "data").mkdir(exist_ok=True)
            self.report.log_to(self.path / "log.txt")
        self.describe()
        for number, name in enumerate(self.plans, 1):
            self.report.say(f"\n##### {name}: task {number} of {len(self.plans)}")
            self.done[name] = self.measure(name)
            self.save()
        result = self.result()
        for line in ["", *result.lines(self.suite.known)]:
            style = "bold green" if line == result.summary() else None
            self.report.say(line, style=style)
        self.report.say(f"written  {self.path / 'suite.json'}")
        return result

    def describe(self) -> None:
        say, seeds = self.report.say, ", ".join(map(str, self.seeds))
        of = f"{len(self.plans)} of {plural(len(self.suite.known), 'task')}"
        say(f"suite    {self.suite.protocol}: {of}, seed{'s' * (len(self.seeds) > 1)} {seeds}")
        if self.changes:
            say(f"changed  not the official protocol: {', '.join(self.changes)}")
        for plan in self.plans.values():
            first, *rest = plan.describe()
            say(f"task     {first}")
            for line in rest:
                say(f"         {line}")
        if any(plan.rule != "whole" for plan in self.plans.values()):
            say("note     images are taken in the order of the source; exactly the 1,000 images")
            say("         of VTAB-1k are those in the order of tfds")

    def measure(self, name: str) -> dict[str, Any]:
        """Runs the study of a task; returns its entry of suite.json."""
        plan, rates = self.plans[name], list(self.rates(name))
        final, grid = (self.path / "data" / f"{name}{end}.json" for end in ("", "-grid"))
        has_grid = len(rates) > 1
        if self.world.is_main:
            write_subset_file(final, plan.final)
            if plan.grid is not None and has_grid:
                write_subset_file(grid, plan.grid)
        self.world.barrier()
        values: dict[str, Any] = {
            "model.weights": self.checkpoint,
            "data.source": str(final),
            "output": str(self.path / name),
        }
        if not has_grid:
            values |= {"data.holdout": 0.0, "optimizer.learning_rate": rates[0]}
        config = self.configs[name].with_values(values)
        result = finetune(
            config,
            grid=rates if has_grid else (),
            seeds=self.seeds,
            grid_source=str(grid) if plan.grid is not None and has_grid else None,
            quiet=self.quiet,
        )
        return _entry(plan, config, result)

    def save(self) -> None:
        if self.world.is_main:
            result = self.result()
            values = {
                **self.header,
                "sources": {**self.all_sources, **self.sources},
                "tasks": result.tasks,
                "mean": result.mean,
                "groups": result.groups,
                "partial": bool(result.missing),
                "missing": result.missing,
            }
            write_measurement(self.path / "suite.json", values)

    def result(self) -> SuiteResult:
        return suite_result(self.path, self.suite.known, self.done, self.changes)


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
        "grid": [[rate, accuracy] for rate, accuracy in result.grid.items()],
        "images": plan.images,
        "source": plan.source,
        "rule": plan.rule,
        "parts": {name: list(parts) for name, parts in plan.final.splits.items()},
        "labels": None if plan.final.labels is None else plan.final.labels.describe(),
        "classes": plan.num_classes,
        "departs": plan.departs(),
        "group": plan.task.group,
        "image_size": height if height == width else f"{height}x{width}",
        "steps": config.steps,
        "batch_size": config.batch_size,
        "resize": config.data.resize,
    }


def as_tasks(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns keyword options in which `tasks` may be a mapping of tasks to sources."""
    tasks = fields.get("tasks")
    if not isinstance(tasks, Mapping):
        return dict(fields)
    named: Sequence[str] = [f"{name}={source}" for name, source in tasks.items()]
    return {**fields, "tasks": None, "task": (*fields.get("task", ()), *named)}
