"""The data that a user has for a task -> what to learn from, to choose by and to measure on.

The index ranges of a suite go by the order of tfds, and a user's files come in another. Which rule
was used is said with every result:
    own        the source has at most 1,000 training images: they are taken as they are
    official   the suite's index ranges, in the source's own order
    first      the ranges do not fit: the first 800 training images, then 200 others
    whole      all training images (Avg 5)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from allmlp.data.hub_dataset import PREFIX
from allmlp.data.items import Source
from allmlp.data.label_rules import is_applied
from allmlp.data.selections import Selection, select, split_and_part
from allmlp.data.source_names import part_of
from allmlp.data.sources import names_source, open_splits, open_unmatched
from allmlp.errors import UserError, near_names
from allmlp.io import expand
from allmlp.studies.vtab_tasks import Task
from allmlp.training.dataset import check_readable

_LEARN, _CHOOSE = 800, 200


@dataclass(frozen=True)
class Plan:
    """How a source serves a task.

    Attributes:
        task: which.
        source: its name, as it can be opened from any folder.
        rule: "own", "official", "first" or "whole"; see the module.
        final: what the final runs train on, and are measured on.
        grid: what the runs of the grid train on and are judged by; None holds a share out.
        images: "train", "held_out" (a part of these; None for a share) and "test".
        num_classes: that the source has.
        notes: what else is to be said.
    """

    task: Task
    source: str
    rule: str
    final: Selection
    grid: Selection | None
    images: dict[str, int | None]
    num_classes: int
    notes: tuple[str, ...]

    def departs(self) -> list[str]:
        """Returns in what the data is not the official one of the task, as far as can be known."""
        found = []
        if self.num_classes != self.task.num_classes:
            found.append(f"{self.num_classes} classes, not {self.task.num_classes}")
        if self.rule == "first":
            found.append("not the suite's index ranges")
        wanted = {"train": _LEARN + _CHOOSE} if self.rule != "whole" else self.task.images or {}
        for name, number in wanted.items():
            if self.images[name] != number:
                found.append(f"{self.images[name]:,} {name} images, not {number:,}")
        return found

    def describe(self) -> list[str]:
        """Returns the lines that say it."""
        parts = self.final.splits
        images = self.images
        learnt = f"{images['train']:,} images to train ({', '.join(parts['train'])})"
        if self.grid is not None:
            chosen = ", ".join(self.grid.splits["validation"])
            learnt += f", {images['held_out']:,} of them to choose by ({chosen})"
        measured = f"{images['test']:,} to measure on ({', '.join(parts['test'])})"
        lines = [f"{self.task.name}: {self.source}", f"  {_RULES[self.rule]}: {learnt}, {measured}"]
        return lines + [f"  {note}" for note in self.notes]


_RULES = {
    "own": "the source's own splits",
    "official": "the suite's index ranges",
    "first": "the first images, for the suite's index ranges do not fit",
    "whole": "all of the source",
}


def named_tasks(
    assignments: Sequence[str], file: str | None, known: Mapping[str, Task]
) -> dict[str, str]:
    """Returns task -> source of the flags and the file that name them, in the suite's order.

    Args:
        assignments: "NAME=SOURCE" each.
        file: a JSON object of names and sources, whose relative paths are relative to its folder.
        known: the tasks of the suite.

    Raises:
        UserError: an unknown task, one that is named twice, or none at all.
    """
    named: list[tuple[str, str]] = [] if file is None else _read_tasks(file)
    in_file = len(named)
    for each in assignments:
        name, equals, source = each.partition("=")
        if not equals or not source.strip():
            raise UserError(f"--task takes NAME=SOURCE, got {each!r}", fix="--task pets=FOLDER")
        named.append((name.strip(), resolved(source.strip())))
    tasks: dict[str, str] = {}
    for number, (name, source) in enumerate(named):
        where = file if number < in_file else "--task"
        if name not in known:
            fix = f"{near_names(name, known)}Known: {', '.join(known)}"
            raise UserError(f"unknown task {name!r}", where=where, fix=fix)
        if name in tasks:
            what = f"the task {name} is named twice: {tasks[name]}, {source}"
            raise UserError(what, where=where, fix="Leave one of them out")
        tasks[name] = source
    if not tasks:
        fix = f"--task NAME=SOURCE, or --tasks FILE.json. Known: {', '.join(known)}"
        raise UserError("no task is named", where=file or "--task", fix=fix)
    return {name: tasks[name] for name in known if name in tasks}


def _read_tasks(file: str) -> list[tuple[str, str]]:
    path = expand(file)
    fix = 'Write it as {"pets": "FOLDER", "cifar100": "hf:owner/name"}'
    try:
        pairs: Any = json.loads(path.read_bytes(), object_pairs_hook=tuple)
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=path) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {str(error)[:200]}", where=path, fix=fix) from error
    is_pairs = isinstance(pairs, tuple) and all(
        isinstance(each, tuple) and isinstance(each[1], str) and each[1].strip() for each in pairs
    )
    if not is_pairs:
        raise UserError("not an object of tasks and the names of their data", where=path, fix=fix)
    folder = str(path.absolute().parent)
    return [(name, resolved(source, folder)) for name, source in pairs]


def resolved(source: str, folder: str | None = None) -> str:
    """Returns the name of data with an absolute path, where it is one.

    Args:
        source: as it was typed.
        folder: what a relative path is relative to; None is the working directory.
    """
    path = os.path.expanduser(source)
    if names_source(source) or (source.startswith(PREFIX) and not os.path.exists(path)):
        return source
    return os.path.join(os.getcwd() if folder is None else folder, path)


def plan_1k(task: Task, source: str) -> Plan:
    """Returns how a source gives a task 800 images to learn from, 200 to choose by, and its test.

    Raises:
        UserError: the source cannot be opened, or has not the images.
    """
    opened, classes, notes = _open(task, source)
    rule, train, validation, test = _parts(task, opened, source)
    final = Selection(source, {"train": (train, validation), "test": (test,)}, classes)
    grid = Selection(source, {"train": (train,), "validation": (validation,)}, classes)
    return _checked(task, rule, final, grid, notes)


def plan_whole(task: Task, source: str) -> Plan:
    """Returns how a source gives a task all of its training images, and its test.

    The validation images are trained on too, as the paper's 2,040 of Flowers-102; of a source
    without test images, as ImageNet, they are what is measured on.

    Raises:
        UserError: the source cannot be opened, or has not the images.
    """
    opened, classes, notes = _open(task, source)
    if "test" not in opened and "validation" not in opened:
        fix = "Give a source with train and test: SOURCE/train/<class>, SOURCE/test/<class>"
        raise UserError("the data has no images to measure on", where=source, fix=fix)
    test = "test" if "test" in opened else "validation"
    train = tuple(each for each in ("train", "validation") if each in opened and each != test)
    final = Selection(source, {"train": train, "test": (test,)}, classes)
    return _checked(task, "whole", final, None, notes)


def _open(task: Task, source: str) -> tuple[dict[str, Source], Any, list[str]]:
    """The splits of a source, the label rule that they need, and what is to be said of it."""
    rule = task.labels
    opened: dict[str, Source] = open_splits(source) if rule is None else open_unmatched(source)
    if "train" not in opened:
        fix = f"Known there: {', '.join(opened)}. Give a source that has both"
        raise UserError("the data has no train split", where=source, fix=fix)
    if rule is None:
        return opened, None, []
    names = {name for each in opened.values() for name in each.class_names}
    if is_applied(rule, sorted(names)):
        note = f"labels: the classes 0 to {rule.num_classes - 1}, taken as they are"
        return open_splits(source), None, [note]
    return opened, rule, [f"labels: {task.number}, {rule.describe()}"]


def _parts(task: Task, opened: Mapping[str, Source], source: str) -> tuple[str, str, str, str]:
    """The rule, and the parts to learn from, to choose by and to measure on."""
    many = len(opened["train"])
    has_test, has_validation = "test" in opened, "validation" in opened
    official = (task.train, task.validation, task.test)
    if many > _LEARN + _CHOOSE and all(_fits(opened, each) for each in official):
        return "official", *official
    test = "test" if has_test else "validation"
    chosen = ""
    if has_validation and has_test:  # what is measured on is not chosen by
        number = min(_CHOOSE, len(opened["validation"]))
        if many <= _LEARN or number == _CHOOSE:
            chosen = f"validation[:{number}]"
    if many <= _LEARN + _CHOOSE:
        if not (has_test or has_validation):
            fix = "Give a source with train and test: SOURCE/train/<class>, SOURCE/test/<class>"
            raise UserError("the data has no images to measure on", where=source, fix=fix)
        if chosen and many <= _LEARN:
            return "own", "train", chosen, test
        cut = many - max(1, many // 5)
        return "own", f"train[:{cut}]", f"train[{cut}:]", test
    if not (has_test or has_validation):
        test = f"train[{_LEARN + _CHOOSE}:]"
    return "first", f"train[:{_LEARN}]", chosen or f"train[{_LEARN}:{_LEARN + _CHOOSE}]", test


def _fits(opened: Mapping[str, Source], text: str) -> bool:
    split, part = split_and_part(text)
    if split not in opened:
        return False
    try:
        return not part or len(part_of(opened[split], part, text)) > 0
    except UserError:
        return False


def open_plan(selection: Selection) -> dict[str, Source]:
    """Returns the splits of a selection."""
    return select(selection, open_unmatched if selection.labels else open_splits, selection.source)


def _checked(
    task: Task, rule: str, final: Selection, grid: Selection | None, notes: list[str]
) -> Plan:
    splits = open_plan(final)
    train, test = splits["train"], splits["test"]
    classes = len(train.class_names)
    if classes < 2:
        what = f"there is only one class, {train.class_names[0]!r}; a task needs two"
        raise UserError(what, where=final.source)
    if classes != task.num_classes:
        notes.append(f"{classes} classes, where the task has {task.num_classes}")
    present = len(np.unique(train.labels))
    if present < classes:
        notes.append(f"{present} of the {classes} classes are among the training images")
    held_out = None if grid is None else len(open_plan(grid)["validation"])
    if rule in ("own", "first") and len(train) != _LEARN + _CHOOSE:
        notes.append(f"{len(train):,} training images, where the task has 1,000")
    images: dict[str, int | None] = {"train": len(train), "held_out": held_out, "test": len(test)}
    return Plan(task, final.source, rule, final, grid, images, classes, tuple(notes))


def check_images(plan: Plan, max_bad: float) -> None:
    """Looks at the headers of the images of a task, of more than 5,000 at some.

    Raises:
        UserError: the share of unreadable ones is above `max_bad`.
    """
    for split in open_plan(plan.final).values():
        check_readable(split, max_bad)
