"""timm's weights in our frame: loading, resizing, saving, training; with a stand-in for timm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import allmlp as am
import fake_timm
from allmlp.training import loop
from allmlp.training.loop import resume
from allmlp.weights import hub, timm_pretrained

Saved = dict[str, Tensor]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub that has weights of every stand-in; lists what was asked of it."""
    fake_timm.install(monkeypatch)
    asked: list[str] = []

    def fetch(model: hub.HubModel) -> Path:
        asked.append(model.owner_and_name)
        path = tmp_path / "hub" / f"{model.owner_and_name.partition('/')[2]}.safetensors"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            safetensors.torch.save_file(theirs(path.stem).state_dict(), path)
        return path

    monkeypatch.setattr(timm_pretrained.hub, "fetch", fetch)
    return asked


def theirs(name: str) -> Any:
    """timm's own model with weights, and statistics that are not those of a new one."""
    torch.manual_seed(1)
    model: Any = fake_timm.create_model(name)
    for each in (*model.parameters(), model.bn.running_mean):
        torch.nn.init.normal_(each)
    return model.eval()


def images(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["fake_cnn.first", "fake_bit.i21k", "fake_vit.a"])
def test_logits_are_timms(fetched: list[str], name: str):
    model = am.load_model(f"timm:{name}", quiet=True)
    assert fetched == [f"timm/{name}"]
    assert model.source == f"timm:{name}"
    assert not model.training
    assert model.head is not None
    torch.testing.assert_close(model(images()), theirs(name)(images()), rtol=0, atol=1e-6)
    expected = theirs(name)
    features = expected.forward_head(expected.forward_features(images()), pre_logits=True)
    assert torch.equal(model.features(images()), features)


def test_class_names_and_preprocessing_come_along(fetched: list[str]):
    model = am.load_model("timm:fake_cnn.first", quiet=True)
    assert model.class_names is not None
    assert model.class_names[0] == "n01440764 tench"
    assert am.load_model("timm:fake_bit.i21k", quiet=True).class_names is None
    found = model.preprocessing
    assert found is not None
    assert (found.mean, found.std) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
    assert (found.crop, found.interpolation, found.resize) == (0.9, "bicubic", "resmall-crop")


def test_another_size_and_head(fetched: list[str], capsys: pytest.CaptureFixture[str]):
    model: Any = am.load_model("timm:fake_vit.a", image_size=(8, 24), num_classes=3)
    assert model.config.image_size == model.preprocessing.image_size == (8, 24)
    assert model.backbone.pos_embed.shape[2:] == (2, 6)
    assert model.head.weight.shape == (3, fake_timm.WIDTH)
    assert not model.head.weight.any()
    err = capsys.readouterr().err
    assert "resized  16x16 -> 8x24 pixels, by timm" in err
    assert "new, all zeros, for 3 classes; the weights had 4" in err
    assert am.load_model("timm:fake_cnn.first", num_classes=0, quiet=True).head is None


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("fake_cnn.secnd", {}, r"no weights 'secnd' of fake_cnn\n.*first, own"),
        ("fake_cnn", {}, r"there are no weights of timm:fake_cnn\n.*timm:fake_cnn.first"),
        ("fake_cnn.own", {}, r"form of their own[\s\S]*example.org/a.npz"),
        ("bit_r50x2", {}, "nobody has published weights of timm:bit_r50x2"),
        ("fake_two", {}, "2 classifiers, one is meant"),
        ("fake_odd", {}, "computes more behind its features than one dense layer"),
        ("fake_mlp", {"image_size": 24}, "cannot bring the weights of fake_mlp from 16x16 to 24"),
        (
            "fake_cnn.first",
            {"resize_weights": "resample"},
            "resize_weights='resample' has no effect",
        ),
        ("fake_cnn.first", {"image_size": 0}, "not an image size: 0"),
        ("fake_cnn.first", {"num_classes": -1}, "num_classes must be at least 0"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    fetched: list[str], source: str, settings: Any, message: str
):
    with pytest.raises(am.UserError, match=message):
        am.load_model(f"timm:{source}", quiet=True, **settings)


def test_a_file_of_another_model(fetched: list[str], tmp_path: Path):
    (tmp_path / "hub").mkdir()
    file = tmp_path / "hub" / "fake_bit.i21k.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(am.UserError, match=r"timm cannot load fake_bit.i21k: .*Missing key"):
        am.load_model("timm:fake_bit", quiet=True)


def test_saved_and_loaded(fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = am.load_model("timm:fake_vit.a", image_size=8, quiet=True)
    am.save_model(model, tmp_path / "saved")
    again = am.load_model(tmp_path / "saved", quiet=True)
    assert again.config == model.config
    assert again.preprocessing == model.preprocessing
    assert torch.equal(again(images(8)), model(images(8)))
    assert again.state_dict()["backbone.bn.num_batches_tracked"].dtype == torch.int64
    larger: Any = am.load_model(tmp_path / "saved", image_size=24, num_classes=2, quiet=True)
    assert larger.backbone.pos_embed.shape[2:] == (6, 6)
    for format, file in (("google", "a.npz"), ("timm", "a.safetensors")):
        with pytest.raises(am.UserError, match=rf"'{format}' has no place for this.*fake_vit"):
            am.save_model(model, tmp_path / file, format=format)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(am.UserError, match="pip install timm"):
        am.load_model(tmp_path / "saved", quiet=True)


def test_tensors_without_a_description(fetched: list[str], tmp_path: Path):
    tensors = am.load_model("timm:fake_vit.a", quiet=True).state_dict()
    safetensors.torch.save_file(dict(tensors), tmp_path / "a.safetensors")
    with pytest.raises(am.UserError, match="the file does not say of which"):
        am.load_model(tmp_path / "a.safetensors")


def test_tensors_of_another_shape(fetched: list[str], tmp_path: Path):
    model = am.load_model("timm:fake_vit.a", quiet=True)
    am.save_model(model, tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    config.write_text(config.read_text().replace('"num_classes": 4', '"num_classes": 5'))
    with pytest.raises(am.UserError, match=r"misshapen: head.weight is \(4, 6\)"):
        am.load_model(tmp_path / "saved")


def digits(output: Path, **changes: object) -> am.TrainConfig:
    values: dict[str, object] = {
        "data.source": "digits",
        "data.num_workers": 0,
        "data.holdout": 0.0,
        "model.overrides": {},
        "model.image_size": 16,
        "steps": 6,
        "epochs": None,
        "optimizer.warmup": 0,
        "evaluate_every": 3,
        "checkpoint_every": 3,
        "batch_size": 8,
        "device": "cpu",
        "output": str(output),
    }
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return am.recipe("scratch").with_values({**values, **changed})


def weights(run: Path) -> Saved:
    return safetensors.torch.load_file(run / "best" / "model.safetensors")


@pytest.mark.slow
def test_a_run_goes_on_with_its_running_means(
    fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changes = {"model__name": "timm:fake_cnn", "optimizer__average": 0.5}
    whole = digits(tmp_path / "whole", **changes)
    am.train(whole, quiet=True)
    train_step = loop.Trainer.train_step

    def killed(self: loop.Trainer, step: int, batch: Any) -> None:
        if step == 5:
            self.state.checkpoints.wait()
            raise KeyboardInterrupt
        train_step(self, step, batch)

    monkeypatch.setattr(loop.Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        am.train(digits(tmp_path / "stopped", **changes), quiet=True)
    monkeypatch.setattr(loop.Trainer, "train_step", train_step)
    resume(tmp_path / "stopped", quiet=True)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    assert expected["backbone.bn.num_batches_tracked"] == 6
    assert expected["backbone.bn.running_mean"].abs().min() > 0
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
def test_fine_tuning_the_head_alone(fetched: list[str], tmp_path: Path):
    changes = {"model__name": "", "model__weights": "timm:fake_cnn.first", "model__trained": "head"}
    am.train(digits(tmp_path / "run", **changes), quiet=True)
    found, before = weights(tmp_path / "run"), theirs("fake_cnn.first").state_dict()
    assert found["head.weight"].shape == (10, fake_timm.WIDTH)
    assert found["head.weight"].any()
    for name, value in before.items():
        if not name.startswith("fc."):
            assert torch.equal(found[f"backbone.{name}"], value), name
    kept = am.load_model(tmp_path / "run", quiet=True)
    assert kept.class_names == [str(digit) for digit in range(10)]
    assert len(am.evaluate(kept, "digits:test").labels) == 359
