"""Options of predict, export and serve; does not import torch, to keep --help fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from allmlp.errors import exclusive, needs
from allmlp.evaluation.options import ComputeOptions, Fraction, Positive
from allmlp.options import LoadOptions, Options, Precision


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ComputeOptions, LoadOptions):
    """Classify images: files, folders and patterns, or any data source.

    An output with a file extension is one file, any other a folder of parts and a manifest:
    repeating the command writes the missing parts; torchrun splits them across processes.

    Examples of use:
        mixer predict runs/flowers photo.jpg
        mixer predict runs/flowers FOLDER 'more/*.png' --output predictions.csv
        find photos -name '*.jpg' | mixer predict runs/flowers - --output predictions.jsonl
        mixer predict runs/digits digits:test --top-k 1 --output -
        mixer predict mixer_b16.i1k photos --features --output features.parquet
        mixer predict mixer_b16.i1k photos --features --neighbors 5 --output features.csv
        mixer predict mixer_b16.i1k shards:test --output predictions --format parquet
    """

    top_k: Positive | None = None
    """Number of classes per image (default 5)."""
    unsure_below: Fraction | None = None
    """Answer "unsure" if the highest probability is lower; defaults to the model's threshold."""
    features: bool = False
    """Write the pooled features (the input of the head) instead of classes."""
    neighbors: Positive | None = None
    """Also write this many nearest neighbours of each image, by cosine similarity of the features:
    name, row from 0, and similarity."""
    output: str | Path | None = None
    """A .csv, .jsonl or .parquet file, a folder for part files, or - for standard output."""
    overwrite: bool = False
    """Replace existing files."""
    format: Literal["csv", "jsonl", "parquet"] | None = None
    """Format of part files, or of standard output (csv or jsonl); defaults to csv."""
    part_size: Positive | None = None
    """Images per part file; by default at most about 10,000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        needs({"neighbors": self.neighbors}, "features", self.features or None)
        needs({"format": self.format, "part_size": self.part_size}, "output", self.output)
        exclusive(features=self.features, top_k=self.top_k)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(LoadOptions):
    """Export a model to a file, or a web page, that runs without this package, and validate it.

    The file is run by its runtime and compared with the model: logits, accuracy on --data, speed. A
    file that fails is not kept, and the exit code is 1.

    Examples of use:
        mixer export runs/flowers --output flowers.onnx --data FOLDER:test
        mixer export runs/flowers --output flowers.xml --precision bfloat16
        mixer export mixer_b16.i1k --output b16_448.onnx --image-size 448 --uint8-input
        mixer export runs/flowers --output flowers/ --data FOLDER:test
        mixer export runs/mine --output m.onnx --precision int8 --calibration A:train --data A:test
    """

    output: str | Path
    """File to write: .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2 (torch.export); or a
    folder (without an ending, or with / at its end) for a web page that classifies images."""
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    """Precision of weights and matrix products."""
    uint8_input: bool = False
    """Take uint8 images, channels last, and normalise them inside the file."""
    data: str | None = None
    """Labelled images to compare the file's accuracy with the model's; required for int8."""
    max_accuracy_drop: Annotated[float, Interval(ge=0, le=100)] = 0.5
    """Largest drop of top-1 accuracy to accept, or of mAP with several labels per image, in
    percentage points."""
    calibration: str | None = None
    """Images (labels not needed) to calibrate int8 ranges on; must not overlap the data."""
    calibration_images: Positive = 1000
    """Most calibration images to use, spread evenly."""
    overwrite: bool = False
    """Replace existing files."""
    num_workers: int | None = None
    """Number of processes that decode images; by default chosen by the size of the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_int8 = {"precision int8": self.precision == "int8"}
        needs(is_int8, "calibration", self.calibration)
        needs(is_int8, "data", self.data)
        needs({"calibration": self.calibration}, "precision int8", *is_int8.values())


@dataclass(frozen=True, kw_only=True)
class ServeOptions(LoadOptions):
    """Serve a model on a local web page and over HTTP.

    The page shows the classes of uploaded images, which regions the prediction depends on, and what
    token-mixing units read and write. There is no password: anyone with network access can use it.

    Examples of use:
        mixer serve runs/flowers
        mixer serve flowers.onnx --port 8080
        mixer serve mixer_b16.i1k --precision float32 --top-k 10
        mixer serve runs/flowers --host 0.0.0.0
    """

    host: str = "127.0.0.1"
    """Address to listen on; 127.0.0.1 is this machine only, 0.0.0.0 all networks."""
    port: Annotated[int, Interval(ge=0, le=65535)] = 8000
    """Port to listen on; 0 picks a free one."""
    top_k: Positive | None = None
    """Number of classes per image (default 5)."""
    unsure_below: Fraction | None = None
    """Answer "unsure" if the highest probability is lower; defaults to the model's threshold."""
    precision: Precision = "auto"
    """Precision of matrix products for classification; maps are computed in float32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    max_images: Positive = 64
    """Most images per request."""
    max_megabytes: Annotated[float, Interval(ge=0.001, le=1000)] = 20.0
    """Largest image file in megabytes."""


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """Upload a model to the Hugging Face hub: weights, config.json and model card, in one commit.

    From a run folder these are the files of best/, and model.onnx if you exported one into the run
    folder; nothing else is uploaded. Log in with `hf auth login`, or set HF_TOKEN.

    Examples:
        mixer push runs/flowers owner/flowers
        mixer push runs/flowers owner/flowers --private --license mit --examples rose.jpg
        mixer push mine.safetensors owner/mine --revision v2 --message "Trained for longer"
    """

    private: bool = False
    """Make a private repository; one that exists stays as it is."""
    revision: str | None = None
    """Branch to commit to, made if it does not exist; defaults to main."""
    message: str = "Upload a model of allmlp"
    """Commit message."""
    license: str | None = None
    """Licence of the weights as the hub names it, such as mit; the card does not state one unless
    the weights that the run began with have one."""
    examples: tuple[str, ...] = ()
    """Images to upload as examples for the page; no others are."""
