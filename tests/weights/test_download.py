"""Downloads from a server that hangs up, changes, lies or is not there; and from the hub."""

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants, file_download
from test_layouts import timm_folder

import allmlp as am
import hub_server
from allmlp.console import Reporter
from allmlp.weights import download
from allmlp.weights.download import Published, cache_folder, cached
from web_server import Behaviour, serve

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUIET = Reporter(quiet=True)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(file_download.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def published(url: str, **known: Any) -> Published:
    return Published(name="mixer_x.test", url=url, **known)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def failed(known: Published, path: Path) -> am.UserError:
    with pytest.raises(am.UserError) as caught:
        cached(known, path, QUIET)
    return caught.value


def test_a_plain_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "folder" / "file.npz"
    with serve(Behaviour(CONTENT)) as url:
        size = len(CONTENT) / 2**20
        known = published(url, mebibytes=round(size, 2), sha256=SHA256[:8])
        assert cached(known, path, Reporter(stderr=True)) == path
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["file.npz", "file.npz.sha256"]
    assert path.with_name("file.npz.sha256").read_text() == f"{SHA256}  file.npz\n"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert url in printed.err
    assert str(path) in printed.err
    cached(known, path, QUIET)  # the server has gone: nothing is downloaded again
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ranges", [True, False])  # which the server knows or not
def test_an_interrupted_download_resumes_by_itself(tmp_path: Path, ranges: bool):
    behaviour = Behaviour(CONTENT, cut_after=[100_000, 50_000][: 1 + ranges], ranges=ranges)
    with serve(behaviour) as url:
        cached(published(url), tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert not ranges or behaviour.requests == [None, "bytes=100000-", "bytes=150000-"]


@pytest.mark.parametrize("changes", [False, True])
def test_an_interrupted_download_resumes_the_next_time(tmp_path: Path, changes: bool):
    """If the server has the same file; another one starts again."""
    behaviour = Behaviour(CONTENT, cut_after=[100_000] + [0] * 40)
    with serve(behaviour) as url:
        assert failed(published(url), tmp_path / "file").code == "no-download"
        assert [path.stat().st_size for path in tmp_path.glob("*.partial")] == [100_000]
        behaviour.cut_after.clear()
        behaviour.requests.clear()
        if changes:
            behaviour.content, behaviour.tag = CONTENT[::-1], '"two"'
        cached(published(url), tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == behaviour.content
    assert behaviour.requests == [None if changes else "bytes=100000-"]
    assert names(tmp_path) == ["file", "file.sha256"]


@pytest.mark.parametrize("known", [{"mebibytes": 0.5}, {"sha256": "00000000"}])
def test_a_changed_file_is_an_error(tmp_path: Path, known: dict[str, Any]):
    with serve(Behaviour(CONTENT)) as url:
        error = failed(published(url, **known), tmp_path / "file")
    assert error.code == "changed"
    assert ("300,000 bytes" in error.what) == ("mebibytes" in known)
    assert (SHA256 in error.what) == ("sha256" in known)
    assert names(tmp_path) == []


def test_a_later_change_on_the_server_or_the_disk_is_noticed(tmp_path: Path):
    """Without a published checksum the first download's is kept, also if the file is deleted."""
    path, behaviour = tmp_path / "file", Behaviour(CONTENT)
    with serve(behaviour) as url:
        cached(published(url), path, QUIET)
        flipped = bytearray(CONTENT)
        flipped[1000] ^= 1
        path.write_bytes(flipped)
        error = failed(published(url), path)
        assert (error.code, error.where) == ("damaged", str(path))
        path.unlink()
        behaviour.content = bytes(flipped)
        error = failed(published(url), path)
        assert error.code == "changed"
        assert SHA256 in error.what
        assert names(tmp_path) == ["file.sha256"]


def test_a_server_or_network_that_fails_is_one_message_at_once(tmp_path, monkeypatch):
    known, path = published("http://127.0.0.1:9/file"), tmp_path / "file"
    started = time.monotonic()
    error = failed(known, path)
    assert error.code == "no-download"
    assert f"put it at {path}" in error.text()
    assert time.monotonic() - started < 5  # it does not try again and again
    with serve(Behaviour(CONTENT, status=[404])) as url:
        error = failed(published(url), path)
        assert "404" in error.what
        assert url in error.text()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with serve(behaviour := Behaviour(CONTENT)) as url:
        assert "HF_HUB_OFFLINE" in failed(published(url), path).what
        assert behaviour.requests == []
    assert names(tmp_path) == []
    path.write_bytes(CONTENT)  # put there by hand, as the message says
    assert cached(known, path, QUIET).read_bytes() == CONTENT
    assert (tmp_path / "file.sha256").read_text().startswith(SHA256)


def test_two_processes_download_a_file_once(tmp_path: Path):
    behaviour = Behaviour(CONTENT, stall=[0.3])
    with serve(behaviour) as url:
        arguments = (published(url), tmp_path / "file", QUIET)
        threads = [threading.Thread(target=cached, args=arguments) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(behaviour.requests) == 1
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    error = failed(published("http://127.0.0.1:9/x"), tmp_path / "file" / "x" / "y")
    assert "MIXER_CACHE" in error.text()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIXER_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(download.sys, "platform", "linux")
    monkeypatch.delenv("MIXER_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "allmlp"


# --- hf:owner/name, on a hub of our own and without a network ---


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """The hub's cache, with a hub that has owner/tiny, branches main and v2."""
    files = {path.name: path.read_bytes() for path in timm_folder(tmp_path).iterdir()}
    with hub_server.serve(hub_server.Hub({"owner/tiny": {"main": files, "v2": files}}), tmp_path):
        yield tmp_path / "cache"


def test_a_model_of_the_hub_and_then_offline(cache: Path, monkeypatch: pytest.MonkeyPatch):
    for offline in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        model = am.load_model("hf:owner/tiny@v2", quiet=True)
        assert (model.config.num_classes, model.config.gelu) == (7, "exact")
        assert model.preprocessing.value_range() == "[0, 1]"
    blob = next(path for path in cache.rglob("model.safetensors")).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(am.UserError, match="the cached file is damaged") as caught:
        am.load_model("hf:owner/tiny@v2")
    assert str(blob) in str(caught.value.fix)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:owner/nothing", "no model 'owner/nothing', or it is private"),
        ("hf:owner/tiny@v9", "owner/tiny has no revision 'v9'"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_what_is_not_there(source: str, message: str):
    with pytest.raises(am.UserError, match=message):
        am.load_model(source)


def test_no_network_is_one_message(cache: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(am.UserError, match="owner/tiny is not in the cache") as caught:
        am.load_model("hf:owner/tiny")
    assert caught.value.where == str(cache)
    assert "hf download owner/tiny" in str(caught.value.fix)
    assert capfd.readouterr().err == ""  # no warnings of the hub's library
