"""Images that nobody needs the labels of: the same images, labelled or not."""

from __future__ import annotations

import json
import sys
import tarfile
import types
from pathlib import Path

import pytest

from allmlp.cli.pack import index
from allmlp.data import hub_dataset
from allmlp.data.foreign_shards import index_shards, verify
from allmlp.data.items import Source
from allmlp.data.shards import load_index
from allmlp.data.sources import open_images, open_source, open_splits
from allmlp.data.write_shards import pack_splits
from allmlp.errors import UserError
from conftest import draw, encode, make_class_folder

PICTURES = [encode(draw(seed)) for seed in range(6)]


def content(source: Source) -> list[bytes]:
    return [source.read(at) for at in range(len(source))]


def assert_unlabelled(source: Source, pictures: list[bytes]) -> None:
    assert content(source) == pictures
    assert source.class_names == ["unknown"]
    assert source.labels.tolist() == [0] * len(pictures)


def write_parquet(path: Path, **columns: list[object]) -> Path:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": each, "path": None} for each in PICTURES], kind)
    parquet.write_table(pa.table({"image": images, **columns}), path, row_group_size=4)
    return path


def write_list(path: Path, rows: list[str]) -> Path:
    for at, data in enumerate(PICTURES):
        (path.parent / f"{at}.png").write_bytes(data)
    path.write_text("\n".join(rows))
    return path


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "no label column found"),
        ({"id": [1, 2, 3, 4, 5, 6]}, "no label column found"),
        ({"label": ["a", "b", None, "a", "a", "a"]}, "the label is empty"),
        ({"label": ["a", "A", "b", "b", "b", "b"]}, "differ only in case"),
        ({"label": [0.5] * 6}, "got 0.5"),
        ({"labels": [1] * 6, "target": [2] * 6}, "several label columns"),
    ],
)
def test_parquet(tmp_path: Path, columns, message):
    path = write_parquet(tmp_path / "x.parquet", **columns)
    for name in (path, tmp_path, f"{tmp_path}/*.parquet"):
        assert_unlabelled(open_images(str(name)), PICTURES)
    assert open_images(str(path)).item_name(5) == f"{path}[5]"
    assert_unlabelled(open_images(f"{path}:train[4:]"), PICTURES[4:])
    for opener in (open_source, open_splits):  # to train and to measure
        with pytest.raises(UserError, match=message):
            opener(str(path))


def test_several_parquet_files(tmp_path: Path):
    write_parquet(tmp_path / "x-train-0.parquet", label=["a"] * 6)
    write_parquet(tmp_path / "x-test-0.parquet")
    write_parquet(tmp_path / "x-test-1.parquet", label=["b"] * 6)
    assert_unlabelled(open_images(str(tmp_path)), PICTURES * 2)  # the test split has no labels
    assert len(open_images(str(tmp_path), ("train", "test"))) == 6
    with pytest.raises(UserError, match="the data has no validation split"):
        open_images(f"{tmp_path}:validation")


def test_a_column_of_labels_that_is_named_is_read(tmp_path: Path):
    path = write_parquet(tmp_path / "x.parquet", color=list("rgbrgb"))
    assert open_images(f"{path}#label=color").class_names == ["b", "g", "r"]
    with pytest.raises(UserError, match="no column 'colour'"):
        open_images(f"{path}#label=colour")


def test_what_is_wrong_besides_is_told(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"id": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no image column found"):
        open_images(str(tmp_path / "x.parquet"))
    parquet.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match="column 'image' is binary"):
        open_images(str(tmp_path / "y.parquet:train[:1]"))
    empty = write_parquet(tmp_path / "z.parquet")
    parquet.write_table(parquet.read_table(empty).slice(0, 0), empty)
    with pytest.raises(UserError, match="the files have no rows"):
        open_images(str(empty))


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("l.csv", ["path", *(f"{at}.png" for at in range(6))], "no label column found"),
        ("l.csv", ["path,label", *(f"{at}.png," for at in range(6))], "the label is empty"),
        ("l.csv", ["file,id", *(f"{at}.png,{at}" for at in range(6))], "no label column found"),
        (
            "l.jsonl",
            [json.dumps({"path": f"{at}.png"}) for at in range(6)],
            "no label column found",
        ),
    ],
)
def test_lists(tmp_path: Path, name, rows, message):
    path = write_list(tmp_path / name, rows)
    assert_unlabelled(open_images(str(path)), PICTURES)
    assert_unlabelled(open_images(f"{path}:train[:50%]"), PICTURES[:3])
    with pytest.raises(UserError, match=message):
        open_source(str(path))


def test_splits_of_a_list(tmp_path: Path):
    rows = ["path,split", *(f"{at}.png,{'test' if at > 3 else 'train'}" for at in range(6))]
    path = write_list(tmp_path / "l.csv", rows)
    assert_unlabelled(open_images(str(path)), PICTURES[4:])
    assert_unlabelled(open_images(f"{path}:train"), PICTURES[:4])


def test_a_part_of_labelled_data_is_the_same_part(class_folder: Path, tmp_path: Path):
    name = f"{class_folder}:train[70%:]"
    part, known = open_images(name), open_source(name)
    assert content(part) == content(known)
    assert len(set(known.labels.tolist())) == 3  # spread over the classes, so it needs them
    file = tmp_path / "some.json"
    values = {"format": "allmlp selection", "version": 1, "source": str(class_folder)}
    file.write_text(json.dumps({**values, "splits": {"test": ["train[70%:]"]}}))
    assert content(open_images(str(file))) == content(known)


def test_a_selection_of_images_without_labels(tmp_path: Path):
    path = write_parquet(tmp_path / "x.parquet")
    file = tmp_path / "some.json"
    values = {"format": "allmlp selection", "version": 1, "source": str(path)}
    rule = {"rule": "bins", "numbers": [3, 2]}
    for more in ({}, {"labels": rule}):
        parts = {"train": ["train[4:]", "train[:1]"]}
        file.write_text(json.dumps({**values, "splits": parts, **more}))
        assert_unlabelled(open_images(str(file)), [*PICTURES[4:], PICTURES[0]])
    with pytest.raises(UserError, match="means nothing for a selection"):
        open_images(f"{file}#image=x")


def test_classes_that_do_not_match_do_no_harm(tmp_path: Path):
    folder = make_class_folder(tmp_path / "data" / "train", {"ant": 2}).parent
    make_class_folder(folder / "test", {"bee": 3}, start=9)
    assert len(open_images(str(folder))) == 3
    with pytest.raises(UserError, match="unknown to train/"):
        open_source(str(folder))


def test_a_folder_of_images_alone(tmp_path: Path):
    write_list(tmp_path / "l.txt", [])
    assert_unlabelled(open_images(str(tmp_path)), PICTURES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder has no images"):
        open_images(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no class folders found"):
        open_splits(str(tmp_path / "empty"))


def test_tars_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for at, data in enumerate(PICTURES):
        (tmp_path / f"{at}.png").write_bytes(data)
    (tmp_path / "0.cls").write_bytes(b"")  # no label: whatever there is, is passed over
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "x-test-0.tar", "w") as tar:
        for name in ("0.png", "0.cls", *(f"{at}.png" for at in range(1, 6))):
            tar.add(tmp_path / name, name)
    with pytest.raises(UserError, match=r"data index .*--unlabelled|the label is empty"):
        index_shards(tars)
    index(str(tars), unlabelled=True)
    path = tars / "test.index.safetensors"
    assert capsys.readouterr().out == f"written  {path}: 6 images in 1 tar, no labels\n"
    assert (load_index(path).class_names, set(load_index(path).label.tolist())) == ([], {-1})
    assert verify(tars) == []
    assert_unlabelled(open_images(str(tars)), PICTURES)
    assert_unlabelled(open_images(f"{tars}:test[2:4]"), PICTURES[2:4])
    for opener in (open_source, open_splits):
        with pytest.raises(UserError, match="written for predictions only"):
            opener(str(tars))
    data = (tars / "x-test-0.tar").read_bytes()
    (tars / "x-test-0.tar").write_bytes(data.replace(b"3.png", b"3.txt"))
    assert "damaged" in verify(tars)[0]


def test_shards_with_labels_have_them(class_folder: Path, tmp_path: Path):
    pack_splits(open_splits(str(class_folder)), tmp_path / "packed")
    known = open_source(str(tmp_path / "packed"))
    assert content(open_images(str(tmp_path / "packed"))) == content(known)


def test_the_hub(monkeypatch: pytest.MonkeyPatch):
    class Image:
        def __init__(self, decode: bool = True) -> None:
            self.decode = decode

    class Rows:
        def __init__(self, count: int, features: dict[str, object]) -> None:
            self.count, self.features = count, features

        def __len__(self) -> int:
            return self.count

        def select_columns(self, names: list[str]) -> Rows:
            return Rows(self.count, {each: self.features[each] for each in names})

        def cast_column(self, name: str, feature: Image) -> Rows:
            assert not feature.decode
            return self

        def __getitem__(self, at: int) -> dict[str, object]:
            return {"img": {"bytes": PICTURES[at], "path": None}}

    features = {"img": Image(), "text": object()}
    splits = {"train": Rows(2, features), "test": Rows(6, features), "valid": Rows(0, features)}
    module = types.ModuleType("datasets")
    module.__dict__.update(load_dataset=lambda *_, **__: splits, Image=Image)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(hub_dataset, "is_reachable", lambda endpoint: True)
    assert_unlabelled(open_images("hf:owner/name"), PICTURES)
    assert_unlabelled(open_images("hf:owner/name:train[:1]"), PICTURES[:1])
    with pytest.raises(UserError, match="no label column found"):
        open_source("hf:owner/name")
    splits = {"test": Rows(0, features)}
    with pytest.raises(UserError, match="the data set has no rows"):
        open_images("hf:owner/name")
