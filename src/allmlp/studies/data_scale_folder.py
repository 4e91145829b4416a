"""The folder of a data-scale study: what its runs have reached so far, and the points they make.

data_scale.json     a measurement of the kind "data-scale": settings, every cell, the points
data_scale.csv      a line for each cell
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from allmlp.studies.study_file import Cell, StudyFile, write_csv
from allmlp.training.config import TrainConfig

_NOT_IN_CSV = {"label", "few_shot_accuracies", "few_shot_test", "notes"}


def data_scale_file(
    folder: Path, config: TrainConfig, settings: dict[str, Any], cells: list[str]
) -> StudyFile:
    """Returns data_scale.json of a study, which may be there already or not.

    Args:
        folder: of the study.
        config: of the runs.
        settings: of the measurement.
        cells: the names of all runs.
    """
    return StudyFile(
        folder / "data_scale.json",
        "data-scale",
        config,
        settings,
        cells,
        check=lambda cell: points([cell], [], []),
        called="a data-scale study",
        own={"model.name", "seed"},
        addable="models, fractions and seeds",
    )


def write_cells(folder: Path, cells: list[Cell]) -> None:
    """Writes data_scale.csv, where there is a finished run."""
    if cells:
        write_csv(folder / "data_scale.csv", cells, _NOT_IN_CSV)


def points(
    cells: Iterable[Cell], models: Sequence[str], fractions: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns a point of the figure for each model and share that has a finished run.

    Args:
        cells: of any models and shares.
        models, fractions: in the order of the points.
    """
    runs: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        runs.setdefault((cell["model"], cell["fraction"]), []).append(cell)
    order = [(model, fraction) for model in models for fraction in fractions]
    return [_point(runs[each]) for each in order if each in runs]


def _point(runs: list[Cell]) -> dict[str, Any]:
    """Returns the point that the runs of one model and share, one a seed, make."""
    kept = ("model", "label", "fraction", "images", "epochs", "steps")
    means = [each["few_shot"] for each in runs]
    deviation, of = runs[0]["few_shot_deviation"], "draws of the shots, one run"
    if len(runs) > 1:
        deviation, of = statistics.stdev(means), f"{len(runs)} runs"
    return {
        **{key: runs[0][key] for key in kept},
        "runs": len(runs),
        "validation": statistics.fmean(each["validation"] for each in runs),
        "few_shot": statistics.fmean(means),
        "deviation": deviation,
        "deviation_of": None if deviation is None else of,
        "seconds": sum(each["seconds"] for each in runs),
    }
