"""The paper's tables as data: every number against a second copy, and the frontier it speaks of."""

from __future__ import annotations

import pytest

from allmlp.models.catalog import model_config
from allmlp.models.mixer_config import MixerConfig
from allmlp.paper import published as paper
from conftest import GOLDEN


def table(number: int) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a table of the golden copy."""
    text = (GOLDEN / "paper_tables.md").read_text(encoding="utf-8")
    section = text.split(f"## Table {number}:")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells[0], cells[2:]


def shown(value: object) -> str:
    return "-" if value is None else str(value)


def test_table_1():
    header, rows = table(1)
    assert [each.name for each in paper.TABLE_1] == header[1:]
    fields = ("layers", "patch", "hidden", "sequence", "channels_dim", "tokens_dim", "parameters")
    assert len(rows) == len(fields)
    for field, (_, *values) in zip(fields, rows, strict=True):
        assert [str(getattr(each, field)) for each in paper.TABLE_1] == values, field


def test_table_1_is_what_the_catalogue_builds():
    for each in paper.TABLE_1:
        config = model_config(each.model, 224)
        assert isinstance(config, MixerConfig)
        ours = (config.num_blocks, config.patch_size, config.hidden_dim)
        ours += (config.tokens_mlp_dim, config.channels_mlp_dim)
        assert ours == (each.layers, each.patch, each.hidden, each.tokens_dim, each.channels_dim)
        assert (224 // each.patch) ** 2 == each.sequence


def test_table_2():
    _, rows = table(2)
    fields = ("data", "model", "imagenet", "real", "avg5", "vtab", "throughput", "core_days")
    ours = [[shown(getattr(each, field)) for field in fields] for each in paper.TABLE_2]
    assert ours == rows
    assert len(rows) == 10


def test_table_3():
    _, rows = table(3)
    fields = ("data", "model", "pixels", "epochs", "imagenet", "real", "avg5")
    fields += ("throughput", "core_days")
    ours = [[shown(getattr(each, field)) for field in fields] for each in paper.TABLE_3]
    assert ours == rows
    assert len(rows) == 26


@pytest.mark.parametrize(
    ("text", "value"), [("0.41k", 410.0), ("20.48k", 20_480.0), ("85.8", 85.8), (None, None)]
)
def test_the_value_of_a_printed_number(text, value):
    assert paper.number(text) == value


def test_the_families():
    kinds = {each.model: each.family for each in (*paper.TABLE_2, *paper.TABLE_3)}
    assert kinds["Mixer-H/14"] == "MLP"
    assert kinds["ViT-H/14"] == kinds["HaloNet"] == "attention"
    assert {kinds[name] for name in ("BiT-R152x4", "NFNet-F4+", "MPL", "ALIGN")} == {"convolution"}


def test_the_frontier_is_that_of_figure_2():
    """Its caption: Mixer sits on the frontier with HaloNet, ViT, NFNet and MPL."""
    points = [(paper.number(row.core_days), paper.number(row.imagenet)) for row in paper.FIGURE_2]
    best = [paper.FIGURE_2[at].model for at in paper.frontier(points)]  # type: ignore[arg-type]
    assert best == ["HaloNet", "Mixer-L/16", "ViT-L/16", "Mixer-H/14", "NFNet-F4+", "MPL"]


def test_a_frontier_leaves_out_what_another_beats():
    points = [(1.0, 50.0), (2.0, 50.0), (2.0, 60.0), (3.0, 55.0), (4.0, 70.0)]
    assert paper.frontier(points) == [0, 2, 4]
    assert paper.frontier(points, more_is_better=True) == [4]
    assert paper.frontier([]) == []


def test_figure_3_is_at_one_size_and_on_one_data_set():
    assert {(row.data, row.pixels) for row in paper.FIGURE_3} == {("JFT-300M", 224)}
    assert len(paper.FIGURE_3) == 15
