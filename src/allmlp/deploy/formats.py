"""Export formats, one record each, and exported files as models.

To add a format, add a record to `FORMATS` and its suffix to `weights.load.EXPORTED`. Every file
carries its metadata as text entries, see docs/deploy.md.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allmlp.data.transforms import denormalize, normalize
from allmlp.decision import Decision
from allmlp.deploy.browser import CONTENT, MODEL, fetch_runtime, write_page
from allmlp.deploy.onnx_graph import to_bfloat16, to_onnx, with_metadata
from allmlp.errors import UserError, one_of
from allmlp.io import expand, parse_json
from allmlp.models.catalog import config_from_json, config_to_json
from allmlp.models.family import ModelConfig
from allmlp.models.layers import (
    Classifier,
    ImageClassifier,
    check_image_shape,
    checked_names,
    num_logits,
    preprocessing_of,
)
from allmlp.names import NAME, OLD_NAME, import_extra, own_entry
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.device import check_threads
from allmlp.weights.load import EXPORTED, open_model

FORMAT, VERSION = "allmlp export", 1
ENTRIES = ("class_names", "preprocessing", "decision", "input", "decoding", NAME, OLD_NAME)
DECODING = (
    "The first frame; turned upright by EXIF where exif_orientation is true. Samples of 12 and 16"
    " bits become value * 255 / (2^bits - 1), rounded down (in colour the upper byte); a TIFF where"
    " 0 is white is inverted; 32-bit, signed and floating-point samples are refused. What is"
    " transparent is blended on white. Then RGB, or grey (L) for channels = 1, as Pillow converts."
)


@dataclass(frozen=True)
class ExportInfo:
    config: ModelConfig
    class_names: list[str] | None
    preprocessing: Preprocessing
    uint8_input: bool  # (N, H, W, channels), else normalized float32 (N, channels, H, W)
    precision: str
    num_parameters: int
    decision: Decision
    weights: str | None  # `weights_fingerprint` of the files that it was made from, if any
    float32_layers: tuple[str, ...] = ()  # in an int8 file

    def inputs(self, images: Tensor) -> np.ndarray:
        """Converts uint8 images (N, channels, H, W) to graph inputs."""
        if self.uint8_input:
            return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        return normalize(images, self.preprocessing).numpy()


def info_of(
    model: ImageClassifier, precision: str, weights: str | None = None, *, uint8_input: bool
) -> ExportInfo:
    config, how = replace(model.config, num_classes=num_logits(model)), preprocessing_of(model)
    about = (config, model.class_names, how, uint8_input, precision, model.num_parameters)
    return ExportInfo(*about, model.decision, weights)


def to_text(info: ExportInfo) -> dict[str, str]:
    (height, width), channels = info.preprocessing.image_size, info.preprocessing.channels
    values = "numbers" if info.preprocessing.kind == "arrays" else "pixels / 255"
    shape = f"float32 (N, {channels}, {height}, {width}), ({values} - mean) / std"
    if info.uint8_input:
        shape = f"uint8 (N, {height}, {width}, {channels}), pixels from 0 to 255"
    own = {
        "format": FORMAT,
        "version": VERSION,
        "precision": info.precision,
        "uint8_input": info.uint8_input,
        "parameters": info.num_parameters,
        "kept_in_float32": list(info.float32_layers),
        "architecture": config_to_json(info.config),
        "weights": info.weights,
    }
    decision = info.decision.to_json()
    return {
        "class_names": json.dumps(info.class_names),
        "preprocessing": json.dumps(info.preprocessing.to_json()),
        **({"decision": json.dumps(decision)} if decision else {}),
        "input": f"images: {shape}",
        **({"decoding": DECODING} if info.preprocessing.kind == "images" else {}),
        NAME: json.dumps(own),
    }


def from_text(values: Mapping[str, str], path: Path) -> ExportInfo:
    """Parses text entries; raises UserError if they are missing, damaged or newer."""
    own_text, fix = own_entry(values), "Export it again"
    if not own_text:
        what = "the file does not say what its classes and its preprocessing are"
        raise UserError(what, where=path, fix="Only files of `mixer export` can be used here")
    try:
        own: dict[str, Any] = parse_json(own_text)
        if own["version"] > VERSION:
            fix = f"pip install --upgrade {NAME}"
            raise ValueError(f"written by a newer allmlp (version {str(own['version'])[:20]})")
        config = config_from_json(own["architecture"])
        names = parse_json(values["class_names"])
        preprocessing = Preprocessing.from_json(parse_json(values["preprocessing"]))
        if preprocessing.image_size != config.image_size:
            raise ValueError("the preprocessing is of another image size")
        return ExportInfo(
            config,
            None if names is None else checked_names(names, config.num_classes),
            preprocessing,
            bool(own["uint8_input"]),
            str(own["precision"]),
            int(own["parameters"]),
            Decision.from_json(parse_json(values.get("decision") or "{}"), config.num_classes),
            own.get("weights"),
            tuple(map(str, own["kept_in_float32"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        what = f"the file's description cannot be used: {str(getattr(error, 'what', error))[:200]}"
        raise UserError(what, where=path, fix=fix, code="damaged") from error


class ExportedModel:
    """An exported file, run by its runtime on the CPU: images in, logits out.

    Attributes:
        run: computes logits from graph inputs, both arrays.
        runtime: name and version, such as "onnxruntime 1.31.1".
        config, class_names, decision, source: as in `ImageClassifier`.
        preprocessing: the part done outside the file.
    """

    device = torch.device("cpu")

    def __init__(
        self, info: ExportInfo, run: Callable[[np.ndarray], np.ndarray], runtime: str, source: Path
    ) -> None:
        self.info, self.run, self.runtime = info, run, runtime
        self.precision = info.precision
        self.config, self.class_names = info.config, info.class_names
        self.decision = info.decision
        self.num_parameters, self.source = info.num_parameters, str(source)
        self.preprocessing: Preprocessing | None = info.preprocessing
        if info.uint8_input:  # the graph permutes the pixels
            changes = {"permutation": "none", "permutation_patch": None, "permutation_seed": 0}
            self.preprocessing = replace(info.preprocessing, **changes)

    def __repr__(self) -> str:
        return f"an exported file ({self.source})"

    def __call__(self, images: Tensor) -> Tensor:
        """Returns logits (N, num_classes).

        Args:
            images: (N, channels, H, W), float32 in the model's range or uint8.
        """
        check_image_shape(images, self.config, "a file has one size")
        images = images.detach().cpu()
        if images.dtype != torch.uint8 and not self.info.uint8_input:
            return torch.from_numpy(self.run(images.float().numpy()))
        if images.dtype != torch.uint8:  # exact: pixels were integers
            pixels = denormalize(images.float(), self.info.preprocessing) * 255.0
            images = pixels.round().clamp(0, 255).byte()
        return torch.from_numpy(self.run(self.info.inputs(images)))


# --- formats --------------------------------------------------------------------------------------

_ONNX = (("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "export"))


@dataclass(frozen=True, kw_only=True)
class Format:
    name: str
    suffix: str  # of the file passed to the runtime; "" for a folder
    runtime: str  # package that runs it
    packages: tuple[tuple[str, str], ...] = ()  # (module, optional group) needed to export
    make: Callable[[nn.Module, Tensor, str], Any]  # returns the input of `write`; takes a precision
    write: Callable[[Any, ExportInfo, Path], None]
    open: Callable[[Path, int], ExportedModel]  # takes a number of threads
    prepare: Callable[[], object] = lambda: None  # fails early if something cannot be had
    files: Callable[[Path], list[Path]] = lambda path: [path]  # the one opened first comes last
    reads: tuple[str, ...] = ()  # suffixes that the runtime can read
    is_program: bool = False  # no graph to quantize; opening it may run its author's code


def format_of(path: str | Path) -> Format:
    """Returns the format for a suffix; a name without one, or with a / at its end, is a folder."""
    suffix = "" if str(path).endswith(("/", os.sep)) else Path(path).suffix.lower()
    formats = {known.suffix or "a folder": known for known in FORMATS.values()}
    return formats[one_of("ending of an export", suffix or "a folder", formats, path)]


def is_exported(source: object) -> bool:
    return isinstance(source, str | Path) and Path(source).suffix.lower() in EXPORTED


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
    runtimes = {found.runtime: found for found in FORMATS.values() if own.suffix in found.reads}
    chosen = own if runtime is None else runtimes[one_of("runtime", runtime, runtimes, path)]
    for file in reversed(own.files(path)):
        if not file.is_file():
            fix = f"Copy {path.name} and {file.name}" if file != path else None
            raise UserError("no such file", where=file, fix=fix, code="not-found")
    if num_threads is not None:
        check_threads(num_threads)
    return chosen.open(path, num_threads or torch.get_num_threads())


def load_any(model: Classifier | str | Path, **loading: Any) -> Classifier:
    """Returns a model given in memory or by name; an exported file keeps its own size."""
    if not (isinstance(model, ExportedModel) or is_exported(model)):
        return open_model(model, **loading)
    for name, value in loading.items():
        what = f"{name}={value}: an exported file has its own"
        raise UserError(what, where=name, fix="Leave it out, or export it again")
    return model if isinstance(model, ExportedModel) else open_exported(str(model))


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
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _open_onnx(path: Path, num_threads: int) -> ExportedModel:
    version = import_extra("onnxruntime", "export").__version__
    with _readable("ONNX Runtime", path):
        session = onnx_session(path, num_threads)
    info = from_text(session.get_modelmeta().custom_metadata_map, path)

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(None, {"images": images})[0]

    return ExportedModel(info, run, f"onnxruntime {version}", path)


def _write_web(graph: Any, info: ExportInfo, path: Path) -> None:
    values = to_text(info)
    content = with_metadata(graph, values).SerializeToString()
    write_page(path, content, {"architecture": info.config.summary(), "metadata": values})


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
    with _readable("OpenVINO", path):
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
    path.write_bytes(content.getvalue())


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
    head = getattr(getattr(half, "model", half), "head", None)
    exact = set() if head is None else {*head.modules()}  # rounded logits would tie too often
    for module in half.modules():
        if module is head:
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
        elif module in exact:
            continue
        elif isinstance(module, nn.Linear) or getattr(module, "half_products", False):
            module.to(torch.bfloat16)
            module.register_forward_pre_hook(
                lambda _, inputs: tuple(tensor.to(torch.bfloat16) for tensor in inputs)
            )
    return half


@contextlib.contextmanager
def _readable(runtime: str, path: Path) -> Iterator[None]:
    """Turns the errors of a runtime, which have no common base class, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = f"{runtime} cannot read the file: {(lines or [type(error).__name__])[0][:200]}"
        fix = "Copy it again, or export it again"
        raise UserError(what, where=path, fix=fix, code="damaged") from error


_RECORDS = (
    Format(
        name="onnx",
        suffix=".onnx",
        runtime="onnxruntime",
        packages=_ONNX,
        make=_onnx_graph,
        write=_write_onnx,
        open=_open_onnx,
        reads=(".onnx",),
    ),
    Format(
        name="openvino",
        suffix=".xml",
        runtime="openvino",
        packages=(*_ONNX, ("openvino", "openvino")),
        make=_onnx_graph,
        write=_write_openvino,
        open=_open_openvino,
        files=lambda path: [path.with_suffix(".bin"), path],
        reads=(".xml", ".onnx"),
    ),
    Format(
        name="web",
        suffix="",
        runtime="onnxruntime",
        packages=_ONNX,
        prepare=fetch_runtime,
        make=_onnx_graph,
        write=_write_web,
        open=lambda path, num_threads: _open_onnx(path / MODEL, num_threads),
        files=lambda path: [path / name for name in CONTENT],
        reads=("",),
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
FORMATS = {format.name: format for format in _RECORDS}
