"""Two processes train what one would, and one that ends never leaves the other waiting.

Fault tests 10 and 12, and 11 as far as it concerns several processes.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import allmlp as am
import runs
from allmlp.data.sampler import Order, epoch_order
from allmlp.data.sources import open_splits
from allmlp.training.checkpoint import Checkpoints
from conftest import draw, files, make_data
from runs import (
    check_same,
    ended,
    losses_of,
    results_of,
    run_config,
    start,
    start_two,
    steps_of,
    typed_settings,
    unix,
)

pytestmark = [unix, pytest.mark.slow]

PARTS = {"micro_batch_size": 3}  # of a part of four: gradients are added up before the all-reduce

# Notes which images each process trained on at which step, but for the neighbour that mixup needs.
NOTING = """
def noting(self, step, batch, train_step=loop.Trainer.train_step):
    own = batch.indices[: self.config.batch_size // self.world.size].tolist()
    with Path(f"{self.folder.path}.images").open("a") as file:
        file.write(json.dumps([step, self.world.rank, own]) + "\\n")
    train_step(self, step, batch)

patch.setattr(loop.Trainer, "train_step", noting)
"""


def fault(number: int, step: int, rank: int) -> str:
    """A signal to one of the processes alone."""
    return f"""
if os.environ.get("RANK", "{rank}") == "{rank}":
    before_step(patch, {step}, lambda _: os.kill(os.getpid(), {int(number)}))
"""


def images_of(run: Path) -> list[list[int]]:
    """Returns the images of each step's batch, in the order of the processes."""
    parts = [json.loads(line) for line in Path(f"{run}.images").read_text().splitlines()]
    steps = sorted({step for step, _, _ in parts})
    assert steps == list(range(len(steps)))
    return [
        [image for number, _, own in sorted(parts) if number == step for image in own]
        for step in steps
    ]


def weighted(data: Path, run: Path, **changes: object) -> am.TrainConfig:
    """With weights of the classes, which change the loss and nothing else."""
    return run_config(data, run, **{"data__balance": "weights", **changes})


def train_one(data: Path, name: str, **changes: object) -> Path:
    config = weighted(data, data.parent / name, **changes)
    ended([start(config, data.parent / f"{name} text", NOTING)], 0)
    return data.parent / name


@pytest.fixture(scope="module")
def single(data: Path) -> Path:
    return train_one(data, "single")


@pytest.fixture(scope="module")
def double(data: Path) -> Path:
    """The same run of two, with DDP."""
    return train_two(data, "double", **PARTS)


def train_two(data: Path, name: str, **changes: object) -> Path:
    run = data.parent / name
    config = weighted(data, run, **changes)
    first, second = ended(start_two(config, data.parent / f"{name} text", NOTING), 0, 0)
    assert second == ""
    assert "2 processes on cpu (1 thread), sharding" in first
    return run


def check_near(run: Path, single: Path, labels: Any = range(20), **order: Any) -> None:
    """The same images, and the same numbers but for how sums are rounded."""
    steps = Order(seed=0, batch_size=8, **order).places(range(30), labels)
    expected = [[place[1] for place in places] for places in steps]
    assert images_of(run) == images_of(single) == expected
    assert losses_of(run) == pytest.approx(losses_of(single), abs=1e-6, rel=0)
    for mine, other in zip(steps_of(run), steps_of(single), strict=True):
        assert mine["learning_rate"] == other["learning_rate"]
        assert mine["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    columns = ("step", "epoch", "validation_top1", "best")
    rows = [[row[key] for key in columns] for row in results_of(run)]
    assert rows == [[row[key] for key in columns] for row in results_of(single)]
    both = (folder / "validation/evaluation.json" for folder in (run, single))
    mine, other = (json.loads(path.read_text()) for path in both)
    for key in ("images", "top1", "confusion", "per_class", "bad_images"):
        assert mine[key] == other[key]
    assert mine["images"] == 9
    assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_ddp_with_a_balanced_sampler(data: Path):
    one = train_one(data, "one sampler", data__balance="sampler")
    run = train_two(data, "two sampler", data__balance="sampler", **PARTS)
    check_near(run, one, open_splits(str(data))["train"].labels, balanced=True)


def test_ddp(single: Path, double: Path):
    check_near(double, single)


def test_fsdp(data: Path, single: Path):
    check_near(train_two(data, "fsdp", sharding="full", **PARTS), single)


def test_from_one_to_two_and_back(data: Path, single: Path, tmp_path: Path):
    """Each part ends with a SIGTERM to one process, after which all stop after the same step."""
    run, parts = tmp_path / "run", ["one", "none", "full", "one"]
    for number, sharding in enumerate(parts):
        last = [6, 14, 22, 29][number]
        rank = 1 if sharding == "none" else 0
        acts = NOTING + (fault(signal.SIGTERM, last, rank) if last < 29 else "")
        text = tmp_path / f"part {number}"
        config = weighted(data, run, sharding="full" if sharding == "full" else "none")
        is_one = sharding == "one"
        processes = [start(config, text, acts)] if is_one else start_two(config, text, acts)
        if last == 29:
            ended(processes, 0)
            continue
        said = ended(processes, *[143] * len(processes))
        assert f"stopped after step {last + 1} of 30" in said[0]
        again = "the same torchrun command again"
        how = f"mixer train --resume {run}" if is_one else again
        assert f"to resume: {how}\n" in said[0]
        assert said[1:] in ([], [""], ["\nstopping: the run saves at the end of this step\n"])
        checkpoints = Checkpoints(run / "checkpoints", say=lambda line: pytest.fail(line))
        found = checkpoints.newest()
        checkpoints.close()
        assert found.step == last + 1
        assert found.values["world_size"] == len(processes)
    check_near(run, single)


STOPPING = """
class Stop(am.Logger):
    def log(self, step, values):
        if step == 12:
            raise am.StopTraining

if os.environ["RANK"] == "0":
    before_step(patch, 5, lambda trainer: trainer.folder.loggers.active.append(Stop()))
"""


def test_a_callback_ends_both(data: Path, tmp_path: Path):
    config = run_config(data, tmp_path / "run")
    first, _ = ended(start_two(config, tmp_path / "text", STOPPING), 0, 0)
    assert "stopped early: a callback asked for it" in first
    assert len(losses_of(tmp_path / "run")) == 13
    assert results_of(tmp_path / "run")[-1]["step"] == "13"


# What one process does for all

COUNTING = """
import atexit, collections, hashlib
from allmlp.training import checkpoint, dataset

counts = collections.Counter()

def count(owner, name, amount=lambda *_, **__: 1):
    def counting(*arguments, real=getattr(owner, name), **options):
        counts[name] += amount(*arguments)
        return real(*arguments, **options)

    patch.setattr(owner, name, counting)

count(os, "scandir", lambda path: "data/" in str(path))
count(dataset, "EncodedImage")
count(dataset, "fingerprint")
count(hashlib, "file_digest", lambda file, _: os.fstat(file.fileno()).st_size)
count(checkpoint, "safe_open")
name = sys.argv[sys.argv.index("--output") + 1]
report = Path(f"{name}.counts.{os.environ['RANK']}")
atexit.register(lambda: report.write_text(json.dumps({n: c for n, c in counts.items() if c})))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each process lists the images")
def test_a_restart_reads_images_and_checkpoint_once(data: Path, double: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(double, run)
    ended(start_two(weighted(data, run, **PARTS), tmp_path / "text", COUNTING), 0, 0)
    first, second = (json.loads(Path(f"{run}.counts.{rank}").read_text()) for rank in (0, 1))
    state = run / "checkpoints" / "step-00000030" / "state.safetensors"
    assert first.pop("scandir") >= 8
    assert first.pop("safe_open") <= 2
    images, splits = 20 + 20 + 9, 2  # the training images also for how dark they are
    only = {"EncodedImage": images, "fingerprint": splits, "file_digest": state.stat().st_size}
    assert (first, second) == (only, {})
    check_same(run, double)


SHARING = """
import numpy as np
import torch
from allmlp.runtime.world import join_world
from allmlp.training.checkpoint import Checkpoints

def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1000

def peak():
    highest = megabytes("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # begins anew
    return highest

def make():
    called.append(1)
    return {"labels": np.arange(25_000_000), "none": np.zeros(0), "names": ["ä"]}

called = []
with join_world("cpu") as (world, _):
    before = megabytes("RssAnon")
    found = world.once_per_machine(make)
    own = megabytes("RssAnon") - before
    labels, right = found["labels"], found["names"] == ["ä"] and found["none"].size == 0
    labels[world.rank] = -1  # in this process only
    world.barrier()
    right &= int(labels.sum()) == 25_000_000 * 24_999_999 // 2 - world.rank - 1
    del found, labels

    tensors = {str(n): torch.full((25_000_000,), world.rank + 1.0) for n in range(2)}
    tensors["turned"] = torch.arange(6.0).view(2, 3).t() * (world.rank + 1)
    tensors["odd"] = torch.tensor([float("nan"), -0.0], dtype=torch.bfloat16)
    checkpoints = Checkpoints(Path(FOLDER, "checkpoints"), world=world)
    peak()
    before = megabytes("VmRSS")
    checkpoints.save(1, tensors, {})
    checkpoints.wait_on_all()
    checkpoints.load(checkpoints.newest(), tensors)
    held = peak() - before
    checkpoints.close()
    right &= all(bool((tensors[str(n)] == 1.0).all()) for n in range(2))
    right &= torch.equal(tensors["turned"], torch.arange(6.0).view(2, 3).t())
    print(json.dumps([right, len(called), own, held]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory without a name")
def test_memory_of_images_is_shared_and_only_rank_0_holds_a_checkpoint(tmp_path: Path):
    """Labels of 200 MB, a state of 200 MB, in MB of each of four processes."""
    said = run_script(tmp_path, SHARING, 0, 0, 0, 0)
    right, called, own, held = zip(*map(json.loads, said), strict=True)
    assert all(right)
    assert called == (1, 0, 0, 0)
    assert max(own) < 40
    assert held[0] > 150
    assert max(held[1:]) < 60


# One process ends


@pytest.mark.parametrize(("rank", "sharding"), [(1, "none"), (0, "full")])
def test_the_other_ends_too_and_names_it(data, tmp_path, rank: int, sharding: str):
    config = run_config(data, tmp_path / "run", sharding=sharding, checkpoint_every=5)
    processes = start_two(config, tmp_path / "text", fault(signal.SIGKILL, 16, rank))
    other = processes[1 - rank]
    ended([processes[rank]], -signal.SIGKILL)
    assert other.wait(10.0) == 2
    error = other.said().partition("error: ")[2]
    prefix = "" if rank else "rank 1: "
    assert error.startswith(f"{prefix}rank {rank} exited, so training cannot continue: ")
    assert "to fix: Run the same command again to resume" in error
    assert "Traceback" not in other.said()


def test_torchrun_starts_both_again(data: Path, double: Path, tmp_path: Path):
    """`--max-restarts 1`: one process is killed once, and the run ends as if nothing had been."""
    config = weighted(data, tmp_path / "run", checkpoint_every=5, **PARTS)
    once = f"""
killed = Path({str(tmp_path / "killed")!r})
def kill(_):
    if not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1":
    before_step(patch, 16, kill)
"""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--max-restarts", "1", "--standalone", runs.__file__]
    with subprocess.Popen(
        [*torchrun, *(str(word) for word in typed_settings(config))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "FAULT": once, "PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=90)
        finally:
            process.terminate()  # it ends its processes then
    assert process.returncode == 0, said
    assert (tmp_path / "killed").exists()
    assert re.search(r"resumed  after step (10|15) of 30", said)
    check_same(tmp_path / "run", double)


# An error of one process, and one of all


BROKEN = """
from allmlp.data import loader

def decoded(self, index, bad, *random, decoded=loader.Images.decoded):
    if index == 3:
        bad.append(loader.BadImage(index, "three.png", "broken"))
        return None
    return decoded(self, index, bad, *random)

patch.setattr(loader.Images, "decoded", decoded)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_what_only_one_process_meets_is_said_once(data: Path, tmp_path: Path, rank: int):
    """One process reads image 3 first, and it is more than the allowed fraction of bad ones."""
    order = epoch_order(0, 0, 20)
    index = order[4 * rank + 1]
    text = BROKEN.replace("index == 3", f"index == {index}")
    config = run_config(data, tmp_path / "run", data__max_bad=0.0)
    said = ended(start_two(config, tmp_path / "text", text), 2, 2)
    prefix = "" if rank == 0 else "rank 1: "
    both = "".join(said)
    assert both.count(f"error: {prefix}1 of 20 images cannot be decoded (5.0%") == 1
    assert both.count("three.png: broken") in (1, 2)  # "skipped" too
    assert "Traceback" not in both
    assert "error: " not in said[1 - rank]


POISON = """
if os.environ["RANK"] == "1":
    poison = lambda images, _: images * float("inf")
    before_step(patch, 16, lambda _: patch.setattr(loop, "normalize", poison))
"""


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_loss_that_is_not_finite_on_one_stops_both(data, tmp_path, sharding: str):
    config = run_config(data, tmp_path / "run", sharding=sharding, checkpoint_every=8)
    first, second = ended(start_two(config, tmp_path / "text", POISON), 2, 2)
    assert "error: step 16: loss nan, gradient norm nan at" in first
    last = tmp_path / "run" / "checkpoints" / "step-00000016"
    assert f"the last good checkpoint is {last}\n" in first
    assert second == ""


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("a batch of 9 images does not divide by 2 processes", {"batch_size": 9}),
        ("the run folder holds a run with other settings: seed is 0 there", {"seed": 1}),
        ("several processes share one run folder", {"output": None}),
    ],
)
def test_a_mistake_is_said_once_and_makes_nothing(data, double, tmp_path, message, changes):
    before = files(data.parent)
    output = double if "seed" in changes else tmp_path / "run"
    config = weighted(data, output).with_values(changes)
    first, second = ended(start_two(config, tmp_path / "text"), 2, 2)
    assert message in first
    assert first.count("error: ") == 1
    assert second == ""
    assert not (tmp_path / "run").exists()
    assert files(data.parent) == before


# With a rare switch of threads: one that waits for the interpreter's lock waits long.
LEAVING = """
import torch
from allmlp.runtime.world import join_world
sys.setswitchinterval(0.5)
for _ in range(4):
    with join_world("cpu") as (world, _):
        network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        network(torch.ones(2, 4)).sum().backward()
        world.gather("x" * 100)
    del network
"""


def test_processes_end_after_they_have_left(tmp_path: Path):
    """gloo's thread may still hold the last collective's tensors when DDP's reducer is freed."""
    run_script(tmp_path, LEAVING, 0, 0)


# With two micro-batches a step; the weights are those of steps that no NaN has reached.
SHARDED = """
import torch
from allmlp.models.layers import draw_stochastic_depth
from allmlp.runtime.device import ComputePolicy
from allmlp.runtime.world import full_tensor, join_world, parallelize
from allmlp.training.optim import build_optimizers
from allmlp.training.step import Updater
from conftest import tiny_config, tiny_model

config = tiny_config("digits", Path("none"), optimizer__warmup=0)
with join_world("cpu") as (world, device):
    compute, found = ComputePolicy(device, "bfloat16", False, ""), []
    for precision in ("float32", "bfloat16"):
        model, seen, results = tiny_model(), set(), []
        network = parallelize(model, "full", world, precision)
        dense = model.blocks[0].channel_mixing.dense_0
        dense.register_forward_pre_hook(lambda layer, _: seen.add(layer.weight.dtype))
        optimizers = build_optimizers(model, config.optimizer)
        updater = Updater(model, network, optimizers, config, compute, world, 9, print)
        updater.micro_batch_size = 2
        updater.guard_on_device()
        for step in range(4):
            before = [full_tensor(weight.detach()).clone() for weight in model.parameters()]
            random = torch.Generator().manual_seed(10 * step + world.rank)
            scale = float("nan") if step == 3 and world.rank == 1 else 1.0
            images = scale * torch.randn(4, 3, 8, 8, generator=random)
            targets = torch.eye(7)[torch.randint(7, (4,), generator=random)]
            depth = draw_stochastic_depth(model, 4, random)
            updater.asked = lambda: 15 * (step == world.rank)
            results += updater(step, images, targets, depth, step)
        results += updater.results()
        after = [full_tensor(weight.detach()) for weight in model.parameters()]
        assert all(map(torch.equal, before, after)), "a step that is not finite changed a weight"
        assert [result.is_finite for result in results] == [True, True, True, False]
        assert [result.asked for result in results] == [15, 15, 0, 0]
        assert seen == {getattr(torch, precision)}, seen
        found.append([*before, *(torch.tensor(result.loss) for result in results[:3])])
    assert all(map(torch.equal, *found)), "rounding before the gathering changed a bit"
    assert not torch.equal(before[0], next(tiny_model().parameters()))
"""


def test_sharded_weights_travel_in_bfloat16_and_refuse_a_step_that_is_not_finite(tmp_path: Path):
    """The same bits as with float32 weights that autocast rounds, on both processes."""
    run_script(tmp_path, SHARDED, 0, 0)


def run_script(folder: Path, script: str, *codes: int) -> list[str]:
    """Runs a script as several processes, which end with these codes; returns what each says."""
    script = script.replace("FOLDER", repr(str(folder))) + "\nsys.exit()\n"
    return ended(start_two([], folder / "said", script, len(codes)), *codes)


# The other is in C code, as if it waited for a GPU that waits for the first.
FAILING = """
import ctypes
import torch
import torch.distributed as dist
from allmlp.errors import UserError
from allmlp.runtime.world import join_world
from allmlp.training import checkpoint
def fail(*_):
    raise UserError("96 images at once do not fit into the GPU", code="memory")
def stop(*_):
    raise OSError(5, "Input/output error", "images")
def parse(_):
    with join_world("cpu") as (world, _):
ACT
patch.setattr(dist, "destroy_process_group", lambda: time.sleep(50))
patch.setattr("allmlp.cli.main.parse", parse)
main(["train"])
"""
WAIT = """
        if world.rank == RANK:
            ENDS
        ctypes.CDLL(None).sleep(50)
"""


def run_failing(folder: Path, act: str, *codes: int) -> list[str]:
    """Long before the processes that wait would end."""
    started = time.monotonic()
    said = run_script(folder, FAILING.replace("ACT", act), *codes)
    assert time.monotonic() - started < 40
    return said


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_is_printed_and_ends_a_process_that_waits_for_a_gpu(tmp_path: Path, rank: int):
    wait = WAIT.replace("RANK", str(rank)).replace("ENDS", "fail()")
    said = run_failing(tmp_path, wait, 2, 2)
    prefix = "" if rank == 0 else "rank 1: "
    assert "".join(said).count("do not fit") == 1
    assert f"error: {prefix}96 images at once do not fit into the GPU\n" in said[rank]


def test_a_kill_ends_a_process_that_waits_for_a_gpu(tmp_path: Path):
    wait = WAIT.replace("RANK", "1").replace("ENDS", "os.kill(os.getpid(), 9)")
    text = "".join(run_failing(tmp_path, wait, 2, -signal.SIGKILL, 2))
    assert text.count("error: ") == text.count("rank 1 exited, so training cannot continue\n") == 1


READING = """
        tensors = {str(number): torch.ones(5) for number in range(3)}
        checkpoints = checkpoint.Checkpoints(Path(FOLDER, "checkpoints"), world=world)
        checkpoints.save(1, tensors, {})
        found = checkpoints.newest()
        fill = checkpoint.fill_from_rank0
        def filled(*arguments, calls=[]):
            calls.append(1)
            if world.is_main and len(calls) == 2:
                stop()
            fill(*arguments)
        checkpoint.fill_from_rank0 = filled
        checkpoints.load(found, tensors)
"""


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("        world.once_per_machine(fail)", "96 images at once do not fit into the GPU"),
        ("        world.once_per_machine(stop)", "Input/output error"),
        (READING, "the checkpoint cannot be read: [Errno 5] Input/output error: 'images'"),
    ],
)
def test_an_error_in_what_one_does_for_all_is_said_once(tmp_path: Path, act: str, message: str):
    first, second = run_failing(tmp_path, act, 2, 2)
    text = first + second
    assert text.count("to fix: ") <= text.count(message) == 1, text
    assert first.startswith(f"error: {message}")


OTHER_IMAGES = """
from allmlp.runtime import world as module
from allmlp.training.dataset import DataSettings, open_training_data
patch.setattr(module, "machine", lambda: os.environ["RANK"])
""" + FAILING.replace(
    "ACT", '        open_training_data(DataSettings(source=f"{FOLDER}/{world.rank}"), world=world)'
)


def test_machines_with_other_images_are_an_error(tmp_path: Path):
    for rank in "01":
        make_data(tmp_path / rank)
    draw(900).save(tmp_path / "1" / "train" / "ant" / "new.png")
    text = "".join(run_script(tmp_path, OTHER_IMAGES, 2, 2))
    assert text.count("rank 1 has 21 training images of these classes, and rank 0 has 20") == 1
