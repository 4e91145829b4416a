"""Models of timm in our frame: with a stand-in for timm, and with timm itself where it is."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import allmlp as am
import fake_timm
from allmlp.models import timm_model
from allmlp.models.catalog import config_from_json, config_to_json
from allmlp.models.comparison_systems import HAND_BUILT, PAPER_SYSTEMS, SYSTEMS
from allmlp.models.timm_model import TimmConfig, TimmModel, import_timm, own_image_size
from conftest import mixer

pytestmark = pytest.mark.numerics


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_timm.install(monkeypatch)


def images(size: int = 16, number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_create_gives_our_frame(timm: None):
    model = am.create_model("timm:fake_cnn", num_classes=5).eval()
    assert isinstance(model, TimmModel)
    assert model.config == TimmConfig(name="fake_cnn", image_size=(16, 16), num_classes=5)
    assert isinstance(model.head, torch.nn.Linear)
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    torch.nn.init.normal_(model.head.weight)
    features = model.features(images())
    assert features.shape == (2, fake_timm.WIDTH)
    assert torch.equal(model(images()), model.head(features))
    assert "fake_cnn" in model.config.summary()


def test_no_head_gives_features(timm: None):
    model = am.create_model("timm:fake_bit", num_classes=0, in_channels=1).eval()
    assert model.head is None
    assert model(images()[:, :1]).shape == (2, fake_timm.WIDTH)


def test_images_of_another_size_are_refused(timm: None):
    model = am.create_model("timm:fake_cnn")
    with pytest.raises(ValueError, match=r"16x16 pixels, got 8x8: timm builds it for one size"):
        model(images(8))


def test_flops_are_twice_the_multiply_adds(timm: None):
    config = am.create_model("timm:fake_cnn", image_size=(8, 16), num_classes=5).config
    assert config.flops == 2 * (8 * 16 * 3 * 9 * fake_timm.WIDTH + fake_timm.WIDTH * 5)
    assert config.hidden_dim == fake_timm.WIDTH


def test_measuring_draws_no_random_numbers(timm: None):
    first = am.create_model("timm:fake_vit", image_size=24)
    torch.manual_seed(0)
    again = TimmModel(first.config)
    timm_model._measured.cache_clear()
    torch.manual_seed(0)
    unmeasured = TimmModel(first.config)
    for one, other in zip(again.parameters(), unmeasured.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["fake_vit", "fake_mlp"])
def test_sizes_that_a_model_is_built_for(timm: None, name: str):
    model: Any = am.create_model(f"timm:{name}", image_size=(8, 24))
    assert model.backbone.pos_embed.shape == (1, fake_timm.WIDTH, 2, 6)


def test_on_the_meta_device_constants_are_real(timm: None):
    with torch.device("meta"):
        model: Any = am.create_model("timm:fake_cnn", num_classes=2)
    assert all(each.is_meta for each in model.parameters())
    assert not model.backbone.constant.is_meta
    trained = am.create_model("timm:fake_cnn", num_classes=2)
    torch.nn.init.ones_(trained.head.weight)
    model.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(model.eval()(images()), trained.eval()(images()))


def test_json_round_trip(timm: None):
    config = am.create_model("timm:fake_cnn", (8, 16), 3, dropout=0.5).config
    values = json.loads(json.dumps(config_to_json(config)))
    assert values["family"] == "timm"
    assert config_from_json(values) == config


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("timm:fake_cn", {}, r"no model 'fake_cn'[\s\S]*Did you mean fake_cnn"),
        ("timm:", {}, "no model ''"),
        ("timm:fake_cnn.first", {}, r"a model with random weights has no tag[\s\S]*timm:fake_cnn,"),
        ("timm:fake_cnn", {"width": 3}, r"no setting 'width'[\s\S]*in_channels, dropout"),
        ("timm:fake_cnn", {"image_size": 0}, "height must be a whole number"),
        ("timm:fake_cnn", {"image_size": (8,)}, "cannot build timm:fake_cnn"),
        ("timm:fake_cnn", {"num_classes": -1}, "num_classes must be at least 0"),
        ("timm:fake_cnn", {"dropout": float("nan")}, r"dropout must be in \[0, 1\)"),
        ("timm:fake_cnn", {"stochastic_depth": 0.1}, "unexpected keyword argument 'drop_path"),
        ("timm:fake_vit", {"image_size": 2}, "timm's fake_vit takes no images|timm cannot build"),
        ("timm:fake_two", {}, "2 classifiers, one is meant"),
    ],
)
def test_what_cannot_be_built_is_refused(timm: None, name: str, settings: Any, message: str):
    with pytest.raises(am.UserError, match=message):
        am.create_model(name, **settings)


def test_absent_timm_names_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for call in (am.create_model, am.load_model):
        with pytest.raises(am.UserError, match=r"not installed[\s\S]*pip install timm"):
            call("timm:resnet18")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", r"nms[\s\S]*whl/cpu"),
        ("import no_such_module_xyz", r"no_such_module_xyz[\s\S]*pip install no_such_module_xyz"),
    ],
)
def test_a_timm_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(line)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(am.UserError, match=f"timm cannot be imported: .*{message}"):
        import_timm()


def test_the_comparison_systems_are_listed(capsys: pytest.CaptureFixture[str]):
    code, out, _ = mixer(capsys, "models", "--comparison")
    assert code == 0
    for system in SYSTEMS:
        assert f"\n{system.paper_name} " in out
        assert f"{system.parameters:,}" in out
    assert set(PAPER_SYSTEMS) >= {"HaloNet", "BiT-R200x3", "NFNet-F4+", "ALIGN", "MPL", "ViT-H/14"}
    own = {name.removeprefix("timm:") for name in PAPER_SYSTEMS.values()}
    assert set(HAND_BUILT) <= own
    code, _, err = mixer(capsys, "models", "--comparison", "--num-classes", 3)
    assert code == 2
    assert "--comparison and --num-classes do not go together" in err


@pytest.fixture(scope="module")
def real_timm() -> Any:
    """timm itself; its torchvision's operators are declared where torch has no such build."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm, which is no dependency")
    timm_model._measured.cache_clear()
    library = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not hasattr(torch.ops.torchvision, "nms"):
            library = torch.library.Library("torchvision", "DEF")
            boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            for name in ("nms", "qnms"):
                library.define(name + boxes)
        try:
            yield import_timm()
        except am.UserError as error:
            pytest.skip(f"timm is there and cannot be imported: {error.what}")
    timm_model._measured.cache_clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.paper_name)
def test_parameters_of_the_comparison_systems(real_timm: Any, system: Any):
    with torch.device("meta"):
        model = am.create_model(system.model)
    assert sum(each.numel() for each in model.parameters()) == system.parameters
    assert model.config.image_size == own_image_size(system.model.removeprefix("timm:"))


@pytest.mark.filterwarnings("ignore")
def test_flops_of_vit_count_attention(real_timm: Any):
    assert am.create_model("timm:vit_tiny_patch16_224").config.flops / 2e9 == pytest.approx(
        1.2537, abs=1e-3
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_logits_are_those_of_timm(real_timm: Any, name: str):
    from allmlp.weights.timm_pretrained import from_timm

    theirs = real_timm.create_model(name, num_classes=3).eval()
    torch.nn.init.normal_(theirs.get_classifier().weight)
    ours = from_timm(theirs, name, (224, 224))
    x = images(224, 1)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
