"""Exported files as models, and their metadata, stored as text entries:

class_names     JSON list in the order of the logits, or null
preprocessing   JSON object: image_size, resize, crop, mean, std, ... of `Preprocessing`
decision        JSON object: labels, temperature, ... of `Decision`; absent if all are defaults
input           description of the input's shape, type and range
decoding        description of how image files are decoded before resizing
allmlp          JSON object: format, version, precision, architecture, ...
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allmlp.data.transforms import denormalize, normalize
from allmlp.decision import Decision
from allmlp.errors import UserError
from allmlp.io import parse_json
from allmlp.models.catalog import config_from_json, config_to_json
from allmlp.models.family import ModelConfig
from allmlp.models.layers import (
    ImageClassifier,
    check_image_shape,
    checked_names,
    preprocessing_of,
)
from allmlp.names import NAME, OLD_NAME, own_entry
from allmlp.preprocessing import Preprocessing

FORMAT, VERSION = "allmlp export", 1
ENTRIES = ("class_names", "preprocessing", "decision", "input", "decoding", NAME, OLD_NAME)
DECODING = (
    "The first frame; turned upright by EXIF where exif_orientation is true. Samples of 12 and 16"
    " bits become value * 255 / (2^bits - 1), rounded down (in colour the upper byte); a TIFF where"
    " 0 is white is inverted; 32-bit, signed and floating-point samples are refused. What is"
    " transparent is blended on white. Then RGB, or grey (L) for channels = 1, as Pillow converts."
)


@dataclass(frozen=True)
class ExportInfo:
    """Metadata of an exported file."""

    config: ModelConfig
    class_names: list[str] | None
    preprocessing: Preprocessing
    uint8_input: bool  # (N, H, W, channels), else normalized float32 (N, channels, H, W)
    precision: str
    num_parameters: int
    float32_layers: tuple[str, ...] = ()  # in an int8 file
    decision: Decision = field(default_factory=Decision)

    def inputs(self, images: Tensor) -> np.ndarray:
        """Converts uint8 images (N, channels, H, W) to graph inputs."""
        if self.uint8_input:
            return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        return normalize(images, self.preprocessing).numpy()


def info_of(model: ImageClassifier, precision: str, *, uint8_input: bool) -> ExportInfo:
    """Returns the metadata for a model's exported file."""
    how, number = preprocessing_of(model), model.num_parameters
    return ExportInfo(
        *(model.config, model.class_names, how, uint8_input, precision, number),
        decision=model.decision,
    )


def to_text(info: ExportInfo) -> dict[str, str]:
    """Serializes the metadata to text entries."""
    (height, width), channels = info.preprocessing.image_size, info.preprocessing.channels
    shape = f"float32 (N, {channels}, {height}, {width}), (pixels / 255 - mean) / std"
    if info.preprocessing.kind == "arrays":
        shape = f"float32 (N, {channels}, {height}, {width}), (numbers - mean) / std"
    if info.uint8_input:
        shape = f"uint8 (N, {height}, {width}, {channels}), pixels from 0 to 255"
    own = {
        "format": FORMAT,
        "version": VERSION,
        "precision": info.precision,
        "uint8_input": info.uint8_input,
        "parameters": info.num_parameters,
        "kept_in_float32": list(info.float32_layers),
        "architecture": config_to_json(info.config),
    }
    decision = info.decision.to_json()
    return {
        "class_names": json.dumps(info.class_names),
        "preprocessing": json.dumps(info.preprocessing.to_json()),
        **({"decision": json.dumps(decision)} if decision else {}),
        "input": f"images: {shape}",
        **({"decoding": DECODING} if info.preprocessing.kind == "images" else {}),
        NAME: json.dumps(own),
    }


def from_text(values: Mapping[str, str], path: Path) -> ExportInfo:
    """Parses text entries; raises UserError if they are missing, damaged or newer."""
    own_text = own_entry(values)
    if not own_text:
        what = "the file does not say what its classes and its preprocessing are"
        raise UserError(what, where=path, fix="Only files of `mixer export` can be used here")
    try:
        own: dict[str, Any] = parse_json(own_text)
        if own["version"] > VERSION:
            what = f"written by a newer allmlp (version {str(own['version'])[:20]})"
            raise UserError(what, fix=f"pip install --upgrade {NAME}")
        config = config_from_json(own["architecture"])
        names = parse_json(values["class_names"])
        if names is not None:
            names = checked_names(names, config.num_classes)
        preprocessing = Preprocessing.from_json(parse_json(values["preprocessing"]))
        if preprocessing.image_size != config.image_size:
            raise ValueError("the preprocessing is of another image size")
        return ExportInfo(
            config,
            names,
            preprocessing,
            bool(own["uint8_input"]),
            str(own["precision"]),
            int(own["parameters"]),
            tuple(map(str, own["kept_in_float32"])),
            Decision.from_json(parse_json(values.get("decision") or "{}"), config.num_classes),
        )
    except UserError as error:
        raise UserError(error.what, where=path, fix=error.fix) from error
    except (KeyError, TypeError, ValueError) as error:
        what = f"the file's description is damaged: {str(error)[:200]}"
        raise UserError(what, where=path, fix="Export it again", code="damaged") from error


class ExportedModel:
    """An exported file, run by its runtime on the CPU: images in, logits out.

    Args:
        info: the file's metadata.
        run: computes logits from graph inputs.
        runtime: name and version, such as "onnxruntime 1.31.1".
        source: the file.

    Attributes:
        info, run, runtime: as given.
        config, class_names, decision, source: as in `ImageClassifier`.
        preprocessing: the part done outside the file.
    """

    device = torch.device("cpu")

    def __init__(
        self, info: ExportInfo, run: Callable[[np.ndarray], np.ndarray], runtime: str, source: Path
    ) -> None:
        self.info, self.run, self.runtime = info, run, runtime
        self.config, self.class_names = info.config, info.class_names
        self.decision = info.decision
        self.num_parameters, self.source = info.num_parameters, str(source)
        self.preprocessing: Preprocessing | None = info.preprocessing
        if info.uint8_input:  # the graph permutes the pixels
            changes = {"permutation": "none", "permutation_patch": None, "permutation_seed": 0}
            self.preprocessing = replace(info.preprocessing, **changes)

    def __repr__(self) -> str:
        return f"an exported file ({self.source})"

    def __call__(self, images: Tensor) -> Tensor:
        """Returns logits (N, num_classes).

        Args:
            images: (N, channels, H, W), float32 in the model's range or uint8.
        """
        check_image_shape(images, self.config, "a file has one size")
        images = images.detach().cpu()
        if images.dtype != torch.uint8 and not self.info.uint8_input:
            return torch.from_numpy(self.run(images.float().numpy()))
        if images.dtype != torch.uint8:  # exact: pixels were integers
            pixels = denormalize(images.float(), self.info.preprocessing) * 255.0
            images = pixels.round().clamp(0, 255).byte()
        return torch.from_numpy(self.run(self.info.inputs(images)))
