"""A model and images from anywhere -> a table of the most probable classes."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlp_mixer.data.folders import image_files
from mlp_mixer.data.image import SUFFIXES
from mlp_mixer.data.items import ImageFiles, PackedStrings, Source
from mlp_mixer.data.loader import evaluation_batches
from mlp_mixer.data.sources import is_data, open_source
from mlp_mixer.disk import write_aside
from mlp_mixer.errors import UserError
from mlp_mixer.evaluation.accuracy import predict_batch
from mlp_mixer.models.device import choose_device
from mlp_mixer.models.layers import ImageClassifier, classes_of, preprocessing_of
from mlp_mixer.weights.store import load_model

OUTPUT_FORMATS = (".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
        path: of the image.
        classes: (class name, probability), the most probable first; empty for a bad image.
        error: why a bad image could not be read; None for a good one.
    """

    path: str
    classes: list[tuple[str, float]] = field(default_factory=list)
    error: str | None = None


def predict(
    model: ImageClassifier | str | Path,
    images: str | Path | Iterable[str | Path] | Source,
    *,
    top_k: int = 5,
    output: str | Path | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Returns the most probable classes of every image, in order; bad images carry an error.

    Args:
        model: a model with class names, or anything that `load_model` takes.
        images: files, folders (searched to any depth), glob patterns, one source of data such as
            "digits:test" or "list.csv", or what `find_images` made of them.
        top_k: classes for each image; at most as many as the model has.
        output: a .csv, .json or .jsonl file to write as well.
        batch_size: images a batch.
        num_workers: processes that decode; None chooses.
        device: "auto" (the GPU where there is one), "cpu", "cuda"; None leaves a model where it is.
        on_batch: called with the number of images of every batch once it is done.

    Raises:
        UserError: no such model or image, an output format that is not known or cannot be written,
            or a top_k below 1.
    """
    if top_k < 1:
        raise UserError(f"top_k must be at least 1, got {top_k}", where="--top-k")
    target = None if output is None else check_output(output)
    if isinstance(images, str | Path):
        images = [images]
    source = find_images(list(images)) if isinstance(images, Iterable) else images
    if not isinstance(model, ImageClassifier):
        model = load_model(model).to(choose_device(device or "auto"))
    elif device is not None:
        model = model.to(choose_device(device))
    predictions = list(_predict_source(model, source, top_k, batch_size, num_workers, on_batch))
    if target is not None:
        try:
            text = render(predictions, target.suffix)
            write_aside(target, text.encode(errors="surrogateescape"))
        except OSError as error:
            what = f"cannot write the predictions: {error.strerror}"
            raise UserError(what, where=target, fix="Give another --output") from error
    return predictions


def check_output(output: str | Path) -> Path:
    """Returns the path of a file that predictions can be written to.

    Raises:
        UserError: its ending is not in `OUTPUT_FORMATS`, or its folder is not there.
    """
    path = Path(os.path.expanduser(output))
    if path.suffix not in OUTPUT_FORMATS:
        what = f"unknown output format {path.suffix!r}"
        raise UserError(what, where=path, fix=f"Known: {', '.join(OUTPUT_FORMATS)}")
    if path.is_dir():
        raise UserError("the output is a folder", where=path, fix="Give the name of a file")
    if not path.parent.is_dir():
        raise UserError("the output's folder does not exist", where=path.parent, fix="Make it")
    if not os.access(path.parent, os.W_OK):
        raise UserError("the output's folder cannot be written to", where=path.parent)
    return path


def find_images(inputs: Sequence[str | Path]) -> Source:
    """Returns the images that files, folders, glob patterns or data sources name, in that order.

    Raises:
        UserError: nothing is named, or one of them names nothing.
    """
    if not inputs:
        raise UserError("no images given", fix="Give files, folders or patterns such as 'a/*.jpg'")
    if len(inputs) == 1 and is_data(str(inputs[0])):
        return open_source(str(inputs[0]))
    paths: list[Path] = []
    for given in map(str, inputs):
        path = Path(os.path.expanduser(given))
        if path.is_dir():
            found = image_files(path)
        elif path.exists():
            found = [path]
        else:
            found = [Path(each) for each in sorted(glob.glob(str(path), recursive=True))]
            found = [each for each in found if each.is_file()]
        if not found:
            what = "the folder has no images" if path.is_dir() else "no such file or folder"
            fix = f"Images end in {' '.join(SUFFIXES)}" if path.is_dir() else None
            raise UserError(f"{what}: {given!r}", where=path.absolute(), fix=fix)
        paths += found
    return ImageFiles(
        "images", ["unknown"], np.zeros(len(paths), dtype=np.int64), PackedStrings(map(str, paths))
    )


def _predict_source(
    model: ImageClassifier,
    source: Source,
    top_k: int,
    batch_size: int,
    num_workers: int | None,
    on_batch: Callable[[int], None] | None,
) -> Iterator[Prediction]:
    names, preprocessing = classes_of(model), preprocessing_of(model)
    batches = evaluation_batches(
        source, preprocessing, batch_size=batch_size, num_workers=num_workers
    )
    for batch in batches:
        found = {each.index: Prediction(each.name, error=each.what) for each in batch.bad}
        if len(batch.labels):
            probabilities = predict_batch(model, batch, preprocessing)
            for index, row in zip(batch.indices.tolist(), probabilities, strict=True):
                best = np.argsort(-row, kind="stable")[:top_k]
                classes = [(names[at], float(row[at])) for at in best]
                found[index] = Prediction(source.item_name(index), classes)
        yield from (found[index] for index in sorted(found))
        if on_batch is not None:
            on_batch(len(found))


def render(predictions: Sequence[Prediction], suffix: str) -> str:
    """Returns the predictions as the text of a .csv, .json or .jsonl file."""
    if suffix == ".csv":
        width = max((len(each.classes) for each in predictions), default=0)
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        ranks = range(1, width + 1)
        header = [f"{column}_{rank}" for rank in ranks for column in ("class", "probability")]
        writer.writerow(["path", *header, "error"])
        for each in predictions:
            cells = [cell for name, share in each.classes for cell in (name, f"{share:.6f}")]
            cells += [""] * (2 * width - len(cells))
            writer.writerow([each.path, *cells, each.error or ""])
        return file.getvalue()
    rows = [
        {
            "path": each.path,
            "classes": [{"class": name, "probability": share} for name, share in each.classes],
            **({"error": each.error} if each.error is not None else {}),
        }
        for each in predictions
    ]
    if suffix == ".json":
        return json.dumps(rows, indent=2) + "\n"
    return "".join(f"{json.dumps(row)}\n" for row in rows)
