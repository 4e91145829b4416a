"""Frozen features of the images in a source, computed once and cached on disk.

A cache file is named by a hash of everything that the features depend on, so none becomes stale.

Shapes: N images, C features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open

from allmlp.data.fingerprint import fingerprint
from allmlp.data.source import BadImage, Source
from allmlp.environment import packages
from allmlp.errors import UserError
from allmlp.evaluation.options import FeatureOptions
from allmlp.evaluation.predictor import Outputs, Predictor, check_finite
from allmlp.io import atomic_write, expand, parse_json
from allmlp.models.layers import Classifier, ImageClassifier
from allmlp.weights.download import cache_folder
from allmlp.weights.load import open_model

FORMAT = "allmlp features 2"
# Packages whose upgrade may change the numbers.
_PACKAGES = ("allmlp", "torch", "pillow", "simplejpeg", "opencv-python-headless")


@dataclass
class Features:
    values: np.ndarray  # float32 (N, C), decodable images only; (0, 0) if there are none
    indices: np.ndarray  # int64 (N,), indices of these images in the source, ascending
    bad: list[BadImage] = field(default_factory=list)
    from_cache: bool = False
    notes: list[str] = field(default_factory=list)  # e.g. about an unusable cache file


Kind = TypeVar("Kind", bound=FeatureOptions)


def with_cache(options: Kind) -> Kind:
    """Returns the options of a command, with its default for the cache."""
    if options.cache is not None or options.no_cache:
        return options
    return replace(options, cache=str(cache_folder() / "features"))


def cache_path(options: FeatureOptions) -> Path | None:
    return None if options.cache is None or options.no_cache else expand(options.cache)


def opened_model(
    model: ImageClassifier | str | Path, options: FeatureOptions
) -> tuple[ImageClassifier, str | None]:
    """Returns the model and the device to move it to; None leaves a model object where it is."""
    stays = isinstance(model, ImageClassifier) and options.device == "auto"
    net = open_model(model, image_size=options.image_size, resize_weights=options.resize_weights)
    return net, None if stays else options.device


def frozen_features(
    predictor: Predictor,
    source: Source,
    cache: Path | None = None,
    on_batch: Callable[[Outputs], None] | None = None,
) -> Features:
    """Returns the features of all images, computed or read from a cache folder."""
    model, notes, path = check_features(predictor.model), [], None
    if cache is not None:
        parts = [
            FORMAT,
            *(f"{name} {number}" for name, number in packages(_PACKAGES).items()),
            predictor.device.type,
            predictor.precision,
            json.dumps(predictor.preprocessing.to_json(), sort_keys=True),
            weights_hash(model),
            fingerprint(source, most=None),  # reads all image bytes
        ]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        path = cache / f"{key}.safetensors"
        try:
            return _read(path)
        except FileNotFoundError:
            pass
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            reason = str(error) or type(error).__name__
            notes.append(f"the cached features {path} are not used: {reason}; recomputed")
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    bad: list[BadImage] = []
    for outputs in predictor.run(source, predictor.features):
        bad += outputs.bad
        if outputs.values:
            values = outputs.values[0]
            fix = "Are there NaNs in the weights? Otherwise try precision float32"
            check_finite(values, outputs.indices, source, "model's features", fix)
            rows.append((values, outputs.indices))
        if on_batch is not None:
            on_batch(outputs)
    rows = rows or [(np.zeros((0, 0), np.float32), np.zeros(0, np.int64))]
    values, indices = map(np.concatenate, zip(*rows, strict=True))
    found = Features(values, indices, bad, notes=notes)
    if path is not None and len(indices):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            listed = json.dumps([asdict(image) for image in bad])
            checksum = _checksum(path, values, indices, listed)
            metadata = {"format": FORMAT, "key": path.stem, "bad": listed, "sha256": checksum}
            tensors = {"features": values, "indices": indices}
            atomic_write(path, safetensors.numpy.save(tensors, metadata))
        except OSError as error:
            reason = f"{error.strerror or error}: {path.parent}"
            notes.append(f"the features could not be kept for the next time: {reason}")
    return found


def _read(path: Path) -> Features:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        values, indices = file.get_tensor("features"), file.get_tensor("indices")
    if metadata["sha256"] != _checksum(path, values, indices, metadata["bad"]):
        raise ValueError("its checksum is wrong")
    bad = [BadImage(**image) for image in parse_json(metadata["bad"])]
    return Features(values, indices, bad, from_cache=True)


def _checksum(path: Path, values: np.ndarray, indices: np.ndarray, bad: str) -> str:
    """The sha256 of the contents and the name, so that renamed files are rejected, too."""
    digest = hashlib.sha256(f"{path.stem} {values.shape} {bad}".encode())
    digest.update(np.ascontiguousarray(values).data)
    digest.update(np.ascontiguousarray(indices).data)
    return digest.hexdigest()


def check_features(model: Classifier) -> ImageClassifier:
    """Returns the model; UserError if it has no features, only logits."""
    if not isinstance(model, ImageClassifier):
        raise UserError(f"{model} gives no features", fix="Use the model that it was made from")
    if type(model).features is ImageClassifier.features:
        what = f"the model gives no features: {type(model).__name__} defines no features()"
        raise UserError(what, fix="Give its class a method features(images) -> (N, C)")
    return model


def weights_hash(model: ImageClassifier) -> str:
    """Returns the sha256 of a model's architecture, parameters and buffers."""
    digest = hashlib.sha256(f"{type(model).__qualname__} {model.config!r}".encode())
    for kind in (model.named_parameters(), model.named_buffers()):
        for name, tensor in kind:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
