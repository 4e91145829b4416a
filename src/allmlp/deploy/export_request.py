"""What may be asked of an export, checked before anything is read or computed."""

from __future__ import annotations

from pathlib import Path

from allmlp.data.sources import read_from
from allmlp.deploy.exported_files import PRECISIONS, choose_format, files_of
from allmlp.deploy.extras import needed
from allmlp.errors import UserError
from allmlp.io import check_not_inputs, check_output_file, expand

_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "onnxruntime", "openvino"),
    "torch-export": (),
}


def check_request(
    output: str | Path,
    *,
    format: str | None,
    precision: str,
    uint8_input: bool,
    calibration: object,
    calibration_images: int | None,
    data: object,
    max_accuracy_drop: float | None,
    overwrite: bool,
    batch_size: int,
    num_threads: int | None,
) -> tuple[Path, str]:
    """Returns the path of the file and its format.

    Args:
        output, format, precision, uint8_input, calibration, calibration_images, data,
            max_accuracy_drop, overwrite, batch_size, num_threads: as of `export`.

    Raises:
        UserError: unknown words, settings that do not go together or have no effect, an output that
            is there or cannot be written, or a package that is not installed.
    """
    path = expand(output)
    chosen = choose_format(path, format)
    _check_settings(chosen, precision, calibration, calibration_images, data, max_accuracy_drop)
    numbers = {"batch-size": batch_size, "threads": num_threads}
    for name, value in {**numbers, "calibration-images": calibration_images}.items():
        if value is not None and not 1 <= value <= 2**20:
            what = f"{name} is from 1 to {2**20:,}, got {value:,}"
            raise UserError(what, where=f"--{name}", fix=f"--{name} 8")
    for each in (path, *files_of(path), *reports_of(path)):
        check_output_file(each, overwrite=overwrite)
        for source in (data, calibration):
            if isinstance(source, str | Path):
                check_not_inputs([each], read_from(source))
    for name in _PACKAGES[chosen]:
        needed(name)
    return path, chosen


def _check_settings(
    format: str,
    precision: str,
    calibration: object,
    calibration_images: int | None,
    data: object,
    max_accuracy_drop: float | None,
) -> None:
    if precision not in PRECISIONS:
        fix = f"Known: {', '.join(PRECISIONS)}"
        raise UserError(f"unknown precision {precision!r}", where="--precision", fix=fix)
    if precision == "int8" and format == "torch-export":
        what = "torch-export has no int8 here"
        raise UserError(what, where="--precision", fix="--format onnx or --format openvino")
    if precision == "int8" and calibration is None:
        what = "int8 takes the ranges of activations from real images, and none are given"
        fix = "Add --calibration SOURCE, such as FOLDER:train"
        raise UserError(what, where="--calibration", fix=fix)
    if precision == "int8" and data is None:
        what = "nobody would know what int8 costs in accuracy without labelled images"
        raise UserError(what, where="--data", fix="Add --data SOURCE, such as FOLDER:test")
    for name, value in (("calibration", calibration), ("calibration-images", calibration_images)):
        if value is not None and precision != "int8":
            what = f"--{name} has no effect with --precision {precision}"
            raise UserError(what, where=f"--{name}", fix="Leave it out, or add --precision int8")
    if max_accuracy_drop is not None and data is None:
        what = "--max-accuracy-drop has no effect without labelled images"
        raise UserError(what, where="--max-accuracy-drop", fix="Add --data SOURCE")
    if max_accuracy_drop is not None and not 0.0 <= max_accuracy_drop <= 100.0:
        what = f"max_accuracy_drop is points from 0 to 100, got {max_accuracy_drop:g}"
        raise UserError(what, where="--max-accuracy-drop", fix="--max-accuracy-drop 0.5")


def reports_of(path: Path) -> tuple[Path, Path]:
    """Returns the paths of the report beside a file: JSON and Markdown."""
    return path.with_name(f"{path.name}.report.json"), path.with_name(f"{path.name}.report.md")
