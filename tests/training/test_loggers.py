"""What a run tells trackers and callbacks, and that none of them can stop or change it."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


class FakeTracker:
    """Stands for the modules of the trackers, and records their calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []
        self.id, self.name = "abc", "given"
        self.info = SimpleNamespace(run_id="m1")
        self.run = self.summary = self

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any, **options: Any) -> FakeTracker:
            self.calls.append((name, given, options))
            return self

        return call

    def of(self, name: str) -> list[Any]:
        return [options or given for called, given, options in self.calls if called == name]


LOG_CALLS = ("log", "log_metrics", "add_scalar")  # of values by name, or of one


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_trackers_and_their_resumed_run(class_folder, tmp_path: Path, monkeypatch, name: str):
    module, path = FakeTracker(), "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, path, module)
    tiny_run(class_folder, tmp_path / "run", log=name)
    logged = [given[0] for called, given, _ in module.calls if called in LOG_CALLS]
    assert sum("training/loss" in values for values in logged) == 5
    assert sum("evaluation/validation_top1" in values for values in logged) == 2
    assert len(module.of("log_artifact") or module.of("add_image") or module.of("Image")) == 6
    assert module.calls[-1][0] == {"mlflow": "end_run", "tensorboard": "close"}.get(name, "finish")
    module.calls.clear()
    am.resume(tmp_path / "run", quiet=True)
    if name == "mlflow":
        assert module.of("start_run") == [{"run_id": "m1"}]
        assert module.of("log_params") == []
    elif name == "tensorboard":
        assert module.of("SummaryWriter") == [{"purge_step": 5}]
    else:
        [begun] = module.of("init")
        same = {"id": "abc"} if name == "wandb" else {"name": "given"}
        assert same.items() <= begun.items()
        assert begun["resume"] in ("allow", "must")


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
