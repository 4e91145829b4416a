"""The report of a data set, and `mixer data check` that prints it."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allmlp.cli.check import check
from allmlp.data import check as module
from allmlp.data.check import check_source, format_bytes
from allmlp.data.drop_list import read_drop_list, without
from allmlp.data.sources import open_splits
from allmlp.data.write_shards import pack_splits
from allmlp.errors import UserError
from allmlp.training.dataset import open_training_data
from conftest import draw, encode, make_class_folder, tiny_config
from odd_images import png16, tiff


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """Two splits with one of everything that the report names."""
    folder = tmp_path / "odd"
    make_class_folder(folder / "train", {"ant": 3, "bee": 4, "cat": 1})
    make_class_folder(folder / "val", {"ant": 2}, start=100)
    ant, bee = folder / "train" / "ant", folder / "train" / "bee"
    exif = Image.Exif()
    exif[0x0112] = 6
    (ant / "turned.jpg").write_bytes(encode(draw(200, (60, 40)), "JPEG", exif=exif))
    draw(201).convert("RGBA").save(ant / "alpha.png")
    Image.fromarray(np.full((20, 50), 40_000, dtype=np.uint16)).save(ant / "deep.png")
    draw(202).convert("CMYK").save(bee / "cmyk.jpg")
    frames = [draw(203), draw(204)]
    frames[0].save(bee / "animated.gif", save_all=True, append_images=frames[1:])
    draw(205, (8, 70)).save(bee / "tiny.png")
    (bee / "cut.png").write_bytes(encode(draw(206))[:200])
    (bee / "text.png").write_bytes(b"no image at all")
    (folder / "val" / "ant" / "copy.png").write_bytes((bee / "0.png").read_bytes())
    return folder


def test_the_report_counts_everything(odd_folder: Path):
    report = check_source(open_splits(str(odd_folder)), "odd", num_workers=0)
    train, validation = report.splits["train"], report.splits["validation"]
    assert (train.num_images, validation.num_images) == (16, 3)
    assert train.class_counts == {"ant": 6, "bee": 9, "cat": 1}
    assert validation.missing_classes() == ["bee", "cat"]
    assert train.formats == {"PNG": 11, "JPEG": 2, "GIF": 1}
    assert train.modes == {"RGB": 10, "CMYK": 1, "I;16": 1, "P": 1, "RGBA": 1}
    assert train.oddities == {
        "turned by EXIF": 1,
        "alpha": 1,
        "16-bit": 1,
        "CMYK": 1,
        "animated": 1,
    }
    assert train.sizes == {"smallest": (70, 8), "median": (30, 40), "largest": (60, 40)}
    assert [Path(each.name).name for each in train.tiny] == ["tiny.png"]
    assert [Path(each.name).name for each in report.unreadable["train"]] == ["cut.png", "text.png"]
    assert list(report.unreadable) == ["train"]
    readable = (odd_folder / "train").rglob("*.*")
    size = sum(path.stat().st_size for path in readable if path.stem not in ("cut", "text"))
    assert train.num_bytes == size
    assert report.duplicates is not None
    assert report.duplicates.count_with("validation", "train") == 1
    assert report.duplicates.other_label().sum() == 1


def test_every_image_is_read_once_where_nothing_looks_alike(class_folder: Path):
    class Counted:
        def __init__(self, source: object) -> None:
            self.source, self.reads = source, []

        def __getattr__(self, name: str) -> object:
            return getattr(self.source, name)

        def __len__(self) -> int:
            return len(self.source)  # pyright: ignore

        def read(self, index: int) -> bytes:
            self.reads.append(index)
            return self.source.read(index)  # pyright: ignore

    splits = {name: Counted(each) for name, each in open_splits(str(class_folder)).items()}
    check_source(splits, "data", num_workers=0)  # pyright: ignore
    assert {name: each.reads for name, each in splits.items()} == {
        name: list(range(len(each))) for name, each in splits.items()
    }


def test_huge_images(class_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "HUGE_PIXELS", 1000)
    report = check_source(open_splits(f"{class_folder}:validation"), "data", num_workers=0)
    assert len(report.splits["validation"].huge) == 9
    assert report.splits["validation"].huge[0].what.startswith("30x40 pixels, ")


def test_sizes_are_told_in_words(odd_folder: Path, class_folder: Path):
    report = check_source(open_splits(str(class_folder)), "data", num_workers=0)
    assert report.splits["train"].size_summary == "all 30x40"
    report = check_source(open_splits(str(odd_folder)), "odd", num_workers=0)
    assert report.splits["train"].size_summary.startswith("4 different; shorter side 30 px")


def test_nothing_readable(tmp_path: Path):
    folder = tmp_path / "data" / "ant"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(b"")
    assert check(str(folder.parent), output=str(tmp_path / "out"), num_workers=0) == 3
    assert (tmp_path / "out" / "samples.png").exists()


def test_bytes_in_words():
    assert [format_bytes(n) for n in (12, 3_400, 12_345_678, 5 * 10**9)] == [
        "12 bytes",
        "3.4 kB",
        "12.3 MB",
        "5.0 GB",
    ]


def test_the_verb_prints_and_writes(
    odd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output, drops = tmp_path / "report", tmp_path / "drops.txt"
    code = check(str(odd_folder), output=str(output), drop_list=str(drops), num_workers=0)
    out = capsys.readouterr().out
    assert code == 3
    assert "unreadable images: 2" in out
    assert "cut.png: the image is damaged" in out
    assert "text.png: the file is not an image" in out
    assert "special: turned by EXIF 1, alpha 1, 16-bit 1, CMYK 1, animated 1" in out
    assert "classes without images: bee, cat" in out
    assert "duplicates of different classes: 1 pair" in out
    assert "(bee) and validation[2]" in out
    assert "drop list" in out
    assert sorted(each.name for each in output.iterdir()) == [
        *("bad_files.txt", "check.json", "duplicates.csv", "duplicates.png", "samples.png"),
    ]
    saved = json.loads((output / "check.json").read_text())
    assert saved["splits"]["train"]["num_images"] == 16
    assert saved["duplicates"]["pairs_of_other_classes"] == 1
    assert len((output / "bad_files.txt").read_text().splitlines()) == 2
    with (output / "duplicates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["class_1"], row["class_2"], row["kind"]) for row in rows] == [
        ("bee", "ant", "same file")
    ]
    splits = open_splits(str(odd_folder))
    assert len(without(splits["train"], read_drop_list(drops), "train")) == 15


def test_a_clean_folder(class_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert check(str(class_folder), num_workers=0) == 0
    out = capsys.readouterr().out
    assert "unreadable images: none" in out
    assert "--output FOLDER" in out
    assert check(str(class_folder), duplicates="off", num_workers=0) == 0
    assert "\nduplicates: " not in capsys.readouterr().out


def test_damaged_shards_are_named(
    class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    packed = tmp_path / "packed"
    pack_splits(open_splits(str(class_folder)), packed)
    assert check(str(packed), num_workers=0) == 0
    assert "of the shards" not in capsys.readouterr().out
    [shard] = packed.glob("train*.tar")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # behind the last image: all can be decoded
    shard.write_bytes(data)
    assert check(f"{packed}:train", num_workers=0) == 3
    out = capsys.readouterr().out
    assert "problems of the shards: 1" in out
    assert f"{shard}: sha256" in out
    assert "unreadable images: none" in out


def test_long_lists_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_class_folder(tmp_path / "data", {"ant": 2})
    for number in range(30):
        (folder / "ant" / f"bad{number}.png").write_bytes(b"bad")
    assert check(str(folder), num_workers=0) == 3
    out = capsys.readouterr().out
    assert out.count("the file is not an image") == 20
    assert "... and 10 more; all in bad_files.txt, with --output FOLDER" in out


def test_mistakes_are_told_before_the_work(class_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="--duplicates off"):
        check(str(class_folder), duplicates="off", drop_list="list.txt")
    with pytest.raises(UserError, match="no such data"):
        check(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be a folder"):
        check(str(class_folder), output=str(tmp_path / "file"))
    with pytest.raises(UserError, match="does not exist"):
        check(str(class_folder), drop_list=str(tmp_path / "none" / "list.txt"))


def test_12_bit_values_in_16_bit_files_are_named(tmp_path: Path, capsys):
    folder = make_class_folder(tmp_path / "data", {"ant": 4, "bee": 4})
    dark = np.full((20, 20), 600, np.uint16)
    dark[3, 3] = 4095
    Image.fromarray(dark).save(folder / "ant" / "dark.png")
    (folder / "bee" / "dark.png").write_bytes(png16(np.stack([dark, dark // 2, dark], axis=-1)))
    (folder / "bee" / "inverted.tif").write_bytes(tiff(np.full(25, 65_000), 16, photometric=0))
    Image.fromarray(dark * 16).save(folder / "ant" / "bright.png")
    report = check_source(open_splits(str(folder)), "x", num_workers=0).splits["train"]
    assert report.oddities["16-bit"] == 4
    found = {each.name.removeprefix(str(folder)): each.what for each in report.dark}
    assert list(found) == ["/ant/dark.png", "/bee/dark.png", "/bee/inverted.tif"]
    assert [re.findall(r"[\d,]+", what)[0] for what in found.values()] == ["4,095", "4,095", "535"]
    assert check(str(folder)) == 0
    out = capsys.readouterr().out
    assert "brightest sample 4,095 of 65,535" in out
    assert "by 16" in out


@pytest.mark.parametrize("scale", [1, 16])
def test_training_says_that_16_bit_images_are_nearly_black(tmp_path: Path, scale: int):
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for at in range(4):
            samples = np.full((9, 9), 3_000 + 300 * at, np.uint16)
            Image.fromarray(samples * scale).save(tmp_path / "data" / name / f"{at}.png")
    config = tiny_config(str(tmp_path / "data"), tmp_path / "run")
    lines = open_training_data(config.data).describe()
    said = [line for line in lines if "nearly black" in line]
    assert len(said) == (1 if scale == 1 else 0)
    assert scale != 1 or "3,900 of 65,535" in said[0]
