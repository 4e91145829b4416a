"""A kill at any instant: what is found afterwards is whole."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mlp_mixer as mm

SAVER = """
import sys, torch, mlp_mixer as mm
sizes = dict(patch_size=4, hidden_dim=64, num_blocks=2, tokens_mlp_dim=64, channels_mlp_dim=256)
model = mm.create_model("mixer_s16", 32, 10, **sizes)
number = 0
while True:
    number += 1
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, number)
    mm.save_model(model, sys.argv[1])
    print(number, flush=True)
"""


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
                model = mm.load_model(folder)
                values = {float(p.detach().mean()) for p in model.parameters()}
                assert len(values) == 1  # all tensors of one and the same save
                assert min(values) >= 1.0
                looks += 1
                child.send_signal(signal.SIGCONT)
            child.kill()
        assert len({float(p.detach().mean()) for p in mm.load_model(folder).parameters()}) == 1
    assert looks == 12


TRAINER = """
import sys, mlp_mixer as mm
config = mm.recipe("digits").with_value("output", sys.argv[1]).with_value("evaluate_every", 1)
config = config.with_value("model.overrides.num_blocks", 1).with_value("device", "cpu")
mm.train(config.with_value("data.num_workers", 0))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals as Unix has them")
def test_a_killed_run_leaves_a_whole_model(tmp_path: Path):
    chance = random.Random(1)
    for number in range(3):
        run = tmp_path / str(number)
        command = [sys.executable, "-c", TRAINER, str(run)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            best = _read_until_best(child, chance.randint(1, 3))
            time.sleep(chance.uniform(0.0, 0.5))
            child.kill()
        assert best >= 1
        model = mm.load_model(run)
        assert model.config.num_classes == 10
        figures = (run / "results.csv").read_text().splitlines()
        assert len(figures) >= 1 + best
        assert (run / "best" / "README.md").read_text().startswith("---\nlibrary_name")


def _read_until_best(child: subprocess.Popen[str], times: int) -> int:
    """Reads what a run says until it has said "best" so many times."""
    assert child.stdout is not None
    seen = 0
    while seen < times:
        line = child.stdout.readline()
        assert line, "the run ended before it was killed"
        seen += line.rstrip().endswith("   best")
    return seen
