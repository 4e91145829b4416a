"""The paper's tables as data: every number against a second copy, and the frontier."""

import pytest

from allmlp.models.catalog import model_config
from allmlp.paper import figures, published
from conftest import GOLDEN


def table(number: int) -> list[list[str]]:
    """Returns the rows of a table of the golden copy."""
    text = (GOLDEN / "paper_tables.md").read_text(encoding="utf-8")
    section = text.split(f"## Table {number}:")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def test_table_1_is_as_printed_and_what_the_catalog_builds():
    columns = zip(*(row[1:] for row in table(1)), strict=True)
    for ours, printed in zip(published.TABLE_1, columns, strict=True):
        assert (ours.name, *map(str, ours[2:])) == printed
        config = model_config(ours.model, 224)
        sizes = (config.num_blocks, config.patch_size, config.hidden_dim, config.num_tokens)
        assert (*sizes, config.channels_mlp_dim, config.tokens_mlp_dim) == ours[2:-1]


@pytest.mark.parametrize(
    ("number", "rows", "fields"),
    [
        (2, published.TABLE_2, "data model imagenet real avg5 vtab throughput core_days"),
        (3, published.TABLE_3, "data model pixels epochs imagenet real avg5 throughput core_days"),
    ],
)
def test_tables_2_and_3_are_as_printed(number, rows, fields):
    ours = [[str(getattr(row, field) or "-") for field in fields.split()] for row in rows]
    assert ours == table(number)[1:]


def test_the_frontier_is_that_of_figure_2():
    """Its caption: Mixer sits on the frontier with HaloNet, ViT, NFNet and MPL."""
    rows = published.FIGURE_2
    points = [(published.number(row.core_days), published.number(row.imagenet)) for row in rows]
    best = [rows[at] for at in figures.frontier(points)]
    names = ["HaloNet", "Mixer-L/16", "ViT-L/16", "Mixer-H/14", "NFNet-F4+", "MPL"]
    assert [row.model for row in best] == names
    families = ["attention", "MLP", "attention", "MLP", "convolution", "convolution"]
    assert [row.family for row in best] == families
