"""What a run writes.

runs/<date>_<recipe>/
  config.json  environment.json  log.txt
  metrics.jsonl     a line per logged step
  results.csv       a line per evaluation
  bad_files.txt     images that could not be decoded, if there were any
  best/             model.safetensors + config.json + README.md: what you ship
  test/             evaluation.json, per_class.csv, confusion.csv of best/
  plots/            curves, confusion, a training batch, predictions, worst mistakes
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import shlex
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mlp_mixer.data.items import BadImage, Source
from mlp_mixer.errors import UserError
from mlp_mixer.training.config import TrainConfig
from mlp_mixer.weights.files import write_aside


class RunFolder:
    """The folder of one run, made when this object is made.

    Args:
        path: of the folder, see `planned_path`.
        config: of the run.

    Raises:
        UserError: it cannot be made.
    """

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path = path
        self.plots, self.best = self.path / "plots", self.path / "best"
        try:
            self.plots.mkdir(parents=True)
        except OSError as error:
            what = f"cannot make the run folder: {error.strerror}"
            raise UserError(what, where=self.path, fix="Give another --output") from error
        self.write_json("config.json", config.to_json())
        self._results_header: list[str] | None = None

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Writes a JSON file into the folder."""
        write_aside(self.path / name, (json.dumps(values, indent=2) + "\n").encode())

    def log_step(self, values: dict[str, float]) -> None:
        """Adds a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def log_evaluation(self, values: dict[str, float]) -> None:
        """Adds a line to results.csv; every line has the columns of the first."""
        with (self.path / "results.csv").open("a", newline="") as file:
            if self._results_header is None:
                self._results_header = list(values)
                csv.writer(file).writerow(values)
            csv.DictWriter(file, fieldnames=self._results_header).writerow(values)

    def log_bad_file(self, bad: BadImage) -> None:
        """Adds a line to bad_files.txt."""
        with (self.path / "bad_files.txt").open(
            "a", encoding="utf-8", errors="surrogateescape"
        ) as file:
            file.write(f"{bad.name}\t{bad.what}\n")

    def write_card(self, text: str) -> None:
        """Writes the model card, best/README.md, beside the weights."""
        write_aside(self.best / "README.md", text.encode(errors="backslashreplace"))


def planned_path(config: TrainConfig) -> Path:
    """Returns `config.output`, or the first unused runs/<date>_<recipe>."""
    if config.output is not None:
        return Path(os.path.expanduser(config.output))
    stem = f"{datetime.now():%Y-%m-%d_%H%M}_{config.recipe}"
    path, number = Path("runs") / stem, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}_{number}"
    return path


def check_unused(path: Path) -> None:
    """Raises UserError where the path is a file or a folder with something in it."""
    if path.is_file():
        raise UserError("the run folder is a file", where=path, fix="Give another --output")
    if path.is_dir() and any(path.iterdir()):
        what = "the run folder exists and is not empty; a run never writes over another"
        raise UserError(what, where=path, fix="Give another --output or remove it")


def environment(config: TrainConfig, source: Source, device: torch.device) -> dict[str, Any]:
    """Returns what environment.json holds: versions, hardware, command, seed, data fingerprint."""
    packages = (
        *("torch", "numpy", "pillow", "simplejpeg", "opencv-python-headless"),
        *("safetensors", "scikit-learn"),
    )
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["mixer", *sys.argv[1:]]) if _is_command() else None,
        "mlp_mixer": version("mlp_mixer"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "seed": config.seed,
        "data": {"training_images": len(source), "fingerprint": fingerprint(source)},
    }


def fingerprint(source: Source) -> str:
    """Returns the sha256 over every image's name and class and the bytes of 100 of them."""
    digest = hashlib.sha256(f"{len(source)} {source.class_names}".encode(errors="surrogateescape"))
    labels = source.labels
    for index in range(len(source)):
        text = f"{source.item_name(index)}\t{labels[index]}\n"
        digest.update(text.encode(errors="surrogateescape"))
    for index in range(0, len(source), -(-len(source) // 100)):
        try:
            digest.update(source.read(index))
        except UserError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def _is_command() -> bool:
    return Path(sys.argv[0]).name in ("mixer", "__main__.py")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
