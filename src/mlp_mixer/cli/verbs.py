"""The verbs of the command, by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlp_mixer.cli.check import check
from mlp_mixer.cli.convert import convert
from mlp_mixer.cli.evaluate import evaluate
from mlp_mixer.cli.export import export
from mlp_mixer.cli.few_shot import few_shot
from mlp_mixer.cli.finetune import finetune
from mlp_mixer.cli.inspect import inspect
from mlp_mixer.cli.models import models
from mlp_mixer.cli.pack import index, pack
from mlp_mixer.cli.permute import permute
from mlp_mixer.cli.predict import predict
from mlp_mixer.cli.report import report
from mlp_mixer.cli.serve import serve
from mlp_mixer.cli.study import data_scale
from mlp_mixer.cli.study_ablations import ablations
from mlp_mixer.cli.throughput import throughput
from mlp_mixer.cli.train import train
from mlp_mixer.cli.transfer import transfer
from mlp_mixer.cli.vtab import vtab

VERBS: dict[str, Callable[..., Any]] = {
    "models": models,
    "train": train,
    "finetune": finetune,
    "evaluate": evaluate,
    "few-shot": few_shot,
    "vtab": vtab,
    "transfer": transfer,
    "predict": predict,
    "inspect": inspect,
    "throughput": throughput,
    "convert": convert,
    "export": export,
    "serve": serve,
    "permute": permute,
    "report": report,
    "study data-scale": data_scale,
    "study ablations": ablations,
    "data check": check,
    "data pack": pack,
    "data index": index,
}

# What the help says of verbs of two words, by the first.
GROUPS: dict[str, str] = {
    "study": "Many runs that make a figure or a table of the paper: data-scale, ablations.",
    "data": "Look at data before training (data check), and pack it for fast reading (data pack).",
}
