"""Exports that are killed: no half file, and nothing is left behind for long."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import allmlp as am
from allmlp.deploy import export as module
from allmlp.deploy.export import ExportReport, Parity
from allmlp.deploy.formats import format_of
from allmlp.io import staging_folder
from conftest import tiny_model

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals as Unix has them")


def killed_export(path: Path, instant: int) -> int:
    """Exports, quickly, in a child that is killed after so many writes and renames; returns how the
    child ended."""
    if number := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    replace, left, parity = os.replace, iter(range(instant)), Parity("x", 1, 0.0, 1.0, 1.0)

    def step() -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

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

    try:
        module.build, os.replace, module.import_extra = build, counted, lambda *_: None
        am.export(tiny_model(), path, overwrite=True)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("name", ["m.onnx", "m.xml"])
def test_killed_at_every_instant(tmp_path: Path, name: str):
    """What is hidden is left to the next one."""
    path, count = tmp_path / name, 0
    files = [file.name for file in format_of(path).files(path)]
    reports, ended = [f"{name}.report.json"], -signal.SIGKILL
    while ended == -signal.SIGKILL:
        for file in tmp_path.iterdir():
            if file.is_file():
                file.unlink()
        for file in (*files, *reports):
            (tmp_path / file).write_bytes(b"old")
        ended, count = killed_export(path, count), count + 1
        found = {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}
        hidden = [file for file in tmp_path.iterdir() if file.is_dir()]
        assert len(hidden) == (ended != 0)  # its own: that of the one before is gone
        assert set(found) <= {*files, *reports}
        values = {found[file] for file in files if file in found}
        if name in found:  # what a runtime is given
            assert len(values) == 1
        assert "old" not in {found.get(report) for report in reports} or values == {"old"}
    assert (ended, count) == (0, 2 + 2 * len(files) + len(reports))
    assert set(found) == {*files, *reports}
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
