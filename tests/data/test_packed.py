"""Packed data and tars of other tools: round trips, damage, and the commands that write them."""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from allmlp.data.source import EncodedImages, Source, labelled
from allmlp.data.sources import open_source, open_splits
from allmlp.data.sources.packed import pack_splits, verify
from allmlp.errors import UserError
from conftest import draw, encode, mixer, user_error, write_tar

KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
OLD = Path(__file__).parents[1] / "golden" / "old_shards"


def made(count: int = 12) -> Source:
    """Images of every format in mixed order of classes; "cat" has none."""
    files = [encode(draw(at, (30 + at, 20)), KINDS[at % len(KINDS)]) for at in range(count)]
    labels = np.array([(at * 7 // 3) % 2 for at in range(count)], dtype=np.int64)
    return labelled(EncodedImages(files, "/some/where/made"), "made", ["ant", "bee", "cat"], labels)


def content(source: Source) -> list[tuple[bytes, str]]:
    return [(source.read(at), source.class_names[source.labels[at]]) for at in range(len(source))]


@pytest.mark.parametrize("shard_bytes", [1, 12_000, 10**9])
def test_round_trip(tmp_path: Path, shard_bytes: int):
    source, seen = made(), []
    folder = tmp_path / "packed"
    splits = {"train": source, "test": made(3)}
    written = pack_splits(splits, folder, shard_bytes=shard_bytes, on_item=seen.append)["train"]
    again = open_splits(str(folder))["train"]
    assert content(again) == content(source)
    assert again.class_names == ["ant", "bee", "cat"]
    assert (written.num_images, written.bad, sum(seen)) == (12, [], 15)
    number = len(written.files)
    assert {1: number == 12, 10**9: number == 1}.get(shard_bytes, 1 < number < 12)
    for file in written.files:
        size = (folder / file.name).stat().st_size
        assert size == file.size
        assert size <= shard_bytes or len(written.files) == 12
    assert again.item_name(0) == f"{folder / written.files[0].name}:made[0]"
    assert again.item_name(5).endswith("made[5]")
    assert verify(folder) == []
    names = {path.name: path.read_bytes() for path in folder.iterdir()}
    pack_splits(splits, tmp_path / "again", shard_bytes=shard_bytes)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == names


def test_other_readers_need_nothing_of_ours(tmp_path: Path):
    file = pack_splits({"train": made()}, tmp_path)["train"].files[0]
    with pa.memory_map(str(tmp_path / file.name)) as mapped:
        table = pa.ipc.open_stream(mapped).read_all()
    assert table["image"][5].as_py() == {"bytes": made().read(5), "path": "made[5]"}
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_file(str(tmp_path / file.name))
    assert whole.features["label"].names == ["ant", "bee", "cat"]
    assert whole[3]["image"].size == (33, 20)


def test_images_that_cannot_be_read_are_left_out(tmp_path: Path):
    source = made()
    files = [source.read(at) for at in range(12)]
    files[0] = files[7] = b"no image"
    broken = labelled(EncodedImages(files, "made"), "made", source.class_names, source.labels)
    written = pack_splits({"train": broken}, tmp_path)["train"]
    assert [bad.index for bad in written.bad] == [0, 7]
    kept = [at for at in range(12) if at not in (0, 7)]
    assert content(open_source(str(tmp_path))) == [content(source)[at] for at in kept]
    none = labelled(EncodedImages([b"x"], "none"), "none", ["a"], np.zeros(1, np.int64))
    with pytest.raises(UserError, match="none of the 1 images"):
        pack_splits({"train": made(3), "test": none}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_written_over(tmp_path: Path):
    pack_splits({"train": made()}, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with user_error("exists", str(tmp_path)):
        pack_splits({"train": made(3), "test": made(3)}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    pack_splits({"test": made(3)}, tmp_path)  # another split is welcome
    assert [len(source) for source in open_splits(str(tmp_path)).values()] == [12, 3]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        pack_splits({"train": made(3)}, tmp_path / "file")


def test_damaged_files(tmp_path: Path):
    written = pack_splits({"train": made()}, tmp_path, shard_bytes=12_000)["train"]
    path = tmp_path / written.files[1].name
    data, source = path.read_bytes(), open_source(str(tmp_path))
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    path.write_bytes(flipped)
    assert str(path) in verify(tmp_path)[0]
    path.write_bytes(data[:600])
    with pytest.raises(UserError, match="600 bytes instead of"):
        open_splits(str(tmp_path))
    assert str(path) in verify(tmp_path)[0]
    with pytest.raises(UserError, match="cut short"):
        [source.read(at) for at in range(12)]
    path.unlink()
    assert "No such file" in verify(tmp_path)[0]
    with pytest.raises(FileNotFoundError):
        open_splits(str(tmp_path))
    path.write_bytes(bytes(len(data)))
    with pytest.raises(UserError, match="damaged"):
        open_splits(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[", "[1]", "{}", '{"format": "allmlp packed data"}', None])
def test_a_damaged_list_of_files(tmp_path: Path, text: str | None):
    """None: a list that reaches out of the folder."""
    pack_splits({"train": made(2)}, tmp_path)
    whole = (tmp_path / "packed.json").read_text()
    text = whole.replace("train-00000", "../train-00000") if text is None else text
    (tmp_path / "packed.json").write_text(text)
    with pytest.raises(UserError, match=r"packed\.json"):
        open_splits(str(tmp_path))


def test_shards_of_earlier_versions(tmp_path: Path):
    """Their labels are numbers of classes that only the index names."""
    splits = open_splits(str(OLD))
    assert [len(source) for source in splits.values()] == [5, 3]
    train = splits["train"]
    assert train.class_names == ["ant", "bee"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert train.item_name(3) == f"{OLD / 'train-000000.tar'}:00000003.png"
    assert train.read(4).startswith(b"\x89PNG")
    for path in OLD.iterdir():
        shutil.copy(path, tmp_path)
    index = tmp_path / "train.index.safetensors"
    whole = index.read_bytes()
    for data in (whole[:100], b""):
        index.write_bytes(data)
        with pytest.raises(UserError, match="index is damaged"):
            open_splits(str(tmp_path))
    bee = rb", \"bee\""
    index.write_bytes(whole.replace(bee, b" " * len(bee)))
    with pytest.raises(UserError, match="label 1 is none of the 1 classes"):
        open_splits(str(tmp_path))


def test_tars_of_other_tools(tmp_path: Path):
    long = "deep/" * 30 + "x" * 40  # its header has more than one block
    images = [encode(draw(at), "JPEG") for at in range(6)]
    first = [("./a/0.cls", b"10\n"), ("./a/0.jpg", images[0]), ("./a/0.txt", b"caption")]
    first += [("./b/0.JPG", images[1]), ("./b/0.json", b'{"label": 9, "x": [1]}')]
    first += [(f"{long}.jpeg", images[2]), (f"{long}.json", b'{"cls": "2"}')]
    write_tar(tmp_path / "x-train-2.tar", first)
    write_tar(tmp_path / "x-train-10.tar", [("0.seg.png", images[3]), ("0.cls", b"2")])
    write_tar(tmp_path / "x-val-0.tar", [("0.png", images[4]), ("0.cls", b"9")])
    splits = open_splits(str(tmp_path))
    train = splits["train"]
    assert train.class_names == ["2", "9", "10"]
    assert content(train) == [*zip(images[:4], ["10", "9", "2", "2"], strict=True)]
    assert train.item_name(1) == f"{tmp_path / 'x-train-2.tar'}:./b/0.JPG"
    assert content(splits["validation"]) == [(images[4], "9")]


def test_a_tar_that_is_replaced_is_read_anew(tmp_path: Path):
    for at in range(2):
        members = [("0.png", encode(draw(at))), ("0.cls", b"1")]
        write_tar(tmp_path / "new", members)
        os.replace(tmp_path / "new", tmp_path / "x.tar")
        assert open_source(str(tmp_path)).read(0) == encode(draw(at))


def test_tars_with_several_labels(tmp_path: Path):
    members = [("0.png", encode(draw(1))), ("0.json", b'{"label": ["cat", "dog"]}')]
    members += [("1.png", encode(draw(2))), ("1.json", b'{"label": ["dog"]}')]
    write_tar(tmp_path / "train.tar", members)
    source = open_source(str(tmp_path))
    assert (source.class_names, source.labels.tolist()) == (["cat", "dog"], [[1, 1], [0, 1]])


def test_tars_without_labels(tmp_path: Path):
    members = [("0.png", encode(draw(1))), ("0.cls", b"\xff"), ("1.png", encode(draw(2)))]
    write_tar(tmp_path / "x-test.tar", members)
    source = open_source(f"{tmp_path}:test[1:]", labels="any")
    assert (source.read(0), source.class_names) == (members[2][1], ["unknown"])
    with pytest.raises(UserError, match="cannot be read"):
        open_source(str(tmp_path))


def test_tars_beside_images_or_folders_are_not_the_data(class_folder: Path, tmp_path: Path):
    for folder in (class_folder, tmp_path / "flat"):
        folder.mkdir(exist_ok=True)
        write_tar(folder / "backup.tar", [("0.png", encode(draw(1))), ("0.cls", b"cat")])
    (tmp_path / "flat" / "1.png").write_bytes(encode(draw(2)))
    assert open_source(f"{class_folder}:train").class_names != ["cat"]
    flat = open_source(str(tmp_path / "flat"), labels="none")
    assert [Path(flat.item_name(at)).name for at in range(len(flat))] == ["1.png"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", b"x")], "0.jpg"),
        ([("0.jpg", b"x"), ("0.png", b"x"), ("0.cls", b"3")], "0.png"),
        ([("0.jpg", b"x"), ("0.cls", b"\xff")], "the label cannot be read"),
        ([("0.jpg", b"x"), ("0.cls", b" ")], "empty"),
        ([("0.jpg", b"x"), ("0.json", b'{"label": {"a": 1}}')], "got ."),
        ([("0.txt", b"x")], "no images"),
        ([("0.jpg", b"x"), ("0.cls", b"Cat"), ("1.jpg", b"x"), ("1.cls", b"cat")], "only in case"),
    ],
)
def test_tars_that_are_no_data(tmp_path: Path, members, message: str):
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(UserError, match=message):
        open_splits(str(tmp_path))


def test_damaged_tars_are_not_read_in_part(tmp_path: Path):
    path = tmp_path / "train-0.tar"
    members = [(f"{at}.{end}", encode(draw(at))) for at in range(3) for end in ("png", "cls")]
    write_tar(path, [(name, b"1" if name.endswith("cls") else data) for name, data in members])
    whole = path.read_bytes()
    second = whole.index(b"1.png")
    damaged = bytearray(whole)
    damaged[second] ^= 1
    cuts = (whole[: second + 1000], whole[:second], whole[: second + 100])
    for data in (b"", *cuts, bytes(damaged), gzip.compress(whole)):
        path.write_bytes(data)
        with pytest.raises(UserError, match="damaged, cut short or compressed"):
            open_splits(str(tmp_path))


def test_the_command_pack(class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (class_folder / "train" / "bee" / "3.png").write_text("<html>")
    before, target = open_splits(str(class_folder)), tmp_path / "packed"
    code, out, err = mixer(capsys, "data", "pack", class_folder, target, "--shard-size", "20KB")
    assert code == 3
    after = open_splits(str(target))
    assert content(after["validation"]) == content(before["validation"])
    files = len(list(target.glob("train-*.arrow")))
    assert f"19 images in {files} files, " in out
    assert f"mixer train --data {target}\n" in out
    assert f"{class_folder}/train/bee/3.png" in err
    assert mixer(capsys, "data", "pack", f"{class_folder}:train", target)[0] == 2
    sizes = {"1.5GiB": 0, "512 kb": 0, "0": 2, "1TBx": 2, "9" * 30: 2, "1,5GB": 2}
    for size, right in sizes.items():
        target = tmp_path / size
        line = ("data", "pack", "digits:test[:9]", target, "--shard-size", size)
        assert mixer(capsys, *line)[0] == right
        assert target.exists() == (right == 0)
