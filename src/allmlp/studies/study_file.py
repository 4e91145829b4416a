"""What studies of many runs share: what they refuse, and the file that says how far they are.

<study>.json    a measurement: settings, what every run reached, and what they make together
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allmlp.errors import UserError
from allmlp.evaluation.measurement import measurement, read_measurement, write_measurement
from allmlp.io import atomic_write, expand
from allmlp.training.config import TrainConfig
from allmlp.training.resume import differences
from allmlp.training.study_folder import changed_values, names_in, refuse_other_things

Cell = dict[str, Any]  # what one run has reached, as JSON values


def check_output(config: TrainConfig) -> Path:
    """Returns the folder of a study.

    Raises:
        UserError: none is given.
    """
    if config.output is None:
        what = "a study of several runs needs a folder with a name, so that it can go on"
        raise UserError(what, where="--output", fix="--output runs/NAME")
    return expand(config.output)


def check_random_weights(config: TrainConfig) -> None:
    """Raises UserError where the runs would begin with trained weights."""
    if config.model.weights is not None:
        what = "the study trains from random weights"
        raise UserError(what, where=f"model.weights={config.model.weights}", fix="Leave it out")


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises UserError unless there is a seed, and none is there twice."""
    if not seeds or len(set(seeds)) < len(seeds):
        listed = " ".join(map(str, seeds)) or "none"
        raise UserError(f"give each seed once, got {listed}", where="--seeds", fix="--seeds 0 1 2")


@dataclass(frozen=True)
class StudyFile:
    """The measurement of one study, in its folder; only the process that writes calls its methods.

    Attributes:
        path: of the file; its folder need not be there.
        kind: of the measurement.
        config: what the runs share.
        settings: what else the study depends on.
        cells: the names of all runs.
        check: raises ValueError, KeyError or TypeError where a finished run lacks what it needs.
        called: what the study is called in messages.
        own: settings that each run has for itself, which may be others in the file.
        addable: what may be added to a study, in words.
    """

    path: Path
    kind: str
    config: TrainConfig
    settings: dict[str, Any]
    cells: Collection[str]
    check: Callable[[Cell], object]
    called: str = "such a study"
    own: Collection[str] = ()
    addable: str = "runs"

    def done(self) -> dict[str, Cell]:
        """Returns what the runs of this very study have reached so far, by their names.

        Raises:
            UserError: the folder holds something else, or another study.
        """
        folder = self.path.parent
        there = names_in(folder, self.config.data.source, self.settings.get("few_shot_data"))
        if not self.path.is_file():
            refuse_other_things(folder, there - {"log.txt"})
            return {}
        values = read_measurement(self.path)
        try:
            if values["kind"] != self.kind:
                raise ValueError(f"it is of the kind {values['kind']!r}")
            old, before = TrainConfig.from_json(values["config"]), dict(values["settings"])
            done = {str(name): dict(cell) for name, cell in values["cells"].items()}
            for cell in done.values():
                self.check(cell)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"not the results of {self.called}: {error}"
            raise UserError(what, where=self.path, fix="Give another --output") from error
        if not done and not (folder / "cells").is_dir():
            return {}  # it was stopped before its first run: nothing depends on its settings
        changes = [
            each for each in differences(old, self.config) if each.split(" is ")[0] not in self.own
        ]
        changes += changed_values(before, self.settings)
        changes += [f"{name} is there and not asked for" for name in done if name not in self.cells]
        if changes:
            what = f"the folder holds another study: {'; '.join(changes[:6])}"
            fix = f"Give another --output; {self.addable} may be added to those there"
            raise UserError(what, where=folder, fix=fix)
        return done

    def save(self, data: object, done: dict[str, Cell], found: dict[str, Any]) -> None:
        """Writes the measurement.

        Args:
            data: what the runs train on, as JSON values.
            done: what the finished runs have reached.
            found: what they make together.
        """
        missing = [name for name in self.cells if name not in done]
        figures = {
            "data": data,
            "settings": self.settings,
            **found,
            "partial": bool(missing),
            "missing": missing,
            "cells": done,
            "config": self.config.to_json(),
        }
        write_measurement(self.path, measurement(self.kind, None, figures))


def write_csv(path: Path, rows: Sequence[dict[str, Any]], leave_out: Collection[str] = ()) -> None:
    """Writes rows with the columns of the first, but for those that are left out."""
    text = io.StringIO()
    columns = [key for key in rows[0] if key not in leave_out]
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode())
