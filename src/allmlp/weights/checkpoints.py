"""All published checkpoints (checkpoints.toml): metadata, download location, preprocessing."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Literal

import torch

from allmlp.models.catalog import architectures, create_model, family_of
from allmlp.preprocessing import Preprocessing
from allmlp.weights.download import Published


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Published):
    """A published weights file; its name is MODEL.ORIGIN."""

    by_hand: str | None = None  # file name, if only a browser can download it; `url` is then a page
    hub: str | None = None  # the same weights on the hub, as owner/name
    num_classes: int
    trained_on: str
    preprocessing: Preprocessing
    gelu: Literal["tanh", "exact"]  # that the publisher's code computes
    accuracy: str  # published ImageNet-1k top-1 and its source
    licence: str = "Apache-2.0"
    note: str = ""
    recommended_for: Literal["accuracy", "speed"] | None = None  # to fine-tune: the first choice

    @property
    def model(self) -> str:
        return self.name.partition(".")[0]

    @property
    def file_name(self) -> str:
        return self.by_hand or self.url.rpartition("/")[2]

    @property
    def parameters_mebibytes(self) -> float:
        """Size of the parameters as float32, roughly the file size without its header."""
        with torch.device("meta"):
            model = create_model(self.model, num_classes=self.num_classes)
        return 4 * model.num_parameters / 2**20

    def class_names(self) -> list[str] | None:
        return imagenet_classes() if self.num_classes == 1000 else None


def imagenet_classes() -> list[str]:
    """Returns the 1000 classes of ImageNet-1k: WordNet id and the first name of every class."""
    text = files("allmlp.weights").joinpath("imagenet_1k_classes.txt")
    return text.read_text(encoding="utf-8").splitlines()


def _read() -> list[Checkpoint]:
    text = files("allmlp.weights").joinpath("checkpoints.toml").read_text(encoding="utf-8")
    found = []
    for publisher in tomllib.loads(text).values():
        for name, file in publisher.pop("files").items():
            fields = {"num_classes": 1000, **publisher, **file}
            # "file" and "tag" are parts of the URLs.
            parts = {key: fields.pop(key, "") for key in ("file", "tag")}
            for key in fields.keys() & {"url", "hub"}:
                fields[key] = fields[key].format(**parts)
            config = architectures()[name.partition(".")[0]]
            own = family_of(config).published_preprocessing(config)
            preprocessing = replace(own, **fields.pop("preprocessing", {}))
            found.append(Checkpoint(name=name, preprocessing=preprocessing, **fields))
    return found


CHECKPOINTS: dict[str, Checkpoint] = {found.name: found for found in _read()}


def find_checkpoint(name: str) -> Checkpoint | None:
    """Returns the checkpoint with this name, ours or timm's, or None."""
    at_timm = f"timm/{name.removeprefix('timm/')}"
    found = (known for known in CHECKPOINTS.values() if known.hub == at_timm)
    return CHECKPOINTS.get(name) or next(found, None)


def recommended(purpose: Literal["accuracy", "speed"]) -> Checkpoint:
    return next(found for found in CHECKPOINTS.values() if found.recommended_for == purpose)


def checkpoint_of_file(name: str) -> Checkpoint | None:
    """Returns the checkpoint with this file name; None if unknown, or ambiguous as Google's are."""
    known = (found for found in CHECKPOINTS.values() if "mixer_models" not in found.url)
    return next((found for found in known if found.file_name == name), None)


def list_checkpoints() -> list[str]:
    """Returns the names of all published checkpoints, as accepted by `load_model`."""
    return list(CHECKPOINTS)
