"""Imports that wait: the root's exports until they are used, the PEFT method until PEFT itself is imported.

PEFT imports Transformers' models, and those whatever is installed (SciPy, bitsandbytes): seconds that a command's
`--help`, or a script that wants `meft.errors`, need not spend.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


def exports(package: str, file: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Reads a package's exports from the stub beside its `__init__.py`.

    Args:
        package: the package's name.
        file: its `__file__`.

    Returns:
        Its `__all__`, `__getattr__` and `__dir__`.
    """
    tree = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    sources = {
        alias.asname or alias.name: (node.module or package, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def get(name: str) -> Any:
        if name not in sources:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, original = sources[name]
        value = getattr(importlib.import_module(module), original)
        setattr(sys.modules[package], name, value)
        return value

    names = sorted([*sources, "__version__"])
    return names, get, lambda: sorted({*vars(sys.modules[package]), *names})


def when_imported(name: str, then: str) -> None:
    """Imports the module `then` as soon as the module `name` has been imported: now, or when somebody does."""
    if name in sys.modules:
        importlib.import_module(then)
    else:
        sys.meta_path.insert(0, _Watch(name, then))


class _Watch(MetaPathFinder):
    """Finds one module as the other finders would, and has another imported after it."""

    def __init__(self, name: str, then: str) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)
            return None
        spec.loader = _Then(spec.loader, self)
        return spec


class _Then(Loader):
    """Runs a module as its own loader does; then imports the other."""

    def __init__(self, loader: Loader, watch: _Watch) -> None:
        self.loader, self.watch = loader, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.loader.exec_module(module)
        except BaseException:
            sys.meta_path.insert(0, self.watch)  # whoever tries again
            raise
        spec = module.__spec__
        if spec is not None:
            spec.loader = self.loader
        module.__loader__ = self.loader
        importlib.import_module(self.watch.then)
