"""Measured memory of one training step: the peak, what is left afterwards, and what of it are gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from meft.errors import ConfigError
from meft.storage.results import format_bytes

from .causes import CAUSES, Attribution
from .cuda import Ledger, Readings
from .marks import marks_go_to, watched
from .timeline import record_cpu, surviving

# torch.cuda's caching allocator hands out multiples of this many bytes.
_CUDA_ROUNDING = 512


@dataclass(frozen=True)
class MemoryReport:
    """What `measure` found; every figure is in bytes, on `device`, above what was live before the step.

    Attributes:
        device: Where memory was measured.
        peak_bytes: The most that was live at any moment of the step.
        activation_peak_bytes: The most with new gradients of those parameters and new optimizer state (below) left out
            of the sum. Exact on the CPU; on CUDA what is being made of those at the moment of the peak is counted.
        retained_bytes: What is still live after the step, its result included.
        gradient_bytes: What of it are gradients of the parameters that were given to `measure` (0 if none were).
        optimizer_bytes: What of it is state of the optimizer that was given to `measure` (0 if none was).
        causes: `peak_bytes` by cause, which `meft.memory.measurement.causes.CAUSES` lists and explains.
        activation_causes: The same of `activation_peak_bytes`.
        host_peak_bytes: The most that lay on the host at once for the step (residues="host"), beside all that is
            counted above. None on CUDA, where memory of the host is not recorded.
        result: What the step returned.

    Printed with rich, it is a table by cause.
    """

    device: torch.device
    peak_bytes: int
    activation_peak_bytes: int
    retained_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    causes: dict[str, int]
    activation_causes: dict[str, int]
    host_peak_bytes: int | None = None
    result: Any = field(repr=False, default=None)

    def __rich__(self) -> Table:
        table = Table(title="Peak memory of a step", title_justify="left")
        table.add_column("at the peak of")
        table.add_column("everything", justify="right")
        table.add_column("activations", justify="right")
        for cause in CAUSES:
            sizes = self.causes[cause], self.activation_causes[cause]
            if any(sizes):
                table.add_row(cause, *(format_bytes(size) if size else "" for size in sizes))
        table.add_section()
        table.add_row("sum", format_bytes(self.peak_bytes), format_bytes(self.activation_peak_bytes))
        if self.host_peak_bytes:
            table.add_row("on the host besides", format_bytes(self.host_peak_bytes), format_bytes(self.host_peak_bytes))
        return table


def measure(
    step: Callable[[], Any],
    *,
    device: torch.device | str | None = None,
    model: torch.nn.Module | None = None,
    parameters: Iterable[torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> MemoryReport:
    """Runs one training step and reports the peak of its memory.

    Example:
        >>> model.zero_grad()
        >>> report = measure(lambda: model(**batch).loss.backward(), model=model)
        >>> report.activation_peak_bytes
        1843204

    The peak is put down to causes. The layers of `model` are told apart by hooks on them, so without it only gradients
    and optimizer state have a cause; the gradients need `model` or `parameters`, the optimizer `optimizer`.

    On the CPU the figures are sums of exact allocation sizes and the same in every run: they count the memory that
    PyTorch allocates during the step. A release of memory older than the step is not credited, so clear gradients
    before the step, not in it (PyTorch itself notes such a release on standard error). On CUDA they are differences
    of `torch.cuda.memory_allocated`, in the allocator's rounded blocks, with older memory credited; the device's peak
    statistics are reset.

    Python's cyclic garbage collector rests during the step, so reference cycles that hold tensors show up in
    `retained_bytes`, always equally.

    Args:
        step: Called once without arguments; runs forward and backward, and may run the optimizer.
        device: "cpu" or a CUDA device. None takes the device of the first parameter given, else the current CUDA
            device if this process uses one, else the CPU.
        model: The module whose layers and gradients are to be told apart.
        parameters: The same as an iterable of parameters, instead of `model`.
        optimizer: The optimizer that `step` runs, if it does, whose new state is to be set apart.

    Returns:
        The `MemoryReport`; `peak_bytes` is the figure quoted everywhere in this project.

    Raises:
        ConfigError: `step` cannot be called, an argument is of another kind, both `model` and `parameters` are given,
            the device is neither, or a profiler is already running in this thread (a second one would end it and both
            would report nothing).
    """
    if not callable(step):
        raise ConfigError(
            f"measure() needs something it can call to run one training step, and was given a {type(step).__name__}. "
            "Pass a function without arguments, for example: lambda: model(**batch).loss.backward()"
        )
    if model is not None and parameters is not None:
        raise ConfigError(
            "measure() was given both model= and parameters=, and either says whose gradients to set apart. "
            "Pass model= for all of a model's parameters, or parameters= for a choice of them."
        )
    given: tuple[tuple[str, Any, type], ...] = (
        ("model", model, torch.nn.Module),
        ("optimizer", optimizer, torch.optim.Optimizer),
    )
    for name, value, kind in given:
        if value is not None and not isinstance(value, kind):
            raise ConfigError(
                f"measure() was given a {type(value).__name__} as {name}. Valid is a "
                f"{kind.__module__}.{kind.__name__}, or None."
            )
    if torch.autograd._profiler_enabled():
        raise ConfigError(
            "measure() was called while a PyTorch profiler is running in this thread (another measure() counts), and "
            "only one can. Call it outside of the profiled code."
        )
    weights = list(model.parameters() if model is not None else parameters or ())
    where = _device(device, weights)
    with _no_garbage_collection():
        run = _measure_cpu if where.type == "cpu" else _measure_cuda
        return run(step, where, model, weights, optimizer)


def _measure_cpu(
    step: Callable[[], Any],
    device: torch.device,
    model: torch.nn.Module | None,
    weights: list[torch.Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> MemoryReport:
    with watched(model, weights, optimizer):
        result, timeline = record_cpu(step)
    sizes = {block.address: block.size for block in surviving(timeline.blocks)}
    gradients = _storages(_gradients(weights), device) & sizes.keys()
    state = _storages(_state(optimizer), device) & sizes.keys() - gradients
    found = Attribution(timeline, gradients, state)
    causes, activation_causes = found.peak(), found.activations()
    return MemoryReport(
        device=device,
        peak_bytes=sum(causes.values()),
        activation_peak_bytes=sum(activation_causes.values()),
        causes=causes,
        activation_causes=activation_causes,
        host_peak_bytes=found.host_peak(),
        retained_bytes=sum(sizes.values()),
        gradient_bytes=sum(sizes[address] for address in gradients),
        optimizer_bytes=sum(sizes[address] for address in state),
        result=result,
    )


def _measure_cuda(
    step: Callable[[], Any],
    device: torch.device,
    model: torch.nn.Module | None,
    weights: list[torch.Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> MemoryReport:
    def kept_apart() -> tuple[int, int]:
        return _cuda_bytes(_gradients(weights), device), _cuda_bytes(_state(optimizer), device)

    torch.cuda.synchronize(device)
    gradients_before, state_before = kept_apart()
    older = _storages(_gradients(weights), device)
    before = torch.cuda.memory_allocated(device)
    readings = Readings(device)
    with watched(model, weights, optimizer), marks_go_to(readings):
        result = step()
    torch.cuda.synchronize(device)
    readings("")
    gradients_after, state_after = kept_apart()
    ledger = Ledger(readings.taken, older)
    return MemoryReport(
        device=device,
        peak_bytes=sum(ledger.peak.values()),
        activation_peak_bytes=sum(ledger.activations.values()),
        retained_bytes=torch.cuda.memory_allocated(device) - before,
        gradient_bytes=gradients_after - gradients_before,
        optimizer_bytes=state_after - state_before,
        causes=ledger.peak,
        activation_causes=ledger.activations,
        result=result,
    )


def _device(device: torch.device | str | None, weights: list[torch.Tensor]) -> torch.device:
    if device is not None:
        where = torch.device(device)
    elif weights:
        where = weights[0].device
    else:
        where = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    if where.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"measure() cannot measure memory on device {str(where)!r}; it can on 'cpu' and on CUDA devices. "
            "Move the model to one of these."
        )
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    return where


def _gradients(weights: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [weight.grad for weight in weights if weight.grad is not None]


def _state(optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    states = optimizer.state.values() if optimizer is not None else ()
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


def _storages(tensors: Iterable[torch.Tensor], device: torch.device) -> set[int]:
    """The addresses of the memory behind `tensors`, as far as it lies on `device`; views share one."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.device == device}


def _cuda_bytes(tensors: Iterable[torch.Tensor], device: torch.device) -> int:
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors if t.device == device)}
    return sum(-(-size // _CUDA_ROUNDING) * _CUDA_ROUNDING for size in storages.values())


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
