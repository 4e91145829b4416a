"""Every published checkpoint: what it is, where it lies, what it needs, what it reaches.

Names are model, dot, origin, so that Google's four files called Mixer-B_16.npz do not collide.
Sources: the listing of gs://mixer_models in vit_jax.ipynb (sizes), Table 3 of the paper, timm's
default_cfgs and result tables, arXiv 2106.01548 (SAM). ImageNet-21k has no accuracy on ImageNet-1k
without fine-tuning, and the fine-tuned models of the paper were never published.
CycleMLP and Vision Permutator: their authors' READMEs and codes (the accuracies), and PaddleViT,
which measured ports of the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Literal

import torch

from allmlp.errors import UserError, near_names
from allmlp.models.catalog import architecture_name, create_model
from allmlp.models.layers import ModelConfig
from allmlp.preprocessing import Preprocessing

_BUCKET = "https://storage.googleapis.com/mixer_models"
_TIMM = "https://github.com/huggingface/pytorch-image-models/releases/download"
_CYCLE = "https://github.com/ShoufaChen/CycleMLP/releases/download/v0.1"
_DRIVE = "https://drive.google.com/file/d"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A published file of weights.

    Attributes:
        name: model, dot, origin.
        model: its architecture, a name of `list_models()`.
        url: of the file; of a page for browsers where `by_hand`.
        by_hand: the file's name where no program can fetch it, and somebody has to; else None.
        hub: the same weights on the hub, as owner/name; None where they are not there.
        mebibytes: published size; None where only the parameter count is known.
        sha256: published digits, the first eight or all; None where there are none.
        num_classes: of the head.
        trained_on: the data, in words.
        preprocessing: what its input has to be.
        gelu: the form that its publisher computes.
        accuracy: published ImageNet-1k top-1 and where the figure comes from.
        licence: of the weights.
        note: what one should know.
    """

    name: str
    url: str
    by_hand: str | None = None
    hub: str | None = None
    mebibytes: float | None = None
    sha256: str | None = None
    num_classes: int
    trained_on: str
    preprocessing: Preprocessing
    gelu: Literal["tanh", "exact"]
    accuracy: str
    licence: str = "Apache-2.0"
    note: str = ""

    @property
    def model(self) -> str:
        """The name of its architecture."""
        return self.name.partition(".")[0]

    @property
    def file_name(self) -> str:
        """The last part of the URL, or what the file is to be called."""
        return self.by_hand or self.url.rpartition("/")[2]

    @property
    def parameters_mebibytes(self) -> float:
        """What its parameters take as float32, which is the file but for its header."""
        with torch.device("meta"):
            model = create_model(self.model, num_classes=self.num_classes)
        return 4 * sum(each.numel() for each in model.parameters()) / 2**20

    def class_names(self) -> list[str] | None:
        """Returns WordNet ids with the first word of each, for ImageNet-1k; else None."""
        if self.num_classes != 1000:
            return None
        text = files("allmlp.weights").joinpath("imagenet_1k_classes.txt")
        return text.read_text(encoding="utf-8").splitlines()


_GOOGLE = Preprocessing(image_size=(224, 224))
_TIMM_GOOGLE = Preprocessing(image_size=(224, 224), interpolation="bicubic")
_MIIL = Preprocessing(image_size=(224, 224), mean=0.0, std=1.0)
_I1K, _I21K = "ImageNet-1k from scratch", "ImageNet-21k"
_NOT_PUBLISHED = "none without fine-tuning"
_UNVERIFIED = "not verified here; see Table 1 of arXiv 2203.08065"
_SAM = "ImageNet-1k with sharpness-aware minimisation (SAM)"
_GSAM = "ImageNet-1k with surrogate-gap SAM (GSAM)"
_SUSPECT = "users report unexplained low accuracy of GSAM files; measure before relying on it"
_WRONG_TAG = (
    "timm calls it goog_in21k_ft_in1k; that is wrong: it is ImageNet-1k from scratch, as the "
    "paper's author and the accuracy say"
)
_GELU = "Google trained with the tanh GELU, timm computes the exact one"


def _google(
    name: str, path: str, mebibytes: float, trained_on: str, accuracy: str, note: str = ""
) -> Checkpoint:
    return Checkpoint(
        name=name,
        url=f"{_BUCKET}/{path}",
        mebibytes=mebibytes,
        num_classes=21843 if trained_on == _I21K else 1000,
        trained_on=trained_on,
        preprocessing=_GOOGLE,
        gelu="tanh",
        accuracy=accuracy,
        note=note,
    )


def _timm(
    name: str,
    tag: str,
    path: str,
    num_classes: int,
    trained_on: str,
    accuracy: str,
    note: str = _GELU,
    preprocessing: Preprocessing = _TIMM_GOOGLE,
) -> Checkpoint:
    return Checkpoint(
        name=name,
        url=f"{_TIMM}/{path}",
        hub=f"timm/{tag}",
        sha256=path.rpartition("-")[2].removesuffix(".pth"),
        num_classes=num_classes,
        trained_on=trained_on,
        preprocessing=preprocessing,
        gelu="exact",
        accuracy=accuracy,
        note=note,
    )


def _imagenet(crop: float, channels: int = 3) -> Preprocessing:
    """ImageNet's mean and deviation; for a grey model their means."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Preprocessing(
        image_size=(224, 224),
        channels=channels,
        mean=mean if channels == 3 else sum(mean) / 3,
        std=std if channels == 3 else sum(std) / 3,
        crop=crop,
        interpolation="bicubic",
    )


def _cycle(letter: str, readme: float, crop: float, port: float) -> Checkpoint:
    return Checkpoint(
        name=f"cycle_mlp_{letter}.i1k",
        url=f"{_CYCLE}/CycleMLP_{letter.upper()}.pth",
        num_classes=1000,
        trained_on=_I1K,
        preprocessing=_imagenet(crop),
        gelu="exact",
        accuracy=f"{readme} (its README, cut at 0.875); {port} (a port in PaddleViT, {crop})",
        licence="MIT",
    )


def _permutator(size: str, readme: float, crop: float, port: float, drive: str) -> Checkpoint:
    return Checkpoint(
        name=f"vip_{size}.i1k",
        url=f"{_DRIVE}/{drive}/view",
        by_hand=f"vip_{size}.pth",
        num_classes=1000,
        trained_on=_I1K,
        preprocessing=_imagenet(crop),
        gelu="exact",
        accuracy=f"{readme} (its README, cut at {crop}); {port} (a port in PaddleViT)",
        licence="MIT; its README adds: for non-commercial use only",
        note="on Google Drive, to be fetched with a browser",
    )


_ALL = (
    _google("mixer_b16.i1k", "imagenet1k/Mixer-B_16.npz", 228.47, _I1K, "76.44 (paper, Table 3)"),
    _google("mixer_l16.i1k", "imagenet1k/Mixer-L_16.npz", 794.29, _I1K, "71.76 (paper, Table 3)"),
    _google(
        "mixer_b16.i21k",
        "imagenet21k/Mixer-B_16.npz",
        289.61,
        _I21K,
        _NOT_PUBLISHED,
        "fine-tuned on ImageNet-1k the paper reports 80.64; those weights were not published",
    ),
    _google(
        "mixer_l16.i21k",
        "imagenet21k/Mixer-L_16.npz",
        875.78,
        _I21K,
        _NOT_PUBLISHED,
        "fine-tuned on ImageNet-1k the paper reports 82.89; those weights were not published",
    ),
    _google(
        "mixer_b16.sam",
        "sam/Mixer-B_16.npz",
        228.47,
        _SAM,
        "77.4 (arXiv 2106.01548)",
        "a user measured 68.9 with preprocessing not stated (vision_transformer issue 134)",
    ),
    _google("mixer_b32.sam", "sam/Mixer-B_32.npz", 230.04, _SAM, "see arXiv 2106.01548"),
    _google("mixer_b16.gsam", "gsam/Mixer-B_16.npz", 228.47, _GSAM, _UNVERIFIED, _SUSPECT),
    _google("mixer_b32.gsam", "gsam/Mixer-B_32.npz", 230.04, _GSAM, _UNVERIFIED, _SUSPECT),
    _google("mixer_s16.gsam", "gsam/Mixer-S_16.npz", 70.71, _GSAM, _UNVERIFIED, _SUSPECT),
    _google("mixer_s32.gsam", "gsam/Mixer-S_32.npz", 72.91, _GSAM, _UNVERIFIED, _SUSPECT),
    _google("mixer_s8.gsam", "gsam/Mixer-S_8.npz", 78.79, _GSAM, _UNVERIFIED, _SUSPECT),
    _timm(
        "mixer_b16.timm_i1k",
        "mixer_b16_224.goog_in21k_ft_in1k",
        "v0.1-vitjx/jx_mixer_b16_224-76587d61.pth",
        1000,
        _I1K,
        "76.62 (timm's results)",
        f"{_WRONG_TAG}; {_GELU}",
    ),
    _timm(
        "mixer_l16.timm_i1k",
        "mixer_l16_224.goog_in21k_ft_in1k",
        "v0.1-vitjx/jx_mixer_l16_224-92f9adc4.pth",
        1000,
        _I1K,
        "72.08 (timm's results)",
        f"{_WRONG_TAG}; {_GELU}",
    ),
    _timm(
        "mixer_b16.timm_i21k",
        "mixer_b16_224.goog_in21k",
        "v0.1-vitjx/jx_mixer_b16_224_in21k-617b3de2.pth",
        21843,
        _I21K,
        _NOT_PUBLISHED,
        f"timm's old name mixer_b16_224_in21k now gives the 1000-class file; {_GELU}",
    ),
    _timm(
        "mixer_l16.timm_i21k",
        "mixer_l16_224.goog_in21k",
        "v0.1-vitjx/jx_mixer_l16_224_in21k-846aa33c.pth",
        21843,
        _I21K,
        _NOT_PUBLISHED,
        f"timm's old name mixer_l16_224_in21k now gives the 1000-class file; {_GELU}",
    ),
    _timm(
        "mixer_b16.miil_in21k",
        "mixer_b16_224.miil_in21k",
        "v0.1-tresnet/mixer_b16_224_miil_in21k-2a558a71.pth",
        11221,
        "ImageNet-21k-P (11,221 classes), by Alibaba-MIIL",
        _NOT_PUBLISHED,
        "pixels on [0, 1], not [-1, 1]",
        _MIIL,
    ),
    _timm(
        "mixer_b16.miil_in21k_ft_in1k",
        "mixer_b16_224.miil_in21k_ft_in1k",
        "v0.1-tresnet/mixer_b16_224_miil-9229a591.pth",
        1000,
        "ImageNet-21k-P, then ImageNet-1k, by Alibaba-MIIL",
        "82.3 (its author, timm pull request 651)",
        "pixels on [0, 1], not [-1, 1]",
        _MIIL,
    ),
    _cycle("b1", 78.9, 0.9, 78.85),
    _cycle("b2", 81.6, 0.9, 81.58),
    _cycle("b3", 82.4, 0.9, 82.42),
    _cycle("b4", 83.0, 0.875, 82.96),
    _cycle("b5", 83.2, 0.875, 83.25),
    _permutator("s7", 81.5, 0.9, 81.48, "1cX6eauDrsGsLSZnqsX7cl0oiKX8Dzv5z"),
    _permutator("m7", 82.7, 0.9, 82.64, "15y5WMypthpbBFdc01E3mJCZit7q0Yn8m"),
    _permutator("l7", 83.2, 0.875, 83.18, "14F5IXGXmB_3jrwK33Efae-WEb5D_G85c"),
)
CHECKPOINTS: dict[str, Checkpoint] = {each.name: each for each in _ALL}
# timm's own names, which people have at hand.
_BY_TIMM_NAME = {each.hub.removeprefix("timm/"): each for each in _ALL if each.hub}
_BY_FILE = {each.file_name: each for each in _ALL if not each.url.startswith(_BUCKET)}


def find_checkpoint(name: str) -> Checkpoint | None:
    """Returns the checkpoint of a name, ours or timm's; None where there is none."""
    return CHECKPOINTS.get(name) or _BY_TIMM_NAME.get(name.removeprefix("timm/"))


def checkpoint_of_file(name: str) -> Checkpoint | None:
    """Returns the checkpoint whose file has this name, where the name is unlike any other's."""
    return _BY_FILE.get(name)


def authors_preprocessing(config: ModelConfig) -> Preprocessing | None:
    """Returns what CycleMLP and Vision Permutator were published with, for a file that is silent.

    None where the model takes neither grey nor coloured images.
    """
    if config.in_channels not in (1, 3):
        return None
    name = architecture_name(config)
    crop = 0.9 if name in _CUT_LESS else 0.875
    return replace(_imagenet(crop, config.in_channels), image_size=config.image_size)


# `crop_pct` of the authors' `default_cfgs`.
_CUT_LESS = {f"cycle_mlp_b{each}" for each in (1, 2, 3)} | {"vip_s14", "vip_s7", "vip_m7"}


def unknown_checkpoint(name: str) -> UserError:
    """Returns the error for a source that is neither a path nor a checkpoint's name."""
    near = near_names(name, CHECKPOINTS)
    return UserError(
        f"no such model: {name!r}",
        fix=f"{near}Give a run folder, a .safetensors, .npz or .pth file, hf:owner/name, or a name "
        "of `mixer models --weights`",
    )
