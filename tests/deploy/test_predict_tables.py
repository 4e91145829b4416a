"""What is asked and what is written: features, Parquet, precision, wrong numbers, lists."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import allmlp as am
from allmlp.data.image import decode
from allmlp.data.transforms import normalize, resize_for_evaluation
from allmlp.deploy.answers import identity
from allmlp.deploy.inputs import find_images
from allmlp.deploy.metadata import description_of
from allmlp.deploy.predict import render
from allmlp.deploy.rows import NOT_FINITE, Prediction
from allmlp.deploy.runner import ExportedModel
from allmlp.preprocessing import Preprocessing
from conftest import draw, make_class_folder, tiny_model

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture
def model() -> am.ImageClassifier:
    model = tiny_model(num_classes=7)
    model.class_names = NAMES
    return model


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Four good images and a bad one, the third."""
    folder = make_class_folder(tmp_path / "album", {"x": 4})
    (folder / "x" / "1_bad.png").write_text("no image")
    return folder


def inputs_of(album: Path) -> torch.Tensor:
    """The good images as the model is to see them, made without any of what is tested."""
    preprocessing = Preprocessing(image_size=(8, 8))
    pixels = [
        resize_for_evaluation(decode((album / "x" / f"{n}.png").read_bytes(), "x"), preprocessing)
        for n in range(4)
    ]
    return normalize(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), preprocessing)


@torch.inference_mode()
def test_probabilities_are_the_models(model, album):
    expected = model(inputs_of(album)).softmax(dim=1).numpy()
    found = am.predict(model, album, top_k=7, num_workers=0, batch_size=3)
    good = [each for each in found if each.error is None]
    assert len(good) == 4
    for row, each in zip(expected, good, strict=True):
        assert [name for name, _ in each.classes] == [NAMES[k] for k in np.argsort(-row)]
        assert [share for _, share in each.classes] == pytest.approx(sorted(row)[::-1], abs=1e-6)
        assert each.features is None


@torch.inference_mode()
def test_features_are_the_models(model, album):
    """A model without class names gives them as well."""
    model.class_names = None
    expected = model.features(inputs_of(album)).numpy()
    model.train()
    found = am.predict(model, album, features=True, num_workers=0, batch_size=3)
    assert model.training
    assert [each.error is None for each in found] == [True, True, False, True, True]
    values = [each.features for each in found if each.features is not None]
    assert np.allclose(np.stack(values), expected, atol=1e-6)
    assert all(each.classes == [] for each in found)


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_written_features_are_exact(model, album, tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"out{suffix}"
    found = am.predict(model, album, features=True, output=path, num_workers=0, batch_size=2)
    rows = read(path)
    assert [row["path"] for row in rows] == [each.path for each in found]
    for row, each in zip(rows, found, strict=True):
        if suffix == ".csv":
            cells = [row[f"feature_{at}"] for at in range(16)]
            numbers = [float(cell) for cell in cells if cell != ""]
        else:
            numbers = row["features"] or []
        wanted = [] if each.features is None else each.features
        assert np.array_equal(np.asarray(numbers, np.float32), np.asarray(wanted, np.float32))
    assert (rows[2].get("error"), rows[1].get("error") or None) == (found[2].error, None)


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    text = path.read_text()
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    return (
        json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.splitlines()]
    )


def test_parquet(model, album, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("allmlp.deploy.tables._ROW_GROUP", 9)  # three rows of two classes
    path = tmp_path / "out.parquet"
    found = am.predict(model, album, top_k=2, output=path, num_workers=0, batch_size=1)
    file = parquet.ParquetFile(path)
    assert file.num_row_groups == 2
    kinds = {field.name: str(field.type) for field in file.schema_arrow}
    assert kinds == {
        "path": "string",
        "class_1": "string",
        "probability_1": "float",
        "class_2": "string",
        "probability_2": "float",
        "error": "string",
    }
    rows = file.read().to_pylist()
    assert [row["path"] for row in rows] == [each.path for each in found]
    assert [row["class_2"] for row in rows if row["class_2"]] == [
        each.classes[1][0] for each in found if each.classes
    ]
    assert rows[0]["probability_1"] == np.float32(found[0].classes[0][1])
    assert rows[2]["error"] == "the file is not an image"
    assert rows[2]["probability_1"] is None


def test_names_that_are_no_text(model, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    name = os.fsdecode(b"caf\xe9.png")
    draw(0).save(tmp_path / "x.png")
    try:
        (tmp_path / "x.png").rename(tmp_path / name)
    except OSError:
        pytest.skip("this disk takes names in UTF-8 only")
    for suffix in (".csv", ".jsonl", ".parquet"):
        am.predict(model, tmp_path / name, output=tmp_path / f"out{suffix}", num_workers=0)
    assert b"/caf\xe9.png," in (tmp_path / "out.csv").read_bytes()
    assert json.loads((tmp_path / "out.jsonl").read_text())["path"] == str(tmp_path / name)
    stored = parquet.read_table(tmp_path / "out.parquet")["path"][0].as_py()
    assert stored == f"{tmp_path}/caf\\xe9.png"


def test_parquet_needs_a_package(model, album, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(am.UserError, match=r"needs pyarrow\nto fix: pip install"):
        am.predict(model, album, output=tmp_path / "out.parquet")


def test_an_empty_json_list():
    assert render([], ".json") == "[]\n"
    assert render([], ".csv") == "path,error\n"
    one = [Prediction("a", [("cat", 0.5)]), Prediction("b", error="bad")]
    assert render(one, ".json") == json.dumps(json.loads(render(one, ".json")), indent=2) + "\n"
    assert render(one, ".csv") == "path,class_1,probability_1,error\na,cat,0.500000,\nb,,,bad\n"


def test_numbers_that_are_none_are_rows_with_an_error(model, album):
    """The bias of one class: every image's logits have a NaN, and still every image has a row."""
    model.head.bias.data[3] = float("nan")
    found = am.predict(model, album, num_workers=0)
    assert [each.error for each in found].count(NOT_FINITE) == 4
    assert all(each.classes == [] for each in found)


def test_equal_probabilities_keep_the_order_of_the_classes(album):
    model = tiny_model(num_classes=40)
    model.class_names = [f"{n:02}" for n in range(40)]
    model.head.weight.data[:] = model.head.weight.data[0]
    model.head.bias.data.zero_()
    (found, *_) = am.predict(model, album, top_k=9, num_workers=0)
    assert [name for name, _ in found.classes] == model.class_names[:9]


def test_precision(model, album):
    exact, half, chosen = (
        am.predict(model, album, top_k=7, precision=each, num_workers=0)
        for each in ("float32", "bfloat16", "auto")
    )
    assert exact == am.predict(model, album, top_k=7, num_workers=0)
    assert chosen == exact  # a small model gains nothing from bfloat16
    assert half != exact
    for a, b in zip(exact, half, strict=True):
        shares = dict(b.classes)
        assert all(shares[name] == pytest.approx(share, abs=0.05) for name, share in a.classes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float64"}, "unknown precision 'float64'"),
        ({"features": True, "top_k": 3}, "top_k 3 has no effect: features are asked for"),
        ({"features": True, "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers"),
        ({"device": "mps"}, "unknown device 'mps'"),
    ],
)
def test_mistakes_of_a_question(model, album, tmp_path, options, message):
    with pytest.raises(am.UserError, match=message):
        am.predict(model, album, output=tmp_path / "out.csv", **options)
    assert not list(tmp_path.glob("*out*"))


def test_a_model_without_features(album):
    class Bare(am.ImageClassifier):
        pass

    bare = Bare()
    bare.config = tiny_model().config
    bare.weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(am.UserError, match="Bare defines no features"):
        am.predict(bare, album, features=True)


def test_a_list_stands_for_a_dash(tmp_path):
    listed = ["b.png", "no such.png"]
    draw(0).save(tmp_path / "a.png")
    found = find_images([tmp_path / "a.png", "-"], listed)
    assert [found.item_name(at) for at in range(3)] == [str(tmp_path / "a.png"), *listed]
    for inputs, message in (
        (["-", "-"], "more than once"),
        ([tmp_path / "a.png", "digits:test"], "'digits:test' is a source of data, which stands"),
    ):
        with pytest.raises(am.UserError, match=message):
            find_images(inputs, listed)


def exported(model: am.ImageClassifier, path: Path) -> ExportedModel:
    """An exported file whose runtime is the model itself."""

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    path.write_bytes(b"a graph")
    about = description_of(model, "float32", uint8_input=False)
    return ExportedModel(about, run, "none 1.0", path)


def test_an_exported_file_answers_as_its_model(model, album, tmp_path):
    file = exported(model, tmp_path / "x.onnx")
    ours, its = (am.predict(each, album, top_k=7, num_workers=0) for each in (model, file))
    for a, b in zip(ours, its, strict=True):
        assert (a.path, a.error) == (b.path, b.error)
        assert [name for name, _ in a.classes] == [name for name, _ in b.classes]
        assert [x for _, x in a.classes] == pytest.approx([x for _, x in b.classes], abs=1e-6)


def test_an_exported_file_is_known_by_its_bytes(model, tmp_path):
    known = set()
    for path, side in (("x.onnx", b"1"), ("x.xml", b"1"), ("x.xml", b"2")):
        file = exported(model, tmp_path / path)
        (tmp_path / "x.bin").write_bytes(side)
        known.add(identity(file))
        assert identity(file) == identity(file)
    known.add(identity(exported(model, tmp_path / "y.onnx")))
    assert len(known) == 3  # x.onnx and y.onnx hold the same
    assert identity(model) not in known


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": True}, "an exported file gives classes, not features"),
        ({"device": "cuda"}, "device 'cuda': an exported file runs on the CPU"),
    ],
)
def test_what_an_exported_file_cannot_do(model, album, tmp_path, options, message):
    with pytest.raises(am.UserError, match=message):
        am.predict(exported(model, tmp_path / "x.onnx"), album, **options)
