"""The model that a run begins with: new, or from trained weights."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import allmlp as am
from allmlp.training.model import build_model
from conftest import best_of, tiny_config, tiny_model
from runs import train
from staged_models import SMALL_CYCLE
from studies import six_steps

ANIMALS = ["ant", "bee", "cat"]
OWN_RANGE = am.Preprocessing(
    image_size=(8, 8),
    resize="squash",
    mean=(0.1, 0.2, 0.3),
    std=0.25,
    crop=0.9,
    interpolation="bicubic",
)


def model_of(names: list[str]) -> am.ImageClassifier:
    model = tiny_model(names)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    model.preprocessing = OWN_RANGE
    return model.eval()


def finetuning(weights: object, output: object = "unused", **changes: object) -> am.TrainConfig:
    return six_steps(weights, "unused", str(output), **changes)


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Weights that know ant, bee and cat."""
    return am.save_model(model_of(ANIMALS), tmp_path / "animals").parent


def images() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.manual_seed(1)) * 2 - 1


def same_but_head(model: am.ImageClassifier, other: am.ImageClassifier) -> bool:
    theirs = other.state_dict()
    named = {n: tensor for n, tensor in model.state_dict().items() if not n.startswith("head.")}
    return bool(named) and all(torch.equal(tensor, theirs[name]) for name, tensor in named.items())


def test_a_class_may_be_spelled_otherwise(tmp_path: Path):
    model = tiny_model(["n\u00e9v\u00e9", "7"])
    am.save_model(model, tmp_path / "m")
    built = build_model(finetuning(tmp_path / "m"), ["007", "ne\u0301ve\u0301"])
    assert torch.equal(built.head.weight, model.head.weight[[1, 0]])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (ANIMALS, "kept 3 of 3 rows, for 3 classes"),
        (["ant", "bee"], "kept 2 of 3 rows, for 2 classes"),
        (["cat", "dog", "ant"], "kept 2 of 3 rows, for 3 classes, 1 new, zeros: dog"),
        (["cat", "bee", "ant", "dog"], "kept 3 of 3 rows, for 4 classes, 1 new, zeros: dog"),
        (["dog", "Ant", "bee"], "kept 1 of 3 rows, for 3 classes, 2 new, zeros: dog, Ant"),
    ],
)
def test_the_rows_of_known_classes_are_kept(animals, capsys, names, said):
    before = am.load_model(animals)
    model = build_model(finetuning(animals, model__head_bias=0.0), names)
    assert capsys.readouterr().err == f"head     {said}\n"
    assert model.class_names == names
    assert same_but_head(model, before)
    assert torch.equal(model.eval().features(images()), before.features(images()))
    for row, name in enumerate(names):
        weight, bias = model.head.weight[row], model.head.bias[row]
        if name in ANIMALS:
            assert torch.equal(weight, before.head.weight[ANIMALS.index(name)])
            assert torch.equal(bias, before.head.bias[ANIMALS.index(name)])
        else:
            assert not weight.any()
            assert not bias.any()


def test_a_crop_of_the_runs_own_reaches_small_images(animals, tmp_path):
    changes = {"data__resize": "resmall-crop", "data__crop": 0.75, "data__exif_orientation": False}
    config = finetuning(animals, model__image_size=16, **changes)
    model = build_model(config, ["a", "b"], quiet=True)
    expected = {"resize": "resmall-crop", "crop": 0.75, "exif_orientation": False}
    assert model.preprocessing == dataclasses.replace(  # all else is the checkpoint's
        OWN_RANGE, image_size=(16, 16), crop_small=True, **expected
    )
    am.save_model(model, tmp_path / "saved")
    again = build_model(finetuning(tmp_path / "saved"), ["a", "b"], quiet=True)
    assert (again.preprocessing.crop, again.preprocessing.crop_small) == (0.75, True)
    scratch = tiny_config("unused", tmp_path / "run", data__crop=0.75)
    found = build_model(scratch, ["a", "b"]).preprocessing
    assert (found.crop, found.crop_small) == (0.75, True)
    for bad in ({"data__resize": "squash", "data__crop": 0.9}, {"data__crop": 1.5}):
        with pytest.raises(am.UserError, match=r"data\.crop"):
            finetuning(animals, **bad)


def test_a_linear_probe_moves_only_the_head(animals, class_folder, tmp_path):
    changes = {"model__train_only": "head", "data__source": str(class_folder)}
    result = am.train(finetuning(animals, tmp_path / "run", **changes), quiet=True)
    before, after = am.load_model(animals), am.load_model(result.run_folder)
    assert same_but_head(after, before)
    assert not torch.equal(after.head.weight, before.head.weight)
    log = (result.run_folder / "log.txt").read_text()
    assert "only the 51 of the head are trained" in log


def test_a_network_of_stages_is_trained_and_fine_tuned(class_folder, tmp_path):
    """CycleMLP, in bfloat16 and with stochastic depth, then for larger images."""
    stages = {**SMALL_CYCLE, "stem_kernel": 3, "stem_stride": 2, "stochastic_depth": 0.3}
    config = tiny_config(str(class_folder), tmp_path / "run", epochs=1, precision="bfloat16")
    config = config.with_values({"model.name": "cycle_mlp_b1", "model.overrides": stages})
    run = am.train(config, quiet=True).run_folder
    changes = {"data__source": str(class_folder), "model__image_size": 16}
    tuned = am.train(finetuning(run, tmp_path / "tuned", **changes), quiet=True).run_folder
    assert am.load_model(tuned).config.image_size == (16, 16)
    (prediction,) = am.predict(tuned, class_folder / "val" / "bee" / "0.png")
    assert {name for name, _ in prediction.classes} == set(ANIMALS)


def test_a_run_outlives_the_weights_that_it_began_with(class_folder, tmp_path, capsys):
    path = am.save_model(model_of(["x", "y", "z"]), tmp_path / "weights").parent
    changes = {"data__source": str(class_folder), "model__image_size": 16}
    changes |= {"model__train_only": "head"}
    whole = am.train(finetuning(path, tmp_path / "whole", **changes), quiet=True).run_folder
    train(finetuning(path, tmp_path / "run", **changes), stop_after=5)
    shutil.rmtree(path)
    capsys.readouterr()
    again = am.resume(tmp_path / "run").run_folder
    out, err = capsys.readouterr()
    assert "resumed  after step 5 of 6" in out
    assert err == ""  # nothing is grown a second time
    assert best_of(whole) == best_of(again)


def test_without_a_whole_checkpoint_a_run_begins_with_its_first_weights(
    animals, class_folder, tmp_path
):
    """best/ has moved on by then, and would be another beginning."""
    changes = {"data__source": str(class_folder), "keep_checkpoints": 1}
    whole = am.train(finetuning(animals, tmp_path / "whole", **changes), quiet=True).run_folder
    train(finetuning(animals, tmp_path / "run", **changes), stop_after=5)
    checkpoints = tmp_path / "run" / "checkpoints"
    for file in checkpoints.glob("step-*/state.safetensors"):
        file.write_bytes(b"x" + file.read_bytes()[1:])  # the size is right
    with pytest.raises(am.UserError, match=r"no checkpoint of this run can be read: step-"):
        am.resume(tmp_path / "run", quiet=True)  # what it reached is not written over
    for folder in checkpoints.iterdir():  # as if it was killed while the first was written
        shutil.rmtree(folder)
    again = am.resume(tmp_path / "run", quiet=True).run_folder
    assert "resumed  from the beginning" in (again / "log.txt").read_text()
    assert best_of(whole) == best_of(again)
