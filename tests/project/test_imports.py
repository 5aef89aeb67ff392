"""Imports point one way, and what need not be imported is not."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import meft

SOURCE = Path(meft.__file__).parents[1]

# What each package may import besides itself. A package that is not here, or an import that is not, fails the test.
# Read from the top down it is the house from the ground up: nothing imports what stands below it here.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "lazy": set(),
    "storage": {"errors"},
    "loss": {"errors"},
    "engine": {"errors"},
    "options": {"errors", "engine"},
    "parsing": {"errors", "options"},
    "loading": {"errors", "storage", "parsing"},
    "backbone": {"errors", "loss", "engine", "options"},
    "tuner": {"errors", "storage", "loss", "engine", "options", "backbone"},
    "verification": {"errors", "storage", "loss", "engine", "loading", "backbone"},
    "methods": {"errors", "engine", "options", "parsing", "backbone", "tuner"},
    "memory": {"errors", "storage", "engine", "options", "loading", "backbone", "methods"},
    "integrations": {"errors", "lazy", "engine", "options", "backbone", "verification", "memory"},
    "training": {
        *("errors", "storage", "options", "parsing", "loading", "backbone", "tuner", "verification"),
        *("methods", "memory", "integrations"),
    },
    "cli": {
        *("errors", "storage", "engine", "options", "parsing", "loading", "backbone", "tuner", "verification"),
        *("methods", "memory", "integrations", "training"),
    },
    "meft_lab": {
        *("errors", "storage", "engine", "options", "parsing", "loading", "backbone", "tuner", "verification"),
        *("methods", "memory", "training"),
    },
}
TORCH_ALONE = ("errors", "engine")
QUIET = ("trl", "datasets", "matplotlib", "scipy", "sklearn", "lm_eval", "bitsandbytes", "PIL", "deepspeed")


def package_of(module: str) -> str:
    """`meft.engine.tape` belongs to "engine", all of the laboratory to "meft_lab"."""
    first, *rest = module.split(".")
    return first if first == "meft_lab" or not rest else rest[0]


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, absolute."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    package = parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def files_of(package: str) -> list[Path]:
    folder = SOURCE / package if package == "meft_lab" else SOURCE / "meft" / package
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_every_package_is_listed() -> None:
    found = {
        path.stem for path in (SOURCE / "meft").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} | {"meft_lab"} == set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_stay_within_the_list(package: str) -> None:
    used = set()
    for file in files_of(package):
        for module in imports(file):
            if module.split(".")[0] in ("meft", "meft_lab"):
                other = package_of(module)
                if module == "meft" or other == "meft":
                    pytest.fail(f"{file} imports the root, which imports it")
                used.add(other)
                assert other in MAY_IMPORT[package] | {package}, f"{file} imports {module}"
    assert used - {package} == MAY_IMPORT[package], "the list allows what nothing needs any more"


def test_the_list_points_one_way() -> None:
    order = list(MAY_IMPORT)
    for package, others in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(package) for other in others), package


def test_the_engine_needs_torch_alone() -> None:
    modules = [
        ".".join(file.relative_to(SOURCE).with_suffix("").parts)
        for package in TORCH_ALONE
        for file in files_of(package)
        # Triton's kernels are imported where they are launched.
        if file.name not in ("__init__.py", "triton_kernels.py")
    ]
    code = (
        "import sys, types\n"
        f"root = types.ModuleType('meft'); root.__path__ = [{str(SOURCE / 'meft')!r}]; sys.modules['meft'] = root\n"
        f"import {', '.join(modules)}\n"
        "print([name for name in ('transformers', 'peft', 'accelerate', 'rich', 'triton') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_library_is_quiet_and_light() -> None:
    code = f"import sys, meft; print([name for name in {QUIET!r} if name in sys.modules], end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]" and done.stderr == ""


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        # The list of commands is Python's own and rich; what a command needs is imported when it runs.
        (["--help"], (*QUIET, "torch", "transformers", "peft", "accelerate", "yaml", "numpy")),
        (["train", "--help"], ("trl", "matplotlib", "lm_eval", "deepspeed", "sklearn", "tensorboard")),
        (["run", "--help"], ("trl", "matplotlib", "lm_eval", "deepspeed", "sklearn", "tensorboard")),
    ],
    ids=["meft", "train", "run"],
)
def test_help_imports_what_it_needs_and_says_nothing_else(words: list[str], unwanted: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom meft.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n"
        f"    print('\\n' + repr((end.code, [name for name in {unwanted!r} if name in sys.modules])))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "(0, [])" and done.stderr == ""
    assert done.stdout.lower().startswith("usage: meft")


@pytest.mark.parametrize("order", ["meft, peft", "peft, meft"])
def test_the_method_is_registered_once_both_are_imported(order: str) -> None:
    code = (
        f"import {order}\n"
        "print(peft.PEFT_TYPE_TO_CONFIG_MAPPING['MEFT'] is meft.MeftConfig, peft.__spec__.loader is peft.__loader__)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_what_the_root_does_not_export_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'meft' has no attribute 'momentum'"):
        meft.momentum  # noqa: B018
    assert "verify" in dir(meft) and meft.verify is meft.verify


@pytest.mark.parametrize("name", [name for name in meft.__all__ if not name.startswith("_")])
def test_no_submodule_shadows_what_the_root_exports(name: str) -> None:
    place = SOURCE / "meft" / name
    is_module = place.with_suffix(".py").exists() or place.is_dir()
    assert is_module == isinstance(getattr(meft, name), type(meft)), f"meft.{name} is a module and something else"


@pytest.mark.parametrize("package", ["backbone", "loss"])
def test_what_the_tuner_needs_does_not_import_peft_before_it_is_complete(package: str) -> None:
    for file in files_of(package):
        top = ast.parse(file.read_text()).body
        modules = [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
        assert not any(module.split(".")[0] == "peft" for module in modules), file
