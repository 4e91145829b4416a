"""`mixer data pack` killed or failing while it puts its files in place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from allmlp.data.foreign_shards import index_shards
from allmlp.data.sources import open_source, open_splits
from allmlp.data.write_shards import pack, pack_splits
from allmlp.errors import UserError

KILLS = """
import os, shutil, signal, sys
from pathlib import Path
from allmlp.data.sources import open_splits
from allmlp.data.write_shards import pack_splits

def end(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

source, target, renames = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
splits, rename = open_splits(source), os.rename
for instant in range(renames + 1):
    if (number := os.fork()) == 0:
        left = iter(range(instant))
        os.rename = lambda *paths: rename(*paths) if next(left, None) is not None else end()
        shutil.rmtree = end
        pack_splits(splits, target / str(instant), shard_bytes=40_000)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGKILL
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals as Unix has them")
def test_a_kill_among_the_renames(class_folder: Path, tmp_path: Path):
    """What is there in part is refused by its name, and the same command starts over."""
    splits = open_splits(str(class_folder))
    pack_splits(splits, tmp_path / "whole", shard_bytes=40_000)
    whole = {each.name: each.read_bytes() for each in (tmp_path / "whole").iterdir()}
    assert len(whole) == 7
    arguments = [str(class_folder), str(tmp_path), str(len(whole))]
    subprocess.run([sys.executable, "-c", KILLS, *arguments], check=True)
    for instant in range(len(whole) + 1):
        folder = tmp_path / str(instant)
        (packing,) = folder.glob(".packing*")
        assert len(list(folder.iterdir())) == 1 + instant
        if instant == len(whole):  # killed when all was done
            assert list(open_splits(str(folder))) == ["train", "validation"]
            with pytest.raises(UserError, match=r"has shards of train already"):
                pack_splits(splits, folder)
            continue
        for refuses in (index_shards, lambda path: open_splits(str(path))):
            with pytest.raises(UserError) as told:
                refuses(folder)
            assert instant == 0 or packing.name in str(told.value)
            assert str(folder) in str(told.value)
        (folder / "notes.txt").write_text("mine")
        pack_splits(splits, folder, shard_bytes=40_000)
        (folder / "notes.txt").unlink()
        assert {each.name: each.read_bytes() for each in folder.iterdir()} == whole


def test_a_failed_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rename, left, source = os.rename, [2], open_source("digits:test[:9]")

    def fails(source: Path, target: Path) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="No space left"):
        pack_splits({"train": source, "test": source}, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_list_of_names_cannot_reach_out_of_the_folder(tmp_path: Path):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    left = tmp_path / "packed" / ".packing.abc.partial"
    left.mkdir(parents=True)
    (left / "names.txt").write_text("train-000000.tar\n../outside.txt")
    (left / "train-000000.tar").write_bytes(b"half")
    pack(open_source("digits:test[:9]"), tmp_path / "packed", "train")
    assert outside.read_text() == "mine"
    assert not left.exists()
