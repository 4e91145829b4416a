"""The frozen features of a source's images, computed once and kept on disk.

A file of the cache is named by a hash of everything that the features depend on: the weights, the
architecture, the preprocessing, the precision, the kind of device, the versions of what computes
and decodes, and every byte of the images. Nothing in it has to be up to date: what has changed has
another name. Writes are atomic, so that several processes can use one folder, and a file is used
only if its checksum is right. All of it can be deleted at any time.

Shapes: N images, C features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open

from allmlp.data.fingerprint import fingerprint
from allmlp.data.source import BadImage, Source
from allmlp.errors import UserError
from allmlp.evaluation.predictor import Outputs, Predictor, check_finite
from allmlp.io import atomic_write, parse_json
from allmlp.models.layers import ImageClassifier

FORMAT = "allmlp features 2"
# What can change the numbers when it is upgraded.
_PACKAGES = ("allmlp", "torch", "pillow", "simplejpeg", "opencv-python-headless")


@dataclass
class Features:
    """A model's features of some images.

    Attributes:
        values: float32 (N, C), of the images that could be decoded; (0, 0) where none could.
        indices: int64 (N,), of these images in the source, ascending.
        bad: the images that could not be decoded.
        from_cache: whether they were read from a file and the model did not run.
        notes: lines for the user, such as a file of the cache that could not be used.
    """

    values: np.ndarray
    indices: np.ndarray
    bad: list[BadImage] = field(default_factory=list)
    from_cache: bool = False
    notes: list[str] = field(default_factory=list)


def frozen_features(
    predictor: Predictor,
    source: Source,
    cache: FeatureCache | None = None,
    on_batch: Callable[[Outputs], None] | None = None,
) -> Features:
    """Returns the features of every image, read from the cache or computed and kept there.

    Args:
        predictor: of a model that defines `features`.
        source: the images, at least one.
        cache: None computes them.
        on_batch: called with every batch that was computed.
    """
    if type(predictor.model).features is ImageClassifier.features:
        what = f"the model gives no features: {type(predictor.model).__name__} defines no features"
        raise UserError(what, fix="Give its class a method features(images) -> (N, C)")
    notes: list[str] = []
    key = "" if cache is None else cache_key(predictor, source)
    found = None if cache is None else cache.read(key, notes)
    if found is not None:
        return found
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
    if not rows:
        return Features(np.zeros((0, 0), np.float32), np.zeros(0, np.int64), bad, notes=notes)
    values, indices = (np.concatenate(column) for column in zip(*rows, strict=True))
    result = Features(values, indices, bad, notes=notes)
    if cache is not None:
        cache.write(key, result)
    return result


def cache_key(predictor: Predictor, source: Source) -> str:
    """Returns the sha256 of everything that the features depend on. Reads every image's bytes."""
    parts = [
        FORMAT,
        *(f"{name} {version(name)}" for name in _PACKAGES),
        predictor.device.type,
        predictor.precision,
        json.dumps(predictor.preprocessing.to_json(), sort_keys=True),
        weights_hash(predictor.model),
        fingerprint(source, most=None),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def weights_hash(model: ImageClassifier) -> str:
    """Returns the sha256 of a model: its architecture and every parameter and buffer."""
    digest = hashlib.sha256(f"{type(model).__qualname__} {model.config!r}".encode())
    for kind in (model.named_parameters(), model.named_buffers()):
        for name, tensor in kind:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features, made when the first are written."""

    folder: Path

    def read(self, key: str, notes: list[str]) -> Features | None:
        """Returns the features of a key; None, and a note, where a file cannot be trusted."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if (metadata.get("format"), metadata.get("key")) != (FORMAT, key):
                    raise ValueError("it holds something else")
                values, indices = file.get_tensor("features"), file.get_tensor("indices")
            if values.dtype != np.float32 or indices.dtype != np.int64:
                raise ValueError("its numbers are of another type")
            if metadata.get("sha256") != _checksum(key, values, indices, metadata["bad"]):
                raise ValueError("its checksum is wrong")
            bad = [BadImage(**image) for image in parse_json(metadata["bad"])]
        except FileNotFoundError:  # another process has just removed it
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            reason = str(error) or type(error).__name__
            notes.append(f"the cached features {path} are not used: {reason}; computed anew")
            return None
        return Features(values, indices, bad, from_cache=True)

    def write(self, key: str, features: Features) -> None:
        """Keeps features; a note says if that fails."""
        bad = json.dumps([asdict(image) for image in features.bad])
        checksum = _checksum(key, features.values, features.indices, bad)
        metadata = {"format": FORMAT, "key": key, "bad": bad, "sha256": checksum}
        tensors = {"features": features.values, "indices": features.indices}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self._path(key), safetensors.numpy.save(tensors, metadata))
        except OSError as error:
            reason = f"{error.strerror or error}: {self.folder}"
            features.notes.append(f"the features could not be kept for the next time: {reason}")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def _checksum(key: str, values: np.ndarray, indices: np.ndarray, bad: str) -> str:
    digest = hashlib.sha256(f"{key} {values.shape} {bad}".encode())
    digest.update(np.ascontiguousarray(values).data)
    digest.update(np.ascontiguousarray(indices).data)
    return digest.hexdigest()
