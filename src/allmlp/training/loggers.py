"""What a run reports: to TensorBoard, trackio, wandb, MLflow and your own callbacks."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from allmlp.io import atomic_write, parse_json
from allmlp.names import NAME, import_extra
from allmlp.training.config import flat

IDS = "trackers.json"  # in the run folder: tracker -> the id by which a resumed run finds it


class StopTraining(Exception):
    """Raise it in a callback: the run evaluates, saves and ends, as after its last step."""


class Logger:
    """A callback of `am.train`; override what you need.

    Names of values: "training/loss", "training/learning_rate", ... at logged steps (every tenth,
    in short runs every), and "evaluation/validation_top1", ... after an evaluation.
    """

    def start(self, config: dict[str, Any], folder: Path, step: int) -> None:
        """The run starts in its folder, or resumes after `step` steps, with these settings."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Values at a step. Raise `StopTraining` to end the run early."""

    def image(self, step: int, name: str, path: Path) -> None:
        """A figure has been written, such as plots/confusion.png."""

    def finish(self, summary: dict[str, float] | None) -> None:
        """The run has ended, with these results; None if it was interrupted or has failed."""


class Loggers:
    """Tells several loggers the same, in the main process; one that fails is left out."""

    def __init__(
        self, loggers: Iterable[Logger] = (), say: Callable[..., None] = lambda *_, **__: None
    ) -> None:
        self.active, self.say = list(loggers), say
        self.stop_asked = False  # by a callback

    def tell(self, what: str, *given: Any) -> None:
        for logger in list(self.active):
            try:
                getattr(logger, what)(*given)
            except StopTraining:
                self.stop_asked = True
            except Exception as error:  # whatever a tracker's network or your own code raises
                self.active.remove(logger)
                reason = (str(error) or type(error).__name__).splitlines()[0]
                name = getattr(logger, "name", type(logger).__name__)
                text = f"warning  {name} failed in {what} and is left out: {reason}"
                self.say(text, style="yellow")

    def finish(self, summary: dict[str, float] | None) -> None:
        self.tell("finish", summary)
        self.active.clear()


def tracker(name: str) -> Logger:
    """Returns the tracker of this name; UserError if its package is not installed."""
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    kind = {"tensorboard": TensorBoard, "mlflow": Mlflow}.get(name, Wandb)
    return kind(name, import_extra(module, name, f"log={name} needs the package {name}"))


class _Tracker(Logger):
    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module

    def known(self, folder: Path, new: str | None = None) -> str | None:
        """Returns the id of the run as this tracker knows it, or remembers a new one."""
        path = folder / IDS
        ids = parse_json(path.read_bytes()) if path.is_file() else {}
        if new is not None:
            atomic_write(path, json.dumps({**ids, self.name: new}, indent=2) + "\n")
        return ids.get(self.name)


class TensorBoard(_Tracker):
    def start(self, config: dict[str, Any], folder: Path, step: int) -> None:
        self.writer = self.module.SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGB"))
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def finish(self, summary: dict[str, float] | None) -> None:
        self.writer.close()


class Wandb(_Tracker):
    """wandb, and trackio, which has its interface but knows a run by its name."""

    def start(self, config: dict[str, Any], folder: Path, step: int) -> None:
        old, is_wandb = self.known(folder), self.name == "wandb"
        if is_wandb:
            place = {"name": folder.name, "dir": str(folder), "resume": "allow", "id": old}
        elif old:
            place = {"name": old, "resume": "must"}
        else:  # two run folders may have the same name
            place = {"name": f"{folder.name}-{secrets.token_hex(3)}"}
        project = os.environ.get(f"{self.name.upper()}_PROJECT", NAME)
        self.run = self.module.init(project=project, config=config, **place)
        self.known(folder, self.run.id if is_wandb else self.run.name)

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(values, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.log(step, {name: self.module.Image(str(path))})

    def finish(self, summary: dict[str, float] | None) -> None:
        if self.name == "wandb":
            self.run.summary.update(summary or {})
            self.run.finish(exit_code=int(summary is None))
            return
        if summary:
            self.run.log({f"summary/{name}": value for name, value in summary.items()})
        self.module.finish()


class Mlflow(_Tracker):
    def start(self, config: dict[str, Any], folder: Path, step: int) -> None:
        old = self.known(folder)
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            self.module.set_experiment(NAME)
        run = self.module.start_run(**({"run_id": old} if old else {"run_name": folder.name}))
        self.known(folder, run.info.run_id)
        settings = list(flat(config).items())
        for at in range(0, 0 if old else len(settings), 100):  # the most that a request may have
            self.module.log_params(dict(settings[at : at + 100]))

    def log(self, step: int, values: dict[str, float]) -> None:
        self.module.log_metrics(values, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.module.log_artifact(str(path))

    def finish(self, summary: dict[str, float] | None) -> None:
        if summary:
            self.module.log_metrics(summary)
        self.module.end_run("FAILED" if summary is None else "FINISHED")
