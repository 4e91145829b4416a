"""Nothing that is loaded runs code, and no file brings the machine down: one line each."""

import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch

import allmlp as am
from conftest import GOLDEN, refused, tiny_model

MARKER = Path(os.environ.get("TMPDIR", "/tmp")) / f"allmlp_attack_{os.getpid()}"


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {MARKER}",)


def saved(value: object, old: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return file.getvalue()


def array(shape: str, dtype: str = "<f4", data: bytes = b"") -> bytes:
    """A .npy member that claims any shape."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def object_array() -> bytes:
    file = io.BytesIO()
    np.savez(file, **{"stem/kernel": np.array([Evil()], dtype=object)})
    return file.getvalue()


def safe(state: dict[str, torch.Tensor] | None = None) -> bytes:
    return safetensors.torch.save(state or dict(tiny_model().state_dict()))


def expanded() -> dict[str, torch.Tensor]:
    """One number on disk that calls itself a terabyte."""
    state = dict(tiny_model().state_dict())
    state["stem.weight"] = torch.zeros(1).expand(2**38)
    return state


def huge_claim() -> bytes:
    header = (
        b'{"stem.weight":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    )
    return struct.pack("<Q", len(header)) + header + b"0000"


def deep(old: bool = False, step: bytes = b"\x85", times: int = 1_000_000) -> bytes:
    """A tuple within a tuple within ...: hashing it, as a key, would end the process."""
    pickled = b"\x80\x02})" + step * times + b"Ns."
    if not old:
        return archive({"x/other_data.pkl": b"N.", "x/data.pkl": pickled, "x/version": b"3\n"})
    start = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    return start + pickled + pickle.dumps([], 2)


HTML = b"<!doctype html>\n<html><title>404 not found</title></html>\n"
GOOD_NPZ = (GOLDEN / "official_tiny_params.npz").read_bytes()
ATTACKS: dict[str, Callable[[], bytes]] = {
    "pickle.pth": lambda: pickle.dumps(Evil()),
    "evil.pth": lambda: saved({"state_dict": Evil()}),
    "evil_old.pth": lambda: saved({"model": Evil()}, old=True),
    "module.pth": lambda: saved(tiny_model()),
    "evil.safetensors": lambda: saved(Evil()),
    "expanded.pth": lambda: saved(expanded()),
    "memory.pth": lambda: saved({"a": bytearray(10)}),
    "memory_old.pth": lambda: saved({"a": bytearray(10)}, old=True),
    "sparse.pth": lambda: saved({"stem.weight": torch.eye(3).to_sparse()}),
    "meta.pth": lambda: saved({"stem.weight": torch.zeros(3, device="meta")}),
    "negative.npz": lambda: archive({"a.npy": array("(-1, -1)")}),
    "axes.npz": lambda: archive({"a.npy": array("(" + "1," * 70 + ")")}),
    "nothing.npz": lambda: archive({"a.npy": array(f"({2**70}, 0)")}),
    "truth.npz": lambda: archive({"a.npy": array("(True,)")}),
    "long.npz": lambda: archive({"a.npy": array("(1,)", "<f16", bytes(16))}),
    "deep.npz": lambda: archive({"a.npy": array("(" * 5000)}),
    "minus.npz": lambda: archive({"a.npy": array("-" * 5000 + "1")}),
    "deep_tuple.pth": deep,
    "deep_tuple_old.pth": lambda: deep(old=True),
    "doubled_tuple.pth": lambda: deep(step=b"q\x01h\x01\x86", times=45),
    "script.pth": lambda: archive({"a/constants.pkl": b"", "a/data.pkl": b""}),
    "compressed.pth": lambda: archive({"a/data.pkl": bytes(10**6)}, zipfile.ZIP_DEFLATED),
    "cut.pth": lambda: saved({"a": torch.zeros(9)})[:-100],
    "objects.npz": object_array,
    "bomb.npz": lambda: archive({"stem/kernel.npy": bytes(200 * 2**20)}, zipfile.ZIP_DEFLATED),
    "claims.npz": lambda: archive({"stem/kernel.npy": array("(1000000000000,)")}),
    "overflow.npz": lambda: archive({"a.npy": array(f"({2**62}, 16)")}),
    "text.npz": lambda: archive({"stem/kernel.npy": b"hello"}),
    "strings.npz": lambda: archive({"a.npy": array("(1,)", "<U4", b"0" * 16)}),
    "twice.npz": lambda: GOOD_NPZ.replace(b"MixerBlock_1/", b"MixerBlock_0/"),
    "cut.npz": lambda: GOOD_NPZ[: len(GOOD_NPZ) // 2],
    "flipped.npz": lambda: GOOD_NPZ[:5000] + bytes([GOOD_NPZ[5000] ^ 1]) + GOOD_NPZ[5001:],
    "cut.safetensors": lambda: safe()[:-50],
    "huge_header.safetensors": lambda: b"\xff" * 6 + bytes(2) + safe()[8:],
    "huge_claim.safetensors": huge_claim,
    "integers.safetensors": lambda: safe({"stem.weight": torch.zeros(16, 3, 4, 4).long()}),
    "other.zip": lambda: archive({"readme.txt": b"hello"}),
    "empty.npz": lambda: b"",
    "empty.safetensors": lambda: b"",
    "html.npz": lambda: HTML,
    "html.safetensors": lambda: HTML,
    "html.pth": lambda: HTML,
    "text.safetensors": lambda: b"hello",
}
# What must be called unsafe; the others are damaged, or no weights.
UNSAFE = {"evil.pth", "evil_old.pth", "module.pth", "evil.safetensors", "expanded.pth", "bomb.npz"}
UNSAFE |= {"script.pth", "compressed.pth", "twice.npz"}


@pytest.mark.parametrize("name", list(ATTACKS))
def test_load_model(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(ATTACKS[name]())
    with pytest.raises(am.UserError) as caught:
        am.load_model(path)
    assert (caught.value.code == "unsafe") == (name in UNSAFE)
    what, where = caught.value.what, caught.value.where
    assert str(path) in str(where)
    assert len(what.splitlines()) == 1
    assert len(what) < 300
    assert not MARKER.exists()


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "FILE", "--data", "digits:test"],
        ["predict", "FILE", "digits:test"],
        ["convert", "FILE", "out.safetensors"],
        ["models", "--inspect", "FILE"],
    ],
)
def test_every_command_ends_with_one_message(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    path.write_bytes(ATTACKS["evil.pth"]())
    words = (path if word == "FILE" else word for word in command)
    assert f"where: {path}" in refused(capsys, tmp_path, *words)
    assert not MARKER.exists()


LARGE = "cannot be built|do not fit"
NO_MIXER = "not a mixer architecture"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": {"num_blocks": 10**9}}, "says 1,000,000,000 blocks"),
        ({"architecture": {"hidden_dim": 10**15}}, LARGE),
        ({"architecture": {"image_size": [10**12, 10**12]}}, LARGE),
        ({"architecture": {"hidden_dim": 10**400}}, LARGE),
        ({"architecture": {"image_size": "ab"}}, NO_MIXER),
        ({"architecture": {"patch_size": 1.5}}, NO_MIXER),
        ({"architecture": {"gelu": ["exact"]}}, NO_MIXER),
        ({"architecture": {"surprise": 1}}, NO_MIXER),
        ({"architecture": {"family": []}}, "unknown model family"),
        ({"preprocessing": {"image_size": [float("inf"), 8]}}, "not a preprocessing"),
        ({"preprocessing": {"image_size": [8, 8], "std": float("nan")}}, "not a preprocessing"),
        ({"preprocessing": {"image_size": [8, 8], "mean": float("inf")}}, "not a preprocessing"),
        ({"preprocessing": {"image_size": [8, 8], "std": True}}, "not a preprocessing"),
        ({"preprocessing": {"image_size": [8, 8], "resize": "zoom"}}, "zoom"),
        ({"preprocessing": {"image_size": [8, 16]}}, r"\(8, 16\)"),
        ({"class_names": ["\ud800", "b", "c", "d", "e", "f", "g"]}, "not valid text"),
        ({"class_names": ["ant", "bee"]}, "2 class names"),
        ({"decision": {"temperature": -1}}, "temperature"),
        ({"version": 99}, "99"),
        ('{"format": "allmlp", "version": ' + "9" * 5000 + "}", r"config\.json"),
        (
            '{"format": "allmlp", "version": 1, "architecture": {"family": "mixer"}}',
            r"config\.json",
        ),
        ("[" + "1," * 500_000 + "1]", r"config\.json"),
        ("null", r"config\.json"),
        ("{", r"config\.json"),
    ],
)
def test_a_hostile_description(tmp_path: Path, change: Any, message: str):
    path = am.save_model(tiny_model(), tmp_path / "folder")
    file = path.parent / "config.json"
    if isinstance(change, dict):
        said = json.loads(file.read_text())
        architecture = {**said["architecture"], **change.get("architecture", {})}
        change = json.dumps({**said, **change, "architecture": architecture})
    file.write_text(change)
    with pytest.raises(am.UserError, match=message) as caught:
        am.load_model(path)
    assert str(caught.value.where).startswith(str(path.parent))
    assert len(str(caught.value)) < 3000


def test_a_million_blocks_by_name(tmp_path: Path):
    state = dict(tiny_model().state_dict())
    state["blocks.999999999999.layer_norm_0.weight"] = torch.zeros(16)
    state["blocks.999999.layer_norm_0.weight"] = torch.zeros(16)
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(am.UserError, match="block 999,999"):
        am.load_model(tmp_path / "x.safetensors")


def test_the_attack_works_where_it_is_not_stopped():
    """So that the marker's absence says something."""
    code = f"import pickle; pickle.loads({pickle.dumps(Evil())!r})"
    try:
        subprocess.run([sys.executable, "-c", code], check=True)
        assert MARKER.exists()
    finally:
        MARKER.unlink(missing_ok=True)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    kind=st.sampled_from(["npz", "safetensors", "pth"]),
    place=st.floats(0, 1),
    change=st.binary(min_size=0, max_size=12),
    keep=st.floats(0.3, 1),
)
@pytest.mark.slow
def test_any_damage_is_a_model_or_one_error(tmp_path_factory, kind, place, change, keep):
    good = {
        "npz": lambda: GOOD_NPZ,
        "safetensors": safe,
        "pth": lambda: saved(dict(tiny_model().state_dict())),
    }[kind]()
    at = int(place * len(good))
    damaged = bytearray(good)
    damaged[at : at + len(change)] = change
    path = tmp_path_factory.mktemp("damaged") / f"model.{kind}"
    path.write_bytes(damaged[: int(keep * len(damaged))] if place < 0.3 else damaged)
    with contextlib.suppress(am.UserError):  # and no other exception
        assert isinstance(am.load_model(path, quiet=True), am.MlpMixer)
    assert not MARKER.exists()
