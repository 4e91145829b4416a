"""The result file of a measurement: what was measured, on which model, in which environment.

All measuring commands write one, so that reports can be assembled from them later:

    {"format": "allmlp measurement", "version": 1, "kind": "few-shot",
     "model": {"name", "source", "architecture", "parameters", "flops", ...},
     "environment": {"date", "command", "processor", "packages", ...},
     ... the numbers, by names of the kind ...}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from allmlp.environment import environment_info
from allmlp.errors import UserError
from allmlp.io import STANDARD_OUTPUT, atomic_write, check_output_file, expand, read_json
from allmlp.models.catalog import architecture_name, config_to_json
from allmlp.models.layers import Classifier, preprocessing_of
from allmlp.names import NAME, is_format

FORMAT, VERSION = "allmlp measurement", 1


def measurement(kind: str, model: Classifier | None, figures: dict[str, Any]) -> dict[str, Any]:
    """Returns named numbers as a measurement of this kind; model None: of several models."""
    return {"format": FORMAT, "version": VERSION, "kind": kind, **measured_on(model), **figures}


def measured_on(model: Classifier | None) -> dict[str, Any]:
    """Returns descriptions of the model, if any, and of the environment as JSON values."""
    if model is None:
        return {"environment": environment_info(torch.device("cpu"))}
    return {"model": describe(model), "environment": environment_info(model.device)}


def describe(model: Classifier) -> dict[str, Any]:
    return {
        "name": architecture_name(model.config) or model.config.summary(),
        "source": model.source,
        **({"runtime": model.runtime} if model.runtime else {}),  # for an exported file
        "architecture": config_to_json(model.config),
        "image_size": list(model.config.image_size),
        "parameters": model.num_parameters,
        "flops": model.config.flops,
        "preprocessing": preprocessing_of(model).to_json(),
        **({"decision": decision} if (decision := model.decision.to_json()) else {}),
    }


def check_result_path(output: str | None, *, overwrite: bool) -> Path | None:
    """Returns the .json file to write; None for no file and for standard output."""
    if output is None or output == STANDARD_OUTPUT:
        return None
    path = expand(output)
    if path.suffix != ".json":
        what = f"not a .json file: {output!r}"
        raise UserError(what, where="output", fix="Such as results.json, or - for standard output")
    check_output_file(path, overwrite=overwrite, parents=True)
    return path


def save_result(path: Path | None, values: dict[str, Any]) -> None:
    """Writes a measurement atomically to a file, or to standard output."""
    text = json.dumps(values, indent=2) + "\n"
    if path is None:
        print(text, end="", flush=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text)


def read_measurement(path: Path) -> dict[str, Any]:
    values = read_json(path, "not a measurement")
    if not isinstance(values, dict) or not is_format(values.get("format"), FORMAT):
        raise UserError("not a measurement of allmlp", where=path)
    version = values.get("version")
    if not isinstance(version, int) or version > VERSION:
        what = f"written by a newer allmlp (version {str(version)[:20]})"
        raise UserError(what, where=path, fix=f"pip install --upgrade {NAME}")
    return values
