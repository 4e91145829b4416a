"""Damage and malice: what is found is whole, what is passed over is named, and nothing is run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint_faults import save, state, unix, whole_number
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from allmlp.errors import UserError
from allmlp.training.checkpoint import Checkpoint, Checkpoints
from allmlp.training.manifest import MANIFEST, read_manifest, verify, write_manifest


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", MANIFEST])
@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_empty, Path.unlink])
def test_what_is_damaged_is_named_and_passed_over(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
):
    save(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / name)
    lines: list[str] = []
    assert whole_number(tmp_path, lines) == 1
    (line,) = lines
    assert line.startswith("Passed over the checkpoint step-00000002: ")
    assert str(tmp_path / "step-00000002" / name) in line
    assert ("missing" if damage is Path.unlink else "damaged") in line


def test_every_byte_of_a_manifest_counts(tmp_path: Path):
    save(tmp_path, 1)
    path = tmp_path / "step-00000001" / MANIFEST
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        with pytest.raises(UserError):
            read_manifest(path.parent)
    path.write_bytes(raw)
    assert read_manifest(path.parent).step == 1


@unix
def test_a_pipe_in_the_place_of_a_file_blocks_nobody(tmp_path: Path):
    save(tmp_path, 1, 2)
    damage_pipe(tmp_path / "step-00000002" / "__0_0.distcp")
    lines: list[str] = []
    assert whole_number(tmp_path, lines) == 1
    assert "not a plain file" in lines[0]


def test_all_are_damaged(tmp_path: Path):
    save(tmp_path, 1, 2)
    for path in tmp_path.glob("*/.metadata"):
        damage_flip(path)
    lines: list[str] = []
    assert Checkpoints(tmp_path, say=lines.append).newest() is None
    assert len(lines) == 2


def test_a_renamed_folder_and_a_later_format(tmp_path: Path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000005")
    with pytest.raises(UserError, match="the folder was renamed: it holds step 2"):
        verify(tmp_path / "step-00000005")
    path = tmp_path / "step-00000001" / MANIFEST
    reforge(path, b'"format": 1', b'"format": 2')
    with pytest.raises(UserError, match="it is of format 2, this version reads 1"):
        verify(path.parent)


def reforge(path: Path, old: bytes, new: bytes) -> None:
    """Changes a manifest and sets its checksum right, as who means harm would."""
    raw = path.read_bytes()
    digest = json.loads(raw)["sha256"].encode()
    blank = raw.replace(digest, b"0" * 64).replace(old, new)
    assert old not in blank
    head, _, tail = blank.rpartition(b"0" * 64)
    path.write_bytes(head + hashlib.sha256(blank).hexdigest().encode() + tail)


# Malice: all checksums are right


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


class Lookup:
    """Unpickled, it gets at an attribute of an object."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


def hidden_payload(index: Any, marker: Path) -> None:
    index.planner_data = Payload(marker)


def payload_as_entry(index: Any, marker: Path) -> None:
    index.state_dict_metadata["step"] = Payload(marker)


def lookup_of_a_function(index: Any, marker: Path) -> None:
    index.planner_data = Lookup(type(index), "__init__")


def torch_load(index: Any, marker: Path) -> None:
    index.planner_data = torch.load


def free_pickle(index: Any, marker: Path) -> None:
    """DCP itself unpickles an entry of this kind from the tensors' file."""
    index.state_dict_metadata["step"] = BytesStorageMetadata()


def no_tensor(index: Any, marker: Path) -> None:
    entries = index.state_dict_metadata
    entries["step"] = entries["step"].chunks[0]


def another_file(index: Any, marker: Path) -> None:
    for info in index.storage_data.values():
        info.relative_path = "../../elsewhere.pt"


def no_index(index: Any, marker: Path) -> None:
    index.state_dict_metadata = None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (hidden_payload, f"it could run code ({os.name if os.name == 'nt' else 'posix'}.mkdir)"),
        (payload_as_entry, "it could run code"),
        (lookup_of_a_function, "it could run code (builtins.getattr)"),
        (torch_load, "it could run code (torch.serialization.load)"),
        (free_pickle, "BytesStorageMetadata): refused"),
        (no_tensor, "it holds more than tensors of this checkpoint: refused"),
        (another_file, "it holds more than tensors of this checkpoint: refused"),
        (no_index, "it is damaged: not a whole index"),
    ],
)
def test_a_malicious_index_runs_nothing(
    tmp_path: Path, change: Callable[[Any, Path], None], text: str
):
    marker = tmp_path / "marker"
    save(tmp_path / "checkpoints", 1, 2)
    folder = tmp_path / "checkpoints" / "step-00000002"
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index, marker)
    raw = pickle.dumps(index)
    (folder / ".metadata").write_bytes(raw)
    (folder / MANIFEST).unlink()
    write_manifest(folder, 2, False, {"number": 2})

    lines: list[str] = []
    assert whole_number(tmp_path / "checkpoints", lines) == 1
    assert len(lines) == 1
    assert f"{folder / '.metadata'}: {text}" in lines[0] or text in lines[0]
    with pytest.raises(UserError) as error:
        Checkpoints(folder.parent).load(Checkpoint(folder, 2, {}), state(0))
    assert text in error.value.what
    assert not marker.exists()
    if change is hidden_payload:  # it would have worked
        pickle.loads(raw)
        assert marker.exists()


def test_an_index_nested_beyond_what_can_be_hashed(tmp_path: Path):
    """A tuple within a tuple, a million times, as a key: the process would die of it."""
    save(tmp_path / "checkpoints", 1, 2)
    folder = tmp_path / "checkpoints" / "step-00000002"
    (folder / ".metadata").write_bytes(b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.")
    (folder / MANIFEST).unlink()
    write_manifest(folder, 2, False, {"number": 2})
    lines: list[str] = []
    assert whole_number(tmp_path / "checkpoints", lines) == 1
    assert str(folder / ".metadata") in lines[0]
