"""What an exported file says of itself, as text by name: enough to use it without this package.

class_names     a JSON list in the order of the logits, or null
preprocessing   a JSON object: image_size, resize, crop, mean, std, ... of `Preprocessing`
input           in words: what goes in
decoding        in words: how an image file becomes the pixels that are resized
allmlp       a JSON object: format, version, precision, architecture, ...
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allmlp.errors import UserError
from allmlp.io import parse_json
from allmlp.models.catalog import config_from_json, config_to_json
from allmlp.models.layers import ImageClassifier, ModelConfig, preprocessing_of
from allmlp.names import NAME, OLD_NAME, own_entry
from allmlp.preprocessing import Preprocessing

FORMAT, VERSION = "allmlp export", 1
NAMES = ("class_names", "preprocessing", "input", NAME, OLD_NAME)
DECODING = (
    "The first frame; turned upright by EXIF where exif_orientation is true. Samples of 12 and 16"
    " bits become value * 255 / (2^bits - 1), rounded down (in colour the upper byte); a TIFF where"
    " 0 is white is inverted; 32-bit, signed and floating-point samples are refused. What is"
    " transparent is blended on white. Then RGB, or grey (L) for channels = 1, as Pillow converts."
)


@dataclass(frozen=True)
class Description:
    """What an exported file is.

    Attributes:
        config: the architecture.
        class_names: in the order of the logits; None where they are unknown.
        preprocessing: what turns an image file into the model's input.
        uint8_input: the graph takes uint8 (N, H, W, channels), and not float32 (N, channels, H, W).
        precision: "float32", "bfloat16" or "int8".
        num_parameters: trained values of the model.
        kept: layers of an int8 file that compute in float32.
    """

    config: ModelConfig
    class_names: list[str] | None
    preprocessing: Preprocessing
    uint8_input: bool
    precision: str
    num_parameters: int
    kept: tuple[str, ...] = ()

    def outside(self) -> Preprocessing:
        """Returns the preprocessing that is left to do outside of the file."""
        if not self.uint8_input or self.preprocessing.permutation == "none":
            return self.preprocessing
        return replace(
            self.preprocessing, permutation="none", permutation_patch=None, permutation_seed=0
        )

    def input_in_words(self) -> str:
        """Returns what goes into the file: its shape, type and range of values."""
        (height, width), channels = self.preprocessing.image_size, self.preprocessing.channels
        if self.uint8_input:
            return f"images: uint8 (N, {height}, {width}, {channels}), pixels from 0 to 255"
        shape = f"float32 (N, {channels}, {height}, {width})"
        return f"images: {shape}, (pixels / 255 - mean) / std"


def description_of(model: ImageClassifier, precision: str, *, uint8_input: bool) -> Description:
    """Returns what the file of a model will say."""
    return Description(
        model.config,
        model.class_names,
        preprocessing_of(model),
        uint8_input,
        precision,
        sum(each.numel() for each in model.parameters()),
    )


def to_text(about: Description) -> dict[str, str]:
    """Returns a description as text by name."""
    own = {
        "format": FORMAT,
        "version": VERSION,
        "precision": about.precision,
        "uint8_input": about.uint8_input,
        "parameters": about.num_parameters,
        "kept_in_float32": list(about.kept),
        "architecture": config_to_json(about.config),
    }
    return {
        "class_names": json.dumps(about.class_names),
        "preprocessing": json.dumps(about.preprocessing.to_json()),
        "input": about.input_in_words(),
        "decoding": DECODING,
        NAME: json.dumps(own),
    }


def from_text(values: dict[str, str], path: Path) -> Description:
    """Returns the description that a file carries.

    Args:
        values: as `to_text` gives them.
        path: of the file, for errors.

    Raises:
        UserError: it carries none, a damaged one, or one of a newer version.
    """
    own_text = own_entry(values)
    if own_text is None:
        what = "the file does not say what its classes and its preprocessing are"
        raise UserError(what, where=path, fix="Only files of `mixer export` are used here")
    try:
        own: dict[str, Any] = parse_json(own_text)
        names = parse_json(values["class_names"])
        if own["version"] > VERSION:
            what = f"written by a newer allmlp (version {str(own['version'])[:20]})"
            raise UserError(what, where=path, fix=f"pip install --upgrade {NAME}")
        config = config_from_json(own["architecture"])
        preprocessing = Preprocessing.from_json(parse_json(values["preprocessing"]))
        is_list = isinstance(names, list) and all(isinstance(each, str) for each in names)
        if names is not None and not (is_list and len(names) == config.num_classes):
            raise ValueError("the class names are not those of the logits")
        if preprocessing.image_size != config.image_size:
            raise ValueError("the preprocessing is of another image size")
        return Description(
            config,
            names,
            preprocessing,
            bool(own["uint8_input"]),
            str(own["precision"]),
            int(own["parameters"]),
            tuple(map(str, own["kept_in_float32"])),
        )
    except UserError as error:
        raise UserError(error.what, where=path, fix=error.fix) from error
    except (KeyError, TypeError, ValueError) as error:
        what = f"the file's description is damaged: {str(error)[:200]}"
        raise UserError(what, where=path, fix="Export it again") from error
