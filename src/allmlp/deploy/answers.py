"""What a model answers to images: the one place where predictions meet a model.

A model is one with weights, or an exported file with the runtime that runs it.

Legend: N batch, K classes, C features, H W pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from allmlp.data.transforms import normalize
from allmlp.deploy.runner import ExportedModel
from allmlp.errors import UserError
from allmlp.evaluation.features import weights_hash
from allmlp.models.inference import Inference, choose_precision
from allmlp.models.layers import ImageClassifier, classes_of, preprocessing_of


@dataclass(frozen=True)
class Question:
    """What is asked about every image.

    Attributes:
        top_k: so many of the most probable classes; None asks for the features.
        precision: of the products, "float32" or "bfloat16"; None is that of an exported file.
        width: numbers in an answer: classes, at most as many as there are, or features.
        why: this precision, in words.
    """

    top_k: int | None
    precision: str | None
    width: int
    why: str = ""

    @property
    def features(self) -> bool:
        """Whether the features are asked for, and not classes."""
        return self.top_k is None


def make_question(
    model: ImageClassifier,
    *,
    top_k: int | None = None,
    features: bool = False,
    precision: str | None = None,
    batch_size: int = 64,
) -> Question:
    """Returns the question, checked against what the model can answer.

    Args:
        model: on its device.
        top_k: classes for each image; None is 5, or none for features.
        features: ask for the pooled features that the head reads.
        precision: float32, bfloat16 or auto, which None is.
        batch_size: images a batch.

    Raises:
        UserError: a value out of range, or the model gives no classes or no features.
    """
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, got {top_k}", where="--top-k")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if features and top_k is not None:
        what = f"top_k {top_k} has no effect: features are asked for, not classes"
        raise UserError(what, where="--top-k", fix="Leave out --top-k or --features")
    chosen, why = _choose_precision(model, precision)
    if features:
        if isinstance(model, ExportedModel):
            what = "an exported file gives classes, not features"
            raise UserError(what, where="--features", fix="Use the model that it was made from")
        if type(model).features is ImageClassifier.features:
            what = f"the model gives no features: {type(model).__name__} defines no features()"
            raise UserError(what, fix="Give its class a method features(images) -> (N, C)")
        return Question(None, chosen, model.config.hidden_dim, why)
    most = min(top_k or 5, len(classes_of(model, or_numbers=True)))
    return Question(most, chosen, most, why)


def _choose_precision(model: ImageClassifier, name: str | None) -> tuple[str | None, str]:
    chosen, why = choose_precision(model, name, "auto")
    return (None if isinstance(model, ExportedModel) else chosen), why


def device_of(model: ImageClassifier) -> torch.device:
    """Returns where the model computes."""
    return next(model.parameters()).device


def identity(model: ImageClassifier) -> str:
    """Returns the sha256 of all that a model is: its architecture and weights, or its file."""
    if not isinstance(model, ExportedModel):
        return weights_hash(model)
    digest, file = hashlib.sha256(), Path(str(model.source))
    for path in (file, file.with_suffix(".bin")):  # of OpenVINO's two the second has the weights
        if path.exists() and (path == file or file.suffix == ".xml"):
            with path.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def make_ready(model: ImageClassifier, question: Question) -> Inference:
    """Returns the model ready to answer a question for many batches."""
    return Inference(model, question.precision or "float32")


@torch.inference_mode()
def predict_logits(ready: Inference, images: Tensor) -> Tensor:
    """Returns the logits of images, float32 (N, K), on the model's device.

    Args:
        ready: see `make_ready`.
        images: uint8 (N, channels, H, W), of the model's size.
    """
    if isinstance(ready.model, ExportedModel):
        return ready.model(images).float()  # which takes pixels as they are
    return ready.logits(_normal(ready, images))


@torch.inference_mode()
def predict_features(ready: Inference, images: Tensor) -> Tensor:
    """Returns the pooled features of images, float32 (N, C); arguments as `predict_logits`.

    Raises:
        UserError: the model gives something of another shape.
    """
    features = ready.features(_normal(ready, images))
    expected = (len(images), ready.model.config.hidden_dim)
    if tuple(features.shape) != expected:
        what = f"features() gave {tuple(features.shape)} for {len(images)} images, not {expected}"
        raise UserError(what, where=type(ready.model).__name__)
    return features


def _normal(ready: Inference, images: Tensor) -> Tensor:
    return normalize(images.to(ready.device), preprocessing_of(ready.model))


@torch.inference_mode()
def answer(ready: Inference, images: Tensor, question: Question) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the model answers, on its device; a GPU may still be at work on it.

    Args:
        ready, images: as of `predict_logits`.
        question: what is asked.

    Returns:
        values: float32 (N, width), the probabilities in falling order, or the features.
        classes: int64 (N, width), which classes these are; (N, 0) of features.
        finite: bool (N,), whether the model's numbers for an image are.
    """
    with ready.few_threads(len(images)):
        return _answer(ready, images, question)


def _answer(ready: Inference, images: Tensor, question: Question) -> tuple[Tensor, Tensor, Tensor]:
    if question.features:
        features = predict_features(ready, images)
        none = torch.empty(len(images), 0, dtype=torch.int64)
        return features, none, features.isfinite().all(dim=1)
    logits = predict_logits(ready, images)
    finite = logits.isfinite().all(dim=1)
    # Sorted and not torch.topk, which may take any of two classes that are equally probable.
    ordered, classes = logits.softmax(dim=1).sort(dim=1, descending=True, stable=True)
    return ordered[:, : question.width], classes[:, : question.width], finite
