"""MLP-Mixer in PyTorch: train, evaluate, inspect and deploy all-MLP vision models.

    import allmlp as am
    model = am.create_model("mixer_b16", image_size=224, num_classes=10)

Importing the package takes milliseconds: names are loaded lazily. Import it before torch if you
can, so that torch's idle threads sleep instead of spinning (docs/predict.md).
"""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from allmlp.runtime.process import sleep_soon

if TYPE_CHECKING:
    from allmlp.benchmark import Benchmark as Benchmark
    from allmlp.benchmark import benchmark as benchmark
    from allmlp.calibrate import calibrate as calibrate
    from allmlp.decision import Decision as Decision
    from allmlp.deploy.export import ExportReport as ExportReport
    from allmlp.deploy.export import export as export
    from allmlp.deploy.formats import ExportedModel as ExportedModel
    from allmlp.deploy.formats import open_exported as open_exported
    from allmlp.deploy.options import ExportOptions as ExportOptions
    from allmlp.deploy.options import PredictOptions as PredictOptions
    from allmlp.deploy.options import PushOptions as PushOptions
    from allmlp.deploy.predict import Prediction as Prediction
    from allmlp.deploy.predict import predict as predict
    from allmlp.deploy.push import Pushed as Pushed
    from allmlp.deploy.push import push as push
    from allmlp.errors import UserError as UserError
    from allmlp.evaluate import evaluate as evaluate
    from allmlp.evaluation.few_shot import FewShot as FewShot
    from allmlp.evaluation.few_shot import few_shot as few_shot
    from allmlp.evaluation.few_shot import few_shots as few_shots
    from allmlp.evaluation.metrics import Evaluation as Evaluation
    from allmlp.evaluation.options import BenchmarkOptions as BenchmarkOptions
    from allmlp.evaluation.options import CalibrateOptions as CalibrateOptions
    from allmlp.evaluation.options import EvaluateOptions as EvaluateOptions
    from allmlp.evaluation.options import FewShotOptions as FewShotOptions
    from allmlp.evaluation.options import LabelMistakesOptions as LabelMistakesOptions
    from allmlp.inspection.inspect import Inspection as Inspection
    from allmlp.inspection.inspect import inspect as inspect
    from allmlp.label_mistakes import LabelMistakes as LabelMistakes
    from allmlp.label_mistakes import find_label_mistakes as find_label_mistakes
    from allmlp.models.catalog import create_model as create_model
    from allmlp.models.catalog import list_models as list_models
    from allmlp.models.catalog import random_weights as random_weights
    from allmlp.models.layers import ImageClassifier as ImageClassifier
    from allmlp.models.mixer import MixerConfig as MixerConfig
    from allmlp.models.mixer import MlpMixer as MlpMixer
    from allmlp.preprocessing import Preprocessing as Preprocessing
    from allmlp.studies import CrossValidation as CrossValidation
    from allmlp.studies import FinetuneResult as FinetuneResult
    from allmlp.studies import cross_validate as cross_validate
    from allmlp.studies import finetune as finetune
    from allmlp.training.config import TrainConfig as TrainConfig
    from allmlp.training.fit import finetune_config as finetune_config
    from allmlp.training.loggers import Logger as Logger
    from allmlp.training.loggers import StopTraining as StopTraining
    from allmlp.training.recipes import recipe as recipe
    from allmlp.training.report import TrainResult as TrainResult
    from allmlp.training.train import resume as resume
    from allmlp.training.train import train as train
    from allmlp.weights.checkpoints import list_checkpoints as list_checkpoints
    from allmlp.weights.load import load_model as load_model
    from allmlp.weights.save import save_model as save_model

sleep_soon()  # before anything imports torch

# The names above are written once: type checkers read them, and so does this.
_IMPORT = re.compile(r"^    from allmlp\.([\w.]+) import (\w+) as", re.MULTILINE)
with open(__file__, encoding="utf-8") as _file:
    _HOME = {name: module for module, name in _IMPORT.findall(_file.read())}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


class _Package(ModuleType):
    """Keeps `am.evaluate` the function: importing the submodule would shadow it."""

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
