"""Imports point one way; the engine and what lies below it know neither transformers nor peft."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import meft

PACKAGE = Path(meft.__file__).parent

# Every module may import those before it, never those after it; a module not listed here fails the test.
ORDER = [
    {"errors", "version"},
    {"compilation", "residues", "sharding", "tiles"},
    {"arithmetic"},
    {"couplings"},
    {"options"},
    {"plan", "replay", "tape"},
    {"checks", "routes"},
    {"engine", "adapters", "architectures"},
    {"reversible_stack", "calls", "head"},
    {"layers"},
    {"discovery", "peft_type"},
    {"convert"},
    {"config"},
    {"tuner"},
    {"storage", "verify", "folders", "export"},
    {"baselines", "tasks", "results", "families"},
    {"methods"},
    {"memory"},
    {"callbacks"},
    {"training"},
    {"sweep"},
    {"demo", "studies", "cli"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
BARE = (
    "errors",
    "residues",
    "compilation",
    "sharding",
    "tiles",
    "arithmetic",
    "couplings",
    "options",
    "plan",
    "replay",
    "tape",
    "checks",
    "routes",
    "engine",
    "adapters",
)


def imported(path: Path) -> set[str]:
    """The first component of every module a file imports; meft's own ones without the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            depth = len(path.relative_to(PACKAGE).parts)
            if node.level == depth:
                found |= {f"meft.{node.module}"} if node.module else {f"meft.{alias.name}" for alias in node.names}
            elif not node.level and node.module:
                found.add(node.module)
    return {name.removeprefix("meft.").split(".")[0] for name in found}


@pytest.mark.parametrize("name", sorted(RANK))
def test_imports_point_one_way(name: str) -> None:
    path = PACKAGE / name
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    if not path.is_dir() and not files[0].exists():
        pytest.fail(f"{name} is listed here but does not exist")
    for file in files:
        for other in imported(file) - {name}:
            if not (PACKAGE / other).exists() and not (PACKAGE / f"{other}.py").exists():
                continue
            assert other in RANK, f"{file.name} imports {other}, which comes after it"
            assert RANK[other] <= RANK[name], f"{file.name} imports {other}, which comes after it"


def test_the_engine_and_below_import_neither_transformers_nor_peft() -> None:
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('meft'); package.__path__ = [{str(PACKAGE)!r}]; sys.modules['meft'] = package\n"
        f"import {', '.join(f'meft.{name}' for name in BARE)}\n"
        "print([name for name in ('transformers', 'peft') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_core_module_has_a_place_in_the_order() -> None:
    core = set(RANK) | {"__init__", "py"}
    above = {path.stem for path in PACKAGE.glob("*.py")} - core
    for name in above:
        assert not any(name in imported(PACKAGE / f"{low}.py") for low in BARE)
