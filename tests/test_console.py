"""Tables on the console."""

from __future__ import annotations

from rich.cells import cell_len

from allmlp.console import table


def test_wide_letters_take_two_columns():
    lines = table(["类", "images"], [["cat", "9"], ["ねこ", "10"], ["고양이", "1,000"]])
    assert {cell_len(line) for line in lines} == {len("고양이") * 2 + 2 + len("images")}
    assert lines[3] == "ねこ        10"
