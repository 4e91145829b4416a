"""Exported files where a model is taken: what works, what is refused, what is said of them."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

import allmlp as am
import fake_timm
from allmlp import environment
from allmlp.data.sources import open_source
from allmlp.deploy.metadata import description_of
from allmlp.deploy.runner import ExportedModel
from allmlp.runtime.device import to_device
from conftest import mixer, tiny_model

WHY = "pip install 'allmlp[export]'"


@pytest.fixture
def exported(tmp_path: Path) -> ExportedModel:
    """A file whose runtime is the model itself."""
    model = tiny_model(10)
    model.class_names = [str(digit) for digit in range(10)]
    about = description_of(model, "float32", uint8_input=False)
    (tmp_path / "x.onnx").write_bytes(b"a graph")

    def run(images):
        with torch.inference_mode():
            return model.eval()(torch.from_numpy(images)).numpy()

    return ExportedModel(about, run, "none 1.0", tmp_path / "x.onnx")


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_another_device_is_refused_by_both_verbs(capsys, tmp_path, verb, device):
    (tmp_path / "m.onnx").write_bytes(b"")
    images = ["digits:test"] if verb == "predict" else ["--data", "digits:test"]
    code, out, err = mixer(capsys, verb, tmp_path / "m.onnx", *images, "--device", device)
    assert (code, out) == (2, "")
    assert f"device {device!r}: an exported file runs on the CPU" in err


def test_another_device_is_refused_from_python(exported: ExportedModel, monkeypatch):
    data = open_source("digits:test[:20]")
    with pytest.raises(am.UserError, match="device 'cuda': an exported file runs on"):
        am.evaluate(exported, data, device="cuda", allow_missing_classes=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = am.evaluate(
        exported, data, device="auto", allow_missing_classes=True, num_workers=0
    )  # where there is a GPU too
    assert len(found.labels) == 20
    assert to_device(exported, None) is exported
    with pytest.raises(am.UserError, match="unknown device 'mps'"):
        to_device(tiny_model(), "mps")


@pytest.mark.parametrize("name", ["m.onnx", "m.XML", "m.pt2"])
def test_weights_are_not_loaded_from_exported_files(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"")
    for source in (tmp_path / name, str(tmp_path / name), tmp_path / "nowhere" / name):
        with pytest.raises(am.UserError, match="an exported file has no weights") as error:
            am.load_model(source)
        says_how = "am.open_exported(FILE), `mixer predict FILE`" in str(error.value.fix)
        assert says_how == (name != "m.pt2")
    with pytest.raises(am.UserError, match="no weights"):
        am.export(tmp_path / name, tmp_path / "new.pt2")
    run = tmp_path / "folder" / name
    am.save_model(tiny_model(), run.parent)
    run.parent.rename(tmp_path / f"run.{name}")
    assert am.load_model(tmp_path / f"run.{name}").config.num_classes == 7  # a folder is a run


def test_what_needs_weights_or_features_is_refused(exported: ExportedModel, tmp_path: Path):
    for use, message in (
        (lambda: am.save_model(exported, tmp_path / "x.safetensors"), "logits, not weights"),
        (lambda: am.few_shot(exported, "digits", shots=(1,)), "logits, not features"),
        (lambda: am.predict(exported, "digits:test", features=True), "classes, not features"),
        (lambda: am.export(exported, tmp_path / "new.pt2"), "logits, not weights|already"),
        (lambda: am.inspect(exported), "no weights to work on"),
        (lambda: am.inspect(tiny_model(), compare=exported), "no weights to work on"),
        (lambda: am.benchmark({"file": exported}), "no weights to work on"),
    ):
        with pytest.raises(am.UserError, match=message):
            use()
    assert [each.name for each in tmp_path.iterdir()] == ["x.onnx"]


def test_what_ran_is_named(exported: ExportedModel, tmp_path: Path):
    data = open_source("digits:test[:20]")
    found = am.evaluate(exported, data, allow_missing_classes=True, num_workers=0)
    found.save(tmp_path / "report", exported)
    values = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert values["model"]["runtime"] == "none 1.0"
    model = tiny_model(10)
    model.class_names = exported.class_names
    am.evaluate(model, data, allow_missing_classes=True, num_workers=0).save(tmp_path, model)
    assert "runtime" not in json.loads((tmp_path / "evaluation.json").read_text())["model"]


def test_packages_are_named_where_they_are_installed(monkeypatch: pytest.MonkeyPatch):
    there = {"onnxruntime": "1.2.3", "timm": "4.5"}

    def fake(name: str) -> str:
        if name in there:
            return there[name]
        if name in environment._OPTIONAL:
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(environment, "version", fake)
    found = environment.environment_info(torch.device("cpu"))["packages"]
    assert found["torch"] == torch.__version__
    assert set(found) == {*environment._PACKAGES, *there}
    assert found.items() >= there.items()


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=pytest.mark.slow), ".xml"])
def test_predict_takes_the_name_of_a_file(tmp_path: Path, suffix: str):
    pytest.importorskip("onnxscript", reason=WHY)
    pytest.importorskip("onnxruntime" if suffix == ".onnx" else "openvino", reason=WHY)
    model = tiny_model(10)
    model.class_names = [str(digit) for digit in range(10)]
    path = tmp_path / f"m{suffix}"
    assert am.export(model, path).passed
    exact = am.predict(model, "digits:test[:5]", num_workers=0)
    for name in (str(path), path):
        found = am.predict(name, "digits:test[:5]", num_workers=0)
        for a, b in zip(exact, found, strict=True):
            assert a.path == b.path
            assert [k for k, _ in a.classes] == [k for k, _ in b.classes]
            assert [p for _, p in a.classes] == pytest.approx([p for _, p in b.classes], abs=1e-5)


def test_predict_refuses_a_program(tmp_path: Path):
    (tmp_path / "m.pt2").write_bytes(b"")
    for name in (str(tmp_path / "m.pt2"), tmp_path / "m.pt2"):
        with pytest.raises(am.UserError, match="a torch-export file is a program"):
            am.predict(name, "digits:test")


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_a_model_of_timm_becomes_a_file(tmp_path: Path, monkeypatch, suffix: str):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript", reason=WHY)
        pytest.importorskip("onnxruntime", reason=WHY)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    path = tmp_path / f"m{suffix}"
    with monkeypatch.context() as patch:
        fake_timm.install(patch)
        model = am.create_model("timm:fake_cnn", num_classes=5).eval()
        torch.nn.init.normal_(model.head.weight)
        assert am.export(model, path).passed
        with torch.no_grad():
            exact = model(images)
    if suffix == ".pt2":
        found = torch.export.load(path).module()(images)
    else:  # without timm
        found = am.open_exported(path)(images)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_a_file_without_class_names_has_logits_all_the_same(exported: ExportedModel):
    exported.class_names = None
    with pytest.raises(am.UserError, match="carries no class names"):
        am.evaluate(exported, "digits:test[:5]", num_workers=0)
    (found,) = am.predict(exported, "digits:test[:1]", top_k=10, num_workers=0)
    assert sorted(name for name, _ in found.classes) == list("0123456789")
