"""`mixer serve` as a command: its line, its port, its mistakes and its end."""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from pathlib import Path

import pytest

import allmlp as am
from allmlp.deploy import extras
from allmlp.deploy.serve import address_of, is_local, open_socket
from conftest import draw, encode, mixer, tiny_model
from serving import serving

pytest.importorskip("starlette", reason="the extra serve is absent")
pytest.importorskip("python_multipart", reason="the extra serve is absent")
pytest.importorskip("uvicorn", reason="the extra serve is absent")

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
PNG = encode(draw(3))


def test_a_socket_of_this_machine():
    with open_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert is_local(first)
        assert address_of(first, "127.0.0.1") == f"http://127.0.0.1:{port}"
        with pytest.raises(am.UserError, match=f"port {port} is taken") as error:
            open_socket("127.0.0.1", port)
        assert f"--port {port + 1}" in (error.value.fix or "")
    with open_socket("0.0.0.0", 0) as everywhere:
        assert not is_local(everywhere)
        assert address_of(everywhere, "::").startswith("http://[::]:")
    for port in (-1, 65536, 99999):
        with pytest.raises(am.UserError, match=f"no such port: {port}"):
            open_socket("127.0.0.1", port)
    with pytest.raises(am.UserError, match="no address of this machine"):
        open_socket("192.0.2.1", 0)
    with pytest.raises(am.UserError, match="unknown host"):
        open_socket("no host", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/run"], "no/such/run"),
        (["x", "--port", "99999"], "no such port: 99999"),
        (["x", "--host", "192.0.2.1"], "192.0.2.1 is no address of this machine"),
        (["x", "--top-k", "0"], "top_k must be at least 1, got 0"),
        (["x", "--max-images", "0"], "max_images must be at least 1"),
        (["x", "--max-megabytes", "nan"], "max_megabytes must be from 0.001 to 1000, got nan"),
        (["x", "--max-megapixels", "0"], "max_megapixels must be from 0.001 to 100,000, got 0"),
        (
            ["x", "--resize-weights", "auto"],
            "--resize-weights says how to reach another image size",
        ),
    ],
)
def test_mistakes_on_the_command_line(capsys, arguments, message):
    if "--port" not in arguments:
        arguments = [*arguments, "--port", "0"]
    code, out, err = mixer(capsys, "serve", *arguments)
    assert code == 2
    assert out == ""
    assert message in err


def test_without_the_extra(capsys, monkeypatch):
    real = extras.importlib.import_module

    def absent(name: str) -> object:
        if name == "uvicorn":
            raise ModuleNotFoundError("no", name="uvicorn")
        return real(name)

    monkeypatch.setattr(extras.importlib, "import_module", absent)
    code, _, err = mixer(capsys, "serve", "x")
    assert code == 2
    assert "this needs uvicorn, which is not installed" in err
    assert "pip install 'allmlp[serve]'" in err


def test_a_taken_port_on_the_command_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = mixer(capsys, "serve", "x", "--port", port)
    assert code == 2
    assert f"port {port} is taken by another program" in err
    assert "--port 0 for any that is free" in err


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(num_classes=7)
    model.class_names = NAMES
    path = tmp_path_factory.mktemp("weights") / "bugs.safetensors"
    am.save_model(model, path)
    return path


@pytest.mark.slow
def test_the_command_from_its_line_to_ctrl_c(weights):
    with serving(weights, "--top-k", "2") as (url, process):
        assert url.startswith("http://127.0.0.1:")
        request = urllib.request.Request(f"{url}/predict", PNG, {"Content-Type": "image/png"})
        with urllib.request.urlopen(request) as answer:
            assert len(json.load(answer)[0]["classes"]) == 2
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == ("", "stopped\n")


@pytest.mark.slow
def test_the_command_for_all_networks_warns(weights):
    with serving(weights, "--host", "0.0.0.0") as (url, process):
        local = url.replace("0.0.0.0", "127.0.0.1")
        with urllib.request.urlopen(f"{local}/model") as answer:
            assert json.load(answer)["name"] == "bugs.safetensors"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    first, last = err.splitlines()
    assert first.startswith("warning: 0.0.0.0 is more than this machine, and there is no password")
    assert last == "stopped"
