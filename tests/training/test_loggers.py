"""What a run tells trackers and callbacks, and that none of them can stop or change it."""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

import allmlp as am
from allmlp.training.config import TrainConfig
from conftest import best_of, tiny_config, tiny_run, user_error


class Recorder(am.Logger):
    """Records every call; acts at a step."""

    def __init__(self, act: Any = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.act = act

    def start(self, config, folder, step):
        self.calls.append(("start", config["seed"], folder, step))

    def log(self, step, values):
        self.calls.append(("log", step, values))
        if self.act is not None:
            self.act(step, values)

    def image(self, step, name, path):
        assert path.is_file()
        self.calls.append(("image", name))

    def finish(self, summary):
        self.calls.append(("finish", summary))

    def kinds(self) -> list[str]:
        return [call[0] for call in self.calls]


def test_a_callback_is_told_everything_and_changes_nothing(class_folder, tmp_path: Path):
    recorder = Recorder()
    config = tiny_config(str(class_folder), tmp_path / "run")
    result = am.train(config, quiet=True, callbacks=[recorder])
    assert recorder.calls[0] == ("start", 0, tmp_path / "run", 0)
    logged = [call for call in recorder.calls if call[0] == "log"]
    training = [call for call in logged if "training/loss" in call[-1]]
    assert [call[1] for call in training] == list(range(5))  # a short run: every step
    assert "training/learning_rate" in training[0][2]
    evaluations = [call for call in logged if "evaluation/validation_top1" in call[-1]]
    assert len(evaluations) == 2
    assert ("image", "curves") in recorder.calls
    assert ("image", "confusion") in recorder.calls
    assert recorder.kinds()[-1] == "finish"
    assert recorder.calls[-1][1]["validation_top1"] == result.validation.top1
    alone = tiny_run(class_folder, tmp_path / "alone")
    assert best_of(tmp_path / "run") == best_of(alone.run_folder)


def test_one_that_fails_is_left_out_with_a_warning(class_folder, tmp_path: Path, capsys):
    def act(step: int, _: Any) -> None:
        if step == 1:
            raise OSError("the network is down")

    failing, other = Recorder(act), Recorder()
    config = tiny_config(str(class_folder), tmp_path / "run")
    am.train(config, callbacks=[failing, other])
    assert capsys.readouterr().out.count("the network is down") == 1
    assert failing.kinds() == ["start", "log", "log"]
    assert other.kinds()[-1] == "finish"


def test_a_callback_ends_the_run_early(class_folder, tmp_path: Path):
    def act(step: int, values: dict[str, float]) -> None:
        if step == 1 and "training/loss" in values:
            raise am.StopTraining

    recorder = Recorder(act)
    config = tiny_config(str(class_folder), tmp_path / "run", epochs=9)
    result = am.train(config, quiet=True, callbacks=[recorder])
    assert max(call[1] for call in recorder.calls if call[0] == "log") == 2  # steps done
    assert (tmp_path / "run/best/model.safetensors").is_file()
    again = am.resume(tmp_path / "run", quiet=True)  # it is finished
    assert again.validation.top1 == result.validation.top1


def test_a_run_that_fails_is_no_success(class_folder, tmp_path: Path):
    recorder = Recorder()
    config = tiny_config(str(class_folder), tmp_path / "run", optimizer__learning_rate=1e30)
    with user_error("diverged"):
        am.train(config, quiet=True, callbacks=[recorder])
    assert recorder.calls[-1] == ("finish", None)


def calls_of(module: MagicMock, *names: str) -> list[Any]:
    return [call for call in module.mock_calls if call[0].rpartition(".")[2] in names]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_trackers_and_their_resumed_run(class_folder, tmp_path: Path, monkeypatch, name: str):
    module, path = MagicMock(), "torch.utils.tensorboard" if name == "tensorboard" else name
    module.init.return_value.id, module.init.return_value.name = "abc", "given"
    module.start_run.return_value.info.run_id = "m1"
    monkeypatch.setitem(sys.modules, path, module)
    tiny_run(class_folder, tmp_path / "run", log=name)
    logged = [call.args[0] for call in calls_of(module, "log", "log_metrics", "add_scalar")]
    assert sum("training/loss" in values for values in logged) == 5
    assert sum("evaluation/validation_top1" in values for values in logged) == 2
    assert len(calls_of(module, "log_artifact", "add_image", "Image")) == 6
    last = {"mlflow": "end_run", "tensorboard": "close"}.get(name, "finish")
    assert calls_of(module, last) == module.mock_calls[-1:]
    module.reset_mock()
    am.resume(tmp_path / "run", quiet=True)
    [begun] = calls_of(module, "start_run", "SummaryWriter", "init")
    if name == "mlflow":
        assert begun.kwargs == {"run_id": "m1"}
        assert calls_of(module, "log_params") == []
    elif name == "tensorboard":
        assert begun.kwargs == {"purge_step": 5}
    else:
        same = {"id": "abc"} if name == "wandb" else {"name": "given"}
        assert same.items() <= begun.kwargs.items()
        assert begun.kwargs["resume"] in ("allow", "must")


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = am.recipe("digits").with_values({"log": "tensorboard, wandb"})
    assert config.trackers == ["tensorboard", "wandb"]
    with user_error("unknown-name", "wandbb"):
        am.recipe("digits").with_values({"log": "wandbb"})
    old = am.recipe("digits").to_json()
    del old["log"]
    assert TrainConfig.from_json({**old, "tensorboard": True}).log == "tensorboard"
    assert TrainConfig.from_json({**old, "tensorboard": False}).log == ""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(am.UserError, match="needs the package wandb"):
        am.train(am.recipe("digits").with_values({"log": "wandb", "output": str(tmp_path / "r")}))
    assert not (tmp_path / "r").exists()
