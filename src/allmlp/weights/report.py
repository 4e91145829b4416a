"""What a weights file is, as lines to read: `mixer models --inspect` and `--weights`."""

from __future__ import annotations

import re
from pathlib import Path

from allmlp.console import Reporter, table
from allmlp.errors import UserError
from allmlp.weights.architecture import check_shapes
from allmlp.weights.architecture import describe as in_words
from allmlp.weights.checkpoints import CHECKPOINTS
from allmlp.weights.description import describe
from allmlp.weights.download import cache_folder
from allmlp.weights.files import WeightsFile, read_weights
from allmlp.weights.google import natural
from allmlp.weights.locate import locate


def inspect_file(source: str | Path, image_size: tuple[int, int] | None = None) -> list[str]:
    """Returns lines: what a file is, what it needs, and its tensors.

    Args:
        source: anything that `load_model` takes.
        image_size: (H, W), where the file's tokens make no square and nothing says their sides.

    Raises:
        UserError: the file is damaged or would run code. One that makes no Mixer is still listed,
            with the reason.
    """
    place = locate(source, Reporter(stderr=True))
    file = read_weights(place.path)
    size = place.path.stat().st_size
    lines = [
        f"file           {place.path}",
        f"               {file.container}, {size:,} bytes, {len(file.tensors)} tensors",
    ]
    try:
        found = describe(file, place.checkpoint, image_size)
        check_shapes(found.config, found.layout, file.tensors, place.path)
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
        f"says           {found.said_by}",
        *(f"note           {note}" for note in found.notes),
        "",
    ]
    return lines + list_tensors(file)


def list_tensors(file: WeightsFile) -> list[str]:
    """Returns a table of the tensors; what all blocks have alike stands in one row."""
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


def list_checkpoints() -> list[str]:
    """Returns a table of every published checkpoint, and what one should know of each."""
    rows = []
    for each in CHECKPOINTS.values():
        size = f"{each.mebibytes:.1f}" if each.mebibytes else f"~{each.parameters_mebibytes:.0f}"
        here = (cache_folder() / each.name / each.file_name).is_file()
        top1 = each.accuracy.split()[0] if each.accuracy[0].isdigit() else "-"
        cells = [each.name, f"{each.num_classes:,}", size, top1, each.gelu]
        values = each.preprocessing.value_range()
        rows.append([*cells, values if values[0] == "[" else "mean, std", "yes" if here else "no"])
    header = ["name", "classes", "MiB", "top-1", "GELU", "values", "here"]
    lines = table(header, rows)
    lines += ["All take 224x224 pixels. top-1 is on ImageNet-1k, as published; sources below.", ""]
    for each in CHECKPOINTS.values():
        lines += [
            each.name,
            f"  trained on  {each.trained_on}",
            f"  top-1       {each.accuracy}",
            f"  input       {each.preprocessing.summary()}",
            f"  {'page' if each.by_hand else 'file'}        {each.url}",
        ]
        if each.hub:
            lines.append(f"  on the hub  hf:{each.hub}")
        lines.append(f"  licence     {each.licence}")
        if each.note:
            lines.append(f"  note        {each.note}")
    lines += ["", f"Downloads go to {cache_folder()} (MIXER_CACHE changes that)."]
    return lines
