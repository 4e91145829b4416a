"""The verbs of the command, by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlp_mixer.cli.check import check
from mlp_mixer.cli.convert import convert
from mlp_mixer.cli.evaluate import evaluate
from mlp_mixer.cli.finetune import finetune
from mlp_mixer.cli.models import models
from mlp_mixer.cli.pack import index, pack
from mlp_mixer.cli.predict import predict
from mlp_mixer.cli.train import train

VERBS: dict[str, Callable[..., Any]] = {
    "models": models,
    "train": train,
    "finetune": finetune,
    "evaluate": evaluate,
    "predict": predict,
    "convert": convert,
    "data check": check,
    "data pack": pack,
    "data index": index,
}

# What the help says of verbs of two words, by the first.
GROUPS: dict[str, str] = {
    "data": "Look at data before training (data check), and pack it for fast reading (data pack).",
}
