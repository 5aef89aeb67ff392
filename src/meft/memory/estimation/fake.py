"""Steps on tensors without values: a model of any size from its configuration alone, and what its step would allocate.

`FakeTensorMode` runs every operation on shapes and dtypes only. `record_fake` notes the storage of every tensor that
an operation returns and when it dies, as the profiler does for a real step (`measurement.timeline`). What a kernel
allocates inside itself and frees before it returns is not seen, but for attention's.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..measurement.marks import marks_go_to, on_host
from ..measurement.timeline import Timeline, build_timeline


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Puts fake tensors of `mode` on the CPU in the place of a model's parameters and buffers, in place.

    A model is built on the meta device and converted, since building it on fake tensors fails: `Module.to` cannot swap
    those. Parameters that several modules share stay shared.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in made:
            new: Tensor = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new, tensor  # the old one with it, so that its id is not given to another
        return made[id(tensor)][0]

    for module in model.modules():
        registries: tuple[Any, ...] = (module._parameters, module._buffers)
        for registry in registries:
            for name, tensor in registry.items():
                registry[name] = fake(tensor)


def record_fake(
    step: Callable[[], Any],
    known: Iterable[Tensor | None],
    rounding: int = 1,
    *,
    cpu_kernels: bool = True,
    numbers: bool = False,
) -> Timeline:
    """Runs `step()`, within the mode of its fake tensors, and returns what it would allocate.

    Args:
        step: Runs on fake tensors, or on tensors of the meta device.
        known: Tensors that are older than the step.
        rounding: Every block takes a multiple of this many bytes.
        cpu_kernels: Whether the kernels are those of the CPU, which convert operands of mixed dtypes beforehand.
        numbers: Whether the step may read a value, and gets 1: an optimizer's memory does not depend on it.
    """
    recorder = _Recorder(known, rounding, cpu_kernels, numbers)
    with marks_go_to(recorder.note), recorder:
        step()
    recorder.flush()
    return build_timeline(recorder.events)


class _Recorder(TorchDispatchMode):
    """Notes the storage of every tensor that an operation makes, and when it dies."""

    def __init__(self, known: Iterable[Tensor | None], rounding: int, cpu_kernels: bool, numbers: bool) -> None:
        super().__init__()
        self.events: list[tuple[int, int] | str] = []
        self.rounding, self.cpu_kernels, self.numbers = rounding, cpu_kernels, numbers
        self._live: dict[int, weakref.ref[Any]] = {}
        self._postponed: list[tuple[int, int]] = []
        for tensor in known:
            if tensor is not None:
                self._watch(tensor, older=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.numbers and func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        if func is torch.ops.aten.rand.default and not args[0]:
            # Layer drop draws a number for each layer and looks at it: above any probability, so none is dropped.
            return torch.tensor(1.0)
        output = func(*args, **(kwargs or {}))
        if self.cpu_kernels and func in _PROMOTING:
            self._convert(output, args)
        sums_up = func is torch.ops.aten.add.Tensor and _adds_up_gradients(args)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._watch(tensor, postponed=sums_up)
        if self.cpu_kernels and func in _FLASH:
            workspace = _FLASH[func](args)
            self.note((_WORKSPACE, workspace))
            self.note((_WORKSPACE, -workspace))
        return output

    def note(self, event: tuple[int, int] | str) -> None:
        """Adds an event, after those that were put off."""
        self.flush()
        self.events.append(event)

    def flush(self) -> None:
        """Adds the events that were put off."""
        self.events += self._postponed
        self._postponed.clear()

    def _watch(self, tensor: Tensor, *, older: bool = False, postponed: bool = False) -> None:
        storage = tensor.untyped_storage()
        if storage.device.type != "meta":  # a number that an optimizer keeps on the host
            return
        key, size = storage._cdata, -(-storage.nbytes() // self.rounding) * self.rounding
        if key in self._live:
            return
        if postponed:
            # Autograd adds gradients up in place where nobody else holds one of them, but never while a dispatch mode
            # is active, as here. So the sum is counted when the next tensor comes: by then that one is released.
            self.flush()
            self._postponed.append((key, size))
        elif not older:
            self.note((key, size))

        def died(_: Any) -> None:
            del self._live[key]
            if (key, size) in self._postponed:
                self._postponed.remove((key, size))
            elif not older:
                self.events.append((key, -size))

        # PyTorch keeps the Python object of a storage for as long as the storage lives.
        self._live[key] = weakref.ref(storage, died)

    def _convert(self, output: Tensor, operands: Iterable[Any]) -> None:
        """Kernels of the CPU first convert operands of another dtype than the result's, and keep them until the end."""
        copies = [
            (-1 - place, operand.numel() * output.element_size())
            for place, operand in enumerate(operands)
            if isinstance(operand, Tensor) and operand.dim() and operand.dtype != output.dtype
        ]
        if output.untyped_storage()._cdata not in self._live:
            copies.append((0, output.untyped_storage().nbytes()))
        if len(copies) > 1 or (copies and copies[0][0]):
            for key, size in copies:
                self.note((key, size))
            for key, size in copies:
                self.note((key, -size))


_PROMOTING = frozenset(
    getattr(torch.ops.aten, name).Tensor for name in ("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_")
)


def _flash_forward(args: tuple[Any, ...]) -> int:
    query, key = args[:2]
    rows, columns, size = _flash_block(query, key)
    reduced = query.element_size() if size > query.element_size() else 0
    return torch.get_num_threads() * (
        (rows * columns + 2 * rows + rows * query.shape[3]) * size + rows * columns * reduced
    )


def _flash_backward(args: tuple[Any, ...]) -> int:
    _, query, key = args[:3]
    rows, columns, size = _flash_block(query, key)
    reduced = query.element_size() if size > query.element_size() else 0
    return torch.get_num_threads() * 2 * rows * columns * (size + reduced) + rows * size


def _flash_block(query: Tensor, key: Tensor) -> tuple[int, int, int]:
    """Rows and columns of the block of scores that a thread has at once, and the bytes of a score.

    Source: `flash_attention_kernel_impl` and `flash_attention_backward_kernel_impl` in PyTorch's
    aten/src/ATen/native/cpu/FlashAttentionKernel.cpp.
    """
    length = query.shape[2]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(rows, length), min(512, key.shape[2]), max(4, query.element_size())


_WORKSPACE = -100
"""The place of a kernel's workspace."""
_FLASH: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_backward,
}
"""Attention on the CPU takes blocks of its scores, of which every thread has one."""


# What PyTorch wraps a mode's handler in.
_WRAPPERS = ("torch._compile", "torch._dynamo", "torch.utils._python_dispatch")


def _adds_up_gradients(operands: tuple[Any, Any]) -> bool:
    """Whether an addition is autograd's own, of gradients one of which it could overwrite: views hold their base."""
    if torch._C._current_graph_task_id() == -1 or all(operand._is_view() for operand in operands):
        return False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_WRAPPERS):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


@contextmanager
def offloaded() -> Iterator[None]:
    """Keeps what is saved for the backward pass on the host, as `torch.autograd.graph.save_on_cpu` does for a GPU.

    On the CPU, where that context copies nothing back, this one copies both ways, and marks the copies on the host.
    """

    def pack(tensor: Tensor) -> Tensor:
        with on_host():
            return tensor.detach().clone()

    def unpack(tensor: Tensor) -> Tensor:
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
