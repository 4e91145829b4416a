"""`mixer throughput` as a user sees it."""

from __future__ import annotations

import json

import pytest

from allmlp import save_model
from allmlp.evaluation import throughput as module
from allmlp.evaluation.peak import Peak
from allmlp.evaluation.result_file import read_measurement
from allmlp.training.recipes import RECIPES, recipe
from conftest import mixer, tiny_model

QUICK = ("--device", "cpu", "--seconds", "0.001", "--rounds", "1", "--batch-sizes", "1", "2")


@pytest.fixture(autouse=True)
def _quick_peak(monkeypatch: pytest.MonkeyPatch):
    def measured(device, precision, seconds, clock):
        return Peak(100.0, (2, 3, 4), precision)

    monkeypatch.setattr(module, "measure_peak", measured)


@pytest.fixture
def saved(tmp_path):
    return save_model(tiny_model(), tmp_path / "tiny").parent


def test_a_table_and_a_file(capsys, saved, tmp_path, trained):
    target = tmp_path / "new" / "speed.json"
    run = trained.run_folder
    code, out, _ = mixer(capsys, "throughput", saved, run, *QUICK, "--output", target)
    assert code == 0
    assert "machine  " in out
    assert "float32 (a small model): 100 GFLOP/s, 2x3 by 3x4" in out
    assert "images/s at batch" in out
    assert "torch's own count agrees within 1 %" in out
    assert out.splitlines()[-1] == f"written  {target}"
    lines = out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("model"))
    assert max(len(line) for line in lines[at : at + 4]) == 100  # these paths are longer
    assert lines[at + 2].startswith("...")
    assert "/tiny " in lines[at + 2]
    values = read_measurement(target)
    assert values["kind"] == "throughput"
    assert [each["name"] for each in values["models"]] == [str(saved), str(run)]
    assert [each["model"]["source"] for each in values["models"]] == [str(saved), str(run)]
    for each in values["models"]:
        assert each["best"]["images_per_second"] > 0
        assert [point["batch_size"] for point in each["points"]] == [1, 2]


def test_a_training_step_at_another_size(capsys, saved):
    code, out, _ = mixer(
        *(capsys, "throughput", saved, *QUICK),
        *("--mode", "training", "--image-size", 16, "--precision", "bfloat16", "--threads", 1),
    )
    assert code == 0
    assert "a training step (AdamW), not compiled" in out
    assert "1 thread of" in out
    assert "bfloat16 (chosen)" in out
    assert " 16 " in out
    assert "p50" not in out


def test_a_model_that_fails_is_named_and_the_others_are_measured(capsys, saved, monkeypatch):
    monkeypatch.setattr("allmlp.runtime.device.free_memory", lambda device: 10**6)
    code, out, _ = mixer(capsys, "throughput", "mixer_s32", saved, *QUICK)
    assert code == 0
    assert "failed   mixer_s32: memory: the weights take 0.1 GB, 0.0 GB are free" in out
    assert "tiny" in out
    code, out, _ = mixer(capsys, "throughput", "mixer_s32", *QUICK)
    assert code == 2
    assert "failed   mixer_s32" in out


def test_ctrl_c_prints_what_there_is(capsys, saved, tmp_path, monkeypatch):
    def stopped(courses, plan, clock, tell):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "time_latency", stopped)
    target = tmp_path / "speed.json"
    code, out, err = mixer(capsys, "throughput", saved, *QUICK, "--output", target)
    assert code == 130
    assert "images/s at batch" in out
    assert "stopped  before the end" in out
    assert "(incomplete)" in out
    assert "stopped" in err
    assert json.loads(target.read_text())["interrupted"] is True


def test_what_a_recipe_takes(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(
        RECIPES, "cifar10", lambda: recipe("digits").with_value("recipe", "cifar10")
    )
    target = tmp_path / "cost.json"
    code, out, _ = mixer(capsys, "throughput", "--recipe", "cifar10", *QUICK, "--output", target)
    assert code == 0
    assert "a training step" in out
    assert "recipe   cifar10: 100 epochs of 45,000 images (CIFAR-10" in out
    assert "days of this device" in out
    found = json.loads(target.read_text())
    cost, (model,) = found["recipe"], found["models"]
    rate = model["best"]["images_per_second"]
    assert model["mode"] == "training"
    assert cost["images_seen"] == 4_500_000
    assert cost["device_days"] == pytest.approx(4_500_000 / rate / 86_400)
    assert cost["operations"] == 3 * model["flops"]["formula"] * 4_500_000


def test_sharpness_counts_twice_and_another_optimizer_is_said(capsys, tmp_path, monkeypatch):
    changed = recipe("digits").with_values(
        {"optimizer.sam_rho": 0.1, "optimizer.sam_start": 0.25, "optimizer": "muon"}
    )
    monkeypatch.setitem(RECIPES, "digits", lambda: changed)
    target = tmp_path / "cost.json"
    flags = ("--recipe", "digits", "--images", 1000, *QUICK)
    code, out, _ = mixer(capsys, "throughput", *flags, "--output", target)
    assert code == 0
    assert "1,000 images (as given), 100,000 images, 75% of them twice" in out
    assert "the recipe's optimizer is muon, timed was AdamW" in out
    found = json.loads(target.read_text())
    rate = found["models"][0]["best"]["images_per_second"]
    assert found["recipe"]["device_days"] == pytest.approx(175_000 / rate / 86_400)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no model to measure"),
        (("mixer_s23",), "is called 'mixer_s23'"),
        (("mixer_s32", "mixer_s32"), "mixer_s32 is named twice"),
        (("mixer_s32", "--image-size", "100"), "not divisible by the patch size 32"),
        (("mixer_s32", "--batch-sizes", "0"), "a batch size is from 1"),
        (("mixer_s32", "--seconds", "0"), "seconds must be above 0"),
        (("mixer_s32", "--seconds", "nan"), "seconds must be above 0"),
        (("mixer_s32", "--compile", "auto"), "unknown value 'auto'"),
        (("mixer_s32", "--precision", "half"), "unknown precision 'half'"),
        (("mixer_s32", "--mode", "predict"), "unknown mode 'predict'"),
        (("mixer_s32", "--budget", "5", "--batch-sizes", "1"), "budget=5 has no effect"),
        (("mixer_s32", "--output", "speed.csv"), "not a .json file: 'speed.csv'"),
        (("mixer_s32", "--images", "5"), "--images 5 has no effect without --recipe"),
        (("mixer_s32", "--recipe", "digits"), "mixer_s32 has no effect with --recipe"),
        (("--recipe", "digits", "--mode", "inference"), "--mode inference has no effect"),
        (("--recipe", "nothing"), "unknown recipe 'nothing'"),
        (("--recipe", "scratch"), "how many training images scratch has is not known"),
        (("--recipe", "finetune_pets"), "fine-tunes a model of your choice"),
        (("--recipe", "digits", "--images", "0"), "--images 0 must be at least 1"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(module, "sweep", None)
    code, out, err = mixer(capsys, "throughput", *arguments)
    assert code == 2
    assert message in err
    assert out == ""
