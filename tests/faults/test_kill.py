"""A kill at any instant: what is found afterwards is whole."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import allmlp as am

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
            assert child.stdout is not None
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
