"""The verbs of the command, by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from allmlp.cli.check import check
from allmlp.cli.convert import convert
from allmlp.cli.evaluate import evaluate
from allmlp.cli.export import export
from allmlp.cli.few_shot import few_shot
from allmlp.cli.finetune import finetune
from allmlp.cli.models import models
from allmlp.cli.pack import index, pack
from allmlp.cli.permute import permute
from allmlp.cli.predict import predict
from allmlp.cli.report import report
from allmlp.cli.serve import serve
from allmlp.cli.study import data_scale
from allmlp.cli.study_ablations import ablations
from allmlp.cli.table import Command
from allmlp.cli.throughput import throughput
from allmlp.cli.train import train
from allmlp.cli.transfer import transfer
from allmlp.cli.vtab import vtab

VERBS: dict[str, Callable[..., Any]] = {
    "models": models,
    "train": train,
    "finetune": finetune,
    "evaluate": evaluate,
    "few-shot": few_shot,
    "vtab": vtab,
    "transfer": transfer,
    "predict": predict,
    "inspect": Command(
        "inspection.inspect",
        "InspectOptions",
        "inspect",
        "Look inside: what the token-mixing units have learned, and what one image excites.",
        "show",
        ("model",),
    ),
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
