"""Whether the layers of a model return the same bits twice on this machine: each alone, so that no step need fit.

A reversible layer is run again in the backward pass, and what it returns then must be what it returned before, to the
last bit. A kernel that adds up in an order of its own (atomics) does not do that.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from meft.backbone.discovery import find_stacks
from meft.engine.kernels.choice import why_not
from meft.engine.kernels.proof import same_bits
from meft.engine.replay import RngState
from meft.storage.results import versions


@dataclass(frozen=True)
class LayerFinding:
    """What came of running one layer twice.

    Attributes:
        name: of the layer in the model.
        forward: whether its output has the same bits, without gradients and with.
        backward: whether the gradient of its input has.
        module: the innermost module whose output differs, or None.
        advice: what to set.
    """

    name: str
    forward: bool
    backward: bool
    module: str | None = None
    advice: str = ""

    def __str__(self) -> str:
        if self.forward and self.backward:
            return f"{self.name}: the same bits"
        what = "output" if not self.forward else "gradient"
        where = f" in {self.module}" if self.module else ""
        return f"{self.name}: its {what} has other bits the second time{where}. {self.advice}"


@dataclass
class Diagnosis:
    """What `examine` found; `str()` is a page of text."""

    device: str
    kernels: str
    layers: list[LayerFinding] = field(default_factory=list)

    def passed(self) -> bool:
        """Whether every layer's output has the same bits twice, which is what reversible layers need."""
        return bool(self.layers) and all(found.forward for found in self.layers)

    def __str__(self) -> str:
        known = ", ".join(f"{name} {version}" for name, version in versions().items())
        flags = torch.backends
        backends = (
            f"flash {flags.cuda.flash_sdp_enabled()}, memory-efficient {flags.cuda.mem_efficient_sdp_enabled()}, "
            f"cuDNN {flags.cuda.cudnn_sdp_enabled()}, math {flags.cuda.math_sdp_enabled()}; deterministic algorithms "
            f"{torch.are_deterministic_algorithms_enabled()}, cuDNN benchmark {flags.cudnn.benchmark}"
        )
        bad = [str(found) for found in self.layers if not (found.forward and found.backward)]
        same = len(self.layers) - len(bad)
        return "\n".join(
            [
                f"Versions: {known}",
                f"Device: {self.device}",
                f"Attention backends: {backends}",
                f"Coupling: {self.kernels}",
                "A step waits for the device once for each stack, at the end of its backward pass.",
                f"{same} of {len(self.layers)} layers return the same bits twice, forward and under autograd.",
                *bad,
            ]
        )


def examine(model: nn.Module, batch: Mapping[str, Any]) -> Diagnosis:
    """Runs a model forward once, and on the way every layer of its stacks four times alone: twice in each grad mode.

    Example:
        >>> print(examine(model, random_batch(model, "CAUSAL_LM", batch_size=2, seq_length=64, seed=0)))

    Args:
        model: a plain one, in the mode in which it is to train; dropout draws the same numbers in every run.
        batch: what it is called with, on its device.

    Raises:
        UnsupportedModelError: it has no stack of layers.
    """
    first = next(model.parameters())
    missing = why_not(first.device, first.dtype)
    if missing is None and first.device.type == "cpu":
        missing = "on a processor they run where they are asked for"
    diagnosis = Diagnosis(str(first.device), "fused kernels" if missing is None else f"tensor code ({missing})")
    busy = [False]
    handles = []
    for stack in find_stacks(model):
        for index, layer in enumerate(stack.layers):
            name = f"{stack.name}.{index}"

            def look(layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], name: str = name) -> None:
                if not busy[0]:
                    busy[0] = True
                    try:
                        diagnosis.layers.append(_twice(layer, args, keywords, name))
                    finally:
                        busy[0] = False

            handles.append(layer.register_forward_pre_hook(look, with_kwargs=True))
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return diagnosis


def _twice(layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], name: str) -> LayerFinding:
    state = RngState.take(_hidden(args, keywords).device)
    outputs: list[Tensor] = []
    gradients: list[Tensor | None] = []
    seen: list[list[tuple[str, Tensor]]] = []
    try:
        for grad in (False, False, True, True):
            state.put()
            leaf = _hidden(args, keywords).detach().clone().requires_grad_(grad)
            found: list[tuple[str, Tensor]] = []
            with torch.set_grad_enabled(grad), _noted(layer, found):
                output = _first(layer(*_with(args, leaf), **_with_keywords(args, keywords, leaf)))
            if grad:
                (gradient,) = torch.autograd.grad(output, leaf, torch.ones_like(output), allow_unused=True)
                gradients.append(gradient)
            outputs.append(output.detach())
            seen.append(found)
    finally:
        state.put()
    forward = all(same_bits(outputs[at], outputs[at + 1]) for at in (0, 2))
    backward = same_bits(*gradients)
    module = None
    for at in (0, 2):
        pairs = zip(seen[at], seen[at + 1], strict=False)
        module = module or next((path for (path, one), (_, other) in pairs if not same_bits(one, other)), None)
    return LayerFinding(name, forward, backward, module, "" if forward and backward else _advice(layer, module))


@contextmanager
def _noted(layer: nn.Module, found: list[tuple[str, Tensor]]) -> Any:
    """Keeps the outputs of all modules of a layer, inner ones first, as they come."""

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = _first(output)
            if tensor is not None:
                found.append((path, tensor.detach().clone()))

        return hook

    handles = [module.register_forward_hook(note(path)) for path, module in layer.named_modules() if path]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _advice(layer: nn.Module, module: str | None) -> str:
    inside = layer.get_submodule(module) if module else layer
    words = type(inside).__name__.lower()
    if "expert" in words or "moe" in words:
        return 'Call model.set_experts_implementation("grouped_mm") or ("batched_mm"), which add up in a fixed order.'
    if "attention" in words:
        return 'Call model.set_attn_implementation("eager"), or torch.use_deterministic_algorithms(True).'
    return (
        "Call torch.use_deterministic_algorithms(True); if the module draws random numbers elsewhere than from "
        'PyTorch, switch that off, or train with anchor_every=1 or backward="cached".'
    )


def _hidden(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    return args[0] if args else keywords["hidden_states"]


def _with(args: tuple[Any, ...], leaf: Tensor) -> tuple[Any, ...]:
    return (leaf, *args[1:]) if args else ()


def _with_keywords(args: tuple[Any, ...], keywords: Mapping[str, Any], leaf: Tensor) -> dict[str, Any]:
    return dict(keywords) if args else {**keywords, "hidden_states": leaf}


def _first(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    return next((_first(each) for each in output if each is not None), None) if isinstance(output, tuple) else None
