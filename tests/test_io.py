"""The partial files that killed processes leave."""

import os
from pathlib import Path

from allmlp import io
from conftest import NO_PROCESS


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
