"""Clients that are slow, many, or send images of very many pixels: the others are answered."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import allmlp as am
from allmlp.deploy.serve import make_server, open_socket
from allmlp.deploy.service import Limits, Service
from conftest import draw, encode, tiny_model
from serving import serving

WHY = "the extra serve is absent"
starlette_client = pytest.importorskip("starlette.testclient", reason=WHY)
pytest.importorskip("python_multipart", reason=WHY)
pytest.importorskip("uvicorn", reason=WHY)
from allmlp.deploy.web import Connection, make_app  # noqa: E402

PNG = encode(draw(3))
HEAD = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
SLOW = HEAD + b"Content-Length: 1000\r\n\r\nx"


def make_service(**limits: int) -> Service:
    model = tiny_model(num_classes=3).eval()
    model.class_names = ["ant", "bee", "cat"]
    return Service(model, "bugs", limits=Limits(**limits))


@contextmanager
def running(service: Service) -> Iterator[int]:
    """Gives the port of a server in a thread."""
    with open_socket("127.0.0.1", 0) as listening:
        server = make_server(service, True, "127.0.0.1")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def ask(port: int, method: str = "GET", path: str = "/health", body: bytes | None = None) -> int:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        client.request(method, path, body, {"Content-Type": "image/png"})
        return client.getresponse().status
    finally:
        client.close()


def opened(port: int, sent: bytes, stack: ExitStack) -> socket.socket:
    client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
    client.sendall(sent)
    return client


def received(client: socket.socket) -> bytes:
    """All that comes until the server closes; it fails after a minute."""
    data = b""
    try:
        while more := client.recv(65536):
            data += more
    except ConnectionResetError:  # it closed before it had read all that we sent
        pass
    return data


def test_slow_clients_take_no_places():
    with running(make_service()) as port, ExitStack() as stack:
        for _ in range(12):
            opened(port, SLOW, stack)
        assert ask(port, "POST", "/predict", PNG) == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HT",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /he",
        b"POST /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nx",
    ],
    ids=["nothing", "part of a head", "after an answer", "a body that was refused"],
)
def test_a_client_that_does_not_go_on_is_closed(monkeypatch: pytest.MonkeyPatch, sent: bytes):
    monkeypatch.setattr(Connection, "seconds_for_head", 0.2)
    with running(make_service()) as port, ExitStack() as stack:
        client = opened(port, sent, stack)
        if b"\r\n\r\n" in sent:
            assert client.recv(65536).startswith(b"HTTP/1.1 ")
            client.sendall(b"x")
        answer = received(client)
        if b"\r\n\r\n" not in sent:
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert list(json.loads(body)) == ["error"]
        assert ask(port) == 200


def test_a_request_that_takes_its_time_to_be_answered_is_not_closed(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(Connection, "seconds_for_head", 0.05)
    service = make_service()
    answers: list[dict[str, object]] = [{"name": "image", "classes": [], "error": None}]
    monkeypatch.setattr(service, "predict", lambda *_: threading.Event().wait(0.3) or answers)
    with running(service) as port:
        assert ask(port, "POST", "/predict", PNG) == 200


def test_more_connections_than_allowed_are_told_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Connection, "most", 4)
    with running(make_service()) as port:
        with ExitStack() as stack:
            for _ in range(4):
                opened(port, b"GET /he", stack)
            over = received(opened(port, b"", stack))
            assert over.startswith(b"HTTP/1.1 503 ")
            assert "too many connections" in json.loads(over.partition(b"\r\n\r\n")[2])["error"]
        while ask_or_none(port) != 200:  # until the server has noticed that they are closed
            pass


def ask_or_none(port: int) -> int | None:
    try:
        return ask(port)
    except OSError:
        return None


def test_what_all_send_at_the_same_time_has_a_limit():
    """Four requests of the largest size; a fifth is told to come again."""
    service = make_service(request_bytes=2_000)
    body = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
    body += b"Content-Length: 2001\r\n\r\n" + bytes(2_000)
    with running(service) as port, ExitStack() as stack:
        for _ in range(4):
            opened(port, body, stack)
        statuses = []
        while 503 not in statuses:  # until all four have been read
            statuses.append(ask(port, "POST", "/predict", PNG))
        stack.close()
        while ask(port, "POST", "/predict", PNG) != 200:
            pass


def test_pixels_are_counted_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch):
    service = make_service(pixels=20_000)
    asked = []
    original = service.predict
    monkeypatch.setattr(service, "predict", lambda *a: asked.append(1) or original(*a))
    large, small = (encode(Image.new("RGB", (side, side))) for side in (150, 80))
    with starlette_client.TestClient(make_app(service, None)) as client:

        def post(*contents: bytes, path: str = "/predict") -> tuple[int, object]:
            files = [("images", (f"{at}.png", each)) for at, each in enumerate(contents)]
            answer = client.post(path, files=files)
            return answer.status_code, answer.json()

        for contents in ([large], [small] * 4):
            status, said = post(*contents)
            assert status == 413
            assert isinstance(said, dict)
            assert "megapixels" in said["error"]
        assert post(large, path="/occlusion")[0] == 413
        raw = client.post("/predict", content=large, headers={"content-type": "image/png"})
        assert raw.status_code == 413
        assert asked == []
        status, said = post(*[small] * 3, b"no image")
        assert status == 200
        assert isinstance(said, list)
        assert [each["error"] is None for each in said] == [True] * 3 + [False]
        assert client.get("/model").json()["limits"]["request_pixels"] == 20_000


def test_a_form_of_large_files_opens_none(monkeypatch: pytest.MonkeyPatch):
    """Files on disk would take the descriptors of connections."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    content = encode(Image.fromarray(noise))
    assert len(content) > 2**20
    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", lambda _: 1 / 0)
    with starlette_client.TestClient(make_app(make_service(), None)) as client:
        assert client.post("/predict", files={"images": ("a.png", content)}).status_code == 200


@pytest.mark.slow
def test_connections_beyond_the_descriptors(tmp_path: Path):
    resource = pytest.importorskip("resource", reason="limits as Unix has them")
    model = tiny_model(num_classes=3)
    model.class_names = ["ant", "bee", "cat"]
    am.save_model(model, tmp_path / "bugs")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    with ExitStack() as limit:
        limit.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with serving(tmp_path / "bugs") as (url, process):
            limit.close()
            port = int(url.rpartition(":")[2])
            with ExitStack() as stack:
                for _ in range(150):
                    opened(port, b"GET /he", stack)
                ask_or_none(port)  # 503, or nothing; 200 where the first were closed by now
            while ask_or_none(port) != 200:
                pass
            process.terminate()
            _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert "Too many open files" not in err
