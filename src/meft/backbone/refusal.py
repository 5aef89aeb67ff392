"""A call that is refused leaves the model as it was, wherever in the call it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def as_it_was_if_refused(model: nn.Module) -> Iterator[None]:
    """Puts a model's modules, hooks, flags and configurations back when the block raises.

    What may fail before a change is checked before it; this is for the rest: a warning that the caller has turned into
    an error, a library that refuses halfway. The values of weights are none of it, since nothing that converts a model
    writes them.
    """
    undo: list[Callable[[], None]] = []
    seen: set[int] = set()
    for module in model.modules():
        _note(module, undo)
        config = getattr(module, "config", None)
        if hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            _note(config, undo)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for put_back in undo:
            put_back()
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


def _note(holder: Any, undo: list[Callable[[], None]]) -> None:
    """Adds what puts an object's class and attributes back, and what the containers among these hold."""
    kind, attributes = type(holder), dict(vars(holder))
    contents = {name: value.copy() for name, value in attributes.items() if isinstance(value, dict | list | set)}

    def put_back() -> None:
        # The same containers, since handles of hooks know theirs.
        for name, content in contents.items():
            container = attributes[name]
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        if type(holder) is not kind:
            holder.__class__ = kind
        vars(holder).clear()
        vars(holder).update(attributes)

    undo.append(put_back)
