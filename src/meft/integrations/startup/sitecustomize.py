"""Imported by Python at its start in every process of a program that `meft run` started; its folder is on PYTHONPATH.

Nothing happens before the process imports `transformers.trainer`.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec

_HERE = os.path.dirname(os.path.abspath(__file__))


def _run_the_other() -> None:
    """There is one `sitecustomize` for a process: what this one hides runs as well."""
    elsewhere = [path for path in sys.path if os.path.abspath(path or ".") != _HERE]
    spec = PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


_run_the_other()
if find_spec("meft") is not None:
    from meft.lazy import when_imported

    when_imported("transformers.trainer", "meft.integrations.everywhere")
elif find_spec("transformers") is not None:
    sys.exit(
        f"meft run: {sys.executable} has transformers, and no meft, so nothing would be reversible in this program. "
        "Install meft there: pip install meft."
    )
