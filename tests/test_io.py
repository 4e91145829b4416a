"""Output paths, atomic writes, and the partial files that killed processes leave."""

import os
from pathlib import Path

import pytest

from allmlp import io
from allmlp.errors import UserError
from conftest import NO_PROCESS


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("data/red/a.png", "elsewhere/b.png", "list.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("content")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    os.link(tmp_path / "list.csv", tmp_path / "hard.csv")
    return tmp_path


@pytest.mark.parametrize(
    ("output", "read"),
    [
        ("list.csv", "list.csv"),
        ("./elsewhere/../list.csv", "list.csv"),
        ("hard.csv", "list.csv"),
        ("data", "data"),
        ("data/red/new/deep.csv", "data"),
        ("link/red", "data"),
        ("data/red", "link"),
    ],
)
def test_an_output_in_an_input(data: Path, monkeypatch, output: str, read: str):
    monkeypatch.chdir(data)
    with pytest.raises(UserError) as error:
        io.check_not_inputs([Path("fine.csv"), Path(output)], ["not there", read])
    assert read in error.value.what
    assert error.value.where == str(Path(output))


def test_outputs_beside_the_inputs(data: Path):
    read = [data / "data", data / "list.csv", data / "not there"]
    outputs = [data / "elsewhere", data / "other.csv", data / "data2", data / "list.csv2"]
    io.check_not_inputs(outputs, read, [str(data / "elsewhere/b.png")])
    io.check_output_folder(data, ["other"])  # beside other files


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
