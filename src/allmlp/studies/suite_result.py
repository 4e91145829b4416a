"""What a suite reached: the means, the table and what is said of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allmlp.console import table
from allmlp.errors import plural
from allmlp.studies.vtab_tasks import GROUPS, Task


@dataclass(frozen=True)
class SuiteResult:
    """What a suite reached.

    Attributes:
        folder: where everything lies.
        tasks: task -> "accuracy" (mean over the seeds), "deviation", "seeds", "learning_rate",
            "images", "source" and more, as suite.json has them.
        mean: over the tasks that are there; None where there is none.
        groups: group -> mean over its tasks that are there.
        missing: the suite's other tasks.
        changes: in which the runs were not the official protocol.
    """

    folder: Path
    tasks: dict[str, dict[str, Any]]
    mean: float | None
    groups: dict[str, float]
    missing: list[str]
    changes: list[str]

    @property
    def partial(self) -> bool:
        """Whether tasks of the suite are missing."""
        return bool(self.missing)

    @property
    def of_other_data(self) -> list[str]:
        """The tasks whose data is not the official one, as far as can be known."""
        return [name for name, each in self.tasks.items() if each.get("departs")]

    def summary(self) -> str:
        """Returns "mean of 3 of 19 tasks, partial: 41.20%"."""
        assert self.mean is not None
        many, all_of_them = len(self.tasks), len(self.tasks) + len(self.missing)
        of = (
            f"{many} of {plural(all_of_them, 'task')}, partial"
            if self.partial
            else plural(many, "task")
        )
        return f"mean of {of}: {self.mean:.2%}"

    def lines(self, known: Mapping[str, Task]) -> list[str]:
        """Returns the table, the means of the groups and what is missing.

        Args:
            known: all tasks of the suite.
        """
        lines = [*task_table(self.tasks), ""]
        for group, mean in self.groups.items():
            every = [name for name, task in known.items() if task.group == group]
            have = sum(name in self.tasks for name in every)
            lines.append(f"{group:<12} {mean:.2%} ({have} of {plural(len(every), 'task')})")
        lines.append(self.summary())
        if self.partial:
            lines.append(f"missing  {', '.join(self.missing)}")
        others = self.of_other_data
        for name in others:
            lines.append(f"note     {name}: {', '.join(self.tasks[name]['departs'])}")
        if self.partial or self.changes or others:
            why = ["tasks are missing"] if self.partial else []
            why += ["the protocol is changed"] if self.changes else []
            why += ["the data is not the official one"] if others else []
            lines.append(f"note     not comparable with published means: {' and '.join(why)}")
        return lines


def suite_result(
    folder: Path,
    known: Mapping[str, Task],
    done: Mapping[str, dict[str, Any]],
    changes: list[str],
) -> SuiteResult:
    """Returns what the tasks that are done come to.

    Args:
        folder: of the suite.
        known: all tasks of the suite.
        done: task -> what suite.json says of it.
        changes: in which the runs were not the official protocol.
    """
    tasks = {name: done[name] for name in known if name in done}
    found = {name: float(each["accuracy"]) for name, each in tasks.items()}
    groups: dict[str, float] = {}
    for group in GROUPS:
        values = [found[name] for name in found if known[name].group == group]
        if values:
            groups[group] = statistics.fmean(values)
    missing = [name for name in known if name not in tasks]
    mean = statistics.fmean(found.values()) if found else None
    return SuiteResult(folder, tasks, mean, groups, missing, changes)


def task_table(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the lines of a table of what each task reached."""
    rows = [
        [
            *(name, each["rule"], f"{each['images']['train']:,}", f"{each['images']['test']:,}"),
            *(str(each["classes"]), str(each["image_size"]), f"{each['learning_rate']:g}"),
            f"{each['accuracy']:.2%}",
            "-" if each["deviation"] is None else f"{each['deviation']:.2%}",
            str(len(each["seeds"])),
        ]
        for name, each in tasks.items()
    ]
    header = ["task", "rule", "train", "test", "classes", "pixels", "rate", "top-1", "+-", "runs"]
    return table(header, rows, left=2)
