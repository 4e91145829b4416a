"""A web page of static files that classifies images in the browser, with onnxruntime-web."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from importlib.resources import files
from pathlib import Path

from allmlp.console import Reporter
from allmlp.data.image import MAX_PIXELS, MAX_SIDE
from allmlp.weights.download import Published, cache_folder, cached

VERSION = "1.30.0"
SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
PAGE = ("page.css", "page.js", "index.html")
MODEL, ABOUT, START = "model.onnx", "model.json", "start.js"
CONTENT = (*RUNTIME, MODEL, ABOUT, START, *PAGE)  # index.html comes last


def page_file(name: str) -> bytes:
    return files("allmlp").joinpath("deploy", "page", name).read_bytes()


def fetch_runtime() -> Path:
    """Returns the npm package of onnxruntime-web, downloaded to the cache if necessary."""
    name = f"onnxruntime-web-{VERSION}.tgz"
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
    url = f"{registry}/onnxruntime-web/-/{name}"
    package = Published(name=f"onnxruntime-web {VERSION}", url=url, sha256=SHA256)
    return cached(package, cache_folder() / "onnxruntime-web" / name, Reporter(stderr=True))


def write_page(folder: Path, graph: bytes, about: dict[str, object]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / MODEL).write_bytes(graph)
    limits = {"pixels": MAX_PIXELS, "side": MAX_SIDE}
    digest = hashlib.sha256(graph).hexdigest()  # in the address: another model is fetched anew
    about = {"name": folder.name, **about, "bytes": len(graph), "sha256": digest, "limits": limits}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    if (folder / "index.html").exists():  # another int8 model for the same page
        return
    (folder / START).write_bytes(page_file("browser.js"))
    for name in PAGE:
        (folder / name).write_bytes(page_file(name))
    with tarfile.open(fetch_runtime()) as package:
        for name in RUNTIME:
            file = package.extractfile(f"package/dist/{name}")
            assert file is not None
            (folder / name).write_bytes(file.read())
