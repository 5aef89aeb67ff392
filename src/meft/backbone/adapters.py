"""The bottleneck adapter and where it is placed.

Adapter(x) = up(dropout(act(down(x)))), with the model's own non-linearity and dropout; weights from N(0, 0.02^2),
biases zero, so that its output starts near zero. Placed beside a feed-forward (parallel adapter, He et al. 2022,
arXiv 2110.04366) or behind a module (bottleneck adapter, Houlsby et al. 2019, arXiv 1902.00751). Beside a feed-forward
it is added after the dropout that the layer gives the feed-forward's output, as in the paper's code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from meft.engine.replay import of_one_call
from meft.errors import UnsupportedModelError
from meft.options import INIT_STD


@dataclass(frozen=True)
class Bottleneck:
    """One adapter, made of layers that somebody else owns.

    Attributes:
        down: Linear, hidden -> bottleneck.
        up: Linear, bottleneck -> hidden.
        activation: the non-linearity.
        dropout: module that drops elements of the bottleneck, or a probability of it in training.
        owner: the layer that the adapter belongs to, whose training flag tells whether anything is dropped.
        norm: what the hidden state passes through first, or None.
    """

    down: nn.Linear
    up: nn.Linear
    activation: Callable[[Tensor], Tensor]
    dropout: nn.Module | float
    owner: nn.Module
    norm: nn.Module | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Computes up(dropout(act(down(norm(hidden))))); shape (..., hidden) or (batch, hidden, height, width).

        Raises:
            UnsupportedModelError: neither the last axis nor, of four, the second has the adapter's width, or both do.
        """
        if channel_axis(hidden, self.down.in_features) == 1:
            return self._on_last(hidden.movedim(1, -1)).movedim(-1, 1)
        return self._on_last(hidden)

    def _on_last(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(self.down.weight.dtype)
        narrow = self.activation(self.down(wide if self.norm is None else self.norm(wide)))
        if isinstance(self.dropout, nn.Module):
            narrow = self.dropout(narrow)
        else:
            narrow = nn.functional.dropout(narrow, self.dropout, self.owner.training)
        return self.up(narrow).to(hidden.dtype)


def channel_axis(hidden: Tensor, width: int) -> int:
    """The axis that an adapter acts on: the last, or the channels of (batch, channels, height, width).

    Raises:
        UnsupportedModelError: neither axis has the adapter's width, or both do.
    """
    last, second = hidden.shape[-1] == width, hidden.dim() == 4 and hidden.shape[1] == width
    if last == second:
        found = "both its second and its last axis are" if last else "neither its last axis nor that of its channels is"
        raise UnsupportedModelError(
            f"An adapter of width {width} is given a hidden state of shape {tuple(hidden.shape)}: {found} as wide. "
            "Leave this stack out with stacks=[...], give inputs of another size, or use make_reversible with LoRA."
        )
    return -1 if last else 1


def new_projections(hidden_size: int, bottleneck_dim: int, std: float = INIT_STD) -> tuple[nn.Linear, nn.Linear]:
    """Makes the down- and up-projection of a new adapter: weights N(0, std^2), biases zero.

    With a std of 0 only the up-projection is zero; down's is 0.02, or neither would get a gradient.
    """
    down, up = nn.Linear(hidden_size, bottleneck_dim), nn.Linear(bottleneck_dim, hidden_size)
    for projection, std in ((down, std or INIT_STD), (up, std)):  # noqa: B020
        nn.init.normal_(projection.weight, std=std)
        nn.init.zeros_(projection.bias)
    return down, up


@contextmanager
def beside(entry: nn.Module, exit_: nn.Module, adapter: Bottleneck | None, name: str = "a layer") -> Iterator[None]:
    """For the duration of a call, adds adapter(input of `entry`) to the output of `exit_`.

    In training it is added to what comes out of the dropout that this output is given to, if it is.

    The hooks live only as long as the call, and heed no call of another thread, so nothing stays on the pretrained
    modules.

    Raises:
        UnsupportedModelError: the call did not pass through `entry` and then through `exit_`.
    """
    if adapter is None:
        yield
        return
    received: list[Tensor] = []
    awaited: list[_Awaited] = []
    added = False
    thread = threading.get_ident()

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            received.append(args[0] if args else next(iter(kwargs.values())))

    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal added
        if threading.get_ident() != thread:
            return output
        if not received:
            raise UnsupportedModelError(
                f"In {name}, {type(exit_).__name__} was left before {type(entry).__name__} was entered, so these two "
                "are no feed-forward. Name the module that is with feedforward_module."
            )
        given, first, added = received.pop(), _first(output), True
        if adapter.down.in_features not in (given.shape[-1], given.shape[1]) or first.numel() != given.numel():
            raise UnsupportedModelError(
                f"What was taken for the feed-forward of {name}, {type(entry).__name__} to {type(exit_).__name__}, "
                f"makes {tuple(first.shape)} of {tuple(given.shape)}, but the hidden state has width "
                f"{adapter.down.in_features}. Name the module that reads and returns it with feedforward_module."
            )

        def addend() -> Tensor:
            # Some mixtures of experts return the tokens of all sequences in one matrix.
            return adapter(given).reshape(first.shape)

        if not adapter.owner.training:
            return _with_first(output, first + addend())
        awaited.append(_Awaited(first, addend))
        awaited[-1].__enter__()
        return output

    handles = [
        entry.register_forward_pre_hook(of_one_call(remember), with_kwargs=True),
        exit_.register_forward_hook(of_one_call(add)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while awaited:
            waiting = awaited.pop()
            waiting.__exit__(None, None, None)
            added = added and waiting.output is None
    if not added:
        raise UnsupportedModelError(
            f"The {type(exit_).__name__} that was taken for the feed-forward of {name} was not called, so the adapter "
            "beside it has no effect. Name the module that is called with feedforward_module."
        )


class _Awaited(TorchFunctionMode):
    """Waits for the first use of a tensor, and adds something to it: behind a dropout, before anything else.

    Dropout is a module in some layers and a function in others; both arrive here.

    Args:
        output: the tensor; None once it was used.
        addend: makes what is added.
    """

    def __init__(self, output: Tensor, addend: Callable[[], Tensor]) -> None:
        super().__init__()
        self.output: Tensor | None = output
        self.addend = addend

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        looks = getattr(func, "__name__", "") == "__get__" or func in _LOOKS
        if self.output is None or looks or not any(map(self._is_it, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if func in _VIEWS:
            # Hooks on the gradient of a module's output make an alias of it.
            alias = func(*args, **kwargs)
            if self._is_it(alias):
                return alias
        added = self.addend()
        if func in _DROPOUTS:
            result = func(*args, **kwargs)
            self.output = None
            return result + added
        args, kwargs = tree_map(lambda leaf: leaf + added if self._is_it(leaf) else leaf, (args, kwargs))
        self.output = None
        return func(*args, **kwargs)

    def _is_it(self, value: Any) -> bool:
        output = self.output
        if value is output:
            return True
        if not isinstance(value, Tensor) or output is None or value.shape != output.shape:
            return False
        return value.untyped_storage()._cdata == output.untyped_storage()._cdata


_DROPOUTS = (nn.functional.dropout, torch.dropout, torch.native_dropout)
_VIEWS = (Tensor.view_as, Tensor.view, Tensor.contiguous)
_LOOKS = (Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.register_hook)


@contextmanager
def behind(module: nn.Module, adapter: Bottleneck | None) -> Iterator[None]:
    """For the duration of a call, adds adapter(output) to the output of `module`; other threads do not notice."""
    if adapter is None:
        yield
        return
    thread = threading.get_ident()

    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != thread:
            return output
        first = _first(output)
        return _with_first(output, first + adapter(first))

    handle = module.register_forward_hook(of_one_call(add))
    try:
        yield
    finally:
        handle.remove()


def _first(output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, torch.Tensor)
    return first


def _with_first(output: Any, first: Tensor) -> Any:
    return (first, *output[1:]) if isinstance(output, tuple) else first
