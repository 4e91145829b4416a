"""The exported web page: in Chromium against `mixer predict`, and without a network."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp as am
from allmlp.data.transforms import model_input
from allmlp.deploy import browser as web
from allmlp.models.layers import preprocessing_of
from browser import PROGRAM, Browser, browser
from conftest import encode, mixer, tiny_model, turned, user_error, write_tar
from odd_images import png16
from web_server import Behaviour, serve, static

pytest.importorskip("onnxruntime", reason="pip install 'allmlp[export]'")
pytest.importorskip("onnxscript", reason="pip install 'allmlp[export]'")
PACKAGE = f"onnxruntime-web-{web.VERSION}.tgz"


def small_package(folder: Path) -> bytes:
    members = ((f"package/dist/{name}", name.encode()) for name in web.RUNTIME)
    return gzip.compress(write_tar(folder / "package.tar", members).read_bytes())


def test_without_a_network_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with user_error("no-download") as caught:
        am.export(tiny_model(), tmp_path / "page")
    assert PACKAGE in str(caught.value.fix)  # where to put it
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with serve(Behaviour(small_package(tmp_path))) as url:  # not the published bytes
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", url)
        with user_error("changed"):
            am.export(tiny_model(), tmp_path / "page")
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("folder", [".", "page.v2"])
@pytest.mark.parametrize("name", ["index.html", "model.onnx"])
def test_files_of_the_folder_are_not_replaced(tmp_path: Path, monkeypatch, folder: str, name: str):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / folder
    page.mkdir(exist_ok=True)
    (page / name).write_bytes(b"theirs")
    with user_error("exists") as caught:
        am.export(tiny_model(), "." if folder == "." else f"{page}/")
    assert caught.value.where == str(page / name)
    assert [path.name for path in page.iterdir()] == [name]


@pytest.mark.slow
def test_a_folder_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """With an own runtime; the file inside is that of every other command."""
    content = small_package(tmp_path)
    monkeypatch.setattr(web, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("MIXER_CACHE", str(tmp_path / "cache"))
    model = tiny_model([f"é{at}" for at in range(7)])
    model.decision = am.Decision(temperature=2.0, unsure_below=0.3)
    model.preprocessing = replace(preprocessing_of(model), permutation="pixels")
    am.save_model(model, tmp_path / "m.safetensors")
    page = tmp_path / "page"
    behaviour = Behaviour(content)
    with serve(behaviour) as url:
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", url)
        code, out, err = mixer(capsys, "export", tmp_path / "m.safetensors", "--output", page)
    assert (code, len(behaviour.requests)) == (0, 1), err
    assert f"python3 -m http.server --directory {page}" in out
    assert sorted(path.name for path in page.iterdir()) == sorted(web.CONTENT)
    assert [(page / name).read_text() for name in web.RUNTIME] == list(web.RUNTIME)
    about = json.loads((page / "model.json").read_text())
    assert json.loads(about["metadata"]["class_names"]) == model.class_names
    assert json.loads(about["metadata"]["decision"]) == model.decision.to_json()
    file = am.open_exported(page)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    again = am.open_exported(page / "model.onnx")
    torch.testing.assert_close(file(images), again(images))
    assert am.export(model, page, overwrite=True).passed  # from the cache


# --- in Chromium ----------------------------------------------------------------------------------

in_chromium = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with onnxruntime-web: the user's, or filled by npm."""
    given = os.environ.get("MIXER_CACHE")
    if given and Path(given, "onnxruntime-web", PACKAGE).is_file():
        return Path(given)
    if shutil.which("npm") is None:
        pytest.skip("neither npm nor a cache with onnxruntime-web here")
    folder = tmp_path_factory.mktemp("cache")
    (folder / "onnxruntime-web").mkdir()
    command = ["npm", "pack", "--silent", f"onnxruntime-web@{web.VERSION}"]
    done = subprocess.run(command, cwd=folder / "onnxruntime-web", capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm has no onnxruntime-web here: {done.stderr[-200:]}")
    return folder


def photo(height: int, width: int, channels: int = 3) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(columns / (width / 5) + k) * np.cos(4 * rows / height - k) for k in range(4)]
    noise = np.random.default_rng(0).normal(0, 12, (height, width, channels))
    pixels = 127 + 100 * np.stack(waves[:channels], axis=-1) + noise
    return pixels.clip(0, 255).astype(np.uint8)


def kinds() -> dict[str, tuple[bytes, int]]:
    """Images by name, each with the largest difference of a pixel of a browser's decoder."""
    image = Image.fromarray(photo(120, 160))
    clear = Image.fromarray(photo(90, 70, 4), "RGBA")
    palette = image.quantize(40)
    low_bits = np.random.default_rng(0).integers(0, 256, (60, 80, 3))
    deep = photo(60, 80).astype(int) * 256 + low_bits
    return {
        "plain.png": (encode(image), 0),
        "wide.png": (encode(Image.fromarray(photo(20, 600))), 0),
        "tiny.png": (encode(Image.fromarray(photo(1, 2))), 0),
        "turned.jpg": (encode(image, "JPEG", exif=turned(6), quality=90), 2),
        "turned.png": (encode(image, exif=turned(5)), 0),
        "turned.webp": (encode(image, "WEBP", exif=turned(8), lossless=True), 0),
        "small-colours.jpg": (encode(image, "JPEG", quality=70), 2),
        "grey.png": (encode(image.convert("L")), 0),
        "grey.jpg": (encode(image.convert("L"), "JPEG"), 2),
        "clear.png": (encode(clear), 1),
        "palette.png": (encode(palette), 0),
        "palette-clear.png": (encode(palette, transparency=3), 0),
        "16-bit.png": (png16(deep), 1),
        "16-bit-grey.png": (png16(deep[..., 0]), 1),
        "cmyk.jpg": (encode(image.convert("CMYK"), "JPEG", quality=95), 4),
        "lossy.webp": (encode(image, "WEBP", quality=80), 2),
        "palette.gif": (encode(palette, "GIF"), 0),
    }


REFUSED = {
    "page.tif": encode(Image.fromarray(photo(20, 20)), "TIFF"),
    "cut.jpg": encode(Image.fromarray(photo(120, 160)), "JPEG")[:3000],
    "cut.png": encode(Image.fromarray(photo(120, 160)))[:9000],
    "text.png": b"text",
    "empty.png": b"",
}
PIXELS = """async (name, how) => {
  const { modelInput } = await import("./start.js");
  const file = await (await fetch(`images/${name}`)).blob();
  return [...await modelInput(file, how)];
}"""


@pytest.fixture(scope="module")
def page(
    trained: am.TrainResult, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Browser, Path, str]]:
    folder = tmp_path_factory.mktemp("web") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXER_CACHE", str(cache))
        am.export(trained.run_folder, folder)
    (folder / "images").mkdir()
    for name, data in {**{name: data for name, (data, _) in kinds().items()}, **REFUSED}.items():
        (folder / "images" / name).write_bytes(data)
    with static(folder) as host, browser(folder.parent / "profile") as page:
        page.open(f"{host}/")
        page.wait("!document.querySelector('#file').disabled")
        yield page, folder / "images", f"{host}/"


@in_chromium
@pytest.mark.slow
def test_the_answers_are_those_of_predict(page: Any, trained: am.TrainResult):
    """To 0.01, or 0.05 where decoders may differ by a level or two per pixel."""
    browser, images, url = page
    levels = {name: most for name, (_, most) in kinds().items()}
    paths = [images / name for name in (*levels, *REFUSED)]
    expected = am.predict(trained.run_folder, paths, num_workers=0)
    browser.choose("#file", *paths)
    browser.wait(f"document.querySelector('#status').innerText.startsWith('{len(paths)} images')")
    for at, row in enumerate(expected):
        browser.run(f"document.querySelectorAll('#strip button')[{at}].click()")
        name = Path(row.path).name
        if name in REFUSED:
            assert browser.text("#error").startswith("Not classified: "), name
            assert browser.run("document.querySelectorAll('#classes li').length") == 0, name
            continue
        texts = browser.run("[...document.querySelectorAll('#classes li')].map(e => e.innerText)")
        found = {text.split()[0]: float(text.split()[1]) / 100 for text in texts}
        assert next(iter(found)) == row.classes[0][0], name
        assert found == pytest.approx(dict(row.classes), abs=0.05 if levels[name] else 0.01), name
    strangers = [
        asked for asked in browser.requests() if not asked.startswith((url, "blob:", "data:"))
    ]
    assert strangers == []


HOW: dict[str, dict[str, Any]] = {
    "own": {},
    "bicubic": {"interpolation": "bicubic", "image_size": (64, 48)},
    "squash": {"resize": "squash", "image_size": (24, 40)},
    "resize-crop": {"resize": "resize-crop", "crop": 0.6},
    "grey": {"channels": 1},
    "as stored": {"exif_orientation": False},
}


@in_chromium
@pytest.mark.slow
@pytest.mark.parametrize("name", HOW)
def test_the_pixels_are_those_of_the_product(page: Any, name: str):
    browser, _, _ = page
    how = am.Preprocessing(**{"image_size": (8, 8), **HOW[name]})
    for image, (data, most) in kinds().items():
        _, expected = model_input(data, image, how)
        script = f"({PIXELS})({json.dumps(image)}, {json.dumps(how.to_json())})"
        found = np.array(browser.run(script)).reshape(expected.shape)
        difference = np.abs(found - expected.astype(int)).max()
        # Pillow resizes the rows first for some shapes, which rounds differently.
        assert difference <= most + (name != "own"), image
