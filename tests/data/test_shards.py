"""Tar shards: round trips, kills and damage."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from allmlp.data.foreign_shards import verify
from allmlp.data.items import EncodedImages, Source, subset
from allmlp.data.shards import Shard, ShardImages, ShardIndex, load_index
from allmlp.data.sources import open_source, open_splits
from allmlp.data.write_shards import pack as pack_split
from allmlp.data.write_shards import pack_splits
from allmlp.errors import UserError
from conftest import draw, encode, make_class_folder

KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")


def made(count: int = 12, names: tuple[str, ...] = ("ant", "bee", "cat")) -> EncodedImages:
    """Images of every format in mixed order of classes; "cat" has none."""
    files = [encode(draw(at, (30 + at, 20)), KINDS[at % len(KINDS)]) for at in range(count)]
    labels = np.array([(at * 7 // 3) % 2 for at in range(count)], dtype=np.int64)
    return EncodedImages("made", list(names), labels, files, "/some/where/made")


def content(source: Source) -> list[tuple[bytes, str]]:
    return [(source.read(at), source.class_names[source.labels[at]]) for at in range(len(source))]


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("shard_bytes", [1, 9_000, 10**9])
def test_round_trip(tmp_path: Path, shard_bytes: int):
    source, seen = made(), []
    packed = pack_split(source, tmp_path, "train", shard_bytes=shard_bytes, on_item=seen.append)
    again = open_splits(str(tmp_path))["train"]
    assert content(again) == content(source)
    assert again.class_names == ["ant", "bee", "cat"]
    assert again.labels.tolist() == source.labels.tolist()
    assert (packed.num_images, packed.bad, sum(seen)) == (12, [], 12)
    assert again.item_name(5).endswith(".tar:made[5]")
    assert [again.item_name(at).startswith(f"{tmp_path}/train-0000") for at in (0, 11)] == [
        True
    ] * 2
    for shard in packed.shards:
        size = (tmp_path / shard.name).stat().st_size
        assert size == shard.size
        with tarfile.open(tmp_path / shard.name) as tar:
            assert size <= shard_bytes or len(tar.getnames()) == 2
    assert len(packed.shards) == {1: 12, 10**9: 1}.get(shard_bytes, len(packed.shards))
    assert len(packed.shards) > 1 or shard_bytes == 10**9
    assert verify(tmp_path) == []
    for at in (-1, 12):
        with pytest.raises(IndexError):
            again.read(at)


def test_they_are_plain_webdataset_tars(tmp_path: Path):
    source = made()
    pack_split(source, tmp_path, "val")
    assert files_in(tmp_path) == ["validation-000000.tar", "validation.index.safetensors"]
    with tarfile.open(tmp_path / "validation-000000.tar") as tar:
        names = tar.getnames()
        assert names[:4] == ["00000000.png", "00000000.cls", "00000001.jpg", "00000001.cls"]
        assert [Path(name).suffix for name in names[::2]][:7] == [
            *(".png", ".jpg", ".webp", ".bmp", ".gif", ".tif", ".ppm")
        ]
        for at in range(12):
            image, label = (tar.extractfile(names[2 * at + each]) for each in (0, 1))
            assert image is not None
            assert label is not None
            assert image.read() == source.read(at)
            assert int(label.read()) == source.labels[at]


def test_the_same_images_give_the_same_bytes(tmp_path: Path):
    for folder in ("a", "b"):
        pack_split(made(), tmp_path / folder, "train")
    for name in files_in(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_class_folders_keep_their_splits_classes_and_names(class_folder: Path, tmp_path: Path):
    for path in (class_folder / "val" / "ant").iterdir():
        path.unlink()
    (class_folder / "val" / "ant").rmdir()
    before = open_splits(str(class_folder))
    pack_splits(before, tmp_path / "packed")
    after = open_splits(str(tmp_path / "packed"))
    assert list(after) == ["train", "validation"]
    for split, source in after.items():
        assert content(source) == content(before[split])
        assert source.class_names == ["ant", "bee", "cat"]
        shard = tmp_path / "packed" / f"{split}-000000.tar"
        name = Path(before[split].item_name(3))
        assert source.item_name(3) == f"{shard}:{name.parent.name}/{name.name}"
    part = open_source(f"{tmp_path / 'packed'}:train[:50%]")
    assert np.bincount(part.labels).tolist() == [3, 4, 3]
    with pytest.raises(UserError, match="the option 'label' means nothing for shards"):
        open_splits(f"{tmp_path / 'packed'}#label=x")


def test_a_name_that_is_no_text(tmp_path: Path):
    folder = make_class_folder(tmp_path / "data", {"a": 1})
    os.rename(folder / "a" / "0.png", os.fsencode(folder / "a") + b"/\xff.png")
    pack_splits(open_splits(str(folder)), tmp_path / "packed")
    assert os.fsencode(open_source(str(tmp_path / "packed")).item_name(0)).endswith(b":\xff.png")


def test_unreadable_images_are_left_out_and_named(tmp_path: Path):
    source = made()
    files = list(source.files)
    files[3], files[7] = b"", b"<html>"
    broken = EncodedImages("made", source.class_names, source.labels, files, "made")
    packed = pack_split(broken, tmp_path, "train")
    assert [(each.index, each.name, each.what) for each in packed.bad] == [
        (3, "made[3]", "the file is empty"),
        (7, "made[7]", "the file is not an image that can be read: it is an HTML page"),
    ]
    good = subset(source, np.setdiff1d(np.arange(12), [3, 7]), "good")
    again = open_source(str(tmp_path))
    assert content(again) == content(good)
    assert [again.item_name(at)[-8:] for at in (2, 3)] == [":made[2]", ":made[4]"]
    assert verify(tmp_path) == []
    none = EncodedImages("none", ["a"], np.zeros(1, np.int64), [b"x"], "none")
    with pytest.raises(UserError, match=r"none of the 1 images can be read.*not an image"):
        pack_split(none, tmp_path / "new" / "deep", "train")
    assert not (tmp_path / "new").exists()


class Stop(BaseException):
    """What nothing catches, as a kill."""


@pytest.mark.parametrize("after", [0, 5, 11, 12, 23])
def test_a_stop_in_the_middle_leaves_nothing(tmp_path: Path, after: int):
    left = [after]

    def stop(_: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    splits: dict[str, Source] = {"train": made(), "test": made()}
    with pytest.raises(Stop):
        pack_splits(splits, tmp_path / "new", shard_bytes=9_000, on_item=stop)
    assert not (tmp_path / "new").exists()
    pack_splits(splits, tmp_path / "new", shard_bytes=9_000)
    assert verify(tmp_path / "new") == []


def test_what_is_there_is_never_written_over(tmp_path: Path):
    pack_split(made(), tmp_path, "train")
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    asked: list[int] = []
    for name in ("train", "training"):
        with pytest.raises(UserError, match="has shards of train already: train-000000.tar"):
            pack_split(made(3), tmp_path, name, on_item=asked.append)
    assert asked == []
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before
    pack_split(made(3), tmp_path, "test")  # another split is welcome
    assert len(open_splits(str(tmp_path))) == 2
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="the output is a file"):
        pack_split(made(3), tmp_path / "file", "train")
    with pytest.raises(UserError, match=r"no split is called 'holdout'"):
        pack_split(made(3), tmp_path / "x", "holdout")


def test_shards_missing_or_of_another_size(tmp_path: Path):
    pack_split(made(), tmp_path, "train", shard_bytes=9_000)
    path = tmp_path / "train-000001.tar"
    data = path.read_bytes()
    source = open_source(str(tmp_path))
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"the shard has .* bytes, the index says") as raised:
        open_splits(str(tmp_path))
    assert raised.value.where == str(path)
    assert "bytes, the index says" in verify(tmp_path)[0]
    path.write_bytes(data[:600])
    first = int((load_index(tmp_path / "train.index.safetensors").shard == 0).sum())
    with pytest.raises(UserError, match="the shard was cut short"):
        source.read(first + 1)
    path.unlink()
    with pytest.raises(UserError, match="cannot read a shard: No such file"):
        open_splits(str(tmp_path))
    with pytest.raises(UserError, match="cannot read the shard: No such file"):
        pickle.loads(pickle.dumps(source)).read(first)
    assert "No such file" in verify(tmp_path)[0]


def test_verify_finds_a_flipped_bit(tmp_path: Path):
    pack_split(made(), tmp_path, "train")
    index_of = load_index(tmp_path / "train.index.safetensors")
    path = tmp_path / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[int(index_of.offset[5]) + 40] ^= 1
    path.write_bytes(data)
    problems = verify(tmp_path)
    assert len(problems) == 1
    assert "sha256" in problems[0]
    data[int(index_of.offset[5]) - 400] ^= 1  # a header: no member is found from there on
    path.write_bytes(data)
    assert any("damaged" in problem for problem in verify(tmp_path))


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("offset", 512, "no member of the tar begins at byte"),
        ("length", -1, "bytes in the tar, the index says"),
        ("label", 1, "label '0' in the tar, the index says 'bee'"),
    ],
)
def test_verify_finds_a_wrong_index(tmp_path: Path, field: str, change: int, message: str):
    pack_split(made(), tmp_path, "train")
    path = tmp_path / "train.index.safetensors"
    wrong = load_index(path)
    getattr(wrong, field)[0] += change
    wrong.save(path)
    problems = verify(tmp_path)
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": np.array([0, 3])}, "a label that is no class"),
        ({"label": np.array([0, -1])}, "a label that is no class"),
        ({"shard": np.array([0, 1], np.int32)}, "an image in no shard"),
        ({"offset": np.array([0, -5])}, "before the beginning"),
        ({"length": np.array([0, 5000])}, "behind the end"),
        ({"length": np.array([0, 2**63 - 1])}, "behind the end"),
        ({"offset": np.array([0])}, "1 values of offset for 2 images"),
        ({"offset": np.array([0.0, 1.0])}, "offset is float64"),
        ({"name_ends": np.array([0, 3, 2])}, "names that do not fill"),
        ({"shards": [Shard("../x.tar", 4000, None)]}, "a shard outside the folder"),
        ({"class_names": ["a", 3]}, "class names that are no text"),
    ],
)
def test_an_index_that_contradicts_itself(tmp_path: Path, changes, message: str):
    values = {
        "class_names": ["a", "b"],
        "shards": [Shard("x.tar", 4000, None)],
        "shard": np.zeros(2, np.int32),
        "offset": np.array([512, 2048]),
        "length": np.array([10, 10]),
        "label": np.array([0, 1]),
        "names": np.zeros(2, np.uint8),
        "name_ends": np.array([0, 1, 2]),
    }
    ShardIndex(**values).save(tmp_path / "train.index.safetensors")
    assert len(load_index(tmp_path / "train.index.safetensors")) == 2
    ShardIndex(**{**values, **changes}).save(tmp_path / "train.index.safetensors")
    with pytest.raises(UserError, match=message):
        open_splits(str(tmp_path))


def test_another_safetensors_file(tmp_path: Path):
    from safetensors.numpy import save_file

    for metadata in (None, {"allmlp_shards": '{"version": 2}'}):
        save_file({"x": np.zeros(1)}, tmp_path / "train.index.safetensors", metadata)
        with pytest.raises(UserError, match="not an index of shards"):
            open_splits(str(tmp_path))
    save_file({"x": np.zeros(1)}, tmp_path / "train.index.safetensors", {"allmlp_shards": "[1]"})
    with pytest.raises(UserError, match="the index is damaged"):
        open_splits(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\xff" * 8 + b"{}"])
def test_a_damaged_index(tmp_path: Path, data: bytes):
    (tmp_path / "train.index.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="the index is damaged"):
        open_splits(str(tmp_path))


def _read(source: ShardImages) -> list[bytes]:
    return [source.read(at) for at in (11, 0, 6, 0)]


def test_it_survives_pickling_and_forking(tmp_path: Path):
    pack_split(made(), tmp_path, "train", shard_bytes=1)
    source = open_source(str(tmp_path))
    assert isinstance(source, ShardImages)
    expected = _read(source)
    assert _read(pickle.loads(pickle.dumps(source))) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_read, [source] * 4) == [expected] * 4
    assert _read(source) == expected


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("allmlp.data.shards._OPEN_SHARDS", 3)
    pack_split(made(), tmp_path, "train", shard_bytes=1)
    source = open_source(str(tmp_path))
    assert isinstance(source, ShardImages)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    assert content(source) == content(made())
    assert len(source._descriptors) == 3
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before + 3


def test_a_million_images_are_light(tmp_path: Path):
    count = 1_000_000
    names = np.frombuffer(b"n01440764/x.JPEG" * count, np.uint8)
    made_index = ShardIndex(
        ["a", "b"],
        [Shard("train-000000.tar", 10 * count, None)],
        shard=np.zeros(count, np.int32),
        offset=np.arange(count),
        length=np.full(count, 5),
        label=np.arange(count) % 2,
        names=names,
        name_ends=np.arange(count + 1) * 16,
    )
    made_index.save(tmp_path / "train.index.safetensors")
    with (tmp_path / "train-000000.tar").open("wb") as file:
        file.truncate(10 * count)
    tracemalloc.start()
    source = open_source(str(tmp_path))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count
    assert source.item_name(count - 1).endswith("/train-000000.tar:n01440764/x.JPEG")
    assert kept < 70 * count
    assert peak < 150 * count


def test_metadata_is_json(tmp_path: Path):
    """Another reader needs nothing of ours."""
    from safetensors import safe_open

    pack_split(made(), tmp_path, "train")
    with safe_open(str(tmp_path / "train.index.safetensors"), framework="np") as file:
        described = json.loads(file.metadata()["allmlp_shards"])
        assert described["class_names"] == ["ant", "bee", "cat"]
        name, size, sha256 = described["shards"][0]
        assert (name, size) == ("train-000000.tar", (tmp_path / name).stat().st_size)
        assert len(sha256) == 64
        at, length = (int(file.get_tensor(key)[4]) for key in ("offset", "length"))
    data = (tmp_path / "train-000000.tar").read_bytes()
    assert data[at : at + length] == made().read(4)
