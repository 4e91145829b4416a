"""Wrong labels are found, whatever the model's classes; training takes the list of suspects."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

import allmlp as am
from allmlp.data.fingerprint import exclude, read_exclude_list
from allmlp.data.sources import open_splits
from allmlp.label_mistakes import FILES, confident_learning
from conftest import make_colours, mixer, refused, tiny_model

WRONG = {"train/blue/03.png": "red", "train/red/07.png": "green", "val/green/02.png": "blue"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three classes of a colour each, three images in wrong folders, and a copy of one of them."""
    for split, count in (("train", 12), ("val", 6)):
        wrong = {path.removeprefix(f"{split}/"): name for path, name in WRONG.items()}
        counts = dict.fromkeys(("blue", "green", "red"), count)
        make_colours(tmp_path / "data" / split, counts, count, wrong)
    copy = (tmp_path / "data/train/blue/03.png").read_bytes()
    (tmp_path / "data/train/red/copy.png").write_bytes(copy)
    return tmp_path / "data"


def test_wrong_labels_come_first(data: Path):
    model = tiny_model(num_classes=7)
    found = am.find_label_mistakes(model, data, num_workers=0, device="cpu")
    names = [image.name.removeprefix(f"{data}/") for image in found.ranked]
    assert set(names[:3]) == set(WRONG)
    assert len(names) == 55
    for image, name in zip(found.ranked[:3], names, strict=False):
        assert image.suspected
        assert image.suggestion == WRONG[name]
        assert open_splits(str(data))[image.split].item_name(image.index) == image.name
    assert len(found.suspected) == 3
    assert found.accuracy == pytest.approx(52 / 55)
    probabilities = [image.label_probability for image in found.ranked]
    assert probabilities == sorted(probabilities)


def test_the_command_writes_what_training_takes(data: Path, tmp_path: Path, capsys):
    am.save_model(tiny_model(num_classes=0), tmp_path / "m.safetensors")
    (data / "train" / "red" / "bad.png").write_bytes(b"no image")
    out = tmp_path / "out"
    flags = "--data", data, "--output", out, "--no-cache", "--num-workers", 0, "--top", 3
    code, printed, _ = mixer(capsys, "data", "mistakes", tmp_path / "m.safetensors", *flags)
    assert code == 3  # a bad image
    assert "suspected  3 labels" in printed
    assert "train/blue/03.png" in printed
    assert {path.name for path in out.iterdir()} == set(FILES)
    rows = list(csv.DictReader((out / "mistakes.csv").read_text().splitlines()))
    assert [row["suspected"] for row in rows] == ["1"] * 3 + ["0"] * 52
    excluded, splits = read_exclude_list(out / "exclude.txt"), open_splits(str(data))
    kept = exclude(splits["train"], excluded, "train")
    assert {splits["train"].item_name(at) for at in range(38)} - {
        kept.item_name(at) for at in range(36)
    } == {f"{data}/{name}" for name in WRONG if name.startswith("train")}
    assert len(exclude(splits["validation"], excluded, "validation")) == 17
    line = ("data", "mistakes", tmp_path / "m.safetensors", *flags)
    assert "exists already" in refused(capsys, tmp_path, *line)


def test_a_class_of_one_image_is_not_judged(data: Path):
    (data / "train" / "odd").mkdir()
    (data / "train" / "blue" / "00.png").rename(data / "train" / "odd" / "00.png")
    found = am.find_label_mistakes(tiny_model(num_classes=0), data, num_workers=0, device="cpu")
    assert (found.ranked[-1].label, found.ranked[-1].suspected) == ("odd", False)
    assert any("odd" in note for note in found.notes)


def test_data_that_is_refused(data: Path):
    for path in data.rglob("*.png"):
        path.write_bytes(b"damaged")
    with pytest.raises(am.UserError, match="none of the images can be decoded"):
        am.find_label_mistakes(tiny_model(num_classes=0), data, num_workers=0)
    for folder in [*data.glob("*/green"), *data.glob("*/red")]:
        shutil.rmtree(folder)
    with pytest.raises(am.UserError, match="two classes"):
        am.find_label_mistakes(tiny_model(num_classes=0), data, num_workers=0)


def test_confident_learning_by_hand():
    """The thresholds are 0.6 and 1.3 / 3; below an eighth, a label of two classes is unlikely."""
    own = np.array([0.9, 0.85, 0.05, 0.9, 0.1, 0.3])
    labels = np.array([0, 0, 0, 1, 1, 1])
    probabilities = np.where(np.eye(2)[labels] > 0, own[:, None], 1 - own[:, None])
    suggestions, suspected = confident_learning(probabilities, labels)
    assert suggestions.tolist() == [1, 1, 1, 0, 0, 0]
    assert suspected.tolist() == [False, False, True, False, True, False]
    assert confident_learning(probabilities, labels, 1.0)[1].tolist() == [0, 0, 1, 0, 1, 1]
    labels[:] = 0  # a class without images has no threshold that could be reached
    assert not confident_learning(probabilities, labels)[1].any()
