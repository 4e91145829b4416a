"""The report of a data set, and `mixer data check` that prints it."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allmlp.data.check import check_source
from allmlp.data.fingerprint import exclude, read_exclude_list
from allmlp.data.sources import open_splits
from allmlp.data.sources.packed import pack_splits
from conftest import draw, encode, make_class_folder, mixer, ran, turned
from odd_images import png16, tiff


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """Two splits with one of everything that the report names."""
    folder = tmp_path / "odd"
    make_class_folder(folder / "train", {"ant": 3, "bee": 4, "cat": 1})
    make_class_folder(folder / "val", {"ant": 2}, start=100)
    ant, bee = folder / "train" / "ant", folder / "train" / "bee"
    (ant / "turned.jpg").write_bytes(encode(draw(200, (60, 40)), "JPEG", exif=turned(6)))
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
    values, duplicates = check_source(open_splits(str(odd_folder)), "odd", num_workers=0)
    train, validation = values["splits"]["train"], values["splits"]["validation"]
    assert (train["num_images"], validation["num_images"]) == (16, 3)
    assert train["class_counts"] == {"ant": 6, "bee": 9, "cat": 1}
    assert validation["class_counts"]["bee"] == 0
    assert train["formats"] == {"PNG": 11, "JPEG": 2, "GIF": 1}
    assert train["modes"] == {"RGB": 10, "CMYK": 1, "I;16": 1, "P": 1, "RGBA": 1}
    assert train["sizes"] == {"smallest": (70, 8), "median": (30, 40), "largest": (60, 40)}
    assert [Path(image["name"]).name for image in train["tiny"]] == ["tiny.png"]
    assert [Path(image["name"]).name for image in train["unreadable"]] == ["cut.png", "text.png"]
    assert validation["unreadable"] == []
    readable = (odd_folder / "train").rglob("*.*")
    size = sum(path.stat().st_size for path in readable if path.stem not in ("cut", "text"))
    assert train["num_bytes"] == size
    assert duplicates.counts()["validation"]["train"] == 1
    assert duplicates.other_label().sum() == 1


def test_nothing_readable(tmp_path: Path, capsys):
    folder = tmp_path / "data" / "ant"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(b"")
    flags = "--output", tmp_path / "out", "--num-workers", 0
    assert mixer(capsys, "data", "check", folder.parent, *flags)[0] == 3
    assert (tmp_path / "out" / "samples.png").exists()


def test_the_command_prints_and_writes(odd_folder: Path, tmp_path: Path, capsys):
    output, excluded = tmp_path / "report", tmp_path / "excluded.txt"
    for number in range(30):
        (odd_folder / "train" / "cat" / f"bad{number}.png").write_bytes(b"bad")
    flags = "--output", output, "--exclude", excluded, "--num-workers", 0
    code, out, _ = mixer(capsys, "data", "check", odd_folder, *flags)
    assert code == 3
    assert "unreadable images: 32" in out
    assert "cut.png: the image is damaged" in out
    assert out.count("the file is not an image") == 19  # a list is cut at 20
    assert "... and 12 more" in out
    assert "classes without images: bee, cat" in out
    assert "of different classes: 1 pair" in out
    assert sorted(path.name for path in output.iterdir()) == [
        *("bad_files.txt", "check.json", "duplicates.csv", "duplicates.png", "samples.png")
    ]
    saved = json.loads((output / "check.json").read_text())
    assert saved["splits"]["train"]["num_images"] == 46
    assert saved["duplicates"]["pairs_of_other_classes"] == 1
    assert len((output / "bad_files.txt").read_text().splitlines()) == 32
    with (output / "duplicates.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["class_1"], row["class_2"], row["kind"]) for row in rows]
    assert found == [("bee", "ant", "same file")]
    train = open_splits(str(odd_folder))["train"]
    assert len(exclude(train, read_exclude_list(excluded), "train")) == 45


def test_damaged_packed_data_is_reported(class_folder: Path, tmp_path: Path, capsys):
    packed = tmp_path / "packed"
    file = pack_splits(open_splits(str(class_folder)), packed)["train"].files[0]
    code, out, _ = mixer(capsys, "data", "check", packed, "--num-workers", 0)
    assert (code, "problems of the packed data: 0" in out) == (0, True)
    values = (packed / "packed.json").read_text()  # the images themselves can be decoded
    (packed / "packed.json").write_text(values.replace(str(file.sha256), "0" * 64))
    code, out, _ = mixer(capsys, "data", "check", f"{packed}:train", "--num-workers", 0)
    assert code == 3
    assert "problems of the packed data: 1" in out
    assert str(packed / file.name) in out
    assert "unreadable images: 0" in out


def test_12_bit_values_in_16_bit_files_are_named(tmp_path: Path, capsys):
    folder = make_class_folder(tmp_path / "data", {"ant": 4, "bee": 4})
    dark = np.full((20, 20), 600, np.uint16)
    dark[3, 3] = 4095
    Image.fromarray(dark).save(folder / "ant" / "dark.png")
    (folder / "bee" / "dark.png").write_bytes(png16(np.stack([dark, dark // 2, dark], axis=-1)))
    (folder / "bee" / "inverted.tif").write_bytes(tiff(np.full(25, 65_000), 16, photometric=0))
    Image.fromarray(dark * 16).save(folder / "ant" / "bright.png")
    values, _ = check_source(open_splits(str(folder)), "x", num_workers=0)
    dark_images = values["splits"]["train"]["dark"]
    found = {image["name"].removeprefix(str(folder)): image["what"] for image in dark_images}
    assert list(found) == ["/ant/dark.png", "/bee/dark.png", "/bee/inverted.tif"]
    assert [re.findall(r"[\d,]+", what)[0] for what in found.values()] == ["4,095", "4,095", "535"]
    out, _ = ran(capsys, "data", "check", folder)
    assert "brightest sample 4,095 of 65,535" in out
    assert "by 16" in out
