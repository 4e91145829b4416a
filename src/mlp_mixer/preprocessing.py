"""Preprocessing: what turns an image file into a model's input. Travels with the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlp_mixer.errors import UserError

# How an image of any size becomes one of the model's (the paper's two, and Google's third):
#   resize-crop   squash to 8/7 of the model's size, cut the centre     (Table 2)
#   resmall-crop  shorter side to 8/7 of the model's, cut the centre    (Table 3)
#   squash        straight to the model's size                          (Google's fine-tuning code)
RESIZE_METHODS = ("resize-crop", "resmall-crop", "squash")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a model expects of its input; the same for train, evaluate and predict.

    Args:
        image_size: (H, W) of the input in pixels.
        resize: one of `RESIZE_METHODS`.
        channels: 3 for RGB, 1 for grey.
        mean, std: of the pixel values on [0, 1]; 0.5 and 0.5 give Google's range of [-1, 1].

    Raises:
        ValueError: a value is out of range.
    """

    image_size: tuple[int, int]
    resize: Literal["resize-crop", "resmall-crop", "squash"] = "resmall-crop"
    channels: int = 3
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        if self.resize not in RESIZE_METHODS:
            raise ValueError(f"resize must be one of {RESIZE_METHODS}, got {self.resize!r}")
        if self.channels not in (1, 3):
            raise ValueError(f"images have 1 (grey) or 3 (RGB) channels, got {self.channels}")
        for name in ("mean", "std"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        if self.std <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Preprocessing:
        """Returns what `to_json` wrote.

        Raises:
            UserError: an unknown or missing field, or a value out of range.
        """
        try:
            height, width = values["image_size"]
            return Preprocessing(**{**values, "image_size": (int(height), int(width))})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a preprocessing: {values!r} ({error})") from error
