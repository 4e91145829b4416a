"""The images of a run: splits, holding out, bad files, drop lists, augmentation."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import allmlp as am
from allmlp.data.check import find_duplicates
from allmlp.data.fingerprint import exclude_list
from allmlp.data.image import EncodedImage
from allmlp.data.sources import open_splits
from allmlp.training.config import DataSettings
from allmlp.training.dataset import Augmentation, open_training_data, split_data
from conftest import draw, encode, make_class_folder, tiny_config, tiny_run


def test_without_val_some_images_are_held_out(class_folder: Path, tmp_path: Path):
    config = tiny_config(str(class_folder), tmp_path / "run", data__holdout=0.3)
    with pytest.raises(am.UserError, match="holdout 0.3, but the data has validation"):
        am.train(config, quiet=True)
    shutil.rmtree(class_folder / "val")
    splits = open_training_data(config.data)
    both = (splits.train, splits.validation)
    trained, held_out = ({split.item_name(at) for at in range(len(split))} for split in both)
    assert splits.held_out
    assert (len(trained), len(held_out)) == (14, 6)
    assert not trained & held_out
    result = am.train(config, quiet=True)
    log = (result.run_folder / "log.txt").read_text()
    assert "6 to validate (held out of the training images), none to test" in log


def test_a_few_bad_images_stop_no_small_run(class_folder, tmp_path):
    """1 of 20, or 5: less than half of them and not all of a class, whatever --max-bad says."""
    for name in ("ant/0", "ant/1", "bee/3", "cat/0", "cat/1"):
        (class_folder / "train" / f"{name}.png").write_text("<html>not found</html>")
    (class_folder / "val" / "bee" / "0.png").write_text("")
    run = tiny_run(class_folder, tmp_path / "run").run_folder
    assert len((run / "bad_files.txt").read_text().splitlines()) == 6
    log = (run / "log.txt").read_text()
    assert "warning: 5 of 20 training images cannot be read and are skipped" in log
    assert f"6 bad images left out, named in {run / 'bad_files.txt'}" in log


@pytest.mark.parametrize(
    ("bad", "changes", "message"),
    [
        (["bee/3"], {"data__max_bad": 0.0}, r"1 of 20 .* limit is 0.0%"),
        (["ant/0", "ant/1", "ant/2", "bee/0", "bee/1", "cat/0"], {}, r"6 of 20 .*1.0% or 5 images"),
        ([f"cat/{n}" for n in range(5)], {}, r"5 of 20 .* all images of the class 'cat'"),
    ],
)
def test_more_bad_images_stop_a_run_before_it_begins(class_folder, tmp_path, bad, changes, message):
    for path in (class_folder / "train" / "cat").glob("[5-9]*.png"):
        path.rename(class_folder / "train" / "bee" / f"1{path.name}")
    for name in bad:
        (class_folder / "train" / f"{name}.png").write_text("<html>not found</html>")
    with pytest.raises(am.UserError, match=rf"{message}[\s\S]*{bad[0]}\.png"):
        tiny_run(class_folder, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["train/bee", "val/cat"])
def test_too_many_damaged_images_stop_the_run(class_folder, tmp_path, name):
    for path in (class_folder / name).iterdir():
        path.write_bytes(path.read_bytes()[:-60])  # the header is good
    with pytest.raises(am.UserError, match=rf"images cannot be decoded[\s\S]*{name}/"):
        tiny_run(class_folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("classes", "message"),
    [({"only": 4}, "there is only one class, 'only'"), ({"a": 1, "b": 1}, "no class has two")],
)
def test_data_that_is_no_task(tmp_path, classes, message):
    make_class_folder(tmp_path / "data", classes)
    with pytest.raises(am.UserError, match=message):
        tiny_run(tmp_path / "data", tmp_path / "run")


def test_augmentation_makes_the_models_size(class_folder):
    everything = am.recipe("scratch")
    for setting in ("randaugment=15", "random_erasing=1.0", "crop=padded"):
        everything = everything.with_values({}, [f"augment.{setting}"])
    for config in (am.recipe("digits"), am.recipe("scratch"), everything):
        for channels in (1, 3):
            preprocessing = am.Preprocessing(image_size=(8, 12), channels=channels)
            augment = Augmentation(config.augment, preprocessing)
            for size in ((3, 50), (12, 8), (100, 70)):
                image = EncodedImage(encode(draw(1, size)), "x", channels)
                out = augment(image, np.random.default_rng(0))
                assert (out.dtype, out.shape) == (np.uint8, (8, 12, channels))


def test_randaugment_of_0_is_off():
    config, image = am.recipe("scratch"), EncodedImage(encode(draw(1)), "x", 3)
    for seed in range(9):
        found = []
        for settings in ([], ["augment.randaugment=0"]):
            augment = config.with_values({}, settings).augment
            made = Augmentation(augment, am.Preprocessing(image_size=(8, 8)))
            found.append(made(image, np.random.default_rng(seed)))
        assert np.array_equal(*found)


def test_a_drop_list_leaves_training_and_validation_images_out_and_test_whole(tmp_path):
    """The copies of test images go from train; the run says how many."""
    data = tmp_path / "data"
    for split, start in (("train", 0), ("val", 100), ("test", 200)):
        make_class_folder(data / split, {"a": 5, "b": 5}, start=start)
    for number in range(3):
        copied = (data / "test" / "a" / f"{number}.png").read_bytes()
        (data / "train" / "a" / f"copy{number}.png").write_bytes(copied)
    (data / "test" / "b" / "again.png").write_bytes((data / "test" / "b" / "0.png").read_bytes())
    drops = tmp_path / "copies.txt"
    splits = open_splits(str(data))
    found = find_duplicates(splits, num_workers=0)
    drops.write_text(exclude_list(found.splits, found.to_exclude(), "data"))
    run = tiny_run(data, tmp_path / "run", data__exclude=str(drops)).run_folder
    said = (run / "log.txt").read_text()
    assert "10 images to train, 10 to validate (the data's own), 11 to test" in said
    assert "left out 3 images by" in said
    draw(77).save(data / "train" / "a" / "new.png")
    with pytest.raises(am.UserError, match=r"its train has 13 images[\s\S]*has 14"):
        tiny_run(data, tmp_path / "other", data__exclude=str(drops))
    assert not (tmp_path / "other").exists()


def test_a_list_of_the_training_images_alone(class_folder, tmp_path):
    splits = open_splits(str(class_folder))
    drops = tmp_path / "drops.txt"
    drops.write_text(exclude_list({"train": splits["train"]}, [("train", 0, "bad")], "data"))
    found = split_data(DataSettings(source=str(class_folder), exclude=str(drops)))
    assert found.validation is not None
    assert (len(found.train), len(found.validation)) == (19, len(splits["validation"]))


def test_names_that_figures_and_files_cannot_hold(tmp_path):
    """Formulas for matplotlib, and bytes that are no text."""
    data = tmp_path / os.fsdecode(b"ro\xffot")
    make_class_folder(data, {"a$_x_$": 4, r"b$\frac$": 4})
    result = tiny_run(data, tmp_path / "run")
    assert (result.run_folder / "plots" / "confusion.png").exists()
    assert (result.run_folder / "best" / "README.md").read_text(encoding="utf-8")
    make_class_folder(data, {os.fsdecode(b"c\xff"): 4})
    with pytest.raises(am.UserError, match="the name of a class is not valid text"):
        tiny_run(data, tmp_path / "other")
