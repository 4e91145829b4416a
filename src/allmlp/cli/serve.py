"""`mixer serve`."""

from __future__ import annotations

import sys
from typing import Annotated

from tyro.conf import arg

from allmlp.cli.arguments import Model, ResizeWeights, Size, load_named, warn_of_numbers
from allmlp.errors import UserError

TopK = Annotated[int | None, arg(help_behavior_hint="(default: 5)", metavar="N")]
Precision = Annotated[str | None, arg(help_behavior_hint="(default: auto)", metavar="NAME")]


def serve(
    model: Model,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    top_k: TopK = None,
    image_size: Size = None,
    resize_weights: ResizeWeights = None,
    precision: Precision = None,
    device: str = "auto",
    max_images: int = 64,
    max_megabytes: float = 20.0,
    max_megapixels: float = 200.0,
) -> None:
    """Show a model on a local web page, and answer programs over HTTP.

    The page takes images and shows their classes, what the class hangs on, and what token-mixing
    units read and write. There is no password: whoever can reach it can use it.

    Examples of use:
        mixer serve runs/flowers
        mixer serve flowers.onnx --port 8080
        mixer serve mixer_b16.i1k --precision float32 --top-k 10
        mixer serve runs/flowers --host 0.0.0.0

    Args:
        model: a run folder, a .safetensors, .npz or .pth file, a name of `mixer models --weights`,
            or hf:owner/name; or a file of the verb export, run by its own runtime.
        host: the address to listen on; 127.0.0.1 is this machine alone, 0.0.0.0 all networks.
        port: the number to listen on; 0 lets the system choose.
        top_k: classes for each image.
        image_size: look at the images at another size than the model's own.
        resize_weights: how to reach that size: block-diagonal, resample or auto.
        precision: of the products of the classes: float32, bfloat16 or auto; maps are in float32.
        device: auto, cpu or cuda.
        max_images: in one request.
        max_megabytes: of one image file.
        max_megapixels: of all images of one request: a small file may unpack to gigabytes.
    """
    if top_k is not None and top_k < 1:  # before anything is read
        raise UserError(f"top_k must be at least 1, got {top_k}", where="--top-k")
    if max_images < 1:
        raise UserError(f"max_images must be at least 1, got {max_images}", where="--max-images")
    if not 0.001 <= max_megabytes <= 1000:
        what = f"max_megabytes must be from 0.001 to 1000, got {max_megabytes}"
        raise UserError(what, where="--max-megabytes")
    if not 0.001 <= max_megapixels <= 100_000:
        what = f"max_megapixels must be from 0.001 to 100,000, got {max_megapixels}"
        raise UserError(what, where="--max-megapixels")

    from allmlp.deploy.serve import check_packages, is_local, open_socket
    from allmlp.deploy.serve import serve as answer

    check_packages()
    with open_socket(host, port) as listening:  # before the weights, which take longer
        from allmlp.console import Reporter
        from allmlp.deploy.service import Limits, Service
        from allmlp.runtime.device import to_device

        net = to_device(load_named(model, image_size, resize_weights, exported=True), device)
        warn_of_numbers(net)
        limits = Limits.of(max_images, max_megabytes, max_megapixels)
        service = Service(net, model, top_k=top_k, precision=precision, limits=limits)
        if not is_local(listening):
            print(
                f"warning: {host} is more than this machine, and there is no password: whoever "
                "reaches this port can use it",
                file=sys.stderr,
                flush=True,
            )
        report, classes = Reporter(), service.num_classes
        what = f"({service.name}, {classes:,} {'class' if classes == 1 else 'classes'})"
        answer(
            service,
            listening,
            host,
            on_ready=lambda url: report.say(f"serving  {url}  {what}; Ctrl-C ends it"),
        )
