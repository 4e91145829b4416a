"""What a run writes, and what it takes back when it resumes from an earlier step."""

import errno
import os
from pathlib import Path

import pytest

import allmlp as am
from allmlp import plots
from allmlp.training.run_folder import RunFolder
from conftest import REAL, tiny_model
from runs import results_of, steps_of, unix


def config(path: Path) -> am.TrainConfig:
    return am.recipe("digits").with_value("output", str(path))


def test_going_back_takes_out_what_came_later(tmp_path: Path):
    run = RunFolder(tmp_path / "run", config(tmp_path / "run"))
    for step in range(0, 40, 10):
        run.log_step({"step": step, "loss": 1.0 / (step + 1)})
    for step in (15, 30):
        run.log_evaluation({"epoch": step / 10, "step": step, "best": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')  # cut off by a kill
    run.rewind(20)
    assert [line["step"] for line in steps_of(run.path)] == [0, 10]
    run.log_step({"step": 20, "loss": 0.5})
    run.log_evaluation({"epoch": 3.0, "step": 30, "best": 0})
    rows = [(row["step"], row["best"]) for row in results_of(run.path)]
    assert rows == [("15", "1"), ("30", "0")]
    run.rewind(0)
    assert (run.path / "metrics.jsonl").read_text() == ""
    assert not (run.path / "results.csv").exists()
    run.log_evaluation({"epoch": 1.0, "step": 10, "best": 1})
    assert (run.path / "results.csv").read_text().splitlines()[0] == "epoch,step,best"
    run.close()


DAMAGE = {
    "empty": lambda data: b"",
    "all NUL": lambda data: bytes(len(data)),
    "much NUL": lambda data: bytes(300_000),
    "cut in its first line": lambda data: data[:7],
    "NUL at the end": lambda data: data[:-9] + bytes(9),
    "not UTF-8": lambda data: b"\xff\xfe" + data,
    "not UTF-8 in a line": lambda data: data.replace(b"1", b"\xff", 2),
    "other values": lambda data: data.replace(b"\n", b'\n[1]\n"step"\n{"step": []}\n1,2\n', 1),
    "no last line end": lambda data: data.rstrip(),
    "deep": lambda data: data + b"[" * 100_000,
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damaged_logs_do_not_stop_a_run(tmp_path, monkeypatch, damage):
    """A log is not the state: what can be read of it is kept."""
    monkeypatch.setattr(plots, "curves", REAL["curves"])
    run = RunFolder(tmp_path / "run", config(tmp_path / "run"))
    for step in range(4):
        values = {"step": step, "epoch": step / 2, "loss": 2.0, "learning_rate": 0.1}
        run.log_step(values)
    evaluation = {"validation_loss": 1.0, "validation_top1": 0.5, "best": 1}
    for step in (2, 4):
        run.log_evaluation({"epoch": step / 2, "step": step, **evaluation})
    for name in ("metrics.jsonl", "results.csv"):
        path = run.path / name
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    run.draw_curves()
    run.rewind(4)
    run.log_step({"step": 4, "epoch": 2.0, "loss": 1.0, "learning_rate": 0.1})
    run.log_evaluation({"epoch": 3.0, "step": 6, **evaluation})
    metrics = [line["step"] for line in steps_of(run.path)]
    results = [int(row["step"]) for row in results_of(run.path)]
    assert metrics[-1] == 4
    assert results[-1] == 6
    assert metrics == sorted(set(metrics))
    if damage in ("other values", "no last line end"):
        assert (metrics, results) == ([0, 1, 2, 3, 4], [2, 4, 6])
    run.draw_curves()
    run.close()


@unix
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Lustre without flock: a run says so; a killed one leaves nothing that blocks the next."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    path = tmp_path / "run"
    killed = RunFolder(path, config(path))
    assert killed.is_unlocked
    again = RunFolder(path, config(path))
    am.save_model(tiny_model(), again.best)
    again.close()
    assert {file.name for file in again.best.iterdir()} == {"model.safetensors", "config.json"}
