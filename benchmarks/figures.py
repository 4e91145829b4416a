"""What the benchmarks print and leave behind: medians, ratios by rounds, a table, a JSON file."""

from __future__ import annotations

import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from allmlp.environment import processor
from allmlp.evaluation.result_file import measurement, save_result
from allmlp.models.layers import ImageClassifier


def spread(values: list[float]) -> dict[str, float]:
    """Returns the median, the least and the most of the rounds."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratios(values: list[float], base: list[float]) -> dict[str, float]:
    """Returns the spread of the ratios of each round; both have a value for every round."""
    return spread([value / other for value, other in zip(values, base, strict=True)])


def table(columns: dict[str, str], rows: list[dict[str, str]]) -> str:
    """Returns a Markdown table.

    Args:
        columns: name -> alignment, "left" or "right".
        rows: column -> cell; one that is absent stays empty.
    """
    marks = ["---:" if side == "right" else "---" for side in columns.values()]
    lines = [list(columns), marks, *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(threads: int) -> str:
    """Returns the line about the hardware and torch."""
    import torch

    return f"{processor()}, {threads} threads, torch {torch.__version__}"


def write(
    path: Path | None, kind: str, values: dict[str, Any], model: ImageClassifier | None = None
) -> None:
    """Writes the JSON file where one is named: the figures, the hardware, the versions."""
    if path is None:
        return
    found = measurement(kind, model, values)
    found["environment"]["command"] = shlex.join(["python", *sys.argv])
    save_result(path, found)
    print(f"wrote {path}")
