"""Settings: to and from JSON, one at a time, and every mistake named with its key."""

from __future__ import annotations

import json

import pytest

import allmlp as am
from allmlp.training.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_json_round_trip(name: str):
    config = am.recipe(name)
    assert config.recipe == name
    assert am.TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("epochs=7", "epochs", 7),
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 0.001),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("optimizer.schedule=linear", "optimizer.schedule", "linear"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm", 0.0),
        ("augment.flip=true", "augment.flip", True),
        ("model.image_size=(16, 32)", "model.image_size", (16, 32)),
        ("data.num_workers=null", "data.num_workers", None),
        ("model.overrides.num_blocks=6", "model.overrides.num_blocks", 6),
        ("model.overrides.gelu=exact", "model.overrides.gelu", "exact"),
        ("data.source=2024", "data.source", "2024"),
        ("data.source={[]}", "data.source", "{[]}"),
        ("output=1e3", "output", "1e3"),
    ],
)
def test_one_setting(assignment: str, key: str, value: object):
    config = am.recipe("digits").with_setting(assignment)
    found: object = config
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epochs", r"takes section.name=value, got 'epochs'"),
        ("epoch=3", r"unknown setting 'epoch'[\s\S]*Did you mean epochs"),
        (
            "optimizer.learning_rat=3",
            r"unknown setting 'optimizer.learning_rat'[\s\S]*learning_rate",
        ),
        ("optimiser.learning_rate=3", r"unknown setting 'optimiser'[\s\S]*Did you mean optimizer"),
        ("epochs.x=3", r"unknown setting 'epochs'"),
        ("ema=0.9", r"unknown setting 'ema'[\s\S]*optimizer\.average"),
        ("weight_decay=0.1", r"'weight_decay'[\s\S]*Did you mean optimizer\.weight_decay"),
        ("class_weights=[1,2]", r"'class_weights'[\s\S]*mixer evaluate"),
        ("epochs=2.5", "epochs must be a value of type int | None, got 2.5"),
        ("epochs=true", "epochs must be a value of type int | None, got True"),
        ("epochs=many", "epochs must be a value of type int | None, got 'many'"),
        ("epochs=0", "epochs must be at least 1, got 0"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate must be a value of type float"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate must be above 0, got -1"),
        ("optimizer.name=adam", r"optimizer.name must be one of .*got 'adam'[\s\S]*adamw"),
        ("augment.crop_area=0.5", "augment.crop_area must be a value of type"),
        ("augment.mixup=-0.5", "augment.mixup must be at least 0, got -0.5"),
        ("augment.cutmix=-1", "augment.cutmix must be at least 0"),
        ("augment.crop_padding=0.2", "augment.crop_padding=0.2 has no effect with"),
        ("augment.randaugment=-1", "augment.randaugment must be from 0 to 30"),
        ("augment.randaugment_layers=3", "has no effect without augment.randaugment"),
        ("augment.erasing=2", "augment.erasing must be from 0 to 1"),
        ("data.fraction=0", "data.fraction must be above 0, at most 1, got 0"),
        ("data.fraction_seed=1", "data.fraction_seed=1 has no effect with all of the images"),
        ("data.timeout=-1", "data.timeout must be at least 0"),
        ("data.exif_orientation=maybe", "data.exif_orientation must be a value of type bool"),
        ("data.holdout=1", "data.holdout must be at least 0 and below 1"),
        ("model.image_size=big", "model.image_size must be a value of type"),
        ("model=small", "model must be an object|model"),
        ("optimizer.learning_rate=1e400", "must be a finite number, got inf"),
        ("seed=99999999999999999999999", "seed must be at least 0 and below"),
        ("model.overrides.num_classes=5", r"model.overrides.num_classes is that of the data"),
        ("model.overrides.image_size=32", r"model.overrides.image_size is model.image_size"),
        ("augment.crop_area=(0.5, 1)", "has no effect with augment.crop=none"),
        ("label_smoothing=1", "label_smoothing must be at least 0 and below 1"),
    ],
)
def test_a_wrong_setting(assignment: str, message: str):
    with pytest.raises(am.UserError, match=message):
        am.recipe("digits").with_setting(assignment)


def test_two_shares():
    for text in ("(0.5, 1)", "[0.5, 1]"):
        config = am.recipe("scratch").with_setting(f"augment.crop_area={text}")
        assert config.augment.crop_area == (0.5, 1.0)
    with pytest.raises(am.UserError, match="augment.crop_area must be two shares"):
        am.recipe("scratch").with_setting("augment.crop_area=(1, 0.5)")


def test_another_model_brings_its_own_sizes():
    """--model mixer_h14 must not build the recipe's small network under a large name."""
    config = am.recipe("digits").with_value("model.name", "mixer_b16")
    assert config.model.overrides == {"stochastic_depth": 0.1}
    config = config.with_setting("model.overrides.num_blocks=2")
    assert config.model.overrides["num_blocks"] == 2
    same = am.recipe("digits").with_value("model.name", "mixer_s16")
    assert same == am.recipe("digits")


@pytest.mark.parametrize(
    ("recipe", "assignments", "own"),
    [
        ("scratch", ["augment.crop=none"], {"augment.crop_area": (0.05, 1.0)}),
        ("cifar10", ["augment.crop=inception"], {"augment.crop_padding": 0.125}),
        ("digits", ["optimizer.name=sgd"], {"optimizer.weight_decay": 0.0}),
        ("cifar10", ["augment.randaugment=null"], {"augment.randaugment_layers": 2}),
        ("cifar10", ["augment.mixup=0", "augment.cutmix=0"], {"augment.mix_until": 1.0}),
        ("cifar10", ["optimizer.schedule=steps"], {"optimizer.final": 0.0}),
        ("scratch", ["loss=sigmoid"], {"label_smoothing": 0.0}),
        ("imagenet_b16", ["keep_checkpoints=0"], {"checkpoint_every": None}),
        ("finetune", ["optimizer.name=adamw"], {"optimizer.weight_decay": 0.0}),  # the recipe's
        (
            "scratch",
            ["model.weights=w"],
            {"model.name": "", "model.image_size": None, "model.overrides.stochastic_depth": 0.1},
        ),
        (
            "scratch",
            ["model.trained=head", "model.weights=w", "model.image_size=32"],
            {"model.image_size": 32, "model.overrides.stochastic_depth": 0.0},
        ),
    ],
)
def test_a_value_of_the_recipe_never_blocks_what_is_asked_for(recipe, assignments, own):
    config = am.recipe(recipe).with_values({}, assignments)
    found = config.to_json()
    for key, value in own.items():
        place = found
        *sections, name = key.split(".")
        for section in sections:
            place = place[section]
        assert place[name] == value, key
    assert am.TrainConfig.from_json(json.loads(json.dumps(found))) == config


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["augment.crop=none", "augment.crop_area=(0.25, 1)"], "crop_area=.*augment.crop=none"),
        (["optimizer.name=sgd", "optimizer.beta2=0.9"], "optimizer.beta2=0.9 has no .* sgd"),
        (["label_smoothing=0.2", "loss=sigmoid"], "label_smoothing=0.2 .*sigmoid"),
    ],
)
def test_a_value_that_was_asked_for_and_has_no_effect_is_refused(assignments, message):
    for order in (assignments, assignments[::-1]):
        with pytest.raises(am.UserError, match=message):
            am.recipe("scratch").with_values({}, order)


def test_a_file_with_a_value_without_effect_is_refused():
    values = am.recipe("scratch").to_json()
    values["augment"]["crop"] = "none"
    with pytest.raises(am.UserError, match="augment.crop_area"):
        am.TrainConfig.from_json(values)


def test_unknown_keys_in_a_file():
    values = am.recipe("digits").to_json()
    values["optimizer"]["lr"] = 0.1
    with pytest.raises(am.UserError, match=r"unknown setting 'optimizer\.lr'"):
        am.TrainConfig.from_json(values)


def test_an_unknown_recipe():
    with pytest.raises(am.UserError, match=r"unknown recipe 'digit'[\s\S]*Did you mean digits"):
        am.recipe("digit")


def test_steps_take_the_place_of_epochs_with_their_own_unit():
    config = am.recipe("digits")
    assert (config.epochs, config.steps, config.evaluate_every) == (100, None, 5)
    steps = config.with_value("steps", 2000)
    assert (steps.epochs, steps.steps, steps.evaluate_every) == (None, 2000, 100)
    assert config.with_values({"steps": 2000, "evaluate_every": 7}).evaluate_every == 7
    assert config.with_value("epochs", 30).evaluate_every == 5
    assert steps.with_value("epochs", 30).evaluate_every == 1
    with pytest.raises(am.UserError, match="epochs=3 and steps=4: one of them"):
        config.with_values({"epochs": 3, "steps": 4})


def test_the_order_of_settings_does_not_matter():
    config = am.recipe("cifar10")
    changes = ["augment.mixup=0", "augment.cutmix=0", "augment.mix_until=1"]
    assert config.with_values({}, changes) == config.with_values({}, changes[::-1])
    changes = ["model.overrides.num_blocks=2", "model.name=mixer_b16"]
    config = config.with_values({}, changes)
    assert config == am.recipe("cifar10").with_values({}, changes[::-1])
    assert config.model.overrides["num_blocks"] == 2


def test_as_many_numbers_as_one_likes():
    config = am.recipe("digits").with_values(
        {}, ["optimizer.schedule=steps", "optimizer.final=0", "optimizer.decay_at=(10, 20, 40, 50)"]
    )
    assert config.optimizer.decay_at == (10.0, 20.0, 40.0, 50.0)
    assert am.TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    for value in ("0.5", "(0.5, 'x')"):
        with pytest.raises(am.UserError, match="optimizer.decay_at must be a value of type"):
            config.with_setting(f"optimizer.decay_at={value}")
