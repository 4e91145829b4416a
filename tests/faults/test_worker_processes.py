"""Worker processes without a guard or shared memory, hanging, or killed (fault test 13)."""

import multiprocessing
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import allmlp as am
from conftest import make_data, tiny_config, tiny_run
from runs import (
    DROPOUT,
    check_same,
    ended,
    losses_of,
    run_config,
    start,
    steps_of,
    train,
    unix,
    until,
)

SCRIPT = """
import multiprocessing
import sys

import allmlp as am

def work():
    result = am.train(am.TrainConfig.from_json({config}), quiet=True)
    print("reached", result.validation.top1)

if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
{call}
"""
GUARDED, BARE = "    work()", "work()"


def run_script(folder: Path, method: str, call: str) -> subprocess.CompletedProcess[str]:
    changes = {"epochs": 1, "data__num_workers": 1}
    config = tiny_config(str(make_data(folder / "data")), folder / "run", **changes)
    text = SCRIPT.format(config=config.to_json(), method=method, call=call)
    (folder / "script.py").write_text(text)
    return subprocess.run(
        [sys.executable, folder / "script.py"], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_script_without_a_guard(tmp_path: Path):
    done = run_script(tmp_path, "spawn", BARE)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1  # that of the script, none of the workers
    assert "__name__ == '__main__'" in done.stderr.splitlines()[-1]
    assert str(tmp_path / "script.py") in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_with_a_guard(tmp_path: Path, method: str):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("not on this system")
    done = run_script(tmp_path, method, GUARDED)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    changes = {"epochs": 1, "data__num_workers": 0}
    result = tiny_run(tmp_path / "data", tmp_path / "here", **changes)
    assert done.stdout.split() == ["reached", str(result.validation.top1)]
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "here")


def test_a_process_of_the_users_that_runs_the_script_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(am.UserError, match="Guard"):
        tiny_run(str(make_data(tmp_path / "data")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


HANG = """
import torch.utils.data._utils as parts
patch.setattr(parts, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds that it may take to end
def hang(self, image, random, call=loop.Augmentation.__call__):
    log = Path(FOLDER, "run", "metrics.jsonl")
    if STEPS and not (log.exists() and len(log.read_text().splitlines()) >= STEPS):
        return call(self, image, random)
    Path(FOLDER, "hangs").touch()
    while True:
        time.sleep(1)

patch.setattr(loop.Augmentation, "__call__", hang)
"""


@pytest.mark.slow
@unix
@pytest.mark.parametrize("steps", [0, 3])
def test_a_signal_while_a_batch_is_waited_for(data, straight, tmp_path: Path, steps: int):
    config = run_config(data, tmp_path / "run", **DROPOUT, data__num_workers=1)
    fault = HANG.replace("STEPS", str(steps)).replace("FOLDER", repr(str(tmp_path)))
    process = start(config, tmp_path / "said", fault)
    until((tmp_path / "hangs").exists, 60.0)
    process.send(signal.SIGTERM)
    assert process.wait(30.0) == 143
    assert "Traceback" not in process.said()
    done = int(re.findall(r"stopped after step (\d+) of 30", process.said())[0])
    assert (done > 0) == (steps > 0)
    check_same(train(config), straight)
    if steps:
        assert f"resumed  after step {done} " in (tmp_path / "run" / "log.txt").read_text()


# Worker 0 comes to its end at the first image that it begins after step 12, and notes which.
FAULT = """
import ctypes
from torch.utils.data import get_worker_info

def deadlock():
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)  # no Python runs any more, and no handler of Python's

def faulty(self, image, random, call=loop.Augmentation.__call__):
    worker, run = get_worker_info(), Path(FOLDER, "run")
    if worker is not None and worker.id == 0 and (run / "checkpoints" / "step-00000010").exists():
        Path(FOLDER, "image").write_text(str(image.where))
        KIND()
    return call(self, image, random)

patch.setattr(loop.Augmentation, "__call__", faulty)
"""
KINDS = {"killed": "(lambda: os.kill(os.getpid(), signal.SIGKILL))", "hangs": "deadlock"}


@unix
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_named_and_the_run_resumes_later(data, straight, tmp_path: Path, kind: str):
    changes = {"data__num_workers": 2, "data__timeout": 2.0, "checkpoint_every": 5}
    config = run_config(data, tmp_path / "run", **DROPOUT, **changes)
    fault = FAULT.replace("KIND", KINDS[kind]).replace("FOLDER", repr(str(tmp_path)))
    (said,) = ended([start(config, tmp_path / "said", fault)], 2, seconds=30.0)
    last = said.partition("error: ")[2].splitlines()
    image = (tmp_path / "image").read_text()
    assert last[0].startswith(
        f"worker process 0, at {image}, ended without a message: DataLoader worker (pid"
        if kind == "killed"
        else f"no batch for 2 seconds; worker process 0, at {image}"
    )
    assert last[1] == f"where: {data}:train"
    assert last[2].startswith("to fix: ")
    assert len(last) == 3
    assert "Traceback" not in said
    assert len(losses_of(tmp_path / "run")) < 30
    check_same(train(config), straight)


# A small /dev/shm, as Docker's: a file system of its own in a namespace of its own

LOAD = """
import sys
from allmlp.data.loader import evaluation_batches
from allmlp.data.sources import open_splits
from allmlp.preprocessing import Preprocessing
source, size = open_splits(sys.argv[1])["train"], Preprocessing(image_size=(64, 64))
def load(num_workers):
    batches = evaluation_batches(source, size, batch_size=10, num_workers=num_workers, timeout=60)
    return [batch.images.tolist() for batch in batches]
print("same" if load(2) == load(0) else "other")
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", ["size=1200k", "size=4k", "size=2m,ro"])
def test_a_small_place_for_shared_memory(tmp_path: Path, options: str):
    mount = f"mount -t tmpfs -o {options} tmpfs /dev/shm && "
    enter = ["unshare", "--mount", "sh", "-c"]
    try:
        tried = subprocess.run([*enter, mount + "true"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if tried.returncode:
        pytest.skip("no permission to mount a file system")
    make_data(tmp_path / "data")
    done = subprocess.run(
        [*enter, mount + 'exec "$0" "$@"', sys.executable, "-c", LOAD, tmp_path / "data"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr
    assert done.stderr.startswith("note     /dev/shm")
    assert done.stderr.count("\n") == 1
