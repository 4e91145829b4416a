"""Settings: to and from JSON, one at a time, and every mistake named with its key."""

import json
from typing import Any

import pytest

import allmlp as am
from allmlp.training.config import NoCrop, flat
from conftest import user_error


def changed(recipe: str, *assignments: str) -> dict[str, Any]:
    """The settings of a recipe with some changed, which also survive their JSON."""
    config = am.recipe(recipe).with_values({}, assignments)
    assert am.TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    return flat(config.to_json())


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("epochs=7", "epochs", 7),
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 0.001),
        ("optimizer.schedule=linear", "optimizer.schedule.name", "linear"),
        ("model.image_size=(16, 32)", "model.image_size", [16, 32]),
        ("data.num_workers=null", "data.num_workers", None),
        ("model.overrides.num_blocks=6", "model.overrides.num_blocks", 6),
        ("data.source=2024", "data.source", "2024"),
        ("sharding=none", "sharding", "none"),
        ("optimizer=sgd", "optimizer.name", "sgd"),
        # Other spellings: short ones, and those of version 1.
        ("optimizer.name=muon", "optimizer.name", "muon"),
        ("optimizer.average=0.5", "optimizer.ema_decay", 0.5),
        ("optimizer.final=0.5", "optimizer.schedule.final_lr_fraction", 0.5),
        ("optimizer.sharpness=0.5", "optimizer.sam_rho", 0.5),
        ("label_smoothing=0.5", "loss.label_smoothing", 0.5),
        ("augment.erasing=0.5", "augment.random_erasing", 0.5),
        ("data.without=list.txt", "data.exclude", "list.txt"),
    ],
)
def test_one_setting(assignment: str, key: str, value: object):
    found = changed("digits", assignment)[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("assignment", "code", "named"),
    [
        ("epochs", "invalid", "epochs"),
        ("epoch=3", "unknown-name", "Did you mean epochs"),
        ("optimizer.learning_rat=3", "unknown-name", "learning_rate"),
        ("optimiser.learning_rate=3", "unknown-name", "Did you mean optimizer"),
        ("epochs.x=3", "unknown-name", "'epochs.x'"),
        ("weight_decay=0.1", "unknown-name", "Did you mean optimizer.weight_decay"),
        ("augment.crop.padding=0.2", "unknown-name", "augment.crop=padded"),
        ("augment.crop_area=(0.5, 1)", "unknown-name", "augment.crop=inception"),
        ("optimizer.momentum=0.5", "unknown-name", "sgd or muon"),
        ("optimizer.name=adam", "unknown-name", "adamw"),
        ("epochs=2.5", "wrong-type", "epochs must be a valid integer, got '2.5'"),
        ("optimizer.learning_rate=nan", "wrong-type", "'nan'"),
        ("optimizer.learning_rate=1e400", "wrong-type", "1e400"),
        ("model.image_size=big", "wrong-type", "model.image_size"),
        ("model=small", "wrong-type", "model must be"),
        ("precision=half", "unknown-name", "bfloat16"),
        ("epochs=0", "out-of-range", "1, got 0"),
        ("optimizer.warmup=1.5", "out-of-range", "1.5"),
        ("seed=99999999999999999999999", "out-of-range", "seed"),
        ("model.overrides.num_classes=5", "invalid", "num_classes"),
        ("data.permutation=patches", "invalid", "permutation"),
        ("model.train_only=head", "invalid", "train_only"),
    ],
)
def test_a_wrong_setting(assignment: str, code: str, named: str):
    with user_error(code, named):
        am.recipe("digits").with_values({}, [assignment])


def test_another_choice_keeps_what_both_have():
    found = changed(
        "cifar10", "optimizer=sgd", "optimizer.schedule=steps", "augment.crop=inception"
    )
    before = changed("cifar10")
    assert found["optimizer.learning_rate"] == before["optimizer.learning_rate"]
    assert found["optimizer.ema_decay"] == before["optimizer.ema_decay"]
    assert found["optimizer.momentum"] == before["optimizer.momentum"] == 0.95
    assert "optimizer.weight_decay" not in found
    assert found["optimizer.schedule.decay_factor"] == 0.1
    assert found["augment.crop.area"] == [0.05, 1.0]
    assert changed("scratch", "loss=sigmoid")["loss.name"] == "sigmoid"
    assert am.recipe("scratch").with_value("augment.crop", "none").augment.crop == NoCrop()


def test_another_model_brings_its_own_sizes():
    """--model mixer_h14 must not build the recipe's small network under a large name."""
    config = am.recipe("digits").with_value("model.name", "mixer_b16")
    assert config.model.overrides == {"stochastic_depth": 0.1}
    for order in (1, -1):
        changes = ["model.overrides.num_blocks=2", "model.name=mixer_b16"][::order]
        assert changed("cifar10", *changes)["model.overrides.num_blocks"] == 2
    assert am.recipe("digits").with_value("model.name", "mixer_s16") == am.recipe("digits")
    found = changed("scratch", "model.weights=w")
    assert (found["model.name"], found["model.image_size"]) == ("", None)
    assert changed("scratch", "model.weights=w", "model.image_size=32")["model.image_size"] == 32


def test_steps_take_the_place_of_epochs_with_their_own_unit():
    config = am.recipe("digits")
    assert (config.epochs, config.steps, config.evaluate_every) == (100, None, 5)
    steps = config.with_value("steps", 2000)
    assert (steps.epochs, steps.steps, steps.evaluate_every) == (None, 2000, 100)
    assert config.with_values({"steps": 2000, "evaluate_every": 7}).evaluate_every == 7
    assert config.with_value("epochs", 30).evaluate_every == 5
    assert steps.with_value("epochs", 30).evaluate_every == 1
    with pytest.raises(am.UserError, match="epochs=3 and steps=4"):
        config.with_values({"epochs": 3, "steps": 4})


VERSION_1 = """
{"version": 1, "recipe": "finetune_vtab", "epochs": null, "steps": 2500,
 "model": {"name": "", "image_size": null, "weights": "w", "growth": "resample"},
 "data": {"source": "digits", "without": null, "resize": "squash"},
 "augment": {"crop": "none", "crop_area": [0.05, 1.0], "crop_padding": 0.125, "erasing": 0.1},
 "optimizer": {"name": "sgd", "learning_rate": 0.01, "weight_decay": 0.0, "beta1": 0.8,
               "beta2": 0.999, "momentum": 0.95, "schedule": "linear", "final": 0.1,
               "decay_at": [0.3, 0.6, 0.9], "decay_factor": 0.1, "average": 0.9,
               "sharpness": 0.1, "sharpness_from": 0.5},
 "loss": "sigmoid", "label_smoothing": 0.0}
"""


def test_a_file_of_version_1():
    found = flat(am.TrainConfig.from_json(json.loads(VERSION_1)).to_json())
    expected = {
        "version": 2,
        "model.resize_weights": "resample",
        "augment.crop.name": "none",
        "augment.random_erasing": 0.1,
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.8,
        "optimizer.schedule.name": "linear",
        "optimizer.schedule.final_lr_fraction": 0.1,
        "optimizer.ema_decay": 0.9,
        "optimizer.sam_rho": 0.1,
        "optimizer.sam_start": 0.5,
        "loss.name": "sigmoid",
        "steps": 2500,
    }
    assert {key: found[key] for key in expected} == expected


def test_unknown_settings_and_versions_in_a_file():
    for version in (1, 2):
        values = {"version": version, "optimizer": {"name": "adamw", "lr": 0.1}}
        with pytest.raises(am.UserError, match=r"unknown setting 'optimizer\.lr'"):
            am.TrainConfig.from_json(values)
    with pytest.raises(am.UserError, match="version 3"):
        am.TrainConfig.from_json({"version": 3})


def test_from_python():
    """What is built by hand is checked when it is used."""
    with pytest.raises(am.UserError, match="batch_size"):
        am.train(am.TrainConfig(batch_size=0))
