"""docs/families.md is the catalogue's, and says what is found today."""

from __future__ import annotations

from pathlib import Path

import pytest

from meft_lab.families.catalogue import CATALOGUE
from meft_lab.families.matrix import Row, row_of
from meft_lab.families.report import markdown

PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def rows(text: str) -> dict[str, list[str]]:
    """Cells by family, without the heading."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    found = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in lines[1:]]
    return {cells[0]: cells[1:] for cells in found}


def test_the_page_lists_the_catalogue() -> None:
    assert list(rows(PAGE.read_text())) == list(CATALOGUE)


def test_nothing_on_the_page_failed_or_was_left_out() -> None:
    text = PAGE.read_text()
    assert "FAILED" not in text
    assert [name for name, cells in rows(text).items() if "" in cells[2:7]] == []


@pytest.mark.parametrize("name", ["bert", "gpt_neox", "gpt_neox, sequential", "albert, two groups", "mamba"])
def test_the_page_says_what_is_found(name: str) -> None:
    row: Row = row_of(CATALOGUE[name], heads=name == "gpt_neox")
    found = rows(markdown([row], "meft families"))[name]
    written = rows(PAGE.read_text())[name]
    assert found[:7] == written[:7]
    if row.heads:
        assert found[7] == written[7]


def test_the_page_says_how_it_was_made() -> None:
    assert "Written by `meft families --markdown --output docs/families.md` on 20" in PAGE.read_text()
