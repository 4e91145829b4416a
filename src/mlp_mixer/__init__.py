"""MLP-Mixer in PyTorch: train, evaluate, look inside and deploy all-MLP vision models.

    import mlp_mixer as mm
    model = mm.create_model("mixer_b16", image_size=224, num_classes=10)

Importing this costs milliseconds: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlp_mixer.deploy.predict import Prediction, predict
    from mlp_mixer.errors import UserError
    from mlp_mixer.evaluation.accuracy import Evaluation, evaluate
    from mlp_mixer.models.catalog import create_model, list_models
    from mlp_mixer.models.layers import ImageClassifier
    from mlp_mixer.models.mixer import MixerConfig, MlpMixer
    from mlp_mixer.preprocessing import Preprocessing
    from mlp_mixer.training.config import TrainConfig
    from mlp_mixer.training.finetune import FinetuneResult, finetune
    from mlp_mixer.training.loop import resume, train
    from mlp_mixer.training.recipes import recipe
    from mlp_mixer.training.summary import TrainResult
    from mlp_mixer.weights.store import load_model, save_model

_HOME = {
    "create_model": "models.catalog",
    "list_models": "models.catalog",
    "ImageClassifier": "models.layers",
    "MixerConfig": "models.mixer",
    "MlpMixer": "models.mixer",
    "Preprocessing": "preprocessing",
    "UserError": "errors",
    "load_model": "weights.store",
    "save_model": "weights.store",
    "Evaluation": "evaluation.accuracy",
    "evaluate": "evaluation.accuracy",
    "TrainConfig": "training.config",
    "TrainResult": "training.summary",
    "train": "training.loop",
    "resume": "training.loop",
    "finetune": "training.finetune",
    "FinetuneResult": "training.finetune",
    "recipe": "training.recipes",
    "Prediction": "deploy.predict",
    "predict": "deploy.predict",
}

__all__ = [
    "Evaluation",
    "FinetuneResult",
    "ImageClassifier",
    "MixerConfig",
    "MlpMixer",
    "Prediction",
    "Preprocessing",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "create_model",
    "evaluate",
    "finetune",
    "list_models",
    "load_model",
    "predict",
    "recipe",
    "resume",
    "save_model",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mlp_mixer")
    if name not in _HOME:
        raise AttributeError(f"module 'mlp_mixer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mlp_mixer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
