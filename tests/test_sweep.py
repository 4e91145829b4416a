"""The sweep engine: what makes a run another one, and where runs lie."""

import os
import shutil
import signal
from pathlib import Path

import pytest

import allmlp as am
from allmlp.runtime.world import World
from allmlp.sweep import RESULTS, Sweep, study_folder
from conftest import draw, make_class_folder, tiny_model
from runs import before_step
from studies import pretend, settings


def run(place: Path, name: str = "a", **changes: object) -> dict:
    return Sweep(place / "study", World(), quiet=True).run(name, settings(place, **changes))


def test_a_finished_run_is_skipped_and_a_changed_one_has_a_folder_of_its_own(place, monkeypatch):
    asked = pretend(monkeypatch, lambda config: config.optimizer.learning_rate)
    first = run(place)
    assert run(place) == run(place, num_threads=1) == first
    other = run(place, optimizer__learning_rate=0.5)
    assert (first["folder"], first["accuracy"], other["accuracy"]) == ("a", 0.01, 0.5)
    assert other["folder"].startswith("a-")
    assert run(place) == first
    assert [Path(str(config.output)).name for config in asked] == ["a", other["folder"]]


def test_moved_images_are_the_same_and_changed_ones_are_not(place, monkeypatch):
    asked = pretend(monkeypatch, lambda config: 0.5)
    run(place)
    (place / "data").rename(place / "moved")
    run(place, data__source=str(place / "moved"))
    assert len(asked) == 1
    draw(99).save(place / "moved" / "train" / "ant" / "0.png")
    run(place, data__source=str(place / "moved"))
    assert len(asked) == 2


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_weights_of_the_same_path_are_another_run(place, monkeypatch, is_finished):
    if is_finished:
        pretend(monkeypatch, lambda config: 0.5)
        run(place)
    else:
        with monkeypatch.context() as patch:
            before_step(patch, 4, lambda _: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(SystemExit):
                run(place)
    (place / "weights").rename(place / "moved")
    am.save_model(tiny_model(["z", "y", "x", "w"]), place / "weights")
    asked = pretend(monkeypatch, lambda config: 0.5)
    assert run(place)["folder"].startswith("a-")
    assert len(asked) == 1
    if is_finished:
        assert run(place, model__weights=str(place / "moved"))["folder"] == "a"
    else:
        am.train(settings(place, "study/a"), quiet=True)
        assert "weights has changed since" in (place / "study" / "a" / "log.txt").read_text()


def test_a_finished_run_outlives_its_first_weights(place):
    first = run(place)
    shutil.rmtree(place / "weights")
    assert run(place) == first


def test_groups_and_left_out_images_make_another_run(place, monkeypatch):
    asked = pretend(monkeypatch, lambda config: 0.5)
    images = sorted((place / "data" / "train").rglob("*.png"))
    rows = [f"{image},{image.parent.name},{at // 4}" for at, image in enumerate(images)]
    (place / "list.csv").write_text("\n".join(["path,label,patient", *rows]))
    source, excluded = str(place / "list.csv"), place / "exclude.txt"
    excluded.write_text("1\n2\n")
    changes = [
        {"data__source": source},
        {"data__source": f"{source}#group=patient"},
        {"data__source": source, "data__exclude": str(excluded)},
    ]
    folders = [run(place, **change)["folder"] for change in changes]
    excluded.write_text("1\n")
    folders.append(run(place, **changes[-1])["folder"])
    assert len(asked) == len({*folders}) == 4


def test_a_run_under_a_key_of_another_version_is_measured_again(place):
    first = run(place)
    file = place / "study" / RESULTS
    file.write_text(file.read_text().replace(first["key"], "0" * 16))
    again = run(place)
    assert (again["folder"], again["accuracy"]) == ("a", first["accuracy"])
    assert "resumed" in (place / "study" / "a" / "log.txt").read_text()


def test_a_damaged_line_costs_one_measurement(place, monkeypatch):
    asked = pretend(monkeypatch, lambda config: 0.5)
    run(place, "a")
    run(place, "b", seed=1)
    file = place / "study" / RESULTS
    file.write_bytes(file.read_bytes()[:-20])
    rows = [run(place, "a"), run(place, "b", seed=1)]
    assert [Path(str(config.output)).name for config in asked] == ["a", "b", "b"]
    assert [row["accuracy"] for row in rows] == [0.5, 0.5]


def test_the_folder_of_a_study(place):
    with pytest.raises(am.UserError, match="named folder"):
        study_folder(None, (), ())
    with pytest.raises(am.UserError, match=r"weights|config\.json"):
        study_folder(str(place / "weights"), ("seed-0",), ())
    with pytest.raises(am.UserError, match="data"):
        study_folder(str(place / "data" / "out"), (), [str(place / "data")])
    make_class_folder(place / "study" / "seed-0", {"x": 1})
    assert study_folder(str(place / "study"), ("seed-0",), ()) == place / "study"
