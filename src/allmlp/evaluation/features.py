"""The frozen features of a source's images, computed once and kept on disk.

A file of the cache is named by a hash of everything that the features depend on: the weights, the
architecture, the preprocessing, the precision, the kind of device, the versions of what computes
and decodes, and every byte of the images. Nothing in it has to be up to date: what has changed has
another name. It is written aside and renamed, so that several processes can use one folder, and is
read only if its checksum is right. All of it can be deleted at any time.

Legend: N images, C features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open

from allmlp.data.batches import Batch
from allmlp.data.fingerprint import fingerprint
from allmlp.data.items import BadImage, Source
from allmlp.data.loader import TIMEOUT, evaluation_batches
from allmlp.data.transforms import normalize
from allmlp.errors import UserError
from allmlp.io import atomic_write, parse_json
from allmlp.models.inference import Inference
from allmlp.models.layers import ImageClassifier
from allmlp.preprocessing import Preprocessing

Precision = Literal["float32", "bfloat16"]
PRECISIONS = get_args(Precision)
FORMAT = "allmlp features 2"
# What can change the numbers when it is upgraded.
_PACKAGES = ("allmlp", "torch", "pillow", "simplejpeg", "opencv-python-headless")


@dataclass
class Features:
    """What a model sees in some images.

    Attributes:
        values: float32 (N, C), of the images that could be decoded; (0, 0) where none could.
        indices: int64 (N,), of these images in the source, ascending.
        bad: the images that could not be decoded.
        from_cache: whether they were read from a file and the model did not run.
        notes: lines for the user: a file of the cache that could not be used.
    """

    values: np.ndarray
    indices: np.ndarray
    bad: list[BadImage] = field(default_factory=list)
    from_cache: bool = False
    notes: list[str] = field(default_factory=list)


def frozen_features(
    model: ImageClassifier,
    source: Source,
    preprocessing: Preprocessing,
    *,
    precision: Precision = "float32",
    cache: Path | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    timeout: float = TIMEOUT,
    on_batch: Callable[[Batch], None] | None = None,
) -> Features:
    """Returns `model.features` of every image, in evaluation mode; the model's mode is kept.

    Args:
        model: where it is to compute.
        source: the images, at least one.
        preprocessing: what turns a picture into the model's input.
        precision: of the model's products; the features are float32 either way.
        cache: a folder of earlier features, made where it is absent; None computes them.
        batch_size: images a batch.
        num_workers: processes that decode; None chooses.
        timeout: seconds to wait for images of the workers; 0 waits for ever.
        on_batch: called with every batch that was computed.

    Raises:
        UserError: the model defines no features, or an image's are not finite.
    """
    if type(model).features is ImageClassifier.features:
        what = f"the model gives no features: {type(model).__name__} defines no features()"
        raise UserError(what, fix="Give its class a method features(images) -> (N, C)")
    if precision not in PRECISIONS:
        fix = f"Known: {', '.join(PRECISIONS)}"
        raise UserError(f"unknown precision {precision!r}", where="precision", fix=fix)
    notes: list[str] = []
    path, key = None, ""
    if cache is not None:
        key = cache_key(model, source, preprocessing, precision)
        path = cache / f"{key}.safetensors"
        found = _read(path, key, notes)
        if found is not None:
            return found
    parts: list[np.ndarray] = []
    indices: list[np.ndarray] = []
    bad: list[BadImage] = []
    batches = evaluation_batches(
        source, preprocessing, batch_size=batch_size, num_workers=num_workers, timeout=timeout
    )
    ready = Inference(model, precision)
    for batch in batches:
        bad += batch.bad
        if len(batch.labels):
            parts.append(_features_of(ready, batch, preprocessing, source))
            indices.append(batch.indices.numpy())
        if on_batch is not None:
            on_batch(batch)
    if not parts:
        return Features(np.zeros((0, 0), np.float32), np.zeros(0, np.int64), bad, notes=notes)
    result = Features(np.concatenate(parts), np.concatenate(indices), bad, notes=notes)
    if path is not None:
        _write(path, key, result)
    return result


@torch.inference_mode()
def _features_of(
    ready: Inference, batch: Batch, preprocessing: Preprocessing, source: Source
) -> np.ndarray:
    with ready.few_threads(len(batch.labels)):
        images = normalize(batch.images.to(ready.device), preprocessing)
        features = ready.features(images)
    if features.dim() != 2 or len(features) != len(images):
        what = f"features() gave {tuple(features.shape)} for {len(images)} images, not (N, C)"
        raise UserError(what, where=type(ready.model).__name__)
    values = features.cpu().numpy()
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        number = values[wrong[0]][~np.isfinite(values[wrong[0]])][0]
        raise UserError(
            f"the model's features are not finite: {number} among {values.shape[1]} numbers",
            where=source.item_name(int(batch.indices[wrong[0]])),
            fix="Are there NaNs in the weights? Else try precision float32",
        )
    return values


def cache_key(
    model: ImageClassifier, source: Source, preprocessing: Preprocessing, precision: Precision
) -> str:
    """Returns the sha256 of everything that the features depend on. Reads every image's bytes."""
    parts = [
        FORMAT,
        *(f"{name} {version(name)}" for name in _PACKAGES),
        next(model.parameters()).device.type,
        precision,
        json.dumps(preprocessing.to_json(), sort_keys=True),
        weights_hash(model),
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


def _checksum(key: str, values: np.ndarray, indices: np.ndarray, bad: str) -> str:
    digest = hashlib.sha256(f"{key} {values.shape} {bad}".encode())
    digest.update(np.ascontiguousarray(values).data)
    digest.update(np.ascontiguousarray(indices).data)
    return digest.hexdigest()


def _read(path: Path, key: str, notes: list[str]) -> Features | None:
    """Returns what a file of the cache holds; None, and a note, where it cannot be trusted."""
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
        bad = [BadImage(**each) for each in parse_json(metadata["bad"])]
    except FileNotFoundError:  # another process has just removed it
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = str(error) or type(error).__name__
        notes.append(f"the cached features {path} are not used: {reason}; computed anew")
        return None
    return Features(values, indices, bad, from_cache=True)


def _write(path: Path, key: str, features: Features) -> None:
    """Keeps features; where that cannot be done, a note says so."""
    bad = json.dumps([asdict(each) for each in features.bad])
    metadata = {
        "format": FORMAT,
        "key": key,
        "bad": bad,
        "sha256": _checksum(key, features.values, features.indices, bad),
    }
    tensors = {"features": features.values, "indices": features.indices}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, safetensors.numpy.save(tensors, metadata))
    except OSError as error:
        reason = f"{error.strerror or error}: {path.parent}"
        features.notes.append(f"the features could not be kept for the next time: {reason}")
