"""CycleMLP and Vision Permutator in runs: training, stopping, resuming, fine-tuning, predicting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import allmlp as am
from runs import make_data, run_config
from staged_models import SMALL_CYCLE, SMALL_PERMUTATOR

MODELS: dict[str, dict[str, Any]] = {
    "cycle_mlp_b1": {**SMALL_CYCLE, "stem_kernel": 3, "stem_stride": 2},
    "vip_s7": SMALL_PERMUTATOR,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("siblings") / "data")


def config_of(data: Path, output: Path, name: str, **changes: Any) -> am.TrainConfig:
    overrides = {**MODELS[name], "stochastic_depth": 0.3}
    config = run_config(data, output, **{"steps": 8, "evaluate_every": 4, **changes})
    return config.with_values({"model.name": name, "model.overrides": overrides})


@pytest.mark.parametrize("name", MODELS)
def test_from_training_to_predictions(data: Path, tmp_path: Path, name: str):
    config = config_of(data, tmp_path / "run", name, precision="bfloat16")
    result = am.train(config, quiet=True)
    assert am.load_model(result.run_folder).class_names == ["ant", "bee", "cat"]
    assert result.validation is not None
    tuned = config.with_values(
        {
            "model.name": "",
            "model.weights": str(result.run_folder),
            "model.image_size": 16,
            "model.overrides": {"stochastic_depth": 0.0},
            "output": str(tmp_path / "tuned"),
            "steps": 2,
            "evaluate_every": 1,
        }
    )
    tuned = am.train(tuned, quiet=True)
    larger = am.load_model(tuned.run_folder)
    assert larger.config.image_size == (16, 16)
    assert larger.config.stochastic_depth == 0
    image = next((data / "val" / "bee").glob("*.png"))
    (prediction,) = am.predict(tuned.run_folder, [str(image)])
    assert {name for name, _ in prediction.classes} == {"ant", "bee", "cat"}
