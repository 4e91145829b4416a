"""Preprocessing: from image file to model input. It is stored with the weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from allmlp.errors import UserError

# Resizing to the model's input size (two methods from the paper, one from Google's code):
#   resize-crop   squash to 8/7 of the input size, centre crop         (Table 2)
#   resmall-crop  shorter side to 8/7 of the input size, centre crop   (Table 3)
#   squash        squash to the input size                             (Google's fine-tuning code)
# An image no larger than the input on both sides is upscaled without cropping unless `crop_small`
# is set, so that small images look the same at every input size.
RESIZE_METHODS = ("resize-crop", "resmall-crop", "squash")
INTERPOLATIONS = ("bilinear", "bicubic")
# Figure 4: one fixed permutation, applied to every image as the last step before the model:
#   patches   permutes the patches, and the pixels within each patch
#   pixels    permutes all pixels
PERMUTATIONS = ("none", "patches", "pixels")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a model's input is prepared, the same in train, evaluate and predict.

    Args:
        image_size: input (H, W) in pixels.
        resize: one of `RESIZE_METHODS`.
        channels: 3 for RGB, 1 for grey.
        mean: of pixel values in [0, 1], one number or one per channel.
        std: likewise; a mean and std of 0.5 give Google's range of [-1, 1].
        crop: side of the centre crop as a fraction of the resized image, in (0, 1]; 7/8 is the
            paper's 224 of 256 (timm's crop_pct 0.875). Ignored by "squash".
        crop_small: also crop images no larger than the input, as the paper does (CIFAR: 32 -> 256
            -> centre 224), instead of upscaling them without cropping.
        interpolation: one of `INTERPOLATIONS`, with antialiasing.
        exif_orientation: rotate images upright by their EXIF tag; the paper's code does not.
        permutation: one of `PERMUTATIONS`, for the paper's figure 4.
        permutation_patch: patch side in pixels, for "patches" only; must divide both sides.
        permutation_seed: seed of the permutation.

        kind: "arrays" for rows of numbers, which are only normalised: by `mean` and `std` of the
            training rows, one per channel, in the units of the data. Any number of channels.

    Raises:
        ValueError: a value is out of range.
    """

    image_size: tuple[int, int]
    resize: Literal["resize-crop", "resmall-crop", "squash"] = "resmall-crop"
    channels: int = 3
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    crop: float = 0.875
    crop_small: bool = False
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    exif_orientation: bool = True
    permutation: Literal["none", "patches", "pixels"] = "none"
    permutation_patch: int | None = None
    permutation_seed: int = 0
    kind: Literal["images", "arrays"] = "images"

    def __post_init__(self) -> None:
        for name, choices in (
            ("resize", RESIZE_METHODS),
            ("kind", ("images", "arrays")),
            ("channels", (1, 3) if self.kind == "images" else (self.channels,)),
            ("interpolation", INTERPOLATIONS),
            ("permutation", PERMUTATIONS),
            ("crop_small", (False, True)),
            ("exif_orientation", (False, True)),
        ):
            value = getattr(self, name)
            if value not in choices or type(value) is not type(choices[0]):
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, value := tuple(value))
            numbers = value if isinstance(value, tuple) else (value,) * self.channels
            is_number = all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
            if not is_number or len(numbers) != self.channels:
                what = f"a number or {self.channels} of them, one per channel"
                raise ValueError(f"{name} must be {what}, got {value!r}")
            if name == "std" and min(numbers) <= 0:
                raise ValueError(f"std must be above 0, got {value}")
        if not (isinstance(self.crop, int | float) and 0 < self.crop <= 1):
            raise ValueError(f"crop must be above 0 and at most 1, got {self.crop!r}")
        kind, patch, seed = self.permutation, self.permutation_patch, self.permutation_seed
        if not isinstance(seed, int) or seed < 0 or (seed and kind == "none"):
            what = "permutation_seed is a whole number of at least 0, and 0 without a permutation"
            raise ValueError(f"{what}, got {seed!r}")
        is_side = isinstance(patch, int) and patch > 0
        fits = is_side and all(side % (patch or 1) == 0 for side in self.image_size)
        if not (fits if kind == "patches" else patch is None):
            height, width = self.image_size
            what = f"permutation_patch goes with 'patches', and must divide {height}x{width} pixels"
            raise ValueError(f"{what}; got {patch!r} for {kind!r}")

    def value_range(self) -> str:
        """The range of normalized pixels, "[-1, 1]", or mean and std if channels differ."""
        if self.kind == "arrays":
            return "numbers less the training mean, over the deviation"
        if isinstance(self.mean, tuple) or isinstance(self.std, tuple):
            return f"pixels on [0, 1] less the mean {self.mean}, over the std {self.std}"
        return f"[{(0 - self.mean) / self.std:g}, {(1 - self.mean) / self.std:g}]"

    def summary(self) -> str:
        """Returns for example "resmall-crop 0.875, bilinear, values in [-1, 1]"."""
        crop = "" if self.resize == "squash" else f" {self.crop:.4g}"
        permuted = "" if self.permutation == "none" else f", {self.permutation} permuted"
        values = f"values in {self.value_range()}"
        if self.kind == "arrays":
            return f"arrays, {self.value_range()}{permuted}"
        small = ", small images cropped too" if self.crop_small and crop else ""
        return f"{self.resize}{crop}, {self.interpolation}, {values}{permuted}{small}"

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values; `crop_small` and `kind` only if set.

        Older versions reject a file with one of these rather than prepare its input differently.
        """
        usual = {"crop_small": False, "kind": "images"}
        return {name: v for name, v in asdict(self).items() if usual.get(name) != v}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Preprocessing:
        """Inverse of `to_json`."""
        try:
            height, width = values["image_size"]
            return Preprocessing(**{**values, "image_size": (int(height), int(width))})
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"not a preprocessing: {str(values)[:200]} ({error})") from error
