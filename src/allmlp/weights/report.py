"""What a weights file is, as lines to read: `mixer models --inspect` and `--weights`."""

from __future__ import annotations

import re
from pathlib import Path

from allmlp.console import Reporter, table
from allmlp.errors import UserError
from allmlp.models.catalog import in_words
from allmlp.weights.checkpoints import CHECKPOINTS
from allmlp.weights.description import check_shapes, describe
from allmlp.weights.download import cache_folder
from allmlp.weights.files import WeightsFile, read_weights
from allmlp.weights.layouts import natural
from allmlp.weights.load import locate


def inspect_file(source: str | Path, image_size: tuple[int, int] | None = None) -> list[str]:
    """Returns lines: what a file is, what it needs, and its tensors; `image_size` helps if its
    tokens make no square. One that makes no model is listed with the reason."""
    path, checkpoint = locate(source, Reporter(stderr=True))
    file = read_weights(path)
    size = path.stat().st_size
    lines = [
        f"file           {path}",
        f"               {file.container}, {size:,} bytes, {len(file.tensors)} tensors",
    ]
    try:
        found = describe(file, checkpoint, image_size)
        check_shapes(found, file)
    except UserError as error:
        lines += [f"not a model    {error.what}", ""]
        return lines + list_tensors(file)
    names = found.class_names
    shown = "unknown" if names is None else ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    preprocessing = found.preprocessing
    lines += [
        f"model          {in_words(found.config)}",
        f"names          {found.layout.title}'s",
        f"GELU           {getattr(found.config, 'gelu', 'exact')}",
        f"classes        {shown}",
        f"preprocessing  {'unknown' if preprocessing is None else preprocessing.summary()}",
        f"says           {found.source}",
        *(f"note           {note}" for note in found.notes),
        "",
    ]
    return lines + list_tensors(file)


def list_tensors(file: WeightsFile) -> list[str]:
    """Returns a table of the tensors; what is equal in all blocks is one row."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for name in sorted(file.tensors, key=natural):
        value = file.tensors[name]
        shape = "x".join(map(str, value.shape)) or "()"
        dtype = str(value.dtype).removeprefix("torch.")
        number = re.search(r"(?<=blocks\.)\d+|(?<=[bB]lock_)\d+", name)
        key = name if number is None else f"{name[: number.start()]}#{name[number.end() :]}"
        rows.setdefault((key, shape, dtype), []).append(-1 if number is None else int(number[0]))
    cells = [
        [key.replace("#", _range(blocks)), shape, dtype]
        for (key, shape, dtype), blocks in rows.items()
    ]
    return table(["tensor", "shape", "dtype"], cells, left=3)


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def checkpoint_table() -> list[str]:
    """Returns a table of every published checkpoint, and what to know about checkpoint."""
    rows = []
    for checkpoint in CHECKPOINTS.values():
        size = (
            f"{checkpoint.mebibytes:.1f}"
            if checkpoint.mebibytes
            else f"~{checkpoint.parameters_mebibytes:.0f}"
        )
        here = (cache_folder() / checkpoint.name / checkpoint.file_name).is_file()
        top1 = checkpoint.accuracy.split()[0] if checkpoint.accuracy[0].isdigit() else "-"
        cells = [checkpoint.name, f"{checkpoint.num_classes:,}", size, top1, checkpoint.gelu]
        values = checkpoint.preprocessing.value_range()
        rows.append([*cells, values if values[0] == "[" else "mean, std", "yes" if here else "no"])
    header = ["name", "classes", "MiB", "top-1", "GELU", "values", "here"]
    lines = table(header, rows)
    lines += ["All take 224x224 pixels. top-1 is on ImageNet-1k, as published; sources below.", ""]
    for checkpoint in CHECKPOINTS.values():
        lines += [
            checkpoint.name,
            f"  trained on  {checkpoint.trained_on}",
            f"  top-1       {checkpoint.accuracy}",
            f"  input       {checkpoint.preprocessing.summary()}",
            f"  {'page' if checkpoint.by_hand else 'file'}        {checkpoint.url}",
        ]
        if checkpoint.hub:
            lines.append(f"  on the hub  hf:{checkpoint.hub}")
        lines.append(f"  licence     {checkpoint.licence}")
        if checkpoint.note:
            lines.append(f"  note        {checkpoint.note}")
    lines += ["", f"Downloads go to {cache_folder()} (MIXER_CACHE changes that)."]
    return lines
