"""The local endpoint: its answers, its limits, who is let in, and one request at a time."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp as am
from allmlp.deploy.service import Limits, Service
from allmlp.inspection.attribution import occlusion, read_image
from conftest import TINY, draw, encode, tiny_model

starlette_client = pytest.importorskip("starlette.testclient", reason="the extra serve is absent")
pytest.importorskip("python_multipart", reason="the extra serve is absent")
pytest.importorskip("uvicorn", reason="the extra serve is absent")
from allmlp.deploy.web import make_app  # noqa: E402

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
HOSTS = frozenset({"127.0.0.1", "localhost"})
LIMITS = Limits(images=3, image_bytes=20_000, request_bytes=50_000)


@pytest.fixture
def service() -> Service:
    model = tiny_model(num_classes=7).eval()
    model.class_names = NAMES
    return Service(model, "runs/bugs", limits=LIMITS)


@pytest.fixture
def client(service: Service) -> Iterator[starlette_client.TestClient]:
    with connected(service) as client:
        yield client


def connected(service: Service, places: int = 8) -> starlette_client.TestClient:
    app = make_app(service, HOSTS, places)
    return starlette_client.TestClient(app, base_url="http://127.0.0.1:8000")


def form(*contents: bytes, field: str = "images") -> list[tuple[str, tuple[str, bytes]]]:
    return [(field, (f"{at}.png", content)) for at, content in enumerate(contents)]


def picture(url: str) -> np.ndarray:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


PNG = encode(draw(3))
# A request as a server hands it over, without a client behind it.
SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/occlusion",
    "query_string": b"",
    "root_path": "",
    "http_version": "1.1",
    "scheme": "http",
    "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"image/png")],
}


def test_classes_are_those_of_predict(client, service, tmp_path):
    for seed in (1, 2):
        draw(seed).save(tmp_path / f"{seed}.png")
    expected = am.predict(service.model, tmp_path, num_workers=0)
    answer = client.post("/predict", files=form(encode(draw(1)), encode(draw(2))))
    assert answer.status_code == 200
    assert [each["name"] for each in answer.json()] == ["0.png", "1.png"]
    for found, wanted in zip(answer.json(), expected, strict=True):
        assert found["error"] is None
        assert [(each["name"], each["probability"]) for each in found["classes"]] == [
            (name, pytest.approx(share)) for name, share in wanted.classes
        ]
        assert len(found["classes"]) == 5


def test_a_bad_image_is_an_entry(client):
    cut = encode(draw(2), "JPEG")[:700]
    large = PNG + bytes(20_000)
    answer = client.post("/predict?top_k=1", files=form(b"no image", PNG, cut))
    assert answer.status_code == 200
    first, good, last = answer.json()
    assert first == {"name": "0.png", "classes": [], "error": "the file is not an image"}
    assert good["error"] is None
    assert len(good["classes"]) == 1
    assert last["error"].startswith("the image is damaged")
    first, last = client.post("/predict", files=form(large, b"")).json()
    assert "bytes; the limit is 20,000 bytes" in first["error"]
    assert last["error"] == "the file is empty"


def test_one_image_as_the_body(client):
    for kind in ("image/png", "application/octet-stream", "image/jpeg; q=1"):
        answer = client.post("/predict", content=PNG, headers={"content-type": kind})
        assert answer.status_code == 200
        (expected,) = client.post("/predict", files=form(PNG)).json()
        assert answer.json() == [{**expected, "name": "image"}]
    bad = client.post("/predict", content=b"x", headers={"content-type": "image/png"})
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
    assert (picture(found["image"]) == pixels).all()
    assert picture(found["map"]).shape == (8, 8, 3)


def test_the_units_that_add_most(client):
    found = client.post("/units", files=form(PNG)).json()
    assert [each["layer"] for each in found["layers"]] == [1, 2]
    assert [each["of"] for each in found["layers"]] == [8, 8]
    for layer in found["layers"]:
        assert len(layer["units"]) == 4
        unit = layer["units"][0]
        assert picture(unit["weights"]).shape == picture(unit["written"]).shape == (2, 2, 3)
        assert picture(unit["read"]).shape == (8, 8, 3)
        assert 1 <= unit["unit"] <= 8
    only = client.post("/units?layer=2", files=form(PNG)).json()
    assert only["layers"] == found["layers"][1:]
    answer = client.post("/units?layer=3", files=form(PNG))
    assert answer.status_code == 422
    assert "no layer 3" in answer.json()["error"]


def test_what_is_served(client):
    assert client.get("/health").json() == {"status": "ok"}
    about = client.get("/model").json()
    assert about["name"] == about["source"] == "runs/bugs"
    assert (about["classes"], about["image_size"], about["precision"]) == (7, [8, 8], "float32")
    assert about["units"] == {"layers": [1, 2], "note": ""}
    assert about["limits"]["images"] == 3


def test_the_page_and_nothing_from_elsewhere(client):
    for path in ("/", "/page.css", "/page.js"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "http://" not in answer.text
        assert "https://" not in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "request_of", "status", "message"),
    [
        ("/predict", {"data": {"a": "b"}}, 415, "'application/x-www-form-urlencoded' is not taken"),
        ("/predict", {}, 415, "content without a type"),
        ("/predict", {"content": b"", "headers": {"content-type": "image/png"}}, 400, "no image"),
        ("/predict", {"files": form(PNG, field="file")}, 400, "unknown field 'file'"),
        ("/predict", {"files": {"images": (None, "text")}}, 400, "a field without a file"),
        ("/predict", {"files": form(PNG, PNG, PNG, PNG)}, 413, "more than 3 images"),
        ("/occlusion", {"files": form(PNG, PNG)}, 413, "more than 1 image in"),
        ("/units", {"files": form(b"text")}, 422, "the file is not an image"),
        ("/occlusion", {"files": form(bytes(30_000))}, 422, "the limit is 20,000 bytes"),
        ("/predict", {"files": form(bytes(30_000), bytes(30_000))}, 413, "than 50,000 bytes"),
        (
            "/predict",
            {"content": bytes(20_001), "headers": {"content-type": "image/png"}},
            413,
            "the image has more than 20,000 bytes",
        ),
        (
            "/predict",
            {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
            400,
            "Missing boundary",
        ),
        (
            "/predict",
            {"content": PNG, "headers": {"content-type": "multipart/form-data; boundary=x"}},
            400,
            "the form cannot be read",
        ),
        ("/predict?topk=3", {"files": form(PNG)}, 400, "unknown setting 'topk'"),
        ("/predict?top_k=0", {"files": form(PNG)}, 400, "a number from 1, got '0'"),
        ("/occlusion?layer=1", {"files": form(PNG)}, 400, "it takes none"),
        ("/health", {}, 405, "/health does not take POST"),
        ("/nothing", {}, 404, "there is no /nothing"),
    ],
)
def test_what_is_refused(client, path, request_of, status, message):
    answer = client.post(path, **request_of)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert message in answer.json()["error"]


def test_a_body_without_a_length_has_the_same_limit(client):
    def parts() -> Iterator[bytes]:
        for _ in range(30):
            yield bytes(1000)

    answer = client.post("/predict", content=parts(), headers={"content-type": "image/png"})
    assert answer.status_code == 413


def test_other_names_and_pages_of_others_are_refused(client):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::1"):
        answer = client.get("/model", headers={"host": host})
        assert answer.status_code == 403, host
        assert "is not called" in answer.json()["error"]
    for host in ("localhost:9000", "LOCALHOST", "127.0.0.1"):  # a forwarded port
        assert client.get("/model", headers={"host": host}).status_code == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "file://127.0.0.1:8000"):
        answer = client.post("/predict", files=form(PNG), headers={"origin": origin})
        assert answer.status_code == 403, origin
        assert "are not taken" in answer.json()["error"]
    own = client.post("/predict", files=form(PNG), headers={"origin": "http://127.0.0.1:8000"})
    assert own.status_code == 200


def test_any_name_where_the_network_was_asked_for(service):
    client = starlette_client.TestClient(make_app(service, None), base_url="http://server.lan:80")
    assert client.get("/health").status_code == 200
    answer = client.post("/predict", files=form(PNG), headers={"origin": "http://evil.example"})
    assert answer.status_code == 403


def test_a_fault_of_ours_tells_nothing(client, service, monkeypatch, capsys):
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(service, "predict", broken)
    answer = client.post("/predict", files=form(PNG))
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "RuntimeError: secret" in capsys.readouterr().err
    monkeypatch.undo()
    assert client.post("/predict", files=form(PNG)).status_code == 200


def test_one_at_a_time_and_not_too_many(service, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()
    running, most = 0, 0
    original = service.predict

    def slow(*given: object) -> object:
        nonlocal running, most
        running += 1
        most = max(most, running)
        begun.set()
        may_end.wait(60)
        running -= 1
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
        while client.post("/predict").status_code == 415:  # refused, but not for want of a place
            time.sleep(0.01)
        full = client.post("/predict", files=form(PNG))
        may_end.set()
        for thread in threads:
            thread.join()
    assert full.status_code == 503
    assert full.headers["retry-after"] == "2"
    assert "2 requests are waiting" in full.json()["error"]
    assert codes == [200, 200]
    assert most == 1


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

    async def send(_: object) -> None:
        pass

    asyncio.run(make_app(service, HOSTS)(SCOPE, receive, send))
    assert ended.is_set()


def test_a_client_that_never_ends_its_request(service, monkeypatch):
    monkeypatch.setattr("allmlp.deploy.uploads._SECONDS_TO_SEND", 0.05)
    said = []

    async def receive() -> dict[str, object]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: dict[str, object]) -> None:
        said.append(message)

    asyncio.run(make_app(service, HOSTS)(SCOPE, receive, send))
    assert said[0]["status"] == 408
    assert b"did not arrive within 0.05 seconds" in said[1]["body"]


def test_names_that_are_no_text(service):
    service.model.class_names = [f"caf\udce9 {name}" for name in NAMES]
    with connected(service) as client:
        content = client.post("/predict", files=form(PNG)).content
    assert json.loads(content)[0]["classes"][0]["name"].startswith("caf\udce9 ")


def test_numbers_that_are_not_finite(service):
    torch.nn.init.constant_(service.model.head.bias, float("nan"))
    with connected(service) as client:
        (row,) = client.post("/predict", files=form(PNG)).json()
        assert row["error"] == "the model's numbers for this image are not finite"
        answer = client.post("/occlusion", files=form(PNG))
    assert answer.status_code == 422
    assert "not finite" in answer.json()["error"]


@pytest.mark.slow
def test_an_exported_file_has_a_map_and_no_units(tmp_path):
    pytest.importorskip("onnx", reason="the extra export is absent")
    pytest.importorskip("onnxscript", reason="the extra export is absent")
    pytest.importorskip("onnxruntime", reason="the extra export is absent")
    model = tiny_model(num_classes=7)
    model.class_names = NAMES
    am.export(model, tmp_path / "bugs.onnx")
    with connected(Service(model, "x")) as client:
        expected = client.post("/occlusion", files=form(PNG)).json()
    service = Service(am.open_exported(tmp_path / "bugs.onnx"), str(tmp_path / "bugs.onnx"))
    assert service.about()["name"] == "bugs.onnx"
    assert service.about()["runtime"].startswith("onnxruntime ")
    with connected(service) as client:
        found = client.post("/occlusion", files=form(PNG)).json()
        assert client.get("/model").json()["units"]["layers"] == []
        answer = client.post("/units", files=form(PNG))
    assert found["class"] == expected["class"]
    assert found["largest_drop"]["drop"] == pytest.approx(
        expected["largest_drop"]["drop"], abs=1e-3
    )
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("An exported file only computes logits")


def test_models_without_classes():
    with pytest.raises(am.UserError, match="no head"):
        Service(tiny_model(num_classes=0), "x")
    with connected(Service(tiny_model(num_classes=3), "x")) as client:
        found = client.post("/predict", files=form(PNG)).json()
    assert {each["name"] for each in found[0]["classes"]} == {"0", "1", "2"}
    with pytest.raises(am.UserError, match="all zeros"):
        Service(am.create_model("mixer_s16", 8, 3, **TINY), "x")
