"""Tars that other tools wrote, and the verbs `mixer data pack` and `mixer data index`."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from allmlp.cli.pack import index, pack, parse_bytes
from allmlp.data.foreign_shards import index_shards, verify
from allmlp.data.items import Source
from allmlp.data.sources import open_source, open_splits
from allmlp.errors import UserError
from conftest import draw, encode


def content(source: Source) -> list[tuple[bytes, str]]:
    return [(source.read(at), source.class_names[source.labels[at]]) for at in range(len(source))]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_tars_of_other_tools(tmp_path: Path):
    long = "deep/" * 30 + "x" * 40  # its header has more than one block
    pictures = [encode(draw(at), "JPEG") for at in range(6)]
    first = [("./a/0.cls", b"10\n"), ("./a/0.jpg", pictures[0]), ("./a/0.txt", b"caption")]
    first += [("./b/0.JPG", pictures[1]), ("./b/0.json", b'{"label": 9, "x": [1]}')]
    first += [(f"{long}.jpeg", pictures[2]), (f"{long}.json", b'{"cls": "2"}')]
    write_tar(tmp_path / "x-train-2.tar", first)
    write_tar(tmp_path / "x-train-10.tar", [("0.seg.png", pictures[3]), ("0.cls", b"2")])
    write_tar(tmp_path / "x-val-0.tar", [("0.png", pictures[4]), ("0.cls", b"9")])
    with pytest.raises(UserError, match=rf"no index of them[\s\S]*mixer data index {tmp_path}"):
        open_splits(str(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    assert [path.name for path in index_shards(tmp_path)] == [
        "validation.index.safetensors",
        "train.index.safetensors",
    ]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    splits = open_splits(str(tmp_path))
    train = splits["train"]
    assert train.class_names == ["2", "9", "10"]
    assert content(train) == [*zip(pictures[:4], ["10", "9", "2", "2"], strict=True)]
    assert train.item_name(1) == f"{tmp_path / 'x-train-2.tar'}:./b/0.JPG"
    assert content(splits["validation"]) == [(pictures[4], "9")]
    assert verify(tmp_path) == []
    with pytest.raises(UserError, match="has an index already"):
        index_shards(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", b"x")], "the image has no label: 0.jpg"),
        ([("0.jpg", b"x"), ("1.cls", b"3")], "the image has no label: 0.jpg"),
        ([("0.jpg", b"x"), ("0.png", b"x"), ("0.cls", b"3")], "two images of one sample"),
        ([("0.jpg", b"x"), ("0.cls", b" ")], "the label is empty"),
        ([("0.jpg", b"x"), ("0.cls", b"\xff")], "the label cannot be read"),
        ([("0.jpg", b"x"), ("0.json", b"{")], "the label cannot be read"),
        ([("0.jpg", b"x"), ("0.json", b'{"label": [1]}')], "whole number or text, got .1."),
        ([("0.jpg", b"x"), ("0.json", b'{"y": 1}')], "the image has no label"),
        ([("0.txt", b"x")], "the tars have no images"),
        ([("0.jpg", b"x"), ("0.cls", b"Cat"), ("1.jpg", b"x"), ("1.cls", b"cat")], "only in case"),
    ],
)
def test_tars_that_cannot_be_indexed(tmp_path: Path, members, message: str):
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(UserError, match=message):
        index_shards(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train-0.tar"]


def test_damaged_tars_are_not_indexed_in_part(tmp_path: Path):
    path = tmp_path / "train-0.tar"
    with pytest.raises(UserError, match="the folder has no .tar files"):
        index_shards(tmp_path)
    pictures = [encode(draw(at)) for at in range(3)]
    members = [(f"{at}.{end}", data) for at, picture in enumerate(pictures)
               for end, data in (("png", picture), ("cls", b"1"))]  # fmt: skip
    write_tar(path, members)
    whole = path.read_bytes()
    second = whole.index(b"1.png")
    damaged = bytearray(whole)
    damaged[second] ^= 1
    cuts = [b"", b"no tar", whole[: second + 1000], whole[:second], whole[: second + 100]]
    for data in [*cuts, bytes(damaged), whole[:second] + b"\xff" * 512 + whole[second + 512 :]]:
        path.write_bytes(data)
        with pytest.raises(UserError, match="the tar is damaged, cut short or compressed"):
            index_shards(tmp_path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(UserError, match="damaged, cut short or compressed"):
        index_shards(tmp_path)


def test_the_verb_pack(class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (class_folder / "train" / "bee" / "3.png").write_text("<html>")
    before = open_splits(str(class_folder))
    assert pack(str(class_folder), str(tmp_path / "packed"), shard_size="20KB") == 3
    out, err = capsys.readouterr()
    after = open_splits(str(tmp_path / "packed"))
    assert content(after["validation"]) == content(before["validation"])
    assert len(after["train"]) == 19
    tars = len(list((tmp_path / "packed").glob("train-*.tar")))
    assert tars > 1
    assert f"19 images in {tars} shards, " in out
    assert "1 left out" in out
    assert f"mixer train --data {tmp_path / 'packed'}\n" in out
    assert f"bad image: {class_folder}/train/bee/3.png: the file is not an image" in err
    with pytest.raises(UserError, match="has shards of train already"):
        pack(f"{class_folder}:train", str(tmp_path / "packed"))
    assert pack("digits:test[:10]", str(tmp_path / "digits")) == 0
    assert len(open_source(f"{tmp_path / 'digits'}:test")) == 10


def test_the_verb_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_tar(tmp_path / "a.tar", [("0.png", encode(draw(1))), ("0.cls", b"cat")])
    index(str(tmp_path))
    out = capsys.readouterr().out
    assert out == f"written  {tmp_path}/train.index.safetensors: 1 image in 1 tar, 1 class\n"
    assert open_source(str(tmp_path)).class_names == ["cat"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MB", 256_000_000), ("1GB", 10**9), ("1.5GiB", 3 * 2**29), ("512 kb", 512_000), ("7", 7)],
)
def test_sizes(text: str, size: int):
    assert parse_bytes(text, "--shard-size") == size


@pytest.mark.parametrize("text", ["", "0", "MB", "-1MB", "1TBx", "1e9", "0.1", "9" * 30])
def test_sizes_that_are_none(text: str):
    with pytest.raises(UserError, match="not a size") as raised:
        parse_bytes(text, "--shard-size")
    assert raised.value.where == "--shard-size"
