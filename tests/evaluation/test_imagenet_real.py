"""ImageNet ReaL: by hand on drawn data, and on real images with a model of known answers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import allmlp as am
from allmlp.data.source import Source, subset
from allmlp.data.sources import open_source
from allmlp.data.sources.packed import pack_splits
from allmlp.evaluation.imagenet_real import (
    IMAGES,
    RealLabels,
    imagenet_classes,
    read_real,
    validation_ids,
)
from allmlp.weights.checkpoints import CHECKPOINTS
from conftest import draw, encode

IMAGENET = CHECKPOINTS["mixer_b16.i1k"].class_names() or []


def test_the_score_by_hand():
    labels: list[list[int]] = [[]] * IMAGES
    labels[0], labels[1], labels[4] = [2], [0, 2], [1]
    ids = np.array([5, 1, 2, 3, 2])
    real = RealLabels(labels, ids, np.array([2, 1, 0]))  # the model's class 0 is ImageNet's 2
    score = real.score(np.array([0, 1, 2, 3, 4]), np.array([1, 0, 1, 0, 2]))
    assert (score.images, score.correct, score.unlabelled) == (4, 3, 1)
    assert score.accuracy == 0.75
    assert score.to_json() == {"accuracy": 0.75, "images": 4, "correct": 3, "unlabelled": 1}
    with pytest.raises(am.UserError, match="none of the 1 images has a ReaL label"):
        real.score(np.array([3]), np.array([0]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Validation images 3, 17 and 50,000 in class folders."""
    for name, number in (("n01440764", 17), ("n01440764", 50_000), ("n01443537", 3)):
        (tmp_path / "val" / name).mkdir(parents=True, exist_ok=True)
        draw(number).save(tmp_path / "val" / name / f"ILSVRC2012_val_{number:08d}.JPEG")
    return tmp_path / "val"


def test_numbers_of_files_in_folders_and_shards(folder: Path, tmp_path: Path):
    source = open_source(str(folder))
    assert validation_ids(source).tolist() == [17, 50_000, 3]
    assert validation_ids(subset(source, np.array([2, 0]), "part")).tolist() == [3, 17]
    pack_splits({"validation": source}, tmp_path / "shards")
    packed = open_source(str(tmp_path / "shards"))
    assert sorted(validation_ids(packed).tolist()) == [3, 17, 50_000]


def parquet_file(
    path: Path, columns: dict[str, list[int]], names: list[str | None] | None
) -> Source:
    images = [{"bytes": encode(draw(seed))} for seed in range(3)]
    for image, name in zip(images, names or (), strict=False):
        image["path"] = name
    table = pyarrow.table({"image": images, "label": ["a", "b", "a"], **columns})
    parquet.write_table(table, path, row_group_size=2)
    return open_source(str(path))


def test_numbers_in_parquet_files(tmp_path: Path):
    names: list[str | None] = [f"ILSVRC2012_val_0000000{n}_n01440764.JPEG" for n in (4, 2, 9)]
    column = {"val_id": [30, 20, 10]}
    assert validation_ids(parquet_file(tmp_path / "a.parquet", column, names)).tolist() == [4, 2, 9]
    for others in (None, [names[0], None, "x.jpg"]):
        source = parquet_file(tmp_path / "b.parquet", column, others)
        assert validation_ids(source).tolist() == [30, 20, 10]
        assert validation_ids(subset(source, np.array([2]), "x")).tolist() == [10]
    with pytest.raises(am.UserError, match=r"number in the name '.*c.parquet\[0\]' \(3 of 3"):
        validation_ids(parquet_file(tmp_path / "c.parquet", {}, None))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cat.JPEG", r"no validation number in the name '.*cat.JPEG' \(1 of 3"),
        ("ILSVRC2012_val_000000170.JPEG", "no validation number"),
        ("ILSVRC2012_val_00050001.JPEG", "1 to 50,000, this one is 50001"),
        ("ILSVRC2012_val_00000000.JPEG", "1 to 50,000, this one is 0"),
        ("ILSVRC2012_val_00000003.JPEG", "image 3 is 2 times in the data"),
    ],
)
def test_names_that_are_refused(folder: Path, name: str, message: str):
    path = folder / "n01440764" / "ILSVRC2012_val_00000017.JPEG"
    path.rename(path.with_name(name))
    with pytest.raises(am.UserError, match=message) as no:
        validation_ids(open_source(str(folder)))
    assert Path(str(no.value.where)).is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1], [2]]", r"\[\[1\], \[2\]\]"),
        (json.dumps([[1]] * 49_999 + [3]), "0 to 999: .* got 3"),
        (json.dumps([[1], [5, 1000]] + [[1]] * 49_998), "0 to 999: .* got 1000"),
        (json.dumps([[1], [True]] + [[1]] * 49_998), "0 to 999: .* got True"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(am.UserError, match=message) as no:
        read_real(tmp_path / "real.json")
    assert str(tmp_path / "real.json") in str(no.value.where)
    assert "real.json of google-research/reassessed-imagenet" in str(no.value.fix)


def test_class_lists():
    synsets = [name[:9] for name in IMAGENET]
    words = [name[10:] for name in IMAGENET]
    joined = [f"{word.replace(' ', '_').title()}, something else" for word in words]
    straight = list(range(1000))
    for names in (IMAGENET, synsets, words, joined):
        assert imagenet_classes(names, IMAGENET).tolist() == straight
    assert imagenet_classes(synsets[::-1], IMAGENET).tolist() == straight[::-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names[:999], "ImageNet's 1,000 classes, the model knows 999"),
        (lambda names: ["n00000001 x", *names[1:]], "not those of ImageNet-1k: n00000001"),
        (lambda names: [*names[:999], names[0]], "there twice"),
        (lambda names: [name[10:] for name in reversed(names)], "class 0 is 'toilet tissue'"),
    ],
)
def test_other_classes_are_refused(change: Callable[[list[str]], list[str]], message: str):
    with pytest.raises(am.UserError, match=message):
        imagenet_classes(change(IMAGENET), IMAGENET)
