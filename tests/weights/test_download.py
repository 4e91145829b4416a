"""Downloads from a server that hangs up, changes, lies, is slow or is not there."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import allmlp as am
from allmlp.console import Reporter
from allmlp.weights import download
from allmlp.weights.download import Published, cache_folder, cached
from web_server import Behaviour, serve

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUIET = Reporter(quiet=True)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setattr(download, "PATIENCE", 5.0)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def published(url: str, **known: object) -> Published:
    return Published("mixer_x.test", url, **known)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_plain_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "folder" / "file.npz"
    with serve(Behaviour(CONTENT)) as url:
        size = len(CONTENT) / 2**20
        known = published(url, mebibytes=round(size, 2), sha256=SHA256[:8])
        assert cached(known, path, Reporter(stderr=True)) == path
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["file.npz", "file.npz.sha256"]
    assert path.with_name("file.npz.sha256").read_text() == f"{SHA256}  file.npz\n"
    said = capsys.readouterr()
    assert said.out == ""
    assert f"fetching mixer_x.test (0.29 MiB, {url})" in said.err
    assert str(path) in said.err
    cached(known, path, QUIET)  # the server has gone: nothing is fetched again


def test_an_interrupted_download_goes_on_by_itself(tmp_path: Path):
    behaviour = Behaviour(CONTENT, cut_after=[100_000, 50_000])
    with serve(behaviour) as url:
        cached(published(url), tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert behaviour.requests == [None, "bytes=100000-", "bytes=150000-"]


def test_an_interrupted_download_goes_on_the_next_time(tmp_path: Path):
    behaviour = Behaviour(CONTENT, cut_after=[100_000, 10, 10, 10])
    with serve(behaviour) as url:
        with pytest.raises(am.UserError, match=r"100,030 bytes are kept and continued") as caught:
            cached(published(url), tmp_path / "file", QUIET)
        assert "the connection ended after 100,030 of 300,000 bytes" in str(caught.value)
        assert names(tmp_path) == ["file.partial", "file.partial.json"]
        cached(published(url), tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert behaviour.requests[-1] == "bytes=100030-"
    assert names(tmp_path) == ["file", "file.sha256"]


def test_a_file_that_changes_in_between_is_begun_again(tmp_path: Path):
    behaviour = Behaviour(CONTENT, cut_after=[100_000] + [0] * 3)
    with serve(behaviour) as url:
        with pytest.raises(am.UserError, match="kept and continued"):
            cached(published(url), tmp_path / "file", QUIET)
        behaviour.content, behaviour.tag = CONTENT[::-1], '"two"'
        cached(published(url), tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == CONTENT[::-1]


def test_a_file_that_has_become_shorter_is_begun_again(tmp_path: Path):
    behaviour = Behaviour(CONTENT, cut_after=[100_000] + [0] * 3)
    with serve(behaviour) as url:
        with pytest.raises(am.UserError, match="kept and continued"):
            cached(published(url), tmp_path / "file", QUIET)
        behaviour.content = CONTENT[:50_000]  # under the same tag
        cached(published(url), tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == CONTENT[:50_000]


def test_a_whole_partial_file_is_not_fetched_again(tmp_path: Path):
    """Killed while the sha256 was computed: everything is there already."""
    (tmp_path / "file.partial").write_bytes(CONTENT)
    (tmp_path / "file.partial.json").write_text('{"validator": "\\"one\\""}')
    behaviour = Behaviour(CONTENT)
    with serve(behaviour) as url:
        cached(published(url), tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert behaviour.requests == ["bytes=300000-"]
    assert names(tmp_path) == ["file", "file.sha256"]


def test_another_part_than_asked_for_is_not_taken(tmp_path: Path):
    behaviour = Behaviour(CONTENT, cut_after=[100_000], wrong_part=[True])
    with serve(behaviour) as url:
        cached(published(url), tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert behaviour.requests == [None, "bytes=100000-", None]


def test_the_network_goes_away_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def gone(response: object) -> bytes:
        raise OSError(113, "No route to host")

    monkeypatch.setattr(download.http.client.HTTPResponse, "read1", lambda self, n: gone(self))
    behaviour = Behaviour(CONTENT)
    with serve(behaviour) as url, pytest.raises(am.UserError, match="No route to host") as caught:
        cached(published(url), tmp_path / "file", QUIET)
    assert "cache" not in caught.value.what
    assert len(behaviour.requests) == download.ATTEMPTS


def test_a_server_without_ranges(tmp_path: Path):
    behaviour = Behaviour(CONTENT, cut_after=[100_000], ranges=False)
    with serve(behaviour) as url:
        cached(published(url), tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("known", [{"mebibytes": 0.5}, {"sha256": "00000000"}])
def test_a_changed_file_is_refused(tmp_path: Path, known: dict[str, object]):
    with (
        serve(Behaviour(CONTENT)) as url,
        pytest.raises(am.UserError, match="not the published file") as caught,
    ):
        cached(published(url, **known), tmp_path / "file", QUIET)
    assert ("300,000 bytes" in str(caught.value)) == ("mebibytes" in known)
    assert (SHA256 in str(caught.value)) == ("sha256" in known)
    assert names(tmp_path) == []


def test_a_truncated_file_is_refused(tmp_path: Path):
    """The server itself has half the file: its length is right, its size is not."""
    with (
        serve(Behaviour(CONTENT[:150_000])) as url,
        pytest.raises(am.UserError, match=r"150,000 bytes where 0.29 MiB is expected"),
    ):
        cached(published(url, mebibytes=0.29), tmp_path / "file", QUIET)
    assert names(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_no_such_file(tmp_path: Path, status: int):
    behaviour = Behaviour(CONTENT, status=[status] * 9)
    with (
        serve(behaviour) as url,
        pytest.raises(am.UserError, match=f"the server says {status}") as caught,
    ):
        cached(published(url), tmp_path / "file", QUIET)
    message = str(caught.value)
    assert url in message
    assert f"put it at {tmp_path / 'file'}" in message
    assert len(behaviour.requests) == 1
    assert names(tmp_path) == []


def test_a_server_in_trouble_is_asked_again(tmp_path: Path):
    behaviour = Behaviour(CONTENT, status=[503, 500])
    with serve(behaviour) as url:
        cached(published(url), tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == CONTENT
    behaviour = Behaviour(CONTENT, status=[503] * 9)
    with serve(behaviour) as url, pytest.raises(am.UserError, match="the server says 503"):
        cached(published(url), tmp_path / "other", QUIET)
    assert len(behaviour.requests) == download.ATTEMPTS


def test_a_slow_server_is_waited_for_and_a_silent_one_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with serve(Behaviour(CONTENT, stall=[0.3])) as url:
        cached(published(url), tmp_path / "slow", QUIET)
    assert (tmp_path / "slow").read_bytes() == CONTENT
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    behaviour = Behaviour(CONTENT, stall=[2.0])
    with serve(behaviour) as url:
        cached(published(url), tmp_path / "silent", QUIET)
    assert (tmp_path / "silent").read_bytes() == CONTENT
    assert behaviour.requests[1] is not None  # the half that had come was kept
    with (
        serve(Behaviour(CONTENT, stall=[2.0] * 4)) as url,
        pytest.raises(am.UserError, match=r"the connection broke \(.*timed out"),
    ):
        cached(published(url), tmp_path / "dead", QUIET)


def test_no_network_is_one_message_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = published("http://127.0.0.1:9/file")
    started = time.monotonic()
    with pytest.raises(am.UserError, match="no connection") as caught:
        cached(known, tmp_path / "file", QUIET)
    assert time.monotonic() - started < 5  # it does not try again and again
    assert f"Fetch that file by other means and put it at {tmp_path / 'file'}" in str(caught.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with serve(behaviour := Behaviour(CONTENT)) as url:
        with pytest.raises(am.UserError, match="HF_HUB_OFFLINE forbids downloads"):
            cached(published(url), tmp_path / "file", QUIET)
        assert behaviour.requests == []
    (tmp_path / "file").write_bytes(CONTENT)  # put there by hand, as the message says
    assert cached(known, tmp_path / "file", QUIET).read_bytes() == CONTENT
    assert (tmp_path / "file.sha256").read_text().startswith(SHA256)


def test_a_damaged_cache_is_noticed(tmp_path: Path):
    path = tmp_path / "file"
    with serve(Behaviour(CONTENT)) as url:
        cached(published(url), path, QUIET)
        flipped = bytearray(CONTENT)
        flipped[1000] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(am.UserError, match=r"damaged: sha256 [\s\S]*Delete it") as caught:
            cached(published(url), path, QUIET)
        assert str(path) in str(caught.value)
        path.unlink()
        (tmp_path / "file.sha256").unlink()
        cached(published(url), path, QUIET)
    assert path.read_bytes() == CONTENT


def test_a_later_change_on_the_server_is_noticed(tmp_path: Path):
    """Without a published hash the first download's is kept, also when the file is deleted."""
    path = tmp_path / "file"
    behaviour = Behaviour(CONTENT)
    with serve(behaviour) as url:
        cached(published(url), path, QUIET)
        path.unlink()
        behaviour.content = CONTENT[:-1] + b"x"
        with pytest.raises(
            am.UserError, match=f"has changed since it was fetched first[\\s\\S]*{SHA256}"
        ):
            cached(published(url), path, QUIET)
    assert names(tmp_path) == ["file.sha256"]


def test_two_processes_fetch_a_file_once(tmp_path: Path):
    behaviour = Behaviour(CONTENT, stall=[0.3])
    with serve(behaviour) as url:
        threads = [
            threading.Thread(target=cached, args=(published(url), tmp_path / "file", QUIET))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(behaviour.requests) == 1
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: Usage)
    with (
        serve(Behaviour(CONTENT)) as url,
        pytest.raises(am.UserError, match=r"needs 300,000 bytes, 1,000 are free"),
    ):
        cached(published(url), tmp_path / "file", QUIET)
    assert names(tmp_path) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(am.UserError, match=r"cannot write to the cache[\s\S]*MIXER_CACHE"):
        cached(published("http://127.0.0.1:9/x"), tmp_path / "file" / "x" / "y", QUIET)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIXER_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("MIXER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(download.sys, "platform", "linux")
    monkeypatch.setenv("MIXER_CACHE", "~nosuchuser/x")
    with pytest.raises(am.UserError, match="~ cannot be resolved"):
        cache_folder()
    monkeypatch.delenv("MIXER_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "allmlp"
