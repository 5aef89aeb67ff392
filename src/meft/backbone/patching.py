"""A `forward` that users set on a layer after it was made reversible, run in the place of the layer's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class Patched:
    """The functions that were set as a pretrained layer's `forward`, one over the other.

    Example:
        >>> old = layer.forward                                  # the wrapper's, which is what users hold
        >>> layer.forward = lambda *args, **kwargs: old(*args, **kwargs)

    Such a function may call what it found, which is the wrapper, in order to run the layer. A call that comes back to
    the wrapper while the function runs is therefore one of the function below, and at last of the layer's own.

    Args:
        former: the `forward` that the layer had on its instance before, or None.
    """

    def __init__(self, former: Callable[..., Any] | None) -> None:
        self.former = former
        self.functions: list[Callable[..., Any]] = []
        self._depths: dict[int, int] = {}

    @staticmethod
    def put_on(layer: nn.Module, function: Callable[..., Any]) -> None:
        """Sets a layer's `forward`."""
        present = vars(layer).get("forward")
        if type(present) is not Patched:
            present = layer.forward = Patched(present)
        present.functions.append(function)

    def take_off(self, layer: nn.Module) -> None:
        """Undoes the last `put_on`."""
        self.functions.pop()
        if not self.functions:
            del layer.forward
            if self.former is not None:
                layer.forward = self.former

    @property
    def running(self) -> bool:
        """Whether the caller is, in the end, one of the functions."""
        return threading.get_ident() in self._depths

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(0, args, kwargs)

    def before(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the running function found as the layer's `forward` when it was set."""
        depth = self._depths[threading.get_ident()]
        if depth < len(self.functions):
            return self._run(depth, args, kwargs)
        return type(layer).forward(layer, *args, **kwargs) if self.former is None else self.former(*args, **kwargs)

    def _run(self, depth: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        thread = threading.get_ident()
        self._depths[thread] = depth + 1
        try:
            return self.functions[-1 - depth](*args, **kwargs)
        finally:
            if depth:
                self._depths[thread] = depth
            else:
                del self._depths[thread]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_depths": {}}


def wraps(function: Any, other: Callable[..., Any]) -> bool:
    """Tells whether a function stands around another: it wraps it, closes over it, or has it as a fixed argument."""
    pending, seen = [function], 0
    while pending and seen < 100:
        present = pending.pop()
        seen += 1
        if present == other:
            return True
        pending += [getattr(present, name) for name in ("__wrapped__", "__func__", "func") if hasattr(present, name)]
        pending += [value for value in (*_cells(present), *_fixed(present)) if callable(value)]
    return False


def _cells(function: Any) -> list[Any]:
    found = []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return found


def _fixed(function: Any) -> list[Any]:
    if isinstance(function, partial):
        return [*function.args, *function.keywords.values()]
    return list(getattr(function, "__defaults__", None) or ())
