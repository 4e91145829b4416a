"""MLP-Mixer in PyTorch: train, evaluate, look inside and deploy all-MLP vision models.

    import allmlp as am
    model = am.create_model("mixer_b16", image_size=224, num_classes=10)

Importing this costs milliseconds: each name is loaded when it is first used. Import it before torch
where you can: then torch's threads wait without keeping a core busy (docs/predict.md).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from allmlp.runtime.process import sleep_soon

if TYPE_CHECKING:
    from allmlp.benchmark import Benchmark, BenchmarkOptions, benchmark
    from allmlp.deploy.export import ExportReport, export
    from allmlp.deploy.exported_model import ExportedModel
    from allmlp.deploy.formats import open_exported
    from allmlp.deploy.options import ExportOptions, PredictOptions
    from allmlp.deploy.predict import Prediction, predict
    from allmlp.errors import UserError
    from allmlp.evaluate import EvaluateOptions, evaluate
    from allmlp.evaluation.few_shot import FewShot, FewShotOptions, few_shot, few_shots
    from allmlp.evaluation.metrics import Evaluation
    from allmlp.finetuning import FinetuneResult, finetune
    from allmlp.inspection.inspect import Inspection, inspect
    from allmlp.models.catalog import create_model, list_models, random_weights
    from allmlp.models.layers import ImageClassifier
    from allmlp.models.mixer import MixerConfig, MlpMixer
    from allmlp.preprocessing import Preprocessing
    from allmlp.training.config import TrainConfig
    from allmlp.training.recipes import recipe
    from allmlp.training.report import TrainResult
    from allmlp.training.train import resume, train
    from allmlp.weights.checkpoints import list_checkpoints
    from allmlp.weights.load import load_model
    from allmlp.weights.save import save_model

sleep_soon()  # before anything here imports torch

_HOME = {
    "create_model": "models.catalog",
    "list_models": "models.catalog",
    "ImageClassifier": "models.layers",
    "MixerConfig": "models.mixer",
    "MlpMixer": "models.mixer",
    "Preprocessing": "preprocessing",
    "UserError": "errors",
    "list_checkpoints": "weights.checkpoints",
    "load_model": "weights.load",
    "save_model": "weights.save",
    "Evaluation": "evaluation.metrics",
    "EvaluateOptions": "evaluate",
    "evaluate": "evaluate",
    "Benchmark": "benchmark",
    "BenchmarkOptions": "benchmark",
    "benchmark": "benchmark",
    "FewShot": "evaluation.few_shot",
    "FewShotOptions": "evaluation.few_shot",
    "few_shots": "evaluation.few_shot",
    "few_shot": "evaluation.few_shot",
    "TrainConfig": "training.config",
    "TrainResult": "training.report",
    "train": "training.train",
    "resume": "training.train",
    "finetune": "finetuning",
    "FinetuneResult": "finetuning",
    "recipe": "training.recipes",
    "export": "deploy.export",
    "ExportOptions": "deploy.options",
    "PredictOptions": "deploy.options",
    "ExportReport": "deploy.export",
    "ExportedModel": "deploy.exported_model",
    "open_exported": "deploy.formats",
    "Prediction": "deploy.predict",
    "predict": "deploy.predict",
    "Inspection": "inspection.inspect",
    "inspect": "inspection.inspect",
    "random_weights": "models.catalog",
}

__all__ = [
    "Benchmark",
    "BenchmarkOptions",
    "EvaluateOptions",
    "Evaluation",
    "ExportOptions",
    "ExportReport",
    "ExportedModel",
    "FewShot",
    "FewShotOptions",
    "FinetuneResult",
    "ImageClassifier",
    "Inspection",
    "MixerConfig",
    "MlpMixer",
    "PredictOptions",
    "Prediction",
    "Preprocessing",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "benchmark",
    "create_model",
    "evaluate",
    "export",
    "few_shot",
    "few_shots",
    "finetune",
    "inspect",
    "list_checkpoints",
    "list_models",
    "load_model",
    "open_exported",
    "predict",
    "random_weights",
    "recipe",
    "resume",
    "save_model",
    "train",
]


class _Package(ModuleType):
    """Keeps `am.evaluate` the function: an import of the module of that name would hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
