"""The file that a measurement leaves behind: what was measured, of which model, with what.

Every verb that measures writes one, so that a report can be put together from them later:

    {"format": "allmlp measurement", "version": 1, "kind": "few-shot",
     "model": {"name", "source", "architecture", "parameters", "flops", ...},
     "environment": {"date", "command", "processor", "packages", ...},
     ... the figures, by names of the kind ...}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from allmlp.environment import environment_info
from allmlp.errors import UserError
from allmlp.io import atomic_write, parse_json
from allmlp.models.catalog import architecture_name, config_to_json
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.names import NAME, is_format

FORMAT, VERSION = "allmlp measurement", 1


def measurement(
    kind: str, model: ImageClassifier | None, figures: dict[str, Any]
) -> dict[str, Any]:
    """Returns a measurement as JSON values.

    Args:
        kind: "evaluation", "few-shot", "throughput" or the name of a study.
        model: that was measured; None where the figures are of several.
        figures: what was found, by names of the kind.
    """
    device = torch.device("cpu") if model is None else next(model.parameters()).device
    values: dict[str, Any] = {"format": FORMAT, "version": VERSION, "kind": kind}
    if model is not None:
        values["model"] = describe(model)
    return {**values, "environment": environment_info(device), **figures}


def describe(model: ImageClassifier) -> dict[str, Any]:
    """Returns what a model is, as JSON values: name, source, architecture, size, preprocessing."""
    return {
        "name": architecture_name(model.config) or model.config.summary(),
        "source": model.source,
        **({"runtime": model.runtime} if hasattr(model, "runtime") else {}),  # of an exported file
        "architecture": config_to_json(model.config),
        "image_size": list(model.config.image_size),
        "parameters": sum(each.numel() for each in model.parameters()),
        "flops": model.config.flops,
        "preprocessing": preprocessing_of(model).to_json(),
    }


def to_text(values: dict[str, Any]) -> str:
    """Returns what the file of a measurement holds."""
    return json.dumps(values, indent=2) + "\n"


def write_measurement(path: Path, values: dict[str, Any]) -> None:
    """Writes a measurement whole or not at all; the folder must exist."""
    atomic_write(path, to_text(values).encode(errors="surrogateescape"))


def read_measurement(path: Path) -> dict[str, Any]:
    """Returns what `write_measurement` wrote.

    Raises:
        UserError: it is no measurement, or of a newer version.
    """
    try:
        values = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=path) from error
    except ValueError as error:
        raise UserError(f"not a measurement: {str(error)[:200]}", where=path) from error
    if not isinstance(values, dict) or not is_format(values.get("format"), FORMAT):
        raise UserError("not a measurement of allmlp", where=path)
    version = values.get("version")
    if not isinstance(version, int) or version > VERSION:
        what = f"written by a newer allmlp (version {str(version)[:20]})"
        raise UserError(what, where=path, fix=f"pip install --upgrade {NAME}")
    return values
