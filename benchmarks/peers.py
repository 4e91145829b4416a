"""An environment for each package that the benchmarks compare with.

Imports nothing but Python's own library: it is read in all of these environments.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# The environment -> what is installed into it. timm shares our torch, so that both sides compute
# with the same build; {torchvision} is the version that goes with it. "ours" is this interpreter.
REQUIREMENTS = {
    "timm": ("timm==1.0.31", "{torchvision}", "onnx==1.23.2", "onnxscript==0.7.2"),
    "flax": ("flax==0.12.8", "jax==0.10.2", "numpy"),
    "onnxruntime": ("onnxruntime==1.31.1", "numpy"),
    "openvino": ("openvino==2026.4.1", "numpy"),
}
BESIDE_TORCH = ("timm",)
DEFAULT_FOLDER = Path.home() / ".cache" / "allmlp_benchmarks"


class PeerError(RuntimeError):
    """A side that cannot be installed, or that failed: the reason in a line."""


def python_of(name: str, folder: Path) -> Path:
    """Returns the interpreter of an environment, which is made where it is not there yet.

    Args:
        name: "ours" or one of `REQUIREMENTS`.
        folder: of all environments.

    Raises:
        PeerError: it cannot be made.
    """
    if name == "ours":
        return Path(sys.executable)
    place, python = folder / name, folder / name / "bin" / "python"
    torch_version = version("torch")
    torchvision = f"torchvision==0.{int(torch_version.split('.')[1]) + 15}.*"
    wanted = [each.format(torchvision=torchvision) for each in REQUIREMENTS[name]]
    key = [*wanted, sys.version, torch_version, sysconfig.get_path("purelib")]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    marker = place / "installed.txt"
    if marker.exists() and marker.read_text() == digest:
        return python
    print(f"installing {' '.join(wanted)} into {place}", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    try:
        _call([sys.executable, "-m", "venv", str(place)])
        install = [str(python), "-m", "pip", "install", "--quiet"]
        if name in BESIDE_TORCH:
            ours = sysconfig.get_path("purelib")
            lines = f"import site; site.addsitedir({ours!r})\n"
            inside = place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
            (inside / "site-packages" / "beside_torch.pth").write_text(lines)
            limits = place / "constraints.txt"
            limits.write_text(f"torch=={torch_version}\nnumpy=={version('numpy')}\n")
            install += ["-c", str(limits)]
        _call([*install, *wanted])
    except (OSError, PeerError) as error:
        raise PeerError(f"{name} cannot be installed: {error}") from error
    marker.write_text(digest)
    return python


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise PeerError(last_line(done.stderr) or f"{command[0]} ended with {done.returncode}")


def last_line(text: str) -> str:
    """Returns the line of a log that says why a process ended."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ERROR") or "Error: " in line]
    return (told or lines or [""])[-1][:300]


def versions(*names: str) -> dict[str, str]:
    """Returns the versions of packages that are installed in this environment."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def import_timm() -> Any:
    """Imports timm; torchvision is a build for a GPU that fails to load beside a torch without.

    Two operators, which its import asks for and a Mixer does not, are then registered empty.
    """
    import importlib.util
    import warnings

    import torch

    found = importlib.util.find_spec("torchvision")
    assert found is not None
    assert found.origin is not None
    try:
        torch.ops.load_library(str(Path(found.origin).parent / "_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    warnings.filterwarnings("ignore")
    import timm

    return timm


def timms_mixer(job: dict[str, Any], **options: Any) -> Any:
    """timm's Mixer of a job's shape, with any number of blocks, from random weights."""
    import_timm()
    from timm.models.mlp_mixer import MlpMixer

    dim = job["hidden_dim"]
    return MlpMixer(
        num_classes=job["num_classes"],
        img_size=job["image_size"],
        patch_size=job["patch_size"],
        num_blocks=job["num_blocks"],
        embed_dim=dim,
        mlp_ratio=(job["tokens_mlp_dim"] / dim, job["channels_mlp_dim"] / dim),
        **options,
    )


_KEPT: list[Any] = []
