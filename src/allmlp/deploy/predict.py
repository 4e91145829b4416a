"""A model and images from anywhere -> the most probable classes, or the features, of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from allmlp.data.source import Source
from allmlp.data.sources import read_from
from allmlp.deploy.answers import Question, make_question
from allmlp.deploy.inputs import STANDARD_INPUT, find_images
from allmlp.deploy.rows import OnRows, Prediction, Rows, predict_rows, watched
from allmlp.deploy.runner import is_exported, open_exported
from allmlp.deploy.tables import FILE_FORMATS, check_format, render, write_rows
from allmlp.errors import UserError, named_memory_errors
from allmlp.io import check_not_inputs, check_output_file, expand
from allmlp.models.layers import ImageClassifier
from allmlp.runtime.device import to_device
from allmlp.weights.load import files_of, load_model

__all__ = ["Prediction", "check_output", "find_images", "predict", "predict_to_file", "render"]


@named_memory_errors()
def predict(
    model: ImageClassifier | str | Path,
    images: str | Path | Iterable[str | Path] | Source,
    *,
    top_k: int | None = None,
    features: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Returns the most probable classes of every image, in order; bad images carry an error.

    All rows are kept in memory. For a million images there are `predict_to_file`, which keeps one
    batch, and `predict_parts` of the module `parts`, which can be stopped and started again.

    Args:
        model: a model, an exported file, or anything that `load_model` takes; without class names
            the classes are called "0", "1", ...
        images: files, folders (searched to any depth), glob patterns, one source of data such as
            "digits:test" or "list.csv", or what `find_images` made of them.
        top_k: classes for each image, at most as many as the model has; None is 5.
        features: return the pooled features that the head reads, and no classes.
        output: a .csv, .json, .jsonl or .parquet file to write as well.
        overwrite: replace a file that is there.
        batch_size: images a batch.
        num_workers: processes that decode; None chooses.
        device: "auto" (the GPU where there is one), "cpu", "cuda"; None leaves a model where it is.
        precision: of the products: "float32", "bfloat16", or "auto", which None is: bfloat16 where
            the device is fast at it and the model is not small.
        on_batch: called with the number of images of every batch once it is done.

    Raises:
        UserError: no such model or image, an output that is there, is read, cannot be written or
            has an unknown format, or a number out of range.
    """
    if top_k is not None and top_k < 1:  # before anything is read
        raise UserError(f"top_k must be at least 1, got {top_k}", where="--top-k")
    target = None if output is None else check_output(output, overwrite=overwrite)
    if isinstance(images, str | Path):
        images = [images]
    given = list(images) if isinstance(images, Iterable) else []
    source = find_images(given) if isinstance(images, Iterable) else images
    if target is not None:
        refuse_read(target, model, given, source)
    if isinstance(model, str | Path):
        opened = open_exported(model) if is_exported(model) else load_model(model)
        model = to_device(opened, device or "auto")
    else:
        model = to_device(model, device)
    question = make_question(
        model, top_k=top_k, features=features, precision=precision, batch_size=batch_size
    )
    predictions: list[Prediction] = []

    def keep(rows: Rows) -> None:
        predictions.extend(rows)
        if on_batch is not None:
            on_batch(len(rows))

    if target is None:
        for rows in predict_rows(
            model, source, question, batch_size=batch_size, num_workers=num_workers
        ):
            keep(rows)
    else:
        predict_to_file(
            model,
            source,
            question,
            target,
            batch_size=batch_size,
            num_workers=num_workers,
            on_rows=keep,
        )
    return predictions


def predict_to_file(
    model: ImageClassifier,
    source: Source,
    question: Question,
    path: Path | None,
    suffix: str | None = None,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    on_rows: OnRows | None = None,
) -> None:
    """Writes a row for every image to one file, whole or not at all; only a batch is in memory.

    Args:
        model: on its device.
        source: the images.
        question: what is asked about each, see `make_question`.
        path: as `check_output` gave it; None writes to standard output as the rows come.
        suffix: the format, ".csv" or another of `FILE_FORMATS`; None goes by the path.
        batch_size, num_workers: as of `predict`.
        on_rows: called with the rows of every batch.

    Raises:
        UserError: the disk is full, or a worker died.
    """
    rows = predict_rows(model, source, question, batch_size=batch_size, num_workers=num_workers)
    batches = watched(rows, on_rows)
    try:
        write_rows(path, suffix or (".csv" if path is None else path.suffix), batches, question)
    finally:
        batches.close()


def check_output(output: str | Path, *, overwrite: bool = False) -> Path:
    """Returns the path of a file that predictions can be written to.

    Raises:
        UserError: its ending is none of `FILE_FORMATS`, its folder is not there, or it is there.
    """
    path = expand(output)
    if path.suffix not in FILE_FORMATS:
        what = f"unknown output format {path.suffix!r}"
        fix = f"Known: {', '.join(FILE_FORMATS)}; `mixer predict` takes a folder as well"
        raise UserError(what, where=path, fix=fix)
    check_output_file(path, overwrite=overwrite)
    check_format(path.suffix)
    return path


def refuse_read(output: Path, model: object, images: Iterable[str | Path], source: Source) -> None:
    """Refuses a file or folder of predictions that is, or lies in, what they are made of.

    Args:
        output: the file or folder.
        model: its name; a model in memory has no files.
        images: as they were named.
        source: what was found.

    Raises:
        UserError: names both.
    """
    inputs = [place for each in images if each != STANDARD_INPUT for place in read_from(each)]
    inputs += files_of(model) if isinstance(model, str | Path) else []
    check_not_inputs([output], inputs, map(source.item_name, range(len(source))))
