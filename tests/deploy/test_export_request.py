"""What is refused: before anything is computed, and of files that are opened."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import allmlp as am
from allmlp.deploy.export_report import Parity, compare, failures, measure_speed
from allmlp.deploy.exported_files import choose_format, with_bfloat16_products
from allmlp.deploy.extras import needed
from allmlp.deploy.metadata import description_of, from_text, to_text
from allmlp.deploy.onnx_graph import LARGEST, check_size
from allmlp.deploy.runner import ExportedModel
from conftest import mixer, tiny_model

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "format": ("m.onnx", {"format": "tflite"}, "unknown format 'tflite'"),
    "ending": ("m.tflite", {}, "does not say which format"),
    "both": ("m.onnx", {"format": "openvino"}, r"ends in \.xml"),
    "precision": ("m.onnx", {"precision": "float16"}, "unknown precision 'float16'"),
    "int8 without images": ("m.onnx", {"precision": "int8"}, "none are given"),
    "int8 without data": (
        "m.onnx",
        {"precision": "int8", "calibration": "digits:train"},
        "without labelled images",
    ),
    "int8 in torch-export": ("m.pt2", {"precision": "int8"}, "no int8"),
    "calibration": ("m.onnx", {"calibration": "digits"}, "--calibration has no effect"),
    "calibration images": (
        "m.onnx",
        {"calibration_images": 10},
        "--calibration-images has no effect",
    ),
    "drop without data": ("m.onnx", {"max_accuracy_drop": 1.0}, "without labelled images"),
    "drop": ("m.onnx", {"max_accuracy_drop": -1.0, "data": "digits"}, "points from 0 to 100"),
    "drop nan": (
        "m.onnx",
        {"max_accuracy_drop": float("nan"), "data": "digits"},
        "points from 0 to 100",
    ),
    "batch size": ("m.onnx", {"batch_size": 0}, "batch-size is from 1"),
    "threads": ("m.onnx", {"num_threads": -1}, "threads is from 1"),
    "no folder": ("nowhere/m.onnx", {}, "folder does not exist"),
    "folder": ("folder.onnx", {}, "the output is a folder"),
    "there": ("there.onnx", {}, "there already"),
    "a report there": ("reported.onnx", {}, "there already"),
    "weights there": ("pair.xml", {}, "there already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_requests_that_are_refused(name: str, tmp_path: Path):
    (tmp_path / "folder.onnx").mkdir()
    for each in ("there.onnx", "reported.onnx.report.md", "pair.bin"):
        (tmp_path / each).write_bytes(b"theirs")
    before = {each: each.stat().st_mtime_ns for each in tmp_path.iterdir()}
    output, settings, message = REFUSED[name]
    with pytest.raises(am.UserError, match=message):
        am.export(tiny_model(), tmp_path / output, **settings)
    assert {each: each.stat().st_mtime_ns for each in tmp_path.iterdir()} == before


def test_the_command_refuses_before_it_reads_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, _, err = mixer(capsys, "export", "no/such/run", "--output", tmp_path / "m.tflite")
    assert (code, "which format is meant" in err) == (2, True)
    code, _, err = mixer(capsys, "export", "no/such/run", "--output", tmp_path / "m.pt2")
    assert (code, "no/such/run" in err) == (2, True)
    code, _, err = mixer(
        capsys, "export", "x", "--output", tmp_path / "m.pt2", "--resize-weights", "resample"
    )
    assert (code, "--resize-weights" in err) == (2, True)


def test_a_model_in_memory_has_its_size(tmp_path: Path):
    with pytest.raises(am.UserError, match="image_size=16 has no effect"):
        am.export(tiny_model(), tmp_path / "m.pt2", image_size=16)


def test_an_absent_package_is_one_line(monkeypatch: pytest.MonkeyPatch):
    for module, extra in (("onnxruntime", "export"), ("openvino", "openvino")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(am.UserError, match=f"needs {module}") as error:
            needed(module)
        assert error.value.fix == f"pip install 'allmlp[{extra}]'"


def test_the_formats_by_their_endings():
    assert choose_format(Path("a.onnx"), None) == "onnx"
    assert choose_format(Path("a.b.XML"), None) == "openvino"
    assert choose_format(Path("a.pt2"), "torch-export") == "torch-export"


def test_weights_that_fit_into_no_file():
    check_size(LARGEST - 1)
    with pytest.raises(am.UserError, match=r"3\.00 GiB, and an ONNX file holds at most 2"):
        check_size(3 * 2**30)


def test_a_description_comes_back():
    model = tiny_model(3)
    model.class_names = ["a", "é\n", "\udcff"]
    about = description_of(model, "int8", uint8_input=True)
    assert from_text(to_text(about), Path("m.onnx")) == about
    assert all(each.isascii() for each in to_text(about).values())
    assert "uint8 (N, 8, 8, 3)" in to_text(about)["input"]


def changed(text: dict[str, str], **changes: object) -> dict[str, str]:
    return {**text, "allmlp": json.dumps({**json.loads(text["allmlp"]), **changes})}


def test_descriptions_that_are_damaged():
    model = tiny_model(2)
    model.class_names = ["a", "b"]
    text = to_text(description_of(model, "float32", uint8_input=False))
    path = Path("m.onnx")
    for wrong, message in (
        ({}, "does not say what its classes"),
        (changed(text, version=99), "newer allmlp"),
        (changed(text, version="x"), "damaged"),
        (changed(text, architecture={"family": "gpt"}), "unknown model family"),
        ({**text, "allmlp": "["}, "damaged"),
        ({**text, "class_names": '["a"]'}, "class names are not those"),
        ({**text, "class_names": "[1, 2]"}, "class names are not those"),
        ({**text, "preprocessing": '{"image_size": [16, 16]}'}, "another image size"),
    ):
        with pytest.raises(am.UserError, match=message) as error:
            from_text(wrong, path)
        assert error.value.where == "m.onnx"


def test_files_that_are_not_opened(tmp_path: Path):
    for name, message in (
        ("m.pt2", "is a program"),
        ("m.tflite", "not an exported file"),
        ("m.onnx", "no such file"),
    ):
        with pytest.raises(am.UserError, match=message):
            am.open_exported(tmp_path / name)
    (tmp_path / "m.xml").write_bytes(b"<net/>")
    with pytest.raises(am.UserError, match=r"lie in a \.bin"):
        am.open_exported(tmp_path / "m.xml")
    with pytest.raises(am.UserError, match="does not read OpenVINO"):
        am.open_exported(tmp_path / "m.xml", runtime="onnxruntime")
    with pytest.raises(am.UserError, match="unknown runtime"):
        am.open_exported(tmp_path / "m.xml", runtime="tensorrt")


@pytest.mark.parametrize("content", [b"", b"<html>no</html>", b"\x08\x0a" + 200 * b"\x00"])
def test_damaged_onnx_files(content: bytes, tmp_path: Path):
    pytest.importorskip("onnxruntime", reason="pip install 'allmlp[export]'")
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(am.UserError, match="cannot read the file|does not say"):
        am.open_exported(tmp_path / "m.onnx")


def test_the_criteria():
    exact = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).numpy()
    same = compare(exact, exact, "x", (0.9, 0.9))
    assert (same.top1_agreement, same.largest_difference, same.drop) == (1.0, 0.0, 0.0)
    assert failures(same, "float32", 0.0) == []
    other = compare(exact, exact[:, ::-1], "x", (0.9, 0.894))
    assert other.top1_agreement == 0.0
    assert len(failures(other, "float32", 0.5)) == 2
    assert "fell by 0.60 points" in failures(other, "int8", 0.5)[0]
    assert failures(other, "int8", 0.6) == []
    unknown = compare(exact, exact * float("nan"), "x")
    assert "not finite" in failures(unknown, "int8", 100.0)[0]
    assert Parity("x", 1, 0.0, 0.0, 1.0).relative == 0.0


def test_speed_is_the_median_of_turns():
    model = tiny_model().eval()
    about = description_of(model, "float32", uint8_input=True)
    seen: list[tuple[int, ...]] = []

    def run(images: Any) -> Any:
        seen.append((*images.shape, str(images.dtype)))
        return images[:, 0, 0, :1].astype("float32")

    file = ExportedModel(about, run, "none", Path("m.onnx"))
    ticks = iter(range(10_000))
    found = measure_speed(
        {"a": model, "b": file}, torch.zeros(4, 3, 8, 8), 2, clock=lambda: next(ticks)
    )
    assert {name: each.images_per_second for name, each in found.items()} == {"a": 4.0, "b": 4.0}
    assert found["a"].latency_ms == 1000.0
    assert seen[0] == (4, 8, 8, 3, "uint8")
    assert len(seen) == 3 * 5  # a warm-up and two rounds of a batch and four images


def test_half_products_leave_the_stream_alone():
    model = tiny_model()
    made = with_bfloat16_products(model.eval())
    kinds = {name: each.dtype for name, each in made.named_parameters()}
    assert kinds["blocks.0.token_mixing.dense_0.weight"] == torch.bfloat16
    assert kinds["blocks.0.layer_norm_0.weight"] == torch.float32
    assert kinds["stem.weight"] == torch.float32
    assert model.blocks[0].token_mixing.dense_0.weight.dtype == torch.float32  # type: ignore[union-attr]
    with torch.no_grad():
        found = made(torch.randn(2, 3, 8, 8))
    assert found.dtype == torch.float32
