"""Capture and replay of everything around one call that decides which bits it returns.

A recomputation gives the original bits only if it runs the identical program: the same random numbers, autocast
state, attention kernels and training flags. `Snapshot.take` records them, `Snapshot.replayed` puts them in place and
leaves the surrounding state as it found it. Nothing is kept on modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .switches import compared_since, read_compared, read_switches, switched_to


def on_fake_tensors() -> bool:
    """Whether tensors are without values at present (`FakeTensorMode`), so that none can be looked at."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


@dataclass(frozen=True)
class RngState:
    """States of the CPU generator and of one accelerator's generator (None on a CPU-only call)."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None

    @classmethod
    def take(cls, device: torch.device) -> RngState:
        on_cpu = device.type in ("cpu", "meta")
        accelerator = None if on_cpu else torch.get_device_module(device).get_rng_state(device)
        return cls(device, torch.get_rng_state(), accelerator)

    def put(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    def fingerprint(self) -> int | None:
        """A number by which two states can be told apart; None where tensors have no values."""
        if on_fake_tensors():
            return None
        states = (self.cpu,) if self.accelerator is None else (self.cpu, self.accelerator)
        return hash(tuple(state.numpy().tobytes() for state in states))

    def same_as(self, other: RngState) -> bool:
        if on_fake_tensors():
            return True
        if not torch.equal(self.cpu, other.cpu):
            return False
        if self.accelerator is None or other.accelerator is None:
            return self.accelerator is other.accelerator
        return torch.equal(self.accelerator, other.accelerator)


@dataclass(frozen=True)
class Autocast:
    """The autocast state of one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool

    @classmethod
    def take(cls, device: torch.device) -> tuple[Autocast, ...]:
        types = dict.fromkeys((device.type, "cpu"))
        return tuple(
            cls(
                name,
                torch.is_autocast_enabled(name),
                torch.get_autocast_dtype(name),
                torch.is_autocast_cache_enabled(),
            )
            for name in types
            if torch.amp.is_autocast_available(name)
        )

    def context(self) -> torch.amp.autocast:
        return torch.amp.autocast(
            self.device_type, enabled=self.enabled, dtype=self.dtype, cache_enabled=self.cache_enabled
        )


@dataclass(frozen=True)
class Snapshot:
    """What one call must find again: autocast, what chooses kernels, training flags, and random numbers if it drew any.

    `hooks` are those of modules that have any: PEFT and users put some on for the duration of a forward pass.
    `after` tells the generators' states when the call was done, if it drew any.
    `buffers` are those that the call updates (running statistics of a batch norm): a second call must not do it again.
    `programs` are the compiled ones that it ran.
    `compared` is what decides about bits and cannot be put back.
    """

    rng: RngState | None
    autocast: tuple[Autocast, ...]
    switches: tuple[Any, ...]
    modules: tuple[nn.Module, ...]
    training: tuple[bool, ...]
    buffers: tuple[tuple[nn.Module, str, int], ...] = ()
    programs: tuple[type, ...] = ()
    hooks: tuple[tuple[nn.Module, Hooks], ...] = ()
    after: int | None = None
    compared: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def take(cls, device: torch.device, modules: Iterable[nn.Module] = ()) -> Snapshot:
        """Records the present state for a call whose tensors are on `device` and which runs `modules`."""
        modules = tuple(modules)
        return cls(
            RngState.take(device),
            Autocast.take(device),
            read_switches(),
            modules,
            tuple(module.training for module in modules),
            tuple(
                (module, name, buffer._version)
                for module in modules
                for name, buffer in module._buffers.items()
                if buffer is not None and not buffer.is_inference()
            ),
            hooks=tuple((module, _hooks_of(module)) for module in modules if _has_hooks(module)),
            compared=read_compared(modules),
        )

    def changed(self) -> str:
        """Names what decides about bits, cannot be put back, and has changed; empty if nothing has."""
        return compared_since(self.compared, self.modules)

    def settled(self, programs: tuple[type, ...] = ()) -> Snapshot:
        """Keeps what the call just made turned out to need: no generator states (5 kB on a CPU) if it drew nothing."""
        rng, after = self.rng, None
        if rng is not None:
            present = RngState.take(rng.device)
            if rng.same_as(present):
                rng = None
            else:
                after = present.fingerprint()
        buffers = tuple(entry for entry in self.buffers if _updated(*entry))
        return replace(self, rng=rng, buffers=buffers, programs=programs, after=after)

    @contextmanager
    def replayed(
        self, drawn: list[RngState] | None = None, disturbed: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Puts the recorded state in place and, on leaving, the surrounding state back.

        Args:
            drawn: an empty list, the same for all parts of a call that is made again piece by piece: random numbers
                then go on where the part before left off.
            disturbed: called, after the last part, if the generators did not come to where the call had left them:
                somebody else has drawn from them during one of the two.
        """
        with ExitStack() as stack:
            for autocast in self.autocast:
                stack.enter_context(autocast.context())
            stack.enter_context(switched_to(self.switches))
            stack.enter_context(_training(self.modules, self.training))
            stack.enter_context(_spared(self.buffers))
            stack.enter_context(_hooked(self.modules, self.hooks))
            if self.rng is not None:
                stack.callback(RngState.take(self.rng.device).put)
                (drawn[-1] if drawn else self.rng).put()
            yield
            if self.rng is not None and drawn is not None:
                drawn[:] = [RngState.take(self.rng.device)]
            after = None if self.rng is None or disturbed is None else RngState.take(self.rng.device).fingerprint()
            if disturbed is not None and after is not None and after != self.after:
                disturbed()


@contextmanager
def _training(modules: Sequence[nn.Module], wanted: Sequence[bool]) -> Iterator[None]:
    """The user may have called `eval()` between the forward and the backward pass; autograd would not care."""
    changed = [(m, m.training) for m, flag in zip(modules, wanted, strict=True) if m.training != flag]
    try:
        # Not by attribute: a reversible layer hands its flag on to the layer it stands for, which has an entry here.
        for module, present in changed:
            vars(module)["training"] = not present
        yield
    finally:
        for module, present in changed:
            vars(module)["training"] = present


def _updated(module: nn.Module, name: str, version: int) -> bool:
    now = module._buffers[name]
    # The kernel of a batch norm updates its statistics unseen by version counters.
    return now is None or now._version != version or (isinstance(module, _NormBase) and module.training)


@contextmanager
def _spared(buffers: Sequence[tuple[nn.Module, str, int]]) -> Iterator[None]:
    """Lets a call update copies: in-place restoration would invalidate what its graph has saved."""
    originals = [(module, name, module._buffers[name]) for module, name, _ in buffers]
    try:
        for module, name, original in originals:
            module._buffers[name] = None if original is None else original.clone()
        yield
    finally:
        for module, name, original in originals:
            module._buffers[name] = original


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)

Hooks = tuple[dict[int, Any], ...]
"""The forward hooks of a module, in the registries of `_HOOKS`."""


def of_one_call(hook: Any) -> Any:
    """Marks a hook that is put on by a call for itself, and is none of those that a call must find again."""
    hook.of_one_call = True
    return hook


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _lasting(hooks: dict[int, Any]) -> dict[int, Any]:
    return {identity: hook for identity, hook in hooks.items() if not getattr(hook, "of_one_call", False)}


def _hooks_of(module: nn.Module) -> Hooks:
    before, flags, after, *more = (getattr(module, name).copy() for name in _HOOKS)
    return (_lasting(before), flags, _lasting(after), *more)


@contextmanager
def _hooked(modules: Sequence[nn.Module], wanted: Sequence[tuple[nn.Module, Hooks]]) -> Iterator[None]:
    """Lets modules have the forward hooks that they had, also those that were taken off or put on since.

    Hooks of one call, of another thread at present, stay where they are.
    """
    recorded = {id(module): hooks for module, hooks in wanted}
    changed = []
    for module in modules:
        hooks = recorded.get(id(module))
        if hooks is None and not _has_hooks(module):
            continue
        hooks = hooks or ({}, {}, {}, {}, {})
        present = tuple(getattr(module, name) for name in _HOOKS)
        if hooks[0] == _lasting(present[0]) and hooks[2] == _lasting(present[2]):
            continue
        changed.append((module, present))
        for name, was, now in zip(_HOOKS, hooks, present, strict=True):
            passing = {identity: hook for identity, hook in now.items() if getattr(hook, "of_one_call", False)}
            setattr(module, name, type(now)({**was, **passing}))
    try:
        yield
    finally:
        for module, present in changed:
            for name, value in zip(_HOOKS, present, strict=True):
                setattr(module, name, value)


@contextmanager
def requiring_grad(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Makes the leaves differentiable again that were so in the forward pass; adapters may have been switched since."""
    changed = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in changed:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(False)


@contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Takes the hooks of leaves off: they are for the gradient that the node returns, not for its parts."""
    hooked: list[tuple[Any, Any]] = [(parameter, parameter._backward_hooks) for parameter in parameters]
    hooked = [(parameter, hooks) for parameter, hooks in hooked if hooks]
    try:
        for parameter, _ in hooked:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks


def private_graph() -> AbstractContextManager[Any]:
    """Keeps the graph built within from saved-tensor hooks around it (offloading, checkpointing).

    The graph of one block lives for one call inside a node; what hooks do to tensors that are saved for the backward
    pass would be done to tensors that are not.
    """
    # Pushing hooks of our own is the only way to shadow others, and costs a call a saved tensor: do so if need be. They
    # detach, since a graph that saves its own output undetached would keep itself alive.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None and top(True) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor
