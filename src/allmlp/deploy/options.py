"""The options of predict, export and serve; without torch, so that their --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from allmlp.errors import UserError, at_least, between, needs
from allmlp.options import ComputeOptions, ImageSize, Options, Precision, ResizeWeights


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ComputeOptions):
    """Classify images: files, folders and patterns, or any data source.

    An output with an ending is one file. One without is a folder of part files and a manifest: the
    same command again writes the missing parts, and under torchrun the processes share them.

    Examples of use:
        mixer predict runs/flowers photo.jpg
        mixer predict runs/flowers FOLDER 'more/*.png' --output predictions.csv
        find photos -name '*.jpg' | mixer predict runs/flowers - --output predictions.jsonl
        mixer predict runs/digits digits:test --top-k 1 --output -
        mixer predict mixer_b16.i1k photos --features --output features.parquet
        mixer predict mixer_b16.i1k shards:test --output predictions --format parquet
    """

    top_k: int | None = None
    """Classes per image; 5 if not given."""
    features: bool = False
    """The pooled features that the head reads instead of classes."""
    image_size: ImageSize | None = None
    """Another size than the model's own."""
    resize_weights: ResizeWeights | None = None
    """How to reach that size; auto if not given."""
    output: str | Path | None = None
    """A .csv, .json, .jsonl or .parquet file, a folder for parts, or - for standard output."""
    overwrite: bool = False
    """Replace a file that exists."""
    format: Literal["csv", "jsonl", "parquet"] | None = None
    """Of the parts of a folder, or of standard output (csv or jsonl); csv if not given."""
    part_size: int | None = None
    """Images per part of a folder; at most about 10,000 if not given."""

    def __post_init__(self) -> None:
        for name in ("top_k", "batch_size", "part_size"):
            at_least(name, getattr(self, name), 1)
        needs({"resize_weights": self.resize_weights}, "image_size", self.image_size)
        if self.features and self.top_k is not None:
            what = f"top_k={self.top_k} and features exclude each other: rows have one of them"
            raise UserError(what, fix="Leave out one of them", code="conflict")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Write a model as a file that runs without this package, and measure that file.

    The file is run by its own runtime beside the model: logits, accuracy on --data, speed. A file
    that fails is not kept, and the exit code is 1.

    Examples of use:
        mixer export runs/flowers --output flowers.onnx --data FOLDER:test
        mixer export runs/flowers --output flowers.xml --precision bfloat16
        mixer export mixer_b16.i1k --output b16_448.onnx --image-size 448 --uint8-input
        mixer export runs/mine --output m.onnx --precision int8 --calibration A:train --data A:test
    """

    output: str | Path
    """The file to write: .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2 (torch.export)."""
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    """Of the weights and their products."""
    image_size: ImageSize | None = None
    """Another size than the weights' own."""
    resize_weights: ResizeWeights | None = None
    """How to reach that size; auto if not given."""
    uint8_input: bool = False
    """The file takes uint8 images, channels last, and normalises them inside."""
    data: str | None = None
    """Labelled images on which the model and the file are measured; int8 needs them."""
    max_accuracy_drop: float = 0.5
    """Points of top-1 that the file may lose on them."""
    calibration: str | None = None
    """Images, labelled or not, that determine the ranges of int8; different from --data."""
    calibration_images: int = 1000
    """How many of them are used at most, spread evenly."""
    overwrite: bool = False
    """Replace an output that exists."""
    batch_size: int = 8
    """Images per batch when the speed is measured."""
    num_threads: int | None = None
    """Of the processor; torch's own choice if not given."""
    num_workers: int | None = None
    """Processes that decode images; chosen by the size of the data if not given."""

    def __post_init__(self) -> None:
        is_int8 = {"precision int8": self.precision == "int8"}
        needs(is_int8, "calibration", self.calibration)
        needs(is_int8, "data", self.data)
        needs({"resize_weights": self.resize_weights}, "image_size", self.image_size)
        between("max_accuracy_drop", self.max_accuracy_drop, 0, 100)
        for name in ("batch_size", "num_threads", "calibration_images"):
            between(name, getattr(self, name), 1, 2**20)


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """Show a model on a local web page, and answer programs over HTTP.

    The page takes images and shows their classes, which regions the prediction depends on, and what
    token-mixing units read and write. There is no password: whoever can reach it can use it.

    Examples of use:
        mixer serve runs/flowers
        mixer serve flowers.onnx --port 8080
        mixer serve mixer_b16.i1k --precision float32 --top-k 10
        mixer serve runs/flowers --host 0.0.0.0
    """

    host: str = "127.0.0.1"
    """The address to listen on; 127.0.0.1 is this machine alone, 0.0.0.0 all networks."""
    port: int = 8000
    """The port to listen on; 0 lets the system choose."""
    top_k: int | None = None
    """Classes per image; 5 if not given."""
    image_size: ImageSize | None = None
    """Another size than the model's own."""
    resize_weights: ResizeWeights | None = None
    """How to reach that size; auto if not given."""
    precision: Precision = "auto"
    """Of the matrix products for the classes; maps are computed in float32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    max_images: int = 64
    """Per request."""
    max_megabytes: float = 20.0
    """Per image file."""
    max_megapixels: float = 200.0
    """Of all images of a request together: a small file may unpack to gigabytes."""

    def __post_init__(self) -> None:
        between("port", self.port, 0, 65535)
        at_least("top_k", self.top_k, 1)
        at_least("max_images", self.max_images, 1)
        between("max_megabytes", self.max_megabytes, 0.001, 1000)
        between("max_megapixels", self.max_megapixels, 0.001, 100_000)
        needs({"resize_weights": self.resize_weights}, "image_size", self.image_size)
