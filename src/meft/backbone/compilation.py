"""Compiled blocks: `torch.compile` of what a reversible layer runs twice, such that both runs are one program.

A compiler keeps several programs of one function and picks one that fits the arguments. With its own choice of dynamic
shapes it makes a first program for the shapes it sees first, and when others come a more general one, which fits the
first shapes too: a pass that began with the one program would be rebuilt by the other, whose kernels may round
otherwise. Here the choice follows from the arguments alone: shapes that were seen first have their own program, all
others share one that was made for any shape. Programs made for one kind of shapes exclude each other by their guards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from meft.errors import ConfigError, UnsupportedModelError

Block = Callable[..., Any]
"""(layer, hidden state, *args, **kwargs) -> what the layer returns: a block of `architectures`, or a whole layer."""


def whole(layer: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A layer as a block. `forward`, not the call: the layer's hooks are shown something else, once."""
    return layer.forward(hidden, *args, **kwargs)


def run(block: Block, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs a block as it is; what is compiled otherwise."""
    return block(layer, hidden, *args, **kwargs)


class Compiler:
    """Runs blocks compiled, with one set of options; to be shared by layers, which then share programs.

    Example:
        >>> compiler = Compiler({"backend": "inductor"})
        >>> compiler(whole, layer, hidden, (), {"attention_mask": mask})

    Args:
        options: those of `torch.compile`.

    Raises:
        ConfigError: the options ask for CUDA graphs.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        _refuse_graphs(options)
        self.options = dict(options)
        self._programs: dict[Block, _Programs] = {}

    def __call__(
        self, block: Block, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        programs = self._programs.get(block)
        if programs is None:
            programs = self._programs[block] = _Programs(self.options)
        return programs.fitting(hidden, args, kwargs)(block, layer, hidden, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Programs are neither copied nor pickled.
        return type(self), (self.options,)


@dataclass
class _Programs:
    """The programs of one block, by the kind of shapes that they are made for.

    Attributes:
        options: those of `torch.compile`.
        first: the shapes of the first call.
    """

    options: Mapping[str, Any]
    first: tuple[Any, ...] | None = None
    made: dict[bool, Callable[..., Any]] = field(default_factory=dict)

    def fitting(self, *arguments: Any) -> Callable[..., Any]:
        """The program for these arguments; the same for the same shapes, whatever was called in between."""
        dynamic = self.options.get("dynamic")
        if dynamic is None:
            leaves = tree_leaves(arguments)
            shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor))
            self.first = shapes if self.first is None else self.first
            dynamic = shapes != self.first
        if dynamic not in self.made:
            self.made[dynamic] = torch.compile(_with_own_code(run), **{**self.options, "dynamic": dynamic})
        return self.made[dynamic]


def _with_own_code(function: Any) -> Any:
    """A copy that shares no code: programs are kept and counted (8 at most) by code, across all that share it."""
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or the module itself."""
    return module._modules.get("_orig_mod") or module


def is_compiled(module: nn.Module) -> bool:
    """Tells whether `torch.compile` wrapped a module, or compiled it in place."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def options_of(module: nn.Module, name: str) -> dict[str, Any] | None:
    """The options with which a module was compiled, or None if it was not.

    Raises:
        UnsupportedModelError: it was compiled in a way that does not tell.
    """
    if not is_compiled(module):
        return None
    compiled: Any = module._compiled_call_impl
    context = getattr(module, "dynamo_ctx", None)
    if context is None and hasattr(compiled, "__closure__"):
        # `Module.compile` keeps the compiled call alone, a closure over what compiled it.
        inside = dict(zip(compiled.__code__.co_freevars, compiled.__closure__ or (), strict=True))
        context = inside["self"].cell_contents if "self" in inside else None
    backend = getattr(context, "callback", None)
    if backend is None:
        raise UnsupportedModelError(
            f"{name} was compiled in a way that does not tell its options. Make the model reversible first, and "
            "compile its layers then (layer.compile())."
        )
    return {
        "backend": _innermost(backend),
        "fullgraph": bool(getattr(context, "fullgraph", False)),
        "dynamic": getattr(context, "_dynamic", None),
    }


@torch.compiler.assume_constant_result
def options_around() -> int | None:
    """While a compiler traces the caller: where `surrounding` finds the options it was called with."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        backend = _innermost(InstructionTranslator.current_tx().output.compiler_fn)
    except (ImportError, AttributeError):  # not in every version
        return None
    if backend not in _AROUND:
        _AROUND.append(backend)
    return _AROUND.index(backend)


_AROUND: list[Any] = []


def surrounding(place: int | None) -> dict[str, Any] | None:
    """The options of the `torch.compile` that traced a call of `options_around`."""
    if place is None:
        return None
    backend = _AROUND[place]
    return {"backend": backend, "dynamic": getattr(backend, "dynamic", None)}


def _innermost(backend: Any) -> Any:
    """What was passed to `torch.compile`, or made of its mode and options, without the compiler's own wrappers."""
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend


def _refuse_graphs(options: Mapping[str, Any]) -> None:
    given = {**(options.get("options") or {}), **getattr(options.get("backend"), "config", {})}
    if options.get("mode") in ("reduce-overhead", "max-autotune") or given.get("triton.cudagraphs"):
        raise ConfigError(
            f"mode={options.get('mode')!r} compiles with CUDA graphs, which keep the memory of a layer's activations "
            'for themselves, so that reversible layers would save none. Valid: mode="default" or '
            '"max-autotune-no-cudagraphs". Choose one of these.'
        )
