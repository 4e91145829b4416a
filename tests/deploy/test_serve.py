"""The local endpoint: answers, limits, who may use it, one request at a time; and a browser."""

import asyncio
import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp as am
from allmlp.data.sources import open_source
from allmlp.deploy.options import ServeOptions
from allmlp.deploy.serve import Service
from allmlp.inspection.attribution import occlusion, read_image
from browser import PROGRAM, browser
from conftest import draw, encode, mixer, refused, tiny_model
from serving import running

starlette_client = pytest.importorskip("starlette.testclient", reason="the extra serve is absent")
pytest.importorskip("python_multipart", reason="the extra serve is absent")
uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is absent")
from allmlp.deploy.web import make_app  # noqa: E402

GET = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
HOSTS = frozenset({"127.0.0.1", "localhost"})
PNG = encode(draw(3))
IMAGE = {"content-type": "image/png"}
FORM = {"content-type": "multipart/form-data"}
BOUNDED = {"content-type": "multipart/form-data; boundary=x"}
# A request as a server hands it over, without a client behind it.
SCOPE = {"type": "http", "method": "POST", "path": "/occlusion", "query_string": b""}
SCOPE |= {"root_path": "", "http_version": "1.1", "scheme": "http"}
SCOPE |= {"headers": [(b"host", b"127.0.0.1"), (b"content-type", b"image/png")]}


def make_service(**options: Any) -> Service:
    model = tiny_model(NAMES).eval()
    small = {"max_images": 3, "max_megabytes": 0.02}
    service = Service(model, "runs/bugs", ServeOptions(**{**small, **options}))
    service.request_bytes = 50_000
    return service


@pytest.fixture
def service() -> Service:
    return make_service()


@pytest.fixture
def client(service: Service) -> Iterator[starlette_client.TestClient]:
    with connected(service) as client:
        yield client


def test_the_page_asks_relative_to_its_own_address():
    """So that it works behind a prefix, such as that of a notebook server."""
    for file in (Path(am.__file__).parent / "deploy" / "page").iterdir():
        absolute = re.findall(r"""(?:ask|fetch|src=|href=)\(?["'`]/.*""", file.read_text())
        assert absolute == [], file.name


def test_a_limit_above_that_of_the_web_server():
    service = make_service(max_images=1001)
    service.request_bytes = 10**7
    files = [("images", (f"{at}.png", PNG)) for at in range(1002)]
    with connected(service) as client:
        answer = client.post("/predict", files=files)
    assert (answer.status_code, "1,001 images" in answer.text) == (413, True)


def connected(
    service: Service, hosts: frozenset[str] | None = HOSTS, places: int = 8
) -> starlette_client.TestClient:
    app = make_app(service, hosts, places)
    return starlette_client.TestClient(app, base_url="http://127.0.0.1:8000")


def form(*contents: bytes, field: str = "images") -> list[tuple[str, tuple[str, bytes]]]:
    return [(field, (f"{at}.png", content)) for at, content in enumerate(contents)]


def pixels_in(url: str) -> np.ndarray:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_classes_are_those_of_predict(client, service, tmp_path):
    for seed in (1, 2):
        draw(seed).save(tmp_path / f"{seed}.png")
    expected = am.predict(service.model, tmp_path, num_workers=0)
    answer = client.post("/predict", files=form(encode(draw(1)), encode(draw(2))))
    assert answer.status_code == 200
    assert [row["name"] for row in answer.json()] == ["0.png", "1.png"]
    for found, wanted in zip(answer.json(), expected, strict=True):
        assert found["error"] is None
        assert [(row["name"], row["probability"]) for row in found["classes"]] == [
            (name, pytest.approx(value)) for name, value in wanted.classes
        ]
        assert len(found["classes"]) == 5


def test_a_bad_image_is_an_entry(client):
    cut = encode(draw(2), "JPEG")[:700]
    answer = client.post("/predict?top_k=1", files=form(b"no image", PNG, cut))
    assert answer.status_code == 200
    first, good, last = answer.json()
    assert first == {"name": "0.png", "classes": [], "error": "the file is not an image"}
    assert (good["error"], len(good["classes"])) == (None, 1)
    assert "damaged" in last["error"]
    (empty,) = client.post("/predict", files=form(b"")).json()
    assert "empty" in empty["error"]


def test_one_image_as_the_body(client):
    for kind in ("image/png", "application/octet-stream", "image/jpeg; q=1"):
        answer = client.post("/predict", content=PNG, headers={"content-type": kind})
        assert answer.status_code == 200
        (expected,) = client.post("/predict", files=form(PNG)).json()
        assert answer.json() == [{**expected, "name": "image"}]
    bad = client.post("/predict", content=b"x", headers=IMAGE)
    assert (bad.status_code, bad.json()) == (422, {"error": "the file is not an image"})


def test_the_occlusion_map(client, service, tmp_path):
    (tmp_path / "image.png").write_bytes(PNG)
    image, pixels = read_image(tmp_path / "image.png", service.model)
    expected = occlusion(service.model, image)
    found = client.post("/occlusion", files=form(PNG)).json()
    assert found["class"] == expected.name
    assert found["probability"] == pytest.approx(expected.probability)
    assert found["largest_drop"]["drop"] == pytest.approx(expected.drop.max())
    assert found["patches"] == [2, 2]
    assert found["covered_images"] == expected.drop.size
    assert (pixels_in(found["image"]) == pixels).all()
    assert pixels_in(found["map"]).shape == (8, 8, 3)


def test_the_units_that_add_most(client):
    found = client.post("/units", files=form(PNG)).json()
    assert [(layer["layer"], layer["of"]) for layer in found["layers"]] == [(1, 8), (2, 8)]
    for layer in found["layers"]:
        assert len(layer["units"]) == 4
        unit = layer["units"][0]
        assert pixels_in(unit["weights"]).shape == pixels_in(unit["written"]).shape == (2, 2, 3)
        assert pixels_in(unit["read"]).shape == (8, 8, 3)
        assert 1 <= unit["unit"] <= 8
    only = client.post("/units?layer=2", files=form(PNG)).json()
    assert only["layers"] == found["layers"][1:]
    assert client.post("/units?layer=3", files=form(PNG)).status_code == 422


def test_what_is_served_and_nothing_from_elsewhere(client):
    assert client.get("/health").json() == {"status": "ok"}
    about = client.get("/model").json()
    assert about["name"] == about["source"] == "runs/bugs"
    assert (about["classes"], about["image_size"], about["precision"]) == (7, [8, 8], "float32")
    assert about["units"] == {"layers": [1, 2], "note": ""}
    assert about["limits"]["images"] == 3
    for path in ("/", "/page.css", "/page.js", "/start.js"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "http://" not in answer.text
        assert "https://" not in answer.text
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in client.get("/").text


@pytest.mark.parametrize(
    ("path", "request_of", "status", "word"),
    [
        ("/predict", {"data": {"a": "b"}}, 415, "application/x-www-form-urlencoded"),
        ("/predict", {"content": b"", "headers": IMAGE}, 400, "no image"),
        ("/predict", {"files": form(PNG, field="file")}, 400, "'file'"),
        ("/predict", {"files": {"images": (None, "text")}}, 400, "field"),
        ("/predict", {"files": form(PNG, PNG, PNG, PNG)}, 413, "3 images"),
        ("/occlusion", {"files": form(PNG, PNG)}, 413, "1 image in"),
        ("/units", {"files": form(b"text")}, 422, "not an image"),
        ("/predict", {"files": form(PNG, bytes(20_001))}, 413, "'1.png'"),
        ("/predict", {"files": form(bytes(30_000), bytes(30_000))}, 413, "50,000 bytes"),
        ("/predict", {"content": bytes(20_001), "headers": IMAGE}, 413, "20,000 bytes"),
        ("/predict", {"content": iter([bytes(999)] * 30), "headers": IMAGE}, 413, "20,000 bytes"),
        ("/predict", {"content": b"x", "headers": FORM}, 400, "boundary"),
        ("/predict", {"content": PNG, "headers": BOUNDED}, 400, "multipart"),
        ("/predict?topk=3", {"files": form(PNG)}, 400, "'topk'"),
        ("/predict?top_k=0", {"files": form(PNG)}, 400, "'0'"),
        ("/occlusion?layer=1", {"files": form(PNG)}, 400, "'layer'"),
        ("/health", {}, 405, "Method"),
        ("/nothing", {}, 404, "Found"),
    ],
)
def test_what_is_rejected(client, path, request_of, status, word):
    answer = client.post(path, **request_of)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert word in answer.json()["error"]


def test_other_names_and_pages_of_others_are_rejected(client, service):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::1"):
        assert client.get("/model", headers={"host": host}).status_code == 403, host
    for host in ("localhost:9000", "LOCALHOST", "127.0.0.1"):  # a forwarded port
        assert client.get("/model", headers={"host": host}).status_code == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "file://127.0.0.1:8000"):
        answer = client.post("/predict", files=form(PNG), headers={"origin": origin})
        assert answer.status_code == 403, origin
    own = client.post("/predict", files=form(PNG), headers={"origin": "http://127.0.0.1:8000"})
    assert own.status_code == 200
    with connected(service, None) as everybody:  # any name, if the network was asked for
        assert everybody.get("/health", headers={"host": "server.lan"}).status_code == 200
        answer = everybody.post("/predict", files=form(PNG), headers={"origin": "http://evil.io"})
        assert answer.status_code == 403


def test_a_fault_of_ours_reveals_nothing(client, service, monkeypatch, capsys):
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(service, "predict", broken)
        answer = client.post("/predict", files=form(PNG))
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "RuntimeError: secret" in capsys.readouterr().err
    assert client.post("/predict", files=form(PNG)).status_code == 200


def test_one_at_a_time_and_not_too_many(service, monkeypatch):
    begun, may_end, running = threading.Event(), threading.Event(), threading.Lock()
    original = service.predict

    def slow(*given: object) -> object:
        assert running.acquire(blocking=False)  # nobody else computes
        begun.set()
        may_end.wait(60)
        running.release()
        return original(*given)

    monkeypatch.setattr(service, "predict", slow)
    codes: list[int] = []
    with connected(service, places=2) as client:
        post = lambda: codes.append(client.post("/predict", files=form(PNG)).status_code)  # noqa: E731
        threads = [threading.Thread(target=post) for _ in range(2)]
        threads[0].start()
        assert begun.wait(60)
        assert client.get("/health").status_code == 200  # while the model computes
        threads[1].start()
        while client.post("/predict").status_code == 415:  # not yet for lack of a place
            time.sleep(0.01)
        full = client.post("/predict", files=form(PNG))
        may_end.set()
        for thread in threads:
            thread.join()
    assert (full.status_code, full.headers["retry-after"]) == (503, "2")
    assert codes == [200, 200]


def sent_to(service: Service, receive: Callable[[], Any]) -> list[dict[str, Any]]:
    """What a client of the request SCOPE is sent."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(make_app(service, HOSTS)(SCOPE, receive, send))
    return sent


def test_a_request_whose_client_has_gone_is_given_up(service, monkeypatch):
    ended = threading.Event()

    def endless(_: object, check: object) -> None:
        assert callable(check)
        try:
            while True:
                check(1)
                time.sleep(0.001)
        finally:
            ended.set()

    monkeypatch.setattr(service, "occlusion", endless)
    messages = [{"type": "http.request", "body": PNG}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    sent_to(service, receive)
    assert ended.is_set()


def test_a_client_that_never_ends_its_request(service, monkeypatch):
    monkeypatch.setattr("allmlp.deploy.web._SECONDS_TO_SEND", 0.05)

    async def receive() -> dict[str, object]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    head, body = sent_to(service, receive)
    assert head["status"] == 408
    assert b"0.05 seconds" in body["body"]


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", GET + b"GET /he"])
def test_a_client_that_stops_within_a_head_is_cut_and_others_are_served(monkeypatch, sent):
    monkeypatch.setattr("allmlp.deploy.web._SECONDS_FOR_HEAD", 0.3)
    service = make_service()
    slow = service.predict
    monkeypatch.setattr(Service, "predict", lambda *given: time.sleep(0.5) or slow(*given[1:]))
    with running(service.model) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(sent)
            answer = b"".join(iter(lambda: client.recv(65536), b""))  # until it is closed
        assert answer.count(b"HTTP/1.1 200") == sent.count(GET)
        # A head that came is answered, however long that takes.
        request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", PNG, IMAGE)
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)[0]["error"] is None


def test_names_that_are_not_text_and_values_that_are_not_finite(service):
    service.model.class_names = [f"caf\udce9 {name}" for name in NAMES]
    with connected(service) as client:
        content = client.post("/predict", files=form(PNG)).content
    assert json.loads(content)[0]["classes"][0]["name"].startswith("caf\udce9 ")
    torch.nn.init.constant_(service.model.head.bias, float("nan"))
    with connected(service) as client:
        (row,) = client.post("/predict", files=form(PNG)).json()
        assert (row["classes"], "not finite" in row["error"]) == ([], True)
        assert client.post("/occlusion", files=form(PNG)).status_code == 422


@pytest.mark.slow
def test_an_exported_file_has_a_map_and_no_units(service, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra export is absent")
    pytest.importorskip("onnxruntime", reason="the extra export is absent")
    am.export(service.model, output=tmp_path / "bugs.onnx")
    with connected(service) as client:
        expected = client.post("/occlusion", files=form(PNG)).json()
    file = Service(am.open_exported(tmp_path / "bugs.onnx"), str(tmp_path / "bugs.onnx"))
    assert file.about()["name"] == "bugs.onnx"
    assert file.about()["runtime"].startswith("onnxruntime ")
    with connected(file) as client:
        found = client.post("/occlusion", files=form(PNG)).json()
        assert client.get("/model").json()["units"]["layers"] == []
        assert client.post("/units", files=form(PNG)).status_code == 422
    assert found["class"] == expected["class"]
    drops = [values["largest_drop"]["drop"] for values in (found, expected)]
    assert drops[0] == pytest.approx(drops[1], abs=1e-3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "bugs.safetensors"
    am.save_model(make_service().model, path)
    return path


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["no/such/run"], "no/such/run"),
        (["x", "--port", "99999"], "99999"),
        (["x", "--host", "192.0.2.1"], "192.0.2.1"),
        (["x", "--top-k", "0"], "top_k"),
        (["x", "--max-megabytes", "nan"], "max_megabytes"),
        (["x", "--resize-weights", "resample"], "image_size"),
    ],
)
def test_mistakes_on_the_command_line(capsys, tmp_path, arguments, word):
    port = [] if "--port" in arguments else ["--port", "0"]
    assert word in refused(capsys, tmp_path, "serve", *arguments, *port)


def test_without_the_packages_and_on_a_taken_port(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = mixer(capsys, "serve", "x", "--port", port)
    assert (code, f"port {port}" in err) == (2, True)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = mixer(capsys, "serve", "x")
    assert (code, "pip install 'allmlp[serve]'" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_command_from_its_line_to_ctrl_c(weights, host):
    command = [sys.executable, "-m", "allmlp", "serve", str(weights), "--port", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, "--top-k", "2", "--host", host], stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"serving  (http://\S+)  \(.+ classes\); Ctrl-C ends it\n", line)
            assert found is not None, line
            assert found[1].startswith(f"http://{host}:")
            local = found[1].replace("0.0.0.0", "127.0.0.1")
            request = urllib.request.Request(f"{local}/predict", PNG, IMAGE)
            with urllib.request.urlopen(request) as answer:
                assert len(json.load(answer)[0]["classes"]) == 2
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, "")
    *warnings, last = err.splitlines()
    assert last == "stopped"
    assert [host in line for line in warnings] == ([] if host == "127.0.0.1" else [True])


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
def test_an_image_and_what_it_excites_in_a_browser(trained: am.TrainResult, tmp_path: Path):
    digit = tmp_path / "digit.png"
    digit.write_bytes(open_source("digits:test").read(0))
    (expected,) = am.predict(trained.run_folder, digit)
    with running(trained.run_folder) as port, browser(tmp_path / "profile") as page:
        url = f"http://127.0.0.1:{port}"
        page.open(url)
        page.wait("document.querySelectorAll('#layer option').length > 1")
        assert "10 classes · 8x8 pixels · float32" in page.text("#about")
        page.choose("#file", digit)
        page.wait("document.querySelectorAll('#classes li').length == 5")
        names = page.run("[...document.querySelectorAll('#classes .name')].map(e => e.innerText)")
        assert names == [name for name, _ in expected.classes]
        assert page.text("#classes .value") == f"{100 * expected.classes[0][1]:.1f} %"
        widths = page.run(
            "[...document.querySelectorAll('.bar')].map(b => b.getBoundingClientRect().width)"
        )
        assert len(widths) == 5
        assert widths == sorted(widths, reverse=True)
        page.wait("document.querySelector('#occlusion .note').textContent.includes('falls')")
        assert f"The probability of {expected.classes[0][0]}," in page.text("#occlusion .note")
        shown = page.wait(
            "[...document.images].filter(i => i.naturalWidth > 0 && i.offsetWidth)"
            ".map(i => [i.id, i.alt])"
        )
        assert {"picture", "seen", "map"} <= {name for name, _ in shown}
        assert len(shown) == 3 + 2 * 4 * 3  # layers, units, images of each
        assert all(text for _, text in shown)
        page.run(
            "{const s = document.querySelector('#layer'); s.value = 2;"
            " s.dispatchEvent(new Event('change'))}"
        )
        page.wait("document.querySelector('#layers h3').textContent.startsWith('Layer 2')")
        assert page.run("document.querySelectorAll('#layers .unit').length") == 4
        assert page.complaints() == []
        asked = {address.removeprefix(url) for address in page.requests()}
        pages = {"/", "/page.css", "/page.js", "/start.js"}
        assert {*pages, "/model", "/predict", "/occlusion", "/units", "/units?layer=2"} <= asked
        assert {
            address for address in asked if not address.startswith(("/", "data:", "blob:"))
        } == set()
