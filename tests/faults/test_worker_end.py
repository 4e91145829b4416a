"""A loader worker that is killed or hangs while a run trains (fault test 13)."""

from pathlib import Path

import pytest

from runs import DROPOUT, check_same, losses_of, run_config, start, train, unix

pytestmark = unix

CHANGES = {**DROPOUT, "data__num_workers": 2, "data__timeout": 2.0, "checkpoint_every": 5}

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


@pytest.fixture(scope="module")
def straight(data: Path) -> Path:
    return train(run_config(data, data.parent / "straight", **CHANGES))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_named_and_the_run_resumes_later(data, straight: Path, tmp_path: Path, kind: str):
    config = run_config(data, tmp_path / "run", **CHANGES)
    fault = FAULT.replace("KIND", KINDS[kind]).replace("FOLDER", repr(str(tmp_path)))
    process = start(config, tmp_path / "said", fault)
    assert process.wait(30.0) == 2, process.said()
    last = process.said().partition("error: ")[2].splitlines()
    image = (tmp_path / "image").read_text()
    assert last[0].startswith(
        f"worker process 0, at {image}, ended without a message: DataLoader worker (pid"
        if kind == "killed"
        else f"no batch for 2 seconds; worker process 0, at {image}"
    )
    assert last[1] == f"where: {data}:train"
    assert last[2].startswith("to fix: ")
    assert len(last) == 3
    assert "Traceback" not in process.said()
    assert len(losses_of(tmp_path / "run")) < 30
    check_same(train(config), straight)
