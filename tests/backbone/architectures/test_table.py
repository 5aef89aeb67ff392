"""Rows of the table: which classes they are for, and that no row goes unchecked."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import transformers

from meft.backbone.architectures import FAMILIES, TABLE
from meft.backbone.architectures.parallel import ALWAYS
from support.known_layouts import CHECKED

MODELS = Path(transformers.__file__).parent / "models"

_CLASS = re.compile(r"^class (\w+)\([^)]*\):\n(?:[ \t].*\n|\n)*", re.MULTILINE)


@cache
def sources() -> dict[str, list[str]]:
    """The text of every class in the table, by name: one for each place where Transformers defines it."""
    found: dict[str, list[str]] = {name: [] for name in (*TABLE, *ALWAYS)}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        for match in _CLASS.finditer(path.read_text()):
            if match[1] in found:
                found[match[1]].append(match[0])
    return found


@cache
def forward(name: str) -> str:
    """What a class computes, without annotations and documentation."""
    (tree,) = ast.parse(sources()[name][0]).body
    assert isinstance(tree, ast.ClassDef)
    (method,) = (part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name == "forward")
    body = method.body[1:] if ast.get_docstring(method) else method.body
    parameters = sorted(argument.arg for argument in method.args.args)
    return "\n".join([", ".join(parameters), *(ast.unparse(line) for line in body)])


def present() -> Iterator[str]:
    return (name for name, texts in sources().items() if texts)


def test_a_class_name_means_one_class() -> None:
    """A row is found by a class's name, so Transformers must not have two classes of it."""
    assert len(list(present())) > 200
    assert {name for name, texts in sources().items() if len(texts) > 1} == set()


def test_every_class_exists() -> None:
    """In the Transformers that the table was written for; older ones lack some families."""
    absent = set(sources()) - set(present())
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):
        assert absent == set()
    assert absent.isdisjoint(CHECKED)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_row_is_checked_or_the_copy_of_a_checked_one(name: str) -> None:
    """The same names in the same text, and the same record: what was compared bit for bit for one holds for all."""
    if name in CHECKED or not sources()[name]:
        return
    copies = [other for other in CHECKED if TABLE[other] is TABLE[name] and forward(other) == forward(name)]
    assert copies, f"no checked layer computes what {name} computes"


def test_no_class_has_two_rows() -> None:
    assert sum(len(family.ROWS) for family in FAMILIES) == len(TABLE)
    assert ALWAYS.isdisjoint(TABLE)
