"""Training models of timm: with the stand-in, whose batch normalisation has running means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_timm_models import fetched, theirs

import allmlp as am
import fake_timm
from allmlp.training import train as loop
from allmlp.training.train import resume
from conftest import tiny_config

__all__ = ["fetched"]  # the fixture
Saved = dict[str, torch.Tensor]


def digits(output: Path, **changes: object) -> am.TrainConfig:
    changes = {"model__image_size": 16, "model__overrides": {}, "epochs": None, **changes}
    more = {"optimizer__warmup": 0, "evaluate_every": 3, "checkpoint_every": 3}
    return tiny_config("digits", output, steps=6, data__holdout=0.0, **more, **changes)


def weights(run: Path) -> Saved:
    return safetensors.torch.load_file(run / "best" / "model.safetensors")


@pytest.mark.slow
def test_a_run_goes_on_with_its_running_means(
    fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changes = {"model__name": "timm:fake_cnn", "optimizer__average": 0.5}
    whole = digits(tmp_path / "whole", **changes)
    am.train(whole, quiet=True)
    train_step = loop.Trainer.train_step

    def killed(self: loop.Trainer, step: int, batch: Any) -> None:
        if step == 5:
            self.state.checkpoints.wait()
            raise KeyboardInterrupt
        train_step(self, step, batch)

    monkeypatch.setattr(loop.Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        am.train(digits(tmp_path / "stopped", **changes), quiet=True)
    monkeypatch.setattr(loop.Trainer, "train_step", train_step)
    resume(tmp_path / "stopped", quiet=True)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    assert expected["backbone.bn.num_batches_tracked"] == 6
    assert expected["backbone.bn.running_mean"].abs().min() > 0
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
def test_fine_tuning_the_head_alone(fetched: list[str], tmp_path: Path):
    changes = {"model__name": "", "model__weights": "timm:fake_cnn.first", "model__trained": "head"}
    am.train(digits(tmp_path / "run", **changes), quiet=True)
    found, before = weights(tmp_path / "run"), theirs("fake_cnn.first").state_dict()
    assert found["head.weight"].shape == (10, fake_timm.WIDTH)
    assert found["head.weight"].any()
    for name, value in before.items():
        if not name.startswith("fc."):
            assert torch.equal(found[f"backbone.{name}"], value), name
    kept = am.load_model(tmp_path / "run", quiet=True)
    assert kept.class_names == [str(digit) for digit in range(10)]
    assert len(am.evaluate(kept, "digits:test").labels) == 359
