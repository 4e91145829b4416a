"""Export formats: one record each, with functions that write and run a file.

To add a format, add a record here and its suffix to `weights.load.EXPORTED`.
"""

from __future__ import annotations

import copy
import errno
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allmlp.deploy.exported_model import ENTRIES, ExportedModel, ExportInfo, from_text, to_text
from allmlp.deploy.onnx_graph import to_bfloat16, to_onnx, with_metadata
from allmlp.errors import UserError, one_of
from allmlp.io import expand
from allmlp.models.layers import Classifier
from allmlp.names import import_extra
from allmlp.options import ImageSize, ResizeWeights
from allmlp.runtime.device import check_threads
from allmlp.weights.load import open_model

_ONNX = (("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "export"))


@dataclass(frozen=True, kw_only=True)
class Format:
    """An export format."""

    name: str
    suffix: str  # of the file passed to the runtime
    runtime: str  # package that runs it
    packages: tuple[tuple[str, str], ...] = ()  # (module, optional group) needed to export
    make: Callable[[nn.Module, Tensor, str], Any]  # returns the input of `write`; takes a precision
    write: Callable[[Any, ExportInfo, Path], None]
    open: Callable[[Path, int], ExportedModel]  # takes a number of threads
    sidecar: str | None = None  # suffix of a second file with the weights
    reads: tuple[str, ...] = ()  # suffixes of other formats the runtime can read
    is_program: bool = False  # no graph to quantize; opening it may run its author's code
    notes: tuple[tuple[tuple[str, ...], str], ...] = ()  # (precisions, text)

    def files(self, path: Path) -> list[Path]:
        """Returns the files of a model; the one passed to the runtime comes last."""
        return [path] if self.sidecar is None else [path.with_suffix(self.sidecar), path]


def format_of(path: str | Path) -> Format:
    """Returns the format for a file's suffix."""
    suffix = Path(path).suffix.lower()
    found = next((known for known in FORMATS.values() if known.suffix == suffix), None)
    if found is None:
        known = ", ".join(f"{known.suffix} ({name})" for name, known in FORMATS.items())
        what = f"not the name of an exported file: {Path(path).name!r}"
        raise UserError(what, where=path, fix=f"Known: {known}", code="unknown-name")
    return found


def is_exported(source: object) -> bool:
    """Returns whether this is the name of an exported file, by its suffix."""
    suffixes = [known.suffix for known in FORMATS.values()]
    return isinstance(source, str | Path) and Path(source).suffix.lower() in suffixes


def open_exported(
    path: str | Path, *, runtime: str | None = None, num_threads: int | None = None
) -> ExportedModel:
    """Opens an exported file as a model.

    Args:
        path: a .onnx file or an OpenVINO .xml file, written by `export`.
        runtime: "onnxruntime" or "openvino"; None chooses by format. OpenVINO runs both.
        num_threads: CPU threads; None uses torch's setting.

    Raises:
        UserError: the file does not exist, is damaged or not from `export`, or the runtime is not
            installed.
    """
    path = expand(path)
    own = format_of(path)
    if own.is_program:
        what = "a torch-export file is a program: opening one may run what its author wrote"
        fix = "torch.export.load opens your own; export to .onnx for `mixer predict`"
        raise UserError(what, where=path, fix=fix)
    runtimes = {found.runtime: found for found in FORMATS.values() if not found.is_program}
    chosen = own if runtime is None else runtimes[one_of("runtime", runtime, runtimes)]
    if own.suffix not in (chosen.suffix, *chosen.reads):
        raise UserError(f"{runtime} does not read {own.suffix} files", where=path)
    for file in reversed(own.files(path)):
        if not file.is_file():
            fix = f"Copy {path.name} and {file.name}" if file != path else None
            raise UserError("no such file", where=file, fix=fix, code="not-found")
    if num_threads is not None:
        check_threads(num_threads)
    return chosen.open(path, num_threads or torch.get_num_threads())


def load_any(
    model: Classifier | str | Path,
    image_size: ImageSize | None = None,
    resize_weights: ResizeWeights | None = None,
    **foreign: Any,
) -> Classifier:
    """Returns a model given in memory or by name; an exported file keeps its own size."""
    exported = model if isinstance(model, ExportedModel) else None
    if exported is None and not is_exported(model):
        return open_model(model, image_size, resize_weights or "auto", **foreign)
    if foreign:
        what = f"an exported file has its own {', '.join(foreign)}"
        raise UserError(what, where=next(iter(foreign)), fix="Leave it out, or export it again")
    if image_size is not None:
        what = f"image_size={image_size}: an exported file has one image size"
        raise UserError(what, where="image_size", fix="Leave it out, or export it at that size")
    return exported or open_exported(str(model))


def _onnx_graph(net: nn.Module, example: Tensor, precision: str) -> Any:
    graph = to_onnx(net, example)
    return to_bfloat16(graph) if precision == "bfloat16" else graph


def _write_onnx(graph: Any, info: ExportInfo, path: Path) -> None:
    path.write_bytes(with_metadata(graph, to_text(info)).SerializeToString())


def onnx_session(model: bytes | Path, num_threads: int) -> Any:
    """Returns a silent ONNX Runtime session on the CPU."""
    onnxruntime = import_extra("onnxruntime", "export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 4
    given = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def _open_onnx(path: Path, num_threads: int) -> ExportedModel:
    version = import_extra("onnxruntime", "export").__version__
    try:
        session = onnx_session(path, num_threads)
    except Exception as error:  # its exceptions have no common base class
        raise _unreadable("ONNX Runtime", path, error) from error
    info = from_text(session.get_modelmeta().custom_metadata_map, path)

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(None, {"images": images})[0]

    return ExportedModel(info, run, f"onnxruntime {version}", path)


def _write_openvino(graph: Any, info: ExportInfo, path: Path) -> None:
    openvino = import_extra("openvino", "openvino")  # these calls send no telemetry
    content = with_metadata(graph, to_text(info)).SerializeToString()
    model = openvino.Core().read_model(content)
    try:
        openvino.save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError as error:  # "basic_ios::clear: iostream error"
        reason = str(error).splitlines()[0]
        raise OSError(errno.EIO, f"the disk is full or fails ({reason})") from error


def _open_openvino(path: Path, num_threads: int) -> ExportedModel:
    openvino = import_extra("openvino", "openvino")
    core = openvino.Core()
    try:
        model = core.read_model(str(path))
        entries = {
            name: str(model.get_rt_info(["framework", name]).value)  # where ONNX metadata ends up
            for name in ENTRIES
            if model.has_rt_info(["framework", name])
        }
        info = from_text(entries, path)
        # Otherwise a CPU with bfloat16 uses it for float32 files too.
        hint = "bf16" if info.precision == "bfloat16" else "f32"
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": num_threads}
        compiled = core.compile_model(model, "CPU", settings)
    except UserError:
        raise
    except Exception as error:
        raise _unreadable("OpenVINO", path, error) from error

    def run(images: np.ndarray) -> np.ndarray:
        return compiled({"images": images})[0].copy()

    return ExportedModel(info, run, f"openvino {openvino.__version__.split('-')[0]}", path)


def _program(net: nn.Module, example: Tensor, precision: str) -> Any:
    if precision == "bfloat16":
        net = with_bfloat16_products(net)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (example,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains local file names
    return program


def _write_program(program: Any, info: ExportInfo, path: Path) -> None:
    content = io.BytesIO()  # on a full disk torch's file writer aborts the process
    torch.export.save(program, content, extra_files=to_text(info))
    path.write_bytes(content.getbuffer())


def _open_program(path: Path, num_threads: int) -> ExportedModel:
    entries: dict[str, Any] = dict.fromkeys(ENTRIES, "")
    module = torch.export.load(path, extra_files=entries).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return ExportedModel(from_text(entries, path), run, f"torch {torch.__version__}", path)


def with_bfloat16_products(net: nn.Module) -> nn.Module:
    """Returns a copy with bfloat16 matmuls and a float32 residual stream.

    The stem and the convolutions between stages write the residual stream and stay in float32.
    """
    half = copy.deepcopy(net)
    for module in half.modules():
        if isinstance(module, nn.Linear) or getattr(module, "half_products", False):
            module.to(torch.bfloat16)
            module.register_forward_pre_hook(
                lambda _, inputs: tuple(tensor.to(torch.bfloat16) for tensor in inputs)
            )
    head = getattr(getattr(half, "model", half), "head", None)
    if head is not None:
        head.register_forward_hook(lambda _, __, logits: logits.float())
    return half


def _unreadable(runtime: str, path: Path, error: Exception) -> UserError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = (lines[0] if lines else type(error).__name__)[:200]
    what = f"{runtime} cannot read the file: {reason}"
    return UserError(what, where=path, fix="Copy it again, or export it again", code="damaged")


_ALL = (
    Format(
        name="onnx",
        suffix=".onnx",
        runtime="onnxruntime",
        packages=_ONNX,
        make=_onnx_graph,
        write=_write_onnx,
        open=_open_onnx,
        notes=(
            (
                ("bfloat16",),
                "weights are stored in bfloat16; ONNX Runtime multiplies in float32 on a "
                "processor, so the file is half as large and no faster",
            ),
        ),
    ),
    Format(
        name="openvino",
        suffix=".xml",
        runtime="openvino",
        packages=(*_ONNX, ("openvino", "openvino")),
        make=_onnx_graph,
        write=_write_openvino,
        open=_open_openvino,
        sidecar=".bin",
        reads=(".onnx",),
        notes=(
            (
                ("float32", "bfloat16", "int8"),
                "OpenVINO reads two files, the .xml and the .bin beside it: move both",
            ),
            (
                ("float32", "int8"),
                "set INFERENCE_PRECISION_HINT to f32, as here, or OpenVINO computes in bfloat16 "
                "where the processor has it",
            ),
        ),
    ),
    Format(
        name="torch-export",
        suffix=".pt2",
        runtime="torch",
        make=_program,
        write=_write_program,
        open=_open_program,
        is_program=True,
    ),
)
FORMATS = {format.name: format for format in _ALL}
