"""A stand-in for timm, which is no dependency: three small networks behind the same functions."""

import fnmatch
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allmlp.models import timm_model


@dataclass
class Cfg:
    """The fields of timm's `PretrainedCfg` that are read."""

    tag: str = ""
    input_size: tuple[int, int, int] = (3, 16, 16)
    fixed_input_size: bool = False
    classifier: Any = "fc"
    num_classes: int = 1000
    mean: tuple[float, ...] = (0.4, 0.5, 0.6)
    std: tuple[float, ...] = (0.2, 0.2, 0.3)
    crop_pct: float = 0.9
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    label_names: tuple[str, ...] | None = None
    url: str = ""
    hf_hub_id: str = ""
    hf_hub_filename: str | None = None
    custom_load: bool = False


CFGS = {
    "fake_cnn": Cfg(),
    "fake_cnn.first": Cfg(tag="first", hf_hub_id="timm/fake_cnn.first"),
    "fake_cnn.own": Cfg(tag="own", url="https://example.org/a.npz", custom_load=True),
    "fake_bit": Cfg(tag="i21k", hf_hub_id="timm/fake_bit.i21k", num_classes=7),
    "fake_vit": Cfg(tag="a", hf_hub_id="timm/fake_vit.a", fixed_input_size=True, num_classes=4),
    "fake_mlp": Cfg(tag="a", hf_hub_id="timm/fake_mlp.a", fixed_input_size=True, num_classes=4),
    "fake_two": Cfg(tag="a", hf_hub_id="timm/fake_two.a", classifier=("fc", "fc_dist")),
    "fake_odd": Cfg(tag="a", hf_hub_id="timm/fake_odd.a", num_classes=4),
}
WIDTH = 6


class FakeCnn(nn.Module):
    """Convolution, batch normalisation, mean, classifier: dense, or a 1x1 convolution."""

    def __init__(self, num_classes: int, in_chans: int, kind: str, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, WIDTH, 3, padding=1, bias=False)
        self.bn, self.drop, self.kind = nn.BatchNorm2d(WIDTH), nn.Dropout(drop_rate), kind
        self.register_buffer("constant", torch.ones(WIDTH, 1, 1), persistent=False)
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            is_conv = kind == "fake_bit"
            self.fc = nn.Conv2d(WIDTH, num_classes, 1) if is_conv else nn.Linear(WIDTH, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x))) * self.constant

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(x.mean((2, 3), keepdim=self.kind == "fake_bit"))
        if pre_logits:
            return x.flatten(1)
        x = self.fc(x).flatten(1)
        return 2 * x if self.kind == "fake_odd" else x

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc


class FakeMlp(FakeCnn):
    """Patches of 4 pixels with position embeddings, which are built for one size."""

    def __init__(
        self, num_classes: int, in_chans: int, kind: str, img_size: tuple[int, int] = (16, 16)
    ) -> None:
        super().__init__(num_classes, in_chans, kind)
        self.conv = nn.Conv2d(in_chans, WIDTH, 4, stride=4)
        self.pos_embed = nn.Parameter(torch.randn(1, WIDTH, *(side // 4 for side in img_size)))

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x) + self.pos_embed


class FakeVit(FakeMlp):
    """Which can be brought to another size."""

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        size = [side // 4 for side in img_size]
        self.pos_embed = nn.Parameter(nn.functional.interpolate(self.pos_embed, size=size))


def create_model(
    name: str,
    pretrained: bool = False,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    num_classes: int | None = None,
    in_chans: int = 3,
    **settings: Any,
) -> nn.Module:
    base = name.partition(".")[0]
    classes = get_pretrained_cfg(name).num_classes if num_classes is None else num_classes
    kind: Any = {"fake_vit": FakeVit, "fake_mlp": FakeMlp}.get(base, FakeCnn)
    model = kind(classes, in_chans, base, **settings)
    if pretrained:
        assert pretrained_cfg_overlay is not None, "the package reads files itself"
        model.load_state_dict(pretrained_cfg_overlay["state_dict"])
    return model


def get_pretrained_cfg(name: str) -> Cfg:
    found = CFGS.get(name) or CFGS[name.partition(".")[0]]
    assert "." not in name or name.partition(".")[2] == found.tag
    return found


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    if not pretrained:
        return sorted({name.partition(".")[0] for name in CFGS})
    named = {f"{name.partition('.')[0]}.{cfg.tag}" for name, cfg in CFGS.items() if cfg.tag}
    return sorted(fnmatch.filter(named, pattern))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `import timm` find the stand-in, and forgets what was measured of another timm."""
    module: Any = ModuleType("timm")
    module.__version__ = "0.fake"
    module.is_model = lambda name: name in list_models()
    module.create_model, module.list_models = create_model, list_models
    module.get_pretrained_cfg = get_pretrained_cfg
    monkeypatch.setitem(sys.modules, "timm", module)
    timm_model._measured.cache_clear()
