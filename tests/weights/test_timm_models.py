"""Models of timm in our frame: built, loaded, resized, saved; with a stand-in for timm, and with
timm itself where it is installed."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import allmlp as am
import fake_timm
from allmlp.models.catalog import config_from_json, config_to_json
from allmlp.models.timm_model import TimmConfig, TimmModel
from allmlp.training import train as loop
from allmlp.weights import timm_weights
from conftest import tiny_config
from runs import before_step


@pytest.fixture(autouse=True)
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub that has weights of every stand-in; lists what was asked of it."""
    fake_timm.install(monkeypatch)
    asked: list[str] = []

    def fetch(name: str, revision: str | None) -> Path:
        assert revision is None
        asked.append(name)
        path = tmp_path / "hub" / f"{name.partition('/')[2]}.safetensors"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            safetensors.torch.save_file(theirs(path.stem).state_dict(), path)
        return path

    monkeypatch.setattr(timm_weights.download, "fetch_from_hub", fetch)
    return asked


def theirs(name: str) -> Any:
    """timm's own model with weights, and statistics that are not those of a new one."""
    torch.manual_seed(1)
    model: Any = fake_timm.create_model(name)
    for tensor in (*model.parameters(), model.bn.running_mean):
        torch.nn.init.normal_(tensor)
    return model.eval()


def images(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_create_gives_our_frame():
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
    with pytest.raises(ValueError, match=r"16x16 pixels, got 8x8"):
        model(images(8))
    headless = am.create_model("timm:fake_bit", num_classes=0, in_channels=1).eval()
    assert headless(images()[:, :1]).shape == (2, fake_timm.WIDTH)


def test_sizes_operations_and_json():
    config = am.create_model("timm:fake_cnn", (8, 16), 5, dropout=0.5).config
    assert config.flops == 2 * (8 * 16 * 3 * 9 * fake_timm.WIDTH + fake_timm.WIDTH * 5)
    values = json.loads(json.dumps(config_to_json(config)))
    assert values["family"] == "timm"
    assert config_from_json(values) == config
    for name in ("fake_vit", "fake_mlp"):
        model: Any = am.create_model(f"timm:{name}", image_size=(8, 24))
        assert model.backbone.pos_embed.shape == (1, fake_timm.WIDTH, 2, 6)


def test_on_the_meta_device_constants_are_real():
    with torch.device("meta"):
        model: Any = am.create_model("timm:fake_cnn", num_classes=2)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.backbone.constant.is_meta
    trained = am.create_model("timm:fake_cnn", num_classes=2)
    torch.nn.init.ones_(trained.head.weight)
    model.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(model.eval()(images()), trained.eval()(images()))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fake_cn", {}, r"'fake_cn'[\s\S]*Did you mean fake_cnn"),
        ("", {}, "no model ''"),
        ("fake_cnn.first", {}, r"no tag[\s\S]*timm:fake_cnn,"),
        ("fake_cnn", {"image_size": (8,)}, r"\(8,\)"),
        ("fake_cnn", {"stochastic_depth": 0.1}, "'drop_path"),
        ("fake_vit", {"image_size": 2}, "fake_vit"),
        ("fake_two", {}, "2 classifiers"),
    ],
)
def test_what_cannot_be_built(name: str, settings: Any, message: str):
    with pytest.raises(am.UserError, match=message):
        am.create_model(f"timm:{name}", **settings)


def test_timm_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for call in (am.create_model, am.load_model):
        with pytest.raises(am.UserError, match="pip install timm"):
            call("timm:resnet18")


@pytest.mark.numerics
@pytest.mark.parametrize("name", ["fake_cnn.first", "fake_bit.i21k", "fake_vit.a"])
def test_logits_are_timms(fetched: list[str], name: str):
    model = am.load_model(f"timm:{name}", quiet=True)
    assert fetched == [f"timm/{name}"]
    assert model.source == f"timm:{name}"
    assert not model.training
    expected = theirs(name)
    torch.testing.assert_close(model(images()), expected(images()), rtol=0, atol=1e-6)
    features = expected.forward_head(expected.forward_features(images()), pre_logits=True)
    assert torch.equal(model.features(images()), features)


def test_class_names_and_preprocessing():
    model = am.load_model("timm:fake_cnn.first", quiet=True)
    assert model.class_names[0] == "n01440764 tench"
    assert am.load_model("timm:fake_bit.i21k", quiet=True).class_names is None
    found = model.preprocessing
    assert (found.mean, found.std) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
    assert (found.crop, found.interpolation, found.resize) == (0.9, "bicubic", "resmall-crop")


def test_another_size_and_head(capsys: pytest.CaptureFixture[str]):
    model: Any = am.load_model("timm:fake_vit.a", image_size=(8, 24), num_classes=3)
    assert model.config.image_size == model.preprocessing.image_size == (8, 24)
    assert model.backbone.pos_embed.shape[2:] == (2, 6)
    assert model.head.weight.shape == (3, fake_timm.WIDTH)
    assert not model.head.weight.any()
    assert "16x16 -> 8x24 pixels: by timm" in capsys.readouterr().err
    assert am.load_model("timm:fake_cnn.first", num_classes=0, quiet=True).head is None


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("fake_cnn.secnd", {}, r"'secnd'[\s\S]*first, own"),
        ("fake_cnn", {}, r"timm:fake_cnn\n.*timm:fake_cnn.first"),
        ("fake_cnn.own", {}, r"https://example.org/a.npz"),
        ("bit_r50x2", {}, "nobody has published weights of timm:bit_r50x2"),
        ("fake_two", {}, "2 classifiers"),
        ("fake_odd", {}, "more behind its features"),
        ("fake_mlp", {"image_size": 24}, "fake_mlp from 16x16 to 24x24"),
        ("fake_cnn.first", {"resize_weights": "resample"}, "resize_weights='resample'"),
    ],
)
def test_what_cannot_be_loaded(source: str, settings: Any, message: str):
    with pytest.raises(am.UserError, match=message):
        am.load_model(f"timm:{source}", quiet=True, **settings)


def test_saved_and_loaded(tmp_path: Path):
    model = am.load_model("timm:fake_vit.a", image_size=8, quiet=True)
    am.save_model(model, tmp_path / "saved")
    again = am.load_model(tmp_path / "saved", quiet=True)
    assert (again.config, again.preprocessing) == (model.config, model.preprocessing)
    assert torch.equal(again(images(8)), model(images(8)))
    assert again.state_dict()["backbone.bn.num_batches_tracked"].dtype == torch.int64
    larger: Any = am.load_model(tmp_path / "saved", image_size=24, num_classes=2, quiet=True)
    assert larger.backbone.pos_embed.shape[2:] == (6, 6)
    for format, file in (("google", "a.npz"), ("timm", "a.safetensors")):
        with pytest.raises(am.UserError, match=rf"'{format}'.*fake_vit"):
            am.save_model(model, tmp_path / file, format=format)
    config = tmp_path / "saved" / "config.json"
    config.write_text(config.read_text().replace('"num_classes": 4', '"num_classes": 5'))
    with pytest.raises(am.UserError, match=r"misshapen: head.weight is \(4, 6\)"):
        am.load_model(tmp_path / "saved")


def test_a_file_of_another_model(tmp_path: Path):
    (tmp_path / "hub").mkdir()
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "hub/fake_bit.i21k.safetensors")
    with pytest.raises(am.UserError, match=r"fake_bit.i21k: .*Missing key"):
        am.load_model("timm:fake_bit", quiet=True)


@pytest.fixture(scope="module")
def real_timm() -> Any:
    return pytest.importorskip("timm", reason="timm is no dependency", exc_type=ImportError)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.numerics
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_logits_are_those_of_timm_itself(real_timm: Any, monkeypatch: Any, name: str):
    monkeypatch.setitem(sys.modules, "timm", real_timm)
    model = real_timm.create_model(name, num_classes=3).eval()
    torch.nn.init.normal_(model.get_classifier().weight)
    ours = timm_weights.from_timm(model, name, (224, 224))
    x = images(224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=0, atol=1e-6)
    if name.startswith("vit"):  # attention counts
        flops = am.create_model(f"timm:{name}").config.flops
        assert flops / 2e9 == pytest.approx(1.2537, abs=1e-3)


PAGE = (Path(__file__).parents[2] / "docs" / "timm.md").read_text("utf-8")
SYSTEMS = re.findall(r"\| `timm:(\w+)` \|[^|]*\| ([\d,]+) \| (\d+) \|", PAGE)


def test_the_page_names_the_comparison_systems():
    assert len(SYSTEMS) >= 9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "parameters", "pixels"), SYSTEMS)
def test_the_papers_comparison_systems(real_timm, monkeypatch, name, parameters, pixels):
    monkeypatch.setitem(sys.modules, "timm", real_timm)
    with torch.device("meta"):
        model = am.create_model(f"timm:{name}")
    assert model.num_parameters == int(parameters.replace(",", ""))
    assert model.config.image_size == (int(pixels), int(pixels))


@pytest.mark.slow
def test_a_run_resumes_with_its_running_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changes = {"model__overrides": {}, "model__name": "timm:fake_cnn", "model__image_size": 16}
    changes |= {"data__holdout": 0.0, "optimizer__warmup": 0, "optimizer__average": 0.5}
    changes["checkpoint_every"], length = 3, {"steps": 6, "evaluate_every": 3}
    whole, stopped = (
        tiny_config("digits", tmp_path / name, **changes).with_values(length)
        for name in ("whole", "stopped")
    )
    am.train(whole, quiet=True)

    def kill(trainer: loop.Trainer) -> None:
        trainer.checkpoints.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        before_step(patch, 5, kill)
        with pytest.raises(KeyboardInterrupt):
            am.train(stopped, quiet=True)
    am.resume(tmp_path / "stopped", quiet=True)
    expected, found = (
        safetensors.torch.load_file(tmp_path / run / "best" / "model.safetensors")
        for run in ("whole", "stopped")
    )
    assert expected.keys() == found.keys()
    assert expected["backbone.bn.num_batches_tracked"] == 6
    assert expected["backbone.bn.running_mean"].abs().min() > 0
    assert all(torch.equal(found[name], value) for name, value in expected.items())
