"""Weights, exports and packed data whose writing is killed or fails: what is found is whole, and
nothing is left behind for long."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch

import allmlp as am
from allmlp.data.source import Source
from allmlp.data.sources import open_source, open_splits
from allmlp.data.sources.packed import pack_splits
from allmlp.deploy import export as module
from allmlp.deploy.export import ExportReport, Parity
from allmlp.deploy.formats import format_of
from allmlp.io import staging_folder
from conftest import tiny_model
from runs import killed, unix

# Weights

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
@unix
def test_frozen_and_killed_while_saving(tmp_path: Path):
    """Twelve looks at a saving process frozen at some instant, and three real kills."""
    chance, folder = random.Random(0), tmp_path / "best"
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
                child.send_signal(signal.SIGCONT)
            child.kill()
        assert len({float(p.detach().mean()) for p in am.load_model(folder).parameters()}) == 1


LARGE = """
import sys, allmlp as am
model = am.create_model("mixer_s16", 224, 10, num_blocks=4)
print("saving", flush=True)
while True:
    am.save_model(model, sys.argv[1])
"""


def hidden(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
        return [file for file in folder.rglob("*") if "/." in str(file.relative_to(folder.parent))]
    return []


@pytest.mark.slow
@unix
def test_what_a_killed_save_left_goes_with_the_next(tmp_path: Path):
    """Killed while weights are written: nothing of the library's own may stay for ever."""
    folder = tmp_path / "model"
    command = [sys.executable, "-c", LARGE, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        child.stdout.readline()
        until = time.monotonic() + 60
        while time.monotonic() < until:  # the weights are some megabytes on their way
            child.send_signal(signal.SIGSTOP)
            sizes = [file.stat().st_size for file in hidden(folder) if file.is_file()]
            if sum(sizes) > 1e6:
                break
            child.send_signal(signal.SIGCONT)
            time.sleep(0.001)
        child.kill()
    assert any(file.is_file() and file.stat().st_size > 1e6 for file in hidden(folder))
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


# Exports


def export(path: Path, step: Callable[[], None]) -> None:
    """Exports, quickly; a step follows every write and rename."""
    replace, parity = os.replace, Parity("x", 1, 0.0, 1.0, 1.0)

    def build(model, options, sources, staged, *_):
        step()
        for file in format_of(staged).files(staged):
            file.write_bytes(b"new")
            step()
        known = {"precision": "float32", "runtime": "none", "image_size": (8, 8), "files": {}}
        known |= {"uint8_input": False, "num_threads": 1, "format": "x", "speed": {}}
        return ExportReport(path=str(path), parity=parity, **known)

    def counted(source, target):
        replace(source, target)
        step()

    module.build, os.replace, module.import_extra = build, counted, lambda *_: None
    am.export(tiny_model(), path, overwrite=True)


@unix
@pytest.mark.parametrize("name", ["m.onnx", "m.xml"])
def test_killed_at_every_instant(tmp_path: Path, name: str):
    """What is hidden is left to the next one."""
    path, count = tmp_path / name, 0
    files = [file.name for file in format_of(path).files(path)]
    report, ended = f"{name}.report.json", -signal.SIGKILL
    while ended == -signal.SIGKILL:
        for file in tmp_path.iterdir():
            if file.is_file():
                file.unlink()
        for file in (*files, report):
            (tmp_path / file).write_bytes(b"old")
        ended, count = killed(partial(export, path), count), count + 1
        found = {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}
        left = [file for file in tmp_path.iterdir() if file.is_dir()]
        assert len(left) == (ended != 0)  # its own: that of the one before is gone
        assert set(found) <= {*files, report}
        values = {found[file] for file in files if file in found}
        if name in found:  # what a runtime is given
            assert len(values) == 1
        assert found.get(report) != "old" or values == {"old"}
    assert (ended, count) == (0, 2 + 2 * len(files) + 1)
    assert set(found) == {*files, report}
    assert {found[file] for file in files} == {"new"}
    assert "old" not in found.values()


HOLDER = """
import sys
from pathlib import Path
from allmlp.io import staging_folder
with staging_folder(Path(sys.argv[1])) as folder:
    (folder / "work").write_bytes(b"work")
    print(folder, flush=True)
    sys.stdin.read()
"""


@unix
def test_a_living_process_keeps_its_folder(tmp_path: Path):
    path = tmp_path / "a [1].onnx"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        theirs = Path(other.stdout.readline().strip())
        os.utime(theirs, (0, 0))  # however old it is
        with staging_folder(path) as ours:
            assert ours != theirs
            assert (theirs / "work").read_bytes() == b"work"
        assert list(tmp_path.iterdir()) == [theirs]
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (theirs / "work").exists()
    elsewhere = tmp_path / "b.onnx"
    with staging_folder(elsewhere):
        assert theirs.exists()  # of another file
    with staging_folder(path) as ours:
        assert list(tmp_path.iterdir()) == [ours]
        assert ours.parent == tmp_path  # so that a rename is enough
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["m.pt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("m.onnx", "m.xml"))]
)
def test_a_disk_that_takes_no_more_is_one_error(tmp_path: Path, name: str):
    """A limit on the size of files stands for the full disk: the writers meet it as they would."""
    resource = pytest.importorskip("resource", reason="limits as Unix has them")
    if name != "m.pt2":
        pytest.importorskip("onnxscript", reason="the extra export is not installed")
    if name == "m.xml":
        pytest.importorskip("openvino", reason="the extra export is not installed")
    model, path = tiny_model(), tmp_path / name
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(am.UserError, match="cannot be written") as caught:
            am.export(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(caught.value)
    assert not list(tmp_path.iterdir())


# Packed data


def pack(splits: dict[str, Source], folder: Path, step: Callable[[], None]) -> None:
    """Packs; a step comes before every rename."""
    replace = os.replace
    os.replace = lambda *paths: (step(), replace(*paths))
    pack_splits(splits, folder, shard_bytes=30_000)


@unix
@pytest.mark.slow
def test_a_kill_among_the_renames(class_folder: Path, tmp_path: Path):
    """A fragment is never taken for the data set, and the same command starts over."""
    splits = open_splits(str(class_folder))
    pack_splits(splits, tmp_path / "whole", shard_bytes=30_000)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(whole) > 4
    for instant in range(len(whole)):
        folder = tmp_path / str(instant)
        assert killed(partial(pack, splits, folder), instant) == -signal.SIGKILL
        assert len(list(folder.glob("*.arrow"))) == instant
        with pytest.raises(am.UserError, match="data pack"):
            open_splits(str(folder))
        (folder / "notes.txt").write_text("mine")
        pack_splits(splits, folder, shard_bytes=30_000)
        (folder / "notes.txt").unlink()
        found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}
        assert found == whole


def test_a_failed_rename_is_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, replace = open_source("digits:test[:9]"), os.replace

    def fails(source: Path, target: Path) -> None:
        if target.name == "packed.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="No space left"):
            pack_splits({"train": source, "test": source}, tmp_path / "new")
    assert not list(tmp_path.iterdir())
    pack_splits({"train": source}, tmp_path / "new")
    assert len(open_source(str(tmp_path / "new"))) == 9
