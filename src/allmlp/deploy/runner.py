"""An exported file -> a model that is used like any other: `open_exported`.

What is measured and predicted with is the file itself, run by its own runtime, and not the weights
that it came from. Nothing that is read here runs code; a torch-export file could, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allmlp.data.transforms import denormalize
from allmlp.deploy.extras import needed
from allmlp.deploy.metadata import NAMES, Description, from_text
from allmlp.deploy.onnx_graph import inputs_of
from allmlp.errors import UserError
from allmlp.io import expand
from allmlp.models.layers import ImageClassifier
from allmlp.runtime.device import check_threads

SUFFIXES = {".onnx": "onnxruntime", ".xml": "openvino"}
RUNTIMES = ("onnxruntime", "openvino")
PROGRAM = ".pt2"
_AGAIN = "Copy it again, or export it again"

Run = Callable[[np.ndarray], np.ndarray]  # inputs of the graph -> logits


def is_exported(source: str | Path) -> bool:
    """Returns whether a name is that of an exported file: .onnx, .xml or .pt2."""
    return Path(source).suffix.lower() in (*SUFFIXES, PROGRAM)


def open_exported(
    path: str | Path, *, runtime: str | None = None, num_threads: int | None = None
) -> ExportedModel:
    """Returns an exported file as a model, in evaluation mode.

    Args:
        path: a .onnx file, or the .xml file of a pair for OpenVINO, as `export` writes them.
        runtime: "onnxruntime" or "openvino"; None takes the file's own. OpenVINO runs both.
        num_threads: of the processor; None is torch's number.

    Raises:
        UserError: no such file, it is damaged or not of `export`, or the runtime is not installed.
    """
    path = expand(path)
    suffix = path.suffix.lower()
    if suffix == PROGRAM:
        what = "a torch-export file is a program: opening one may run what its author wrote"
        fix = "torch.export.load opens your own; export to .onnx for `mixer predict`"
        raise UserError(what, where=path, fix=fix)
    if suffix not in SUFFIXES:
        raise UserError("not an exported file", where=path, fix="Known: .onnx, .xml")
    if runtime is not None and runtime not in RUNTIMES:
        raise UserError(f"unknown runtime {runtime!r}", fix=f"Known: {', '.join(RUNTIMES)}")
    if suffix == ".xml" and runtime == "onnxruntime":
        what = "ONNX Runtime does not read OpenVINO's files"
        raise UserError(what, where=path, fix="Leave the runtime out")
    if not path.is_file():
        raise UserError("no such file", where=path, fix=None)
    if suffix == ".xml" and not path.with_suffix(".bin").is_file():
        what = "the weights of an OpenVINO model lie in a .bin beside it, and there is none"
        raise UserError(what, where=path.with_suffix(".bin"), fix="Copy both files")
    if num_threads is not None:
        check_threads(num_threads)
    threads = num_threads or torch.get_num_threads()
    opener = _open_openvino if (runtime or SUFFIXES[suffix]) == "openvino" else _open_onnx
    return opener(path, threads)


class ExportedModel(ImageClassifier):
    """An exported file in the frame of a model; it computes on the processor.

    Args:
        about: what the file is.
        run: computes its logits.
        runtime: with what: "onnxruntime 1.31.1".
        source: the file.

    Attributes:
        about, runtime, run: as given.
        on_processor_only: no device can be chosen.
    """

    on_processor_only = True

    def __init__(self, about: Description, run: Run, runtime: str, source: Path) -> None:
        super().__init__()
        self.config, self.class_names = about.config, about.class_names
        self.preprocessing, self.source = about.outside(), str(source)
        self.about, self.run, self.runtime = about, run, runtime
        # Of the weights, which the session has, only place and number are known here.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        number = torch.empty(about.num_parameters, device="meta")
        self.weights = nn.Parameter(number, requires_grad=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, num_classes).

        Args:
            images: (N, channels, H, W), float32 in the model's range, or uint8 pixels.

        Raises:
            ValueError: the images have another size or other channels than the model.
        """
        self.check_images(images)
        images = images.detach().cpu()
        assert self.preprocessing is not None
        takes_pixels = self.about.uint8_input
        if images.dtype != torch.uint8 and not takes_pixels:
            return torch.from_numpy(self.run(images.float().numpy()))
        if images.dtype != torch.uint8:  # exact: they were whole numbers
            pixels = denormalize(images.float(), self.about.preprocessing) * 255.0
            images = pixels.round().clamp(0, 255).byte()
        return torch.from_numpy(
            self.run(inputs_of(images, self.about.preprocessing, uint8_input=takes_pixels))
        )

    def features(self, images: Tensor) -> Tensor:
        """Refused: the file computes logits only.

        Raises:
            UserError: always.
        """
        raise self._lacks("features")

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """Refused: the weights are the runtime's.

        Raises:
            UserError: always.
        """
        raise self._lacks("weights")

    def _lacks(self, what: str) -> UserError:
        fix = "Use the model that it was made from"
        return UserError(f"an exported file gives logits, not {what}", where=self.source, fix=fix)

    def _apply(self, *_: Any, **__: Any) -> ExportedModel:
        return self  # it stays on the processor, wherever images and labels are


def onnx_session(model: bytes | Path, num_threads: int) -> Any:
    """Returns a session of ONNX Runtime on the processor, that says nothing but errors."""
    onnxruntime = needed("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 4
    given = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def _open_onnx(path: Path, num_threads: int) -> ExportedModel:
    version = needed("onnxruntime").__version__
    try:
        session = onnx_session(path, num_threads)
        said = dict(session.get_modelmeta().custom_metadata_map)
        takes = [each.name for each in session.get_inputs()]
    except Exception as error:  # its own exceptions have no common class
        what = f"ONNX Runtime cannot read the file: {_first_line(error)}"
        raise UserError(what, where=path, fix=_AGAIN) from error
    about = _checked(said, takes, path)

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(None, {"images": images})[0]

    return ExportedModel(about, run, f"onnxruntime {version}", path)


def _open_openvino(path: Path, num_threads: int) -> ExportedModel:
    openvino = needed("openvino")
    core = openvino.Core()
    try:
        model = core.read_model(str(path))
        places = {name: ["framework", name] for name in NAMES}  # where ONNX's own text comes to
        said = {
            name: str(model.get_rt_info(place).value)
            for name, place in places.items()
            if model.has_rt_info(place)
        }
        takes = [each.get_any_name() for each in model.inputs]
        about = _checked(said, takes, path)
        # A processor with bfloat16 would otherwise use it for float32 files, unasked.
        hint = "bf16" if about.precision == "bfloat16" else "f32"
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": num_threads}
        compiled = core.compile_model(model, "CPU", settings)
    except UserError:
        raise
    except Exception as error:
        what = f"OpenVINO cannot read the file: {_first_line(error)}"
        raise UserError(what, where=path, fix=_AGAIN) from error

    def run(images: np.ndarray) -> np.ndarray:
        return compiled({"images": images})[0].copy()

    return ExportedModel(about, run, f"openvino {openvino.__version__.split('-')[0]}", path)


def _checked(said: dict[str, str], takes: list[str], path: Path) -> Description:
    about = from_text(said, path)
    if takes != ["images"]:
        what = f"the graph takes {', '.join(takes) or 'nothing'}, and not images"
        raise UserError(what, where=path, fix="Export it again")
    return about


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
