"""Human-readable description of a weights file: `mixer models --inspect` and `--weights`."""

from __future__ import annotations

import re
from pathlib import Path

from allmlp.console import Reporter, table
from allmlp.errors import UserError
from allmlp.models.catalog import in_words, model_config
from allmlp.models.layers import flops_text
from allmlp.weights.checkpoints import CHECKPOINTS, recommended
from allmlp.weights.description import check_shapes, describe
from allmlp.weights.download import cache_folder
from allmlp.weights.files import WeightsFile, read_weights
from allmlp.weights.layouts import natural
from allmlp.weights.load import locate


def inspect_file(source: str | Path, image_size: tuple[int, int] | None = None) -> list[str]:
    path, checkpoint = locate(source, Reporter(stderr=True))
    file = read_weights(path)
    size, of = path.stat().st_size, f" of {file.chosen}" if file.chosen else ""
    lines = [
        f"file           {path}",
        f"               {file.container}, {size:,} bytes, {len(file.tensors)} tensors{of}",
    ]
    try:
        found = describe(file, checkpoint, image_size)
        check_shapes(found, file)
    except UserError as error:
        return [*lines, f"not a model    {error.what}", "", *list_tensors(file)]
    names = found.class_names
    shown = "unknown" if names is None else ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    preprocessing = found.preprocessing
    facts = [
        ("model", in_words(found.config)),
        ("names", f"{found.layout.title}'s"),
        ("GELU", getattr(found.config, "gelu", "exact")),
        ("classes", shown),
        ("preprocessing", "unknown" if preprocessing is None else preprocessing.summary()),
        ("described by", found.source),
        *(("note", note) for note in found.notes),
    ]
    return [*lines, *(f"{name:<13}  {fact}" for name, fact in facts), "", *list_tensors(file)]


def list_tensors(file: WeightsFile) -> list[str]:
    """Returns a table of the tensors, with one row for tensors that are equal in all blocks."""
    blocks: dict[tuple[str, str, str], list[str]] = {}
    for name in sorted(file.tensors, key=natural):
        value = file.tensors[name]
        shape = "x".join(map(str, value.shape)) or "()"
        dtype = str(value.dtype).removeprefix("torch.")
        number = re.search(r"(?<=blocks\.)\d+|(?<=[bB]lock_)\d+", name)
        key = name if number is None else f"{name[: number.start()]}#{name[number.end() :]}"
        blocks.setdefault((key, shape, dtype), []).append("" if number is None else number[0])
    rows = []
    for (key, shape, dtype), numbers in blocks.items():
        shown = numbers[0] if len(numbers) == 1 else f"{{{numbers[0]}..{numbers[-1]}}}"
        rows.append([key.replace("#", shown), shape, dtype])
    return table(["tensor", "shape", "dtype"], rows, left=3)


def checkpoint_table() -> list[str]:
    rows, details = [], []
    for checkpoint in CHECKPOINTS.values():
        size, values = checkpoint.mebibytes, checkpoint.preprocessing.value_range()
        here = (cache_folder() / checkpoint.name / checkpoint.file_name).is_file()
        rows.append(
            [
                checkpoint.name,
                f"{checkpoint.num_classes:,}",
                f"{size:.1f}" if size else f"~{checkpoint.parameters_mebibytes:.0f}",
                checkpoint.accuracy.split()[0] if checkpoint.accuracy[0].isdigit() else "-",
                checkpoint.gelu,
                values if values[0] == "[" else "mean, std",
                "yes" if here else "no",
            ]
        )
        facts = {
            "trained on": checkpoint.trained_on,
            "top-1": checkpoint.accuracy,
            "input": checkpoint.preprocessing.summary(),
            "page" if checkpoint.by_hand else "file": checkpoint.url,
            "on the hub": checkpoint.hub and f"hf:{checkpoint.hub}",
            "licence": checkpoint.licence,
            "note": checkpoint.note,
        }
        details.append(checkpoint.name)
        details += [f"  {key:<10}  {fact}" for key, fact in facts.items() if fact]
    lines = [
        *table(["name", "classes", "MiB", "top-1", "GELU", "values", "downloaded"], rows),
        "All take 224x224 pixels. top-1 is on ImageNet-1k, as published; sources below.",
        "The others are downloaded when they are first used.",
        *("", "recommended to fine-tune"),
    ]
    for purpose in ("accuracy", "speed"):
        best = recommended(purpose)
        flops = flops_text(model_config(best.model).flops)
        facts = f"top-1 {best.accuracy.split()[0]}, {flops} per image, {best.licence}"
        lines.append(f"  for {purpose:<8}  {best.name}: {facts}")
    end = f"Downloads go to {cache_folder()} (MIXER_CACHE changes that)."
    return [*lines, "", *details, "", end]
