"""Images from anywhere to rows: inputs, numbers, tables, precision, exported files."""

import csv
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from sklearn.neighbors import NearestNeighbors

import allmlp as am
from allmlp.data.image import decode
from allmlp.data.transforms import normalize, resize_for_evaluation
from allmlp.deploy import rows
from allmlp.deploy.predict import PredictOptions, write_predictions
from allmlp.preprocessing import Preprocessing
from conftest import draw, encode, make_class_folder, tiny_model, turned, user_error
from web_server import static

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture
def model() -> am.ImageClassifier:
    return tiny_model(NAMES)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Four good images and a bad one, the third."""
    folder = make_class_folder(tmp_path / "album", {"x": 4})
    (folder / "x" / "1_bad.png").write_text("no image")
    return folder


def inputs_of(album: Path) -> torch.Tensor:
    """The good images as inputs of the model, made without any of what is tested."""
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
    good = [row for row in found if row.error is None]
    assert len(good) == 4
    for row, probabilities in zip(good, expected, strict=True):
        assert [name for name, _ in row.classes] == [NAMES[k] for k in np.argsort(-probabilities)]
        values = [value for _, value in row.classes]
        assert values == pytest.approx(sorted(probabilities)[::-1], abs=1e-6)
        assert row.features is None


@torch.inference_mode()
def test_features_are_the_models(model, album):
    model.class_names = None  # which features do not need
    expected = model.features(inputs_of(album)).numpy()
    model.train()
    found = am.predict(model, album, features=True, num_workers=0, batch_size=3)
    assert model.training
    assert [row.error is None for row in found] == [True, True, False, True, True]
    values = [row.features for row in found if row.features is not None]
    assert np.allclose(np.stack(values), expected, atol=1e-6)
    assert all(row.classes == [] for row in found)


def test_equal_probabilities_keep_the_order_of_the_classes(album):
    model = tiny_model([f"{n:02}" for n in range(40)])
    model.head.weight.data[:] = model.head.weight.data[0]
    model.head.bias.data.zero_()
    (found, *_) = am.predict(model, album, top_k=9, num_workers=0)
    assert [name for name, _ in found.classes] == model.class_names[:9]


# --- what goes in ---------------------------------------------------------------------------------


def test_files_folders_and_patterns_in_order(model, album):
    draw(9).convert("L").save(album / "grey.JPG")
    (album / "notes.txt").write_text("hello")
    inputs = [album / "grey.JPG", str(album / "x" / "[01].png"), album]
    found = am.predict(model, inputs, top_k=1, num_workers=0, batch_size=2)
    names = [Path(row.path).name for row in found]
    folder = ["grey.JPG", "0.png", "1.png", "1_bad.png", "2.png", "3.png"]
    assert names == ["grey.JPG", "0.png", "1.png", *folder]
    assert [row.error is None for row in found] == [True] * 6 + [False] + [True] * 2


def rounded(row: am.Prediction) -> list[tuple[str, float]]:
    return [(name, round(value, 4)) for name, value in row.classes]


def test_images_in_memory(model, tmp_path):
    transparent = draw(2).convert("RGBA")
    transparent.putalpha(100)
    images = [draw(1), draw(1).convert("L"), transparent, draw(3).convert("CMYK")]
    (tmp_path / "turned.png").write_bytes(encode(draw(4), exif=turned(6)))
    images.append(Image.open(tmp_path / "turned.png"))
    paths = []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.{'tiff' if image.mode == 'CMYK' else 'png'}")
        image.save(paths[-1], exif=image.getexif())
    expected = [rounded(row) for row in am.predict(model, paths, num_workers=0)]
    assert expected[4] == rounded(am.predict(model, tmp_path / "turned.png")[0])
    memory = [*images[:4], np.asarray(images[0]), np.asarray(images[1]), paths[0].read_bytes()]
    *found, bad = am.predict(model, [*memory, images[4], b"no image"], num_workers=0, batch_size=2)
    wanted = [expected[at] for at in (0, 1, 2, 3, 0, 1, 0, 4)]
    assert [rounded(row) for row in found] == wanted
    assert (bad.path, bad.error) == ("images[8]", "the file is not an image")
    assert rounded(am.predict(model, images[0])[0]) == expected[0]  # without a list
    for wrong in (np.zeros((8, 8, 3)), np.zeros((2, 2, 2, 2), np.uint8), 3, None):
        with user_error("wrong-type") as caught:
            am.predict(model, [images[0], wrong])
        assert "1" in caught.value.what


def test_urls(model, tmp_path):
    (tmp_path / "x.png").write_bytes(encode(draw(1)))
    asked: list[str | None] = []
    with static(tmp_path, asked) as url:
        inputs = [f"{url}/x.png", tmp_path / "x.png", f"{url}/gone.png"]
        found = am.predict(model, inputs, num_workers=0)
    assert asked == ["allmlp"] * 2  # some servers refuse Python's name
    assert found[0].path == f"{url}/x.png"
    assert found[0].classes == found[1].classes
    assert "404" in (found[2].error or "")


@pytest.mark.parametrize(
    ("inputs", "options", "word"),
    [
        ([], {}, "no images"),
        (["nowhere.jpg"], {}, "nowhere.jpg"),
        (["*.nothing"], {}, "*.nothing"),
        (["EMPTY"], {}, "empty"),
        (["-", "-"], {}, "more than once"),
        (["GOOD", "digits:test"], {}, "digits:test"),
        (["GOOD"], {"top_k": 0}, "top_k"),
        (["GOOD"], {"features": True, "top_k": 3}, "features and top_k"),
        (["GOOD"], {"batch_size": 0}, "batch_size"),
        (["GOOD"], {"part_size": 0}, "part_size"),
        (["GOOD"], {"num_workers": -1}, "num_workers"),
        (["GOOD"], {"device": "mps"}, "mps"),
        (["GOOD"], {"precision": "float64"}, "float64"),
        (["GOOD"], {"image_size": 16}, "16"),
        (["GOOD"], {"output": "out.json"}, ".json"),
        (["GOOD"], {"neighbors": 2}, "features"),
        (["GOOD"], {"features": True, "neighbors": 0}, "neighbors"),
        (["GOOD"], {"features": True, "neighbors": 2, "output": "folder"}, "neighbors"),
        (["GOOD"], {"output": "out.csv", "format": "jsonl"}, "jsonl"),
        (["GOOD"], {"output": "-", "format": "parquet"}, "parquet"),
        (["GOOD"], {"output": "no/such/folder/out.csv"}, "no/such/folder"),
        (["GOOD"], {"output": "folder.csv"}, "folder.csv"),
    ],
)
def test_mistakes(model, album, tmp_path, monkeypatch, inputs, options, word):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "folder.csv"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.rglob("*"))
    places = {"EMPTY": tmp_path / "empty", "GOOD": album / "x" / "0.png"}
    images = [places.get(name, name) for name in inputs]
    with pytest.raises(am.UserError, match=re.escape(word)):
        am.predict(model, images, **options)
    with pytest.raises(am.UserError, match=re.escape(word)):
        write_predictions(model, images, PredictOptions(**options))
    assert sorted(tmp_path.rglob("*")) == before


def test_every_value_that_is_not_finite_is_an_error(model, album):
    model.head.bias.data[3] = float("nan")
    found = am.predict(model, album, num_workers=0)
    good = [row for row in found if row.error != rows.NOT_FINITE]
    assert len(found) - len(good) > 1
    assert all(row.error for row in good)


# --- what comes out -------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    text = path.read_text()
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_written_features_are_exact_and_neighbors_are_named(model, album, tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    options = {"features": True, "neighbors": 2, "num_workers": 0, "batch_size": 2}
    found = am.predict(model, album, output=path, **options)
    for written, row in zip(read(path), found, strict=True):
        assert written["path"] == row.path
        if suffix == ".csv":
            cells = [written[f"feature_{at}"] for at in range(16)]
            numbers = [float(cell) for cell in cells if cell != ""]
        else:
            numbers = written["features"] or []
        wanted = [] if row.features is None else row.features
        assert np.array_equal(np.asarray(numbers, np.float32), np.asarray(wanted, np.float32))
        assert (written.get("error") or None) == row.error
        assert len(row.neighbors) == (2 if row.error is None else 0)
        for rank, (name, place, similarity) in enumerate(row.neighbors, start=1):
            kinds = ("neighbor", "row", "similarity")
            cells = [written.get(f"{kind}_{rank}") for kind in kinds]
            if suffix == ".jsonl":
                cells = list(written["neighbors"][rank - 1].values())
            assert cells[0] == name == found[place].path
            assert (int(cells[1]), float(cells[2])) == (place, pytest.approx(similarity, abs=1e-6))


def test_csv_and_jsonl(model, album, tmp_path):
    for suffix in (".jsonl", ".csv"):
        path = tmp_path / f"out{suffix}"
        found = am.predict(model, album, top_k=2, output=path, num_workers=0)
    assert read(tmp_path / "out.jsonl") == [
        {
            "path": row.path,
            "classes": [{"class": name, "probability": value} for name, value in row.classes],
            **({"error": row.error} if row.error else {}),
        }
        for row in found
    ]
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "path,class_1,probability_1,class_2,probability_2,error"
    (name, value), (second, other) = found[0].classes
    assert lines[1] == f"{found[0].path},{name},{value:.6f},{second},{other:.6f},"
    assert lines[3] == f"{found[2].path},,,,,the file is not an image"


@pytest.mark.parametrize("at_once", [10, 2**24])
def test_neighbors_are_scikit_learns(monkeypatch, at_once: int):
    monkeypatch.setattr(rows, "_AT_ONCE", at_once)
    values = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    found = [am.Prediction(f"{at}.png", features=row) for at, row in enumerate(values)]
    rows.add_neighbors(found, 7)
    distances, places = NearestNeighbors(metric="cosine").fit(values).kneighbors(None, 7)
    assert [[row for _, row, _ in one.neighbors] for one in found] == places.tolist()
    assert [one.neighbors[0][0] for one in found] == [f"{at}.png" for at in places[:, 0]]
    similar = np.array([[value for *_, value in one.neighbors] for one in found])
    np.testing.assert_allclose(similar, 1 - distances, atol=2e-6)


def test_equally_near_neighbors_keep_the_order_and_bad_images_are_none():
    one, other = np.array([1.0, 2.0], np.float32), np.array([-3.0, 1.0], np.float32)
    given = [one, None, 3 * one, other, 2 * one, 0 * one]
    found = [am.Prediction(name, features=x) for name, x in zip("abcdef", given, strict=True)]
    rows.add_neighbors(found, 9)
    names = ["".join(name for name, *_ in one.neighbors) for one in found]
    assert names == ["cefd", "", "aefd", "face", "acfd", "acde"]
    rows.add_neighbors(alone := [am.Prediction("a", features=one)], 3)
    assert alone[0].neighbors == []


def test_parquet(model, album, tmp_path, monkeypatch):
    monkeypatch.setattr("allmlp.deploy.rows._ROW_GROUP", 9)  # three rows of two classes
    path = tmp_path / "out.parquet"
    found = am.predict(model, album, top_k=2, output=path, num_workers=0, batch_size=1)
    file = parquet.ParquetFile(path)
    assert file.num_row_groups == 2
    kinds = [str(column.type) for column in file.schema_arrow]
    assert file.schema_arrow.names[:3] == ["path", "class_1", "probability_1"]
    assert kinds == ["string", "string", "float", "string", "float", "string"]
    rows = file.read().to_pylist()
    assert [row["class_2"] for row in rows if row["class_2"]] == [
        row.classes[1][0] for row in found if row.classes
    ]
    assert rows[0]["probability_1"] == np.float32(found[0].classes[0][1])
    assert (rows[2]["error"], rows[2]["probability_1"]) == ("the file is not an image", None)


def test_paths_that_are_not_text(model, tmp_path):
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
