"""The folder of a fine-tuning study: what its runs reached, the model that it ships, and its card.

finetune.json     settings, grid and seeds, what each run reached, mean and deviation
best/             the model of the first seed
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allmlp.data.sources import read_from
from allmlp.errors import UserError
from allmlp.io import atomic_write, check_not_inputs, check_output_folder, parse_json
from allmlp.training.config import TrainConfig
from allmlp.training.resume import differences

_RESULTS = "finetune.json"


@dataclass(frozen=True)
class FinetuneResult:
    """What the runs of a fine-tuning reached.

    Attributes:
        folder: where everything lies.
        grid: rate -> accuracy on the held-out training images, None where the run diverged; empty
            without a grid.
        learning_rate: of the final runs.
        measured_on: "test", or "validation" where the data has no test images.
        accuracies: seed -> accuracy of its final run.
        mean, deviation: of these; the deviation is the sample's, None for one seed.
    """

    folder: Path
    grid: dict[float, float | None]
    learning_rate: float
    measured_on: str
    accuracies: dict[int, float]
    mean: float = field(init=False)
    deviation: float | None = field(init=False)

    def __post_init__(self) -> None:
        values = list(self.accuracies.values())
        spread = statistics.stdev(values) if len(values) > 1 else None
        object.__setattr__(self, "mean", statistics.fmean(values))
        object.__setattr__(self, "deviation", spread)

    def summary(self) -> str:
        """Returns "97.14% +- 0.16% (mean and standard deviation of seeds 0, 1, 2)"."""
        seeds = [str(each) for each in self.accuracies]
        if self.deviation is None:
            return f"{self.mean:.2%} (seed {seeds[0]})"
        spread = f"{self.mean:.2%} +- {self.deviation:.2%}"
        return f"{spread} (mean and standard deviation of seeds {', '.join(seeds)})"


class StudyFolder:
    """The folder of one study; only the process that writes calls its methods.

    Args:
        path: of the folder; the first run makes it.
        config: of the study.
        rates: of its grid.
        seeds: of its final runs.
        grid_source: data of the grid, where it has some of its own.
    """

    def __init__(
        self,
        path: Path,
        config: TrainConfig,
        rates: list[float],
        seeds: list[int],
        grid_source: str | None = None,
    ) -> None:
        self.path, self.results = path, path / _RESULTS
        self.config, self.rates, self.seeds = config, rates, seeds
        self.grid_source = grid_source

    def done(self, first: str) -> dict[str, float | None]:
        """Returns what the runs of this very study have reached so far, by their folders' names.

        Args:
            first: the name of the first run's folder.

        Raises:
            UserError: the folder holds something else, or another study.
        """
        there = names_in(self.path, self.config.data.source, self.grid_source)
        if not self.results.is_file():  # it may hold the first run, not at its end yet
            folder, *inside = first.split("/")
            there -= {folder}
            if inside:
                there |= names_in(self.path / folder) - {*inside}
            refuse_other_things(self.path, there)
            return {}
        try:
            values = parse_json(self.results.read_bytes())
            old = TrainConfig.from_json(values["config"])
            grid, seeds, done = values["grid"], values["seeds"], dict(values["done"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"not the results of a fine-tuning: {error}", where=self.results
            ) from error
        changes = differences(old, self.config)
        changes += changed_values(values, {"grid_source": self.grid_source})
        if grid != self.rates:
            changes.append(f"the grid is {grid} there and {self.rates} here")
        if seeds != self.seeds[: len(seeds)]:
            changes.append(f"the seeds are {seeds} there and {self.seeds} here")
        if changes:
            what = f"the folder holds another study: {'; '.join(changes[:6])}"
            fix = "Give another --output; seeds may be added behind those that are there"
            raise UserError(what, where=self.path, fix=fix)
        return done

    def save(self, done: dict[str, float | None], result: FinetuneResult | None = None) -> None:
        """Writes finetune.json."""
        values: dict[str, Any] = {
            "config": self.config.to_json(),
            "grid": self.rates,
            "seeds": self.seeds,
            "done": done,
        }
        if self.grid_source is not None:
            values["grid_source"] = self.grid_source
        if result is not None:
            values["learning_rate"] = result.learning_rate
            values["measured_on"] = result.measured_on
            values["mean"], values["deviation"] = result.mean, result.deviation
        atomic_write(self.results, (json.dumps(values, indent=2) + "\n").encode())

    def keep_first_seed(self, result: FinetuneResult) -> None:
        """Copies the first seed's model, with a card that tells of all of them."""
        source, best = self.path / f"seed-{self.seeds[0]}" / "best", self.path / "best"
        if not best.exists():
            aside = self.path / ".best.partial"
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(source, aside)
            os.rename(aside, best)
        card = (source / "README.md").read_text("utf-8")
        card += f"\n## The study\n\nThis is the run with seed {self.seeds[0]}. "
        card += f"Accuracy on the {result.measured_on} images: {result.summary()}.\n"
        if self.rates:
            card += f"The learning rate {result.learning_rate:g} was chosen on held-out training "
            card += f"images from {', '.join(f'{each:g}' for each in self.rates)}.\n"
        atomic_write(best / "README.md", card.encode())


def names_in(folder: Path, *sources: str | None) -> set[str]:
    """Returns what a study's folder holds, but for what is half-written.

    Args:
        folder: of the study.
        sources: the data that it reads, in which a new folder may not lie.

    Raises:
        UserError: it is a file, cannot be written to, or lies in the data.
    """
    check_output_folder(folder)
    there = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    if not there:
        check_not_inputs([folder], (place for each in sources if each for place in read_from(each)))
    return {name for name in there if not name.endswith(".partial")}


def refuse_other_things(folder: Path, there: Iterable[str]) -> None:
    """Raises UserError where a folder without a study holds these, which no study begins with."""
    if there := sorted(there):
        what = f"the folder holds something else: {', '.join(there[:4])}"
        raise UserError(what, where=folder, fix="Give another --output")


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a line for each of the values now that was another before."""
    return [
        f"{key} is {before.get(key)!r} there and {value!r} here"
        for key, value in now.items()
        if before.get(key) != value
    ]
