"""Measurement files made by hand, as the commands write them, for tests of the report."""

import json
from pathlib import Path
from typing import Any

from allmlp.weights.checkpoints import CHECKPOINTS

ARCHITECTURE = {
    "family": "mixer",
    "image_size": [224, 224],
    "patch_size": 16,
    "hidden_dim": 768,
    "num_blocks": 12,
    "tokens_mlp_dim": 384,
    "channels_mlp_dim": 3072,
    "num_classes": 1000,
}


def measured(kind: str, **values: Any) -> dict[str, Any]:
    """What every measurement has; the device is a GPU that nobody has."""
    environment = {"date": "2026-11-21T12:00:00+00:00", "command": f"mixer {kind} as typed"}
    environment |= {"allmlp": "0.1.0", "python": "3.11.7", "packages": {"torch": "2.13.0"}}
    environment |= {"processor": "Test CPU", "threads": 2, "device": "cpu"}
    header = {"format": "allmlp measurement", "version": 1, "kind": kind}
    return {**header, "environment": environment, **values}


def model(name: str = "mixer_b16", source: str = "mixer_b16.i21k") -> dict[str, Any]:
    return {"name": name, "source": source, "architecture": ARCHITECTURE, "image_size": [224, 224]}


def imagenet(**changes: Any) -> dict[str, Any]:
    """An evaluation on the 50,000 validation images of ImageNet."""
    names = CHECKPOINTS["mixer_b16.i1k"].class_names()
    values: dict[str, Any] = {
        "model": model(),
        "data": "imagenet:validation",
        "images": 50_000,
        "top1": 0.61234,
        "protocol": {"resize": "resmall-crop", "crop": 0.875},
        "per_class": [{"class": name, "images": 50} for name in names],
        "class_names": names,
    }
    return measured("evaluation", **{**values, **changes})


def small_evaluation(**changes: Any) -> dict[str, Any]:
    names = [f"class {at}" for at in range(10)]
    values = {"data": "cifar10:test", "images": 10_000, "top1": 0.54321, "class_names": names}
    counts = [{"class": name, "images": 1000} for name in names]
    return imagenet(**{**values, "per_class": counts, **changes})


def few_shot(**changes: Any) -> dict[str, Any]:
    result = {"data": "flowers", "mean": {"1": 0.2111, "5": 0.4222}, "deviation": {"1": 0.0123}}
    return measured("few-shot", **{"model": model(), "results": [result], **changes})


def throughput(**changes: Any) -> dict[str, Any]:
    entry = {"name": "mixer_b16", "model": model(source="random"), "mode": "inference"}
    entry |= {"precision": "float32", "compiled": False, "threads": 2}
    entry |= {"best": {"batch_size": 8, "images_per_second": 12.3456}}
    training = {**entry, "mode": "training", "best": {"batch_size": 4, "images_per_second": 3.21}}
    broken = {**entry, "best": None, "error": "out of memory"}
    values = {"rounds": 5, "seconds": 2.0, "models": [entry, training, broken]}
    return measured("throughput", **{**values, **changes})


def suite(kind: str, tasks: int, total: int, **changes: Any) -> dict[str, Any]:
    """A suite with so many of its tasks done."""
    one = {"accuracy": 0.7, "deviation": 0.01, "seeds": [0, 1, 2], "image_size": 224}
    one |= {"resize": "resize-crop"}
    done = {f"task{at}": {**one, "source": f"folder{at}"} for at in range(tasks)}
    missing = [f"task{at}" for at in range(tasks, total)]
    values = {"model": model(), "checkpoint": "mixer_b16.i21k", "protocol": "paper", "changes": []}
    values |= {"tasks": done, "mean": 0.7, "partial": bool(missing), "missing": missing}
    return measured(kind, **{**values, **changes})


def write(folder: Path, **files: dict[str, Any]) -> Path:
    """Writes NAME=measurement as NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2))
    return folder
