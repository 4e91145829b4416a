"""Which images a run was trained on, and which it held out, wherever they lie now."""

import json
import shutil
from pathlib import Path

import pytest

import allmlp as am
from allmlp.data.source import Source
from allmlp.training import own_images
from allmlp.training.dataset import Splits, open_training_data
from allmlp.training.own_images import open_measured
from conftest import draw, make_class_folder, ran, tiny_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data, 20 images without splits, and run, which held 2 of them out."""
    place = tmp_path_factory.mktemp("own")
    make_class_folder(place / "data", {"ant": 10, "bee": 10})
    tiny_run(place / "data", place / "run", steps=1)
    return place


def names(source: Source) -> set[str]:
    paths = (Path(source.item_name(index)) for index in range(len(source)))
    return {f"{path.parent.name}/{path.stem}" for path in paths}


def splits_of(made: Path) -> Splits:
    return open_training_data(own_images.config_of(made / "run").data)


def test_the_commands_that_the_run_prints_measure_the_held_out_images(made, capsys, tmp_path):
    log = (made / "run" / "log.txt").read_text()
    for number, data in enumerate((made / "data", f"{made / 'data'}:validation")):
        report = tmp_path / str(number)
        out, _ = ran(capsys, "evaluate", made / "run", "--data", data, "--output", report)
        assert "the 2 held-out images of this run" in out
        assert "trained on" not in out
        said = json.loads((report / "evaluation.json").read_text())
        assert (said["images"], said["are_held_out"], said["trained_on"]) == (2, True, 0)
        validation = json.loads((made / "run" / "validation" / "evaluation.json").read_text())
        assert (said["top1"], said["loss"]) == (validation["top1"], validation["loss"])
        assert validation["are_held_out"] is True
    assert f"mixer evaluate {made / 'run'} --data {made / 'data'}:validation\n" in log


def test_moved_data_is_the_same_data(made, tmp_path, monkeypatch):
    shutil.copytree(made / "data", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "moved"), "moved", "moved/", "moved:validation"):
        found = open_measured(str(made / "run"), name)
        assert found.are_held_out
        assert names(found.source) == names(splits_of(made).validation)


def test_data_with_splits_of_its_own_is_measured_by_them(made, tmp_path):
    """And its training images are known where they lie in another split, under another name."""
    make_class_folder(tmp_path / "new" / "test", {"ant": 2, "bee": 2}, start=500)
    make_class_folder(tmp_path / "new" / "train", {"ant": 2, "bee": 2}, start=600)
    trained = [splits_of(made).train.item_name(at) for at in range(2)]
    found = open_measured(str(made / "run"), str(tmp_path / "new"))
    assert (len(found.source), found.are_held_out) == (4, False)
    assert (found.trained_on, found.notes) == (0, ())
    for number in range(2):
        shutil.copy(trained[number], tmp_path / "new" / "test" / "ant" / f"copy{number}.png")
    found = open_measured(str(made / "run"), str(tmp_path / "new"))
    assert (len(found.source), found.trained_on) == (6, 2)
    assert found.notes == ("2 of 6 images were trained on",)


def test_images_of_the_run_beside_new_ones(made, tmp_path):
    shutil.copytree(made / "data", tmp_path / "more")
    for number in range(3):
        draw(700 + number).save(tmp_path / "more" / "bee" / f"new{number}.png")
    found = open_measured(str(made / "run"), str(tmp_path / "more"))
    assert (len(found.source), found.are_held_out, found.trained_on) == (23, False, 18)
    with pytest.raises(am.UserError, match="unknown split"):
        open_measured(str(made / "run"), f"{tmp_path / 'more'}:validation")


def test_large_data_is_looked_at_in_part(made, monkeypatch):
    """Every third of the 20 images, and what is found of them is scaled up."""
    monkeypatch.setattr(own_images, "MOST_CHECKED", 7)
    trained = names(splits_of(made).train)
    part = [f"{name}/{at}" for name in ("ant", "bee") for at in range(10)][::3]
    found = open_measured(str(made / "run"), f"{made / 'data'}:train")
    assert found.trained_on == round(len(trained & {*part}) * 20 / 7)
    assert found.notes[0].startswith("about ")


def test_what_an_older_run_does_not_know_is_said(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    (run / "training_images.txt").unlink()
    found = open_measured(str(run), f"{made / 'data'}:train")
    assert found.trained_on is None
    assert "not known" in found.notes[0]
    assert open_measured(str(run), str(made / "data")).are_held_out
    (run / "environment.json").unlink()
    assert not open_measured(str(run), str(made / "data")).are_held_out


@pytest.mark.parametrize(
    ("file", "study"), [("finetune.json", {"seeds": [0]}), ("folds.json", {"best": 1})]
)
def test_a_study_names_the_run_of_its_model(made, tmp_path, file, study):
    """Its usual name may be that of a run with other settings."""
    for name in ("seed-0", "fold-1"):
        make_class_folder(tmp_path / name, {"x": 1})
    shutil.copytree(made / "run", tmp_path / "run-12345678")
    (tmp_path / file).write_text(json.dumps({**study, "run": "run-12345678"}))
    assert open_measured(str(tmp_path), str(made / "data")).are_held_out
