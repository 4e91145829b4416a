"""Parquet files: bytes and labels, memory or row groups, columns, and damaged files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from allmlp.data.sources import open_source, open_splits, parquet
from allmlp.errors import UserError
from conftest import draw, encode

IMAGES = [encode(draw(seed), "PNG" if seed % 2 else "JPEG") for seed in range(8)]


def write(
    path: Path,
    labels: Any,
    names: list[str] | None = None,
    *,
    files: list[bytes | None] | None = None,
    column: str = "image",
    label: str = "label",
    row_group_size: int = 3,
    more: dict[str, list[object]] | None = None,
    **options: object,
) -> str:
    """A file in the Hugging Face layout; IMAGES in turn, unless `files` are given."""
    chosen = files or [IMAGES[at % len(IMAGES)] for at in range(len(labels))]
    rows = [{"bytes": data, "path": f"{at}.png"} for at, data in enumerate(chosen)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {column: pa.array(rows, kind), label: pa.array(labels), **(more or {})}
    table = pa.table(columns)
    if names is not None:
        features = {column: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, path, row_group_size=row_group_size, **options)
    return str(path)


def damage(path: Path, row_group: int) -> None:
    """Writes over the images of a row group."""
    column = pq.ParquetFile(path).metadata.row_group(row_group).column(0)
    data = bytearray(path.read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    data[begin : begin + column.total_compressed_size] = b"U" * column.total_compressed_size
    path.write_bytes(data)


@pytest.fixture(params=[True, False], ids=["held", "by row group"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the images are held in memory."""
    if not request.param:
        monkeypatch.setattr(parquet, "HELD_BYTES", 100)
    return request.param


def test_bytes_and_labels(tmp_path: Path, held: bool):
    name = write(tmp_path / "x.parquet", [at % 2 for at in range(8)], ["cat", "ant"])
    source = open_source(name)
    assert (source.images.parts[0].held is not None) is held
    assert source.class_names == ["cat", "ant"]  # their order is the metadata's
    assert source.labels.tolist() == [0, 1] * 4
    assert source.labels.dtype == np.int64
    for at in [*range(8), 7, 0, 5, 0]:
        assert source.read(at) == IMAGES[at]
        assert source.item_name(at) == f"{name}[{at}]"


def test_several_files_of_a_split(tmp_path: Path, held: bool):
    for number in (10, 2):
        files: list[bytes | None] = [IMAGES[number % 8], IMAGES[1], IMAGES[2], IMAGES[3]]
        write(tmp_path / f"train-{number}.parquet", ["b", "a", "b", "a"], files=files)
    write(tmp_path / "valid-0.parquet", ["a"])
    splits = open_splits(str(tmp_path))
    assert {split: len(source) for split, source in splits.items()} == {"train": 8, "validation": 1}
    train = splits["train"]
    assert train.item_name(0) == f"{tmp_path / 'train-2.parquet'}[0]"
    assert train.item_name(7) == f"{tmp_path / 'train-10.parquet'}[3]"
    assert train.read(4) == IMAGES[2]
    assert train.read(0) == IMAGES[2]
    assert train.read(7) == IMAGES[3]
    assert splits["validation"].class_names == ["a", "b"]
    assert len(open_source(f"{tmp_path}/train-*.parquet")) == 8
    assert len(open_source(f"{tmp_path}/*-[01]*.parquet:train[:50%]")) == 2


def test_only_the_wanted_split_is_read(tmp_path: Path):
    write(tmp_path / "train.parquet", ["a", "b"] * 300, row_group_size=50)
    write(tmp_path / "test.parquet", ["a", "b"])
    damage(tmp_path / "train.parquet", 0)  # its images, not its labels
    assert len(open_source(str(tmp_path))) == 2
    with pytest.raises(UserError, match="cannot read the Parquet file"):
        open_source(f"{tmp_path}:train")


def test_columns_that_hold_no_images_or_no_labels(tmp_path: Path):
    more: dict[str, list[object]] = {"size": [3], "z": [1.5]}
    name = write(tmp_path / "x.parquet", ["a"], column="photo", label="kind", more=more)
    assert open_source(f"{name}#label=size,image=photo").class_names == ["3"]
    for options, message in (
        ("#label=z", r"a label is a whole number or text, got 1.5"),
        ("#label=kind,image=size", "column 'size' is int64, not struct<bytes"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(f"{name}{options}")
    with pytest.raises(UserError, match="column 'label' is list<"):
        open_source(write(tmp_path / "z.parquet", [[0.1, 0.2]], more={"id": [1]}))


def test_files_that_do_not_belong_together(tmp_path: Path):
    write(tmp_path / "train-0.parquet", [0], ["ant"])
    write(tmp_path / "train-1.parquet", [0], ["bee"])
    with pytest.raises(UserError, match=r"'label' has other classes than in .*train-0"):
        open_splits(str(tmp_path))
    write(tmp_path / "train-1.parquet", ["ant"])
    with pytest.raises(UserError, match=r"'label' is string here and int64 in .*train-0"):
        open_splits(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1, -1], None, "the image has no label .-1."),
        ([0, 1, -1], ["ant", "bee"], "the image has no label .-1."),
        ([0, 1, None], ["ant", "bee"], "the label is empty"),
        ([0.0, 1.0, float("nan")], None, "the label is empty: 'nan'"),
        ([[0], [0, 1], [1, -1]], ["ant", "bee"], "the label is empty"),
        ([[0], [0, 1], [2]], ["ant", "bee"], "the label is empty"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, labels, names, message):
    name = write(tmp_path / "x.parquet", labels, names, row_group_size=1)
    with pytest.raises(UserError, match=message) as raised:
        open_source(name)
    assert raised.value.where == f"{name}[2]"


def test_values_are_the_classes_where_none_are_named(tmp_path: Path):
    labels = pa.array(["sea", "ant", "sea ", "ant"])
    for column in (labels, labels.dictionary_encode()):
        source = open_source(write(tmp_path / "x.parquet", column, row_group_size=2))
        assert (source.class_names, source.labels.tolist()) == (["ant", "sea"], [1, 0, 1, 0])


@pytest.mark.parametrize("names", [["ant", "bee"], None])
def test_a_test_split_without_labels_is_left_out(tmp_path: Path, names: list[str] | None):
    write(tmp_path / "train.parquet", [0, 1], names)
    write(tmp_path / "test.parquet", [-1, -1], names)
    assert list(open_splits(str(tmp_path))) == ["train"]
    with pytest.raises(UserError, match="none of the images has a label"):
        open_source(str(tmp_path / "test.parquet"))


def test_a_row_without_an_image(tmp_path: Path, held: bool):
    files = [IMAGES[0], None, b"", IMAGES[3], None]
    name = write(tmp_path / "x.parquet", ["a"] * 5, files=files)
    source = open_source(name)
    assert source.read(0) == IMAGES[0]
    assert source.read(3) == IMAGES[3]
    for row in (1, 2, 4):
        with pytest.raises(UserError, match="the row has no image") as raised:
            source.read(row)
        assert raised.value.where == f"{name}[{row}]"


def test_damaged_files(tmp_path: Path, held: bool):
    path = tmp_path / "x.parquet"
    write(path, ["a", "b"] * 3, compression="zstd")
    whole = path.read_bytes()
    damage(path, 1)
    with pytest.raises(UserError, match="cannot read the Parquet file") as raised:
        open_source(str(path)).read(4)
    assert raised.value.where == f"{path}, row group 1, from row {path}[3]"
    for share in (0.0, 0.3, 0.7, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match="cannot read the Parquet file") as raised:
            open_source(str(path))
        assert raised.value.where == str(path)


def test_without_labels(tmp_path: Path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "x.parquet"
    write(path, ["a"] * 3, label="kind", more={"labels": [1] * 3, "target": [2] * 3})
    for name in (path, tmp_path, path.parent, f"{path.parent}/*.parquet"):
        source = open_source(str(name), labels="any")
        assert [source.read(at) for at in range(3)] == IMAGES[:3]
        assert (source.class_names, source.labels.tolist()) == (["unknown"], [0] * 3)
        with pytest.raises(UserError, match="several label columns"):
            open_splits(str(name))
    assert open_source(f"{path}#label=kind", labels="any").class_names == ["a"]
