"""A graph -> the file, or for OpenVINO the pair of files, that a runtime reads."""

from __future__ import annotations

import copy
import errno
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allmlp.deploy.extras import needed
from allmlp.deploy.metadata import Description, to_text
from allmlp.deploy.onnx_graph import copied, finish
from allmlp.deploy.runner import ExportedModel, open_exported
from allmlp.errors import UserError

# The formats, and how the names of their files end.
FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2"}
PRECISIONS = ("float32", "bfloat16", "int8")


def choose_format(output: Path, format: str | None) -> str:
    """Returns the format of an output: as given, or by the ending of its name.

    Raises:
        UserError: unknown, or the two do not go together.
    """
    if format is not None and format not in FORMATS:
        fix = f"Known: {', '.join(FORMATS)}"
        raise UserError(f"unknown format {format!r}", where="--format", fix=fix)
    by_name = {suffix: name for name, suffix in FORMATS.items()}.get(output.suffix.lower())
    if format is None and by_name is None:
        known = ", ".join(f"{suffix} ({name})" for name, suffix in FORMATS.items())
        what = f"{output.name!r} does not say which format is meant"
        raise UserError(what, where="--output", fix=f"Endings: {known}")
    if format is not None and output.suffix.lower() != FORMATS[format]:
        fix = f"Call it {output.with_suffix(FORMATS[format]).name}"
        raise UserError(
            f"a file of the format {format} ends in {FORMATS[format]}", where=output, fix=fix
        )
    return format or str(by_name)


def files_of(output: Path) -> list[Path]:
    """Returns the files that a runtime needs; the one that is given to it comes last."""
    is_pair = output.suffix.lower() == FORMATS["openvino"]
    return [output.with_suffix(".bin"), output] if is_pair else [output]


def write_graph(graph: Any, about: Description, path: Path) -> None:
    """Writes an ONNX graph as .onnx, or as the .xml and .bin of OpenVINO.

    Args:
        graph: `onnx.ModelProto`; it is left as it is.
        about: what the file will say of itself.
        path: its ending chooses the format.
    """
    made = copied(graph)
    finish(made, to_text(about))
    content = made.SerializeToString()
    if path.suffix.lower() == FORMATS["onnx"]:
        path.write_bytes(content)
        return
    openvino = needed("openvino")  # read_model and save_model send no telemetry, its tools do
    model = openvino.Core().read_model(content)
    try:
        openvino.save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError as error:  # "basic_ios::clear: iostream error"
        reason = str(error).splitlines()[0]
        raise OSError(errno.EIO, f"the disk is full or fails ({reason})") from error


def write_program(net: nn.Module, example: Tensor, about: Description, path: Path) -> None:
    """Writes a torch-export file (.pt2).

    Args:
        net: in evaluation mode, on the CPU.
        example: an input of it.
        about: what the file will say of itself, in its extra files.
        path: of the file.
    """
    if about.precision == "bfloat16":
        net = with_bfloat16_products(net)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (example,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names the files of this machine
    content = io.BytesIO()  # on a full disk torch's own writer aborts the process
    torch.export.save(program, content, extra_files=to_text(about))
    path.write_bytes(content.getbuffer())


def with_bfloat16_products(net: nn.Module) -> nn.Module:
    """Returns a copy whose products are in bfloat16; the residual stream stays in float32.

    The stem, and the convolutions between stages, whose results are the stream, are left alone.
    """
    made = copy.deepcopy(net)
    for module in made.modules():
        if isinstance(module, nn.Linear) or getattr(module, "half_products", False):
            module.to(torch.bfloat16)
            module.register_forward_pre_hook(_to_bfloat16)
    head = getattr(getattr(made, "model", made), "head", None)
    if head is not None:
        head.register_forward_hook(_to_float32)
    return made


def _to_bfloat16(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.to(torch.bfloat16) for each in given)


def _to_float32(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out.float()


def open_written(path: Path, about: Description, num_threads: int) -> ExportedModel:
    """Returns a file that was just written here as a model, run by its own runtime."""
    if path.suffix.lower() != FORMATS["torch-export"]:
        return open_exported(path, num_threads=num_threads)
    module = torch.export.load(path).module()  # our own file: nobody else has touched it

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return ExportedModel(about, run, f"torch {torch.__version__}", path)
