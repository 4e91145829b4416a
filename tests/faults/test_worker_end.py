"""A loader worker that is killed or hangs while a run trains (fault test 13)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runs import DROPOUT, check_same, files, make_data, run_config, start, train, unix

pytestmark = unix

CHANGES = {**DROPOUT, "data__num_workers": 2, "data__timeout": 2.0, "checkpoint_every": 5}

# Position 133 is the sixth image of step 16; the two workers take steps in turns.
FAULT = """
import ctypes
from mlp_mixer.data import loader
load = loader._TrainingImages.load

def deadlock():
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)  # no Python runs any more, and no handler of Python's

def faulty(self, position):
    if position == 133:
        self.open(loader.locate(self.seed, position, len(self.source))[1], [])
        {"killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
         "hangs": deadlock}[KIND]()
    return load(self, position)

patch.setattr(loader._TrainingImages, "load", faulty)
"""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    return train(run_config(make_data(folder / "data"), folder / "straight", **CHANGES))


@pytest.mark.parametrize("kind", ["killed", "hangs"])
def test_it_is_named_and_the_run_goes_on_later(straight: Path, tmp_path: Path, kind: str):
    data = straight.parent / "data"
    config = run_config(data, tmp_path / "run", **CHANGES)
    process = start(config, tmp_path / "said", FAULT.replace("KIND", repr(kind)))
    assert process.wait(25.0) == 2, process.said()
    last = process.said().partition("error: ")[2].splitlines()
    image = re.findall(r"at (\S+\.png)", last[0])[0]
    assert image in files(data)
    assert last[0].startswith(
        f"worker process 0, at {image}, ended without a word: DataLoader worker (pid"
        if kind == "killed"
        else f"no batch for 2 seconds; worker process 0, at {image}"
    )
    assert last[1] == f"where: {data}:train"
    assert last[2].startswith("to fix: ")
    assert len(last) == 3
    assert "Traceback" not in process.said()
    check_same(train(config), straight)
