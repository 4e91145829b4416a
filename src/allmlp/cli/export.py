"""`mixer export`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

from allmlp.cli.arguments import (
    DataName,
    Format,
    Model,
    Number,
    Real,
    ResizeWeights,
    Size,
    load_named,
)

RequiredFile = Annotated[str, arg(metavar="FILE")]
Points = Annotated[Real, arg(help_behavior_hint="(default: 0.5)", metavar="POINTS")]
Images = Annotated[Number, arg(help_behavior_hint="(default: 1000)", metavar="N")]


def export(
    model: Model,
    /,
    *,
    output: RequiredFile,
    format: Format = None,
    precision: str = "float32",
    image_size: Size = None,
    resize_weights: ResizeWeights = None,
    uint8_input: bool = False,
    data: DataName = None,
    max_accuracy_drop: Points = None,
    calibration: DataName = None,
    calibration_images: Images = None,
    overwrite: bool = False,
    batch_size: int = 8,
    threads: Number = None,
    num_workers: Number = None,
) -> int:
    """Write a model as a file that runs without this package, and measure that file.

    The file is run by its own runtime beside the model: logits, accuracy on --data, speed. A file
    that fails is not left behind, and the exit code is 1.

    Examples of use:
        mixer export runs/flowers --output flowers.onnx --data FOLDER:test
        mixer export runs/flowers --output flowers.xml --precision bfloat16
        mixer export mixer_b16.i1k --output b16_448.onnx --image-size 448 --uint8-input
        mixer export runs/mine --output m.onnx --precision int8 --calibration A:train --data A:test

    Args:
        model: a run folder, a .safetensors, .npz or .pth file, a name of `mixer models --weights`,
            or hf:owner/name.
        output: the file to write: .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2.
        format: onnx, openvino or torch-export; without it by the ending of the output.
        precision: float32, bfloat16 or int8.
        image_size: another size than the weights' own.
        resize_weights: how to reach that size: block-diagonal, resample or auto.
        uint8_input: the file takes uint8 images, channels last, and normalises them inside.
        data: labelled images on which the model and the file are measured; int8 needs them.
        max_accuracy_drop: points of top-1 that the file may lose on them.
        calibration: images from which int8 takes its ranges; others than --data.
        calibration_images: so many of them at most, spread evenly.
        overwrite: replace what is there.
        batch_size: images a batch where the speed is measured.
        threads: of the processor; without it torch's own choice.
        num_workers: processes that decode images.
    """
    from allmlp.console import Reporter
    from allmlp.deploy.export import check_request
    from allmlp.deploy.export import export as write
    from allmlp.io import expand, path_in_errors

    options = {
        "format": format,
        "precision": precision,
        "uint8_input": uint8_input,
        "calibration": calibration,
        "calibration_images": calibration_images,
        "data": data,
        "max_accuracy_drop": max_accuracy_drop,
        "overwrite": overwrite,
        "batch_size": batch_size,
        "num_threads": threads,
    }
    check_request(output, **options)  # before the weights are read
    report = Reporter()
    progress = Reporter(stderr=True)
    net = load_named(model, image_size, resize_weights)
    with path_in_errors(expand(output)):
        result = write(
            net, output, **options, num_workers=num_workers, tell=lambda line: progress.say(line)
        )
    for line in result.lines():
        report.say(line)
    if not result.passed:
        report.say("removed  the file failed and was not kept")
        return 1
    report.say(f"written  {output}")
    return 0
