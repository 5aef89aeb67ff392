"""The matrix as a table and as a page, from verdicts written by hand."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from meft_lab.families.check import WAYS, Verdict
from meft_lab.families.family import Family
from meft_lab.families.matrix import Row
from meft_lab.families.report import markdown, notes, report

SPLIT = 'coupling="meft3" cannot split layers.0 of M, a L, in two. It knows others. Use coupling="meft1".'
WORKS = Verdict("works")

LLAMA = Row(
    Family("llama"),
    layers=("LlamaDecoderLayer",),
    feed_forward=("mlp",),
    cells={**dict.fromkeys(WAYS, WORKS), "meft3": Verdict("refused", SPLIT)},
    heads={
        ("token_classification", "meft1"): WORKS,
        ("token_classification", "full"): WORKS,
        ("base", "meft1"): WORKS,
        ("base", "full"): Verdict("failed", "training step: the loss is nan"),
    },
)
MAMBA = Row(
    Family("mamba"), layers=("MambaBlock",), cells=dict.fromkeys(WAYS, Verdict("refused", "It is recurrent. No."))
)
BROKEN = Row(Family("new", guessed=True), problem="ImportError: it needs timm")
TWO_TOWERS = Row(
    Family("clip"),
    layers=("CLIPEncoderLayer", "TextLayer"),
    feed_forward=("mlp", "fc1:fc2"),
    cells={**dict.fromkeys(WAYS, WORKS), "meft1": Verdict("failed", "training step: a | b")},
    idle=("text.layers",),
)


def page(*rows: Row) -> dict[str, list[str]]:
    """Cells by family."""
    lines = [line for line in markdown(rows, "meft families").splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line[2:-2].split(" | ")] for line in lines)}


def test_notes() -> None:
    assert notes(LLAMA) == [
        'meft3: coupling="meft3" cannot split layers.0 of M, a L, in two',
        "base (full): FAILED: training step: the loss is nan",
    ]
    assert notes(MAMBA) == ["all: It is recurrent"]
    assert notes(BROKEN) == ["not tried: ImportError: it needs timm"]
    assert notes(TWO_TOWERS) == ["not reached by the batch: text.layers", "meft1: FAILED: training step: a | b"]


def test_a_guessed_family_says_so() -> None:
    row = Row(
        Family("new", guessed=True), cells={"meft1": Verdict("works", "A note."), "meft2": Verdict("works", "A note.")}
    )
    assert notes(row) == ["sizes guessed, since the model type is not in the catalogue", "meft1, meft2: A note."]


def test_failures_and_refusals() -> None:
    assert LLAMA.failures == {"base (full)": "training step: the loss is nan"}
    assert LLAMA.refusals == {"meft3": SPLIT}
    assert (MAMBA.failures, BROKEN.failures) == ({}, {})


def test_page() -> None:
    found = page(LLAMA, MAMBA, BROKEN)
    assert found["llama"] == [
        "`LlamaDecoderLayer`",
        "`mlp`",
        "yes",
        "yes",
        "no",
        "yes",
        "yes",
        "token_classification",
        "<br>".join(notes(LLAMA)),
    ]
    assert found["mamba"][2:7] == ["no"] * 5
    assert found["new"][2:] == ["", "", "", "", "", "", "not tried: ImportError: it needs timm"]


def test_page_counts_and_names_its_command() -> None:
    text = markdown([LLAMA, MAMBA], "meft families --markdown")
    assert text.startswith("# Families of models\n\nWritten by `meft families --markdown` on 20")
    assert "2 families, 4 cells work, 6 are refused." in text
    assert re.search(r"with meft \S+, torch \S+, transformers \S+, peft \S+:", text)


def test_bars_in_reasons_do_not_end_a_cell() -> None:
    assert "training step: a \\| b" in markdown([TWO_TOWERS], "meft families")


@pytest.mark.parametrize("row", [LLAMA, MAMBA, BROKEN, TWO_TOWERS])
def test_table(row: Row) -> None:
    text = io.StringIO()
    Console(file=text, width=200, color_system=None).print(report([row]))
    shown = text.getvalue()
    assert row.family.name in shown
    for note in notes(row):
        assert f"{row.family.name}: {note}" in shown
    for word in ("yes", "no", "FAILED"):
        states = {"yes": "works", "no": "refused", "FAILED": "failed"}
        expected = sum(cell.state == states[word] for cell in row.cells.values())
        assert len(re.findall(rf"│\s+{word}\s+(?=│)", shown)) == expected
