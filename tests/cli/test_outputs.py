"""What every verb does alike with its outputs: nothing is replaced unasked, and no input ever."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import allmlp as am
from allmlp import io
from conftest import NO_PROCESS, files, make_class_folder, mixer, ran, refused, tiny_model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, images in class folders, a list, and three links."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        make_class_folder(tmp_path / "data" / split, {"ant": 2, "bee": 2}, start=len(split))
    model = tiny_model(["ant", "bee"])
    am.save_model(model, "model.safetensors")
    am.save_model(model, "model")
    Path("list.csv").write_text("path,label\ndata/test/ant/0.png,ant\ndata/test/bee/0.png,bee\n")
    os.link("list.csv", "hard.csv")
    Path("link").symlink_to("data/test")
    Path("weights.csv").symlink_to("model/model.safetensors")
    return tmp_path


IN_DATA = [
    "predict model.safetensors list.csv --output list.csv",
    "predict model.safetensors list.csv --output hard.csv",
    "predict model.safetensors link --output data/test/rows.csv",
    "predict model.safetensors data/test --output data/test/ant/rows.csv",
    "predict model.safetensors data/test --output link/parts",
    "predict model.safetensors data:test --output data/test/rows.csv",
    "predict model data/test --output weights.csv",
    "convert model model/config.npz",
    "data check list.csv --exclude list.csv",
    "data check list.csv --exclude data/test/ant/0.png",
    "data check data --exclude data/drop.txt",
    "data check data --output data/test/cat",
    "data pack data data/test/packed",
    "evaluate model.safetensors --data data --output data/test/ant",
    "evaluate model.safetensors --data data:test --output link/ant",
    "few-shot model.safetensors --data data --output data/few.json --no-cache",
    "few-shot model.safetensors --data data --cache data/train/cache",
    "convert model.safetensors ./link/../../model.safetensors --num-classes 3",
    "convert model model --num-classes 3",
    "export model.safetensors --output data/test/ant/m.pt2 --data data",
    "train --data data --image-size 8 --output data/train/run",
    "finetune model.safetensors --data data --output link/run --seeds 0 1",
    "paper permutation --data data --image-size 8 --output data/train/study",
    "benchmark model --output model/config.json",
]


NEVER_OVER = ("train", "finetune", "paper permutation", "data pack")


@pytest.mark.parametrize("line", IN_DATA)
def test_no_output_in_an_input(capsys, place: Path, line: str):
    """The one guard, also where the output exists and may be replaced."""
    before, has_flag = files(place), "parts" not in line and not line.startswith(NEVER_OVER)
    code, out, _ = mixer(capsys, *line.split(), *["--overwrite"] * has_flag, "--json")
    error = json.loads(out)["error"]
    assert (code, error["code"]) == (2, "invalid")
    assert error["what"].partition("an input that is read: ")[2]
    assert any(Path(error["where"]).is_relative_to(word) for word in line.split())
    assert files(place) == before


AGAIN = [
    "predict model.safetensors data/test --output rows.csv",
    "data check data --duplicates exact --exclude drop.txt",
    "data check data --output data2",
    "evaluate model.safetensors --data list.csv --output .",
    "inspect model.safetensors --output inside --layers 1",
    "convert model.safetensors other.npz",
    "convert model.safetensors folder",
]


@pytest.mark.parametrize("line", AGAIN)
def test_what_is_there_is_replaced_only_when_asked(capsys, place: Path, line: str):
    ran(capsys, *line.split())
    first = files(place)
    assert "overwrite" in refused(capsys, place, *line.split())
    ran(capsys, *line.split(), "--overwrite")
    assert files(place).keys() == first.keys()


def test_rows_on_standard_output(capsys, place: Path):
    line = ("predict", "model.safetensors", "data/test", "--output")
    to_stdout = (*line, "-", "--format", "jsonl")
    out, err = ran(capsys, *to_stdout)
    assert "images/s" in err
    ran(capsys, *line, "rows.jsonl")
    assert out == Path("rows.jsonl").read_text()
    assert len(out.splitlines()) == 4
    assert not Path("-").exists()
    assert ran(capsys, *to_stdout, "--quiet") == (out, "")
    assert mixer(capsys, *to_stdout, "--json")[0] == 2


@pytest.mark.parametrize(
    "line",
    [
        "evaluate model --data data --output -",
        "data check data --output -",
        "data pack data -",
        "inspect model --output -",
        "convert model -",
        "export model --output -",
        "paper tables model --output -",
        "train --data data --image-size 8 --output -",
        "finetune model --data data --output -",
    ],
)
def test_nothing_for_standard_output(capsys, place: Path, line: str):
    assert "standard output" in refused(capsys, place, *line.split())


@pytest.mark.slow
def test_the_reader_of_the_rows_may_go_away(place: Path):
    read, write = os.pipe()
    os.close(read)
    line = "-m allmlp predict model.safetensors data/test --output -"
    command = [sys.executable, *line.split()]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr


def test_a_full_disk_has_a_place_and_a_fix(capsys, place: Path, monkeypatch):
    def fill(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("allmlp.io.os.fsync", fill)
    line = "evaluate model.safetensors --data data --output report"
    code, _, err = mixer(capsys, *line.split())
    assert code == 2
    what, where, fix = err.splitlines()
    assert what == "error: No space left on device"
    assert where.startswith("where: report/")
    assert fix.startswith("to fix: ")
    assert not [path for path in Path("report").rglob("*") if path.is_file()]


def test_partial_files_of_living_processes_stay(tmp_path: Path):
    mine, of_dead = (io.partial_path(tmp_path / "a.csv", pid) for pid in (None, NO_PROCESS))
    assert str(os.getpid()) in mine.name
    elsewhere = mine.with_name(f".a.csv.00000000-{NO_PROCESS}.partial")
    old = mine.with_name(".a.csv.partial")
    for path in (mine, of_dead, elsewhere, old):
        path.write_text("half")
    os.utime(old, (0, 0))
    io.remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, elsewhere}
