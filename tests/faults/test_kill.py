"""A kill at any instant: what is found afterwards is whole."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch

import allmlp as am
from conftest import tiny_model

SAVER = """
import sys, torch, allmlp as am
sizes = dict(patch_size=4, hidden_dim=64, num_blocks=2, tokens_mlp_dim=64, channels_mlp_dim=256)
model = am.create_model("mixer_s16", 32, 10, **sizes)
number = 0
while True:
    number += 1
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, number)
    am.save_model(model, sys.argv[1])
    print(number, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals as Unix has them")
def test_frozen_and_killed_while_saving(tmp_path: Path):
    """Twelve looks at a saving process frozen at some instant, and three real kills."""
    chance, folder, looks = random.Random(0), tmp_path / "best", 0
    for _ in range(3):
        command = [sys.executable, "-c", SAVER, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for _ in range(4):
                child.stdout.readline()
                time.sleep(chance.uniform(0.0, 0.02))
                child.send_signal(signal.SIGSTOP)  # frozen in the middle: nothing more is written
                model = am.load_model(folder)
                values = {float(p.detach().mean()) for p in model.parameters()}
                assert len(values) == 1  # all tensors of one and the same save
                assert min(values) >= 1.0
                looks += 1
                child.send_signal(signal.SIGCONT)
            child.kill()
        assert len({float(p.detach().mean()) for p in am.load_model(folder).parameters()}) == 1
    assert looks == 12


LARGE = """
import sys, allmlp as am
model = am.create_model("mixer_s16", 224, 10, num_blocks=4)
print("saving", flush=True)
while True:
    am.save_model(model, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals as Unix has them")
def test_what_a_killed_save_left_goes_with_the_next(tmp_path: Path):
    """Killed while weights are written: nothing of the library's own may stay for ever."""
    folder = tmp_path / "model"
    command = [sys.executable, "-c", LARGE, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        child.stdout.readline()
        until = time.monotonic() + 60
        while time.monotonic() < until:  # the weights are some megabytes on their way
            child.send_signal(signal.SIGSTOP)
            sizes = [file.stat().st_size for file in _hidden(folder) if file.is_file()]
            if sum(sizes) > 1e6:
                break
            child.send_signal(signal.SIGCONT)
            time.sleep(0.001)
        child.kill()
    assert any(file.is_file() and file.stat().st_size > 1e6 for file in _hidden(folder))
    for file in folder.glob(".*"):
        os.utime(file, (0, 0))  # it was killed long ago
    am.save_model(tiny_model(), folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_what_the_library_writes_is_removed_when_it_fails(tmp_path, monkeypatch):
    def full(tensors: object, target: Path, metadata: object) -> None:
        target.with_name(".tmpAbCdEf").write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(am.UserError, match="No space left on device"):
        am.save_model(tiny_model(), tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def _hidden(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
        return [file for file in folder.rglob("*") if "/." in str(file.relative_to(folder.parent))]
    return []
