"""`ReversibleStack`: what the wrappers of one stack share, and the forward passes that run through it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from meft.engine.checks import leads_to
from meft.engine.engine import Tape, finish, splice
from meft.errors import ConfigError, MeftWarning, UnsupportedModelError
from meft.loss import refresh

from .adapters import Bottleneck
from .checkpointing import inside, is_wrapped, warn_dropped
from .compilation import Compiler
from .plan import Plan

logger = logging.get_logger(__name__)

Container = nn.ModuleList | nn.Sequential
"""What holds the layers of a stack."""


@dataclass
class ReversibleStack:
    """One stack of layers under one plan, and the forward passes running through it.

    Attributes:
        plan: how the stack is run.
        name: the stack's name in the model, for messages.
        model: the model's class, for messages.
        order: index of the layer that each call of a forward pass runs; ALBERT runs one layer many times.
        layers: the list in the model that holds the layers or their wrappers.
        sure: whether the list is known to be a stack; one on trial whose first forward pass fails is left out.
        left_out: why its layers run as they are, if they do.
        plain: indices of the layers that run as they are because they change the hidden state's shape.
        changes: what conversion changed besides the layers, as (object, attribute, value before).
        hooks: handles of the hooks that conversion put on the model.
        compilers: those that layers are compiled with, one for each set of options.
        heads: models whose output embedding takes its loss in tiles, also one that is put in later.
    """

    plan: Plan
    name: str
    model: str
    order: tuple[int, ...]
    layers: Container = field(repr=False, compare=False)
    sure: bool = True
    changes: list[tuple[Any, str, Any]] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    compilers: list[Compiler] = field(default_factory=list, repr=False, compare=False)
    heads: list[Any] = field(default_factory=list, repr=False, compare=False)
    left_out: str | None = None
    plain: set[int] = field(default_factory=set)
    _running: dict[int, Tape] = field(default_factory=dict, repr=False)
    # By thread: how many calls of the running forward pass lie below its present run of layers.
    _below: dict[int, int] = field(default_factory=dict, repr=False)
    _run: set[int] = field(default_factory=set, repr=False)
    _spliced: set[int] = field(default_factory=set, repr=False)
    _vetted: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)
    _said: set[str] = field(default_factory=set, repr=False)

    @property
    def depth(self) -> int:
        """Number of calls of a layer in one forward pass."""
        return len(self.order)

    def layer_name(self, index: int) -> str:
        return f"{self.name}.{index} of {self.model}"

    def frozen(self, index: int) -> bool:
        return index < self.plan.frozen_layers

    def reversible(self, position: int) -> bool:
        """Whether the call at this position of a forward pass, from 0, is to be rebuilt."""
        return self.plan.reversible and position < self.depth - self.plan.cached_layers

    def upcoming(self, index: int) -> int:
        """The position that a call of the layer at `index` is about to take in the forward pass of this thread."""
        first = self.plan.frozen_layers
        tape = self._running.get(threading.get_ident())
        position = first if tape is None else first + tape.position
        if index < first or position >= self.depth or self.order[position] != index:
            return self.order.index(index)
        return position

    def unread(self, index: int) -> set[str]:
        """Functions of the layer at `index` that add to nothing but a stream which the output rule leaves out."""
        coupling = self.plan.coupling
        highest = index == self.order[-1] and self.order.count(index) == 1
        return coupling.unread() if coupling is not None and highest else set()

    def as_deployed(self) -> bool:
        """Whether the layers are to run as the plain model's: random signs are drawn in training only."""
        coupling = self.plan.coupling
        return coupling is not None and coupling.random and not self.in_training()

    def in_training(self) -> bool:
        """Whether the stack is: any of its layers that are not frozen."""
        return any(layer.training for layer in islice(self.layers, self.plan.frozen_layers, None))

    def compiler(self, options: dict[str, Any]) -> Compiler:
        """The one compiler of all layers that are compiled with these options, for them to share programs."""
        for compiler in self.compilers:
            if compiler.options == options:
                return compiler
        self.compilers.append(Compiler(options))
        return self.compilers[-1]

    def vet(self, index: int, modules: Iterable[nn.Module]) -> bool:
        """Tells once for every layer, and again when hooks on its modules came or went, that it is to be looked at."""
        hooks = tuple(key for m in modules for kind in (m._forward_pre_hooks, m._forward_hooks) for key in kind)
        if self._vetted.get(index) == hooks:
            return False
        self._vetted[index] = hooks
        return True

    @property
    def on_trial(self) -> bool:
        """Whether no forward pass has shown yet that the list is a stack."""
        return not self.sure and len(self._run) < len(self.layers)

    def leave_out(self, reason: str) -> None:
        """Lets the layers of a list on trial run as they are from now on."""
        self.left_out = reason
        self._close()
        logger.warning_once(
            f"{self.name} of {self.model} is no stack of layers, and its layers run as they are: {reason}"
        )

    def position(self) -> int:
        """The place in the running forward pass of the call that is due."""
        tape = self._running.get(threading.get_ident())
        done = 0 if tape is None else tape.position
        return self.plan.frozen_layers + self._below.get(threading.get_ident(), 0) + done

    def tape(self, index: int, hidden: Tensor) -> Tape:
        """Starts a forward pass at the lowest coupled layer, and finds the running one at the others.

        Where the model changed the hidden state since the layer before, what it made becomes the newest stream; where
        it has another shape or dtype, the streams begin anew.

        Raises:
            UnsupportedModelError: the hidden state does not come from what the layer before returned, or is no float
                tensor.
        """
        tape = self._due(index)
        first = self.plan.frozen_layers
        if tape is None:
            return self._start(hidden)
        if tape.passed_on(hidden) and _followed(tape, hidden):
            return tape
        if index == self.order[first] and len(self.layers) - first < self.depth - first:
            # A layer that runs many times, after a forward pass that was interrupted.
            return self._start(hidden)
        if hidden.shape != tape.shape or hidden.dtype != tape.dtype:
            self._refuse_unread(f"given a hidden state of shape {tuple(hidden.shape)}", index)
            return self._start(hidden, below=self.position() - first)
        if not self._comes_from(tape, index, hidden):
            raise UnsupportedModelError(
                f"{self.model} calls {self.name}.{index} with a tensor that does not come from what "
                f"{self.name}.{index - 1} returned (another one of shape {tuple(hidden.shape)}, or the same detached "
                "from its graph), so they are not layers of one stack. Remove the hook or code between these layers, "
                f"freeze the layers below with frozen_layers={index}, or leave this stack out with stacks=[...]."
            )
        splice(tape, hidden)
        return tape

    def show_again(self, hidden: Tensor) -> None:
        """Takes back that a layer was given the hidden state; its call failed."""
        tape = self._running.get(threading.get_ident())
        if tape is not None:
            tape.show(hidden)

    def leave(self, index: int, hidden: Tensor) -> Tensor:
        """Ends the run of layers below one that is not coupled.

        Returns:
            The hidden state for that layer, by the output rule if it comes straight from the layers below.
        """
        tape, first, position = self._due(index), self.plan.frozen_layers, self.position()
        if tape is not None and tape.position == 0:
            self.end()  # begun by this very layer
            self._below[threading.get_ident()] = position - first
        elif tape is not None:
            if tape.passed_on(hidden) and _followed(tape, hidden):
                hidden = finish(tape)
            elif self.on_trial:
                self.leave_out(f"{self.name}.{index} is not given what the layer before it returned")
                return hidden
            else:
                self._refuse_unread("changed", index)
            self._close()
        if tape is None and not self._below.get(threading.get_ident()):
            position = first  # the lowest layer of a forward pass
        if position == self.depth - 1:
            self._below.pop(threading.get_ident(), None)
            if not self.sure and len(self.plain) == len(self.layers):
                self.leave_out("every layer returns another shape than it is given")
        else:
            self._below[threading.get_ident()] = position - first + 1
        return hidden

    def _due(self, index: int) -> Tape | None:
        """The running tape if the layer is due, None if a tape must be started; refuses layers out of order."""
        first, tape, position = self.plan.frozen_layers, self._running.get(threading.get_ident()), self.position()
        due = self.order[position]
        if index == self.order[first] and (position == first or due != index):
            self._close()
            self._below.pop(threading.get_ident(), None)
            return None
        if due != index:
            self._refuse_other_couplings()
            reached = "no layer" if position == first else f"{self.name}.{self.order[position - 1]}"
            raise UnsupportedModelError(
                f"{self.model} called {self.name}.{index} after {reached}, but a reversible stack runs every layer "
                "once, in order. Models that skip or repeat layers cannot be made reversible; if layers were added or "
                "taken away since, restore the model and make it reversible again."
            )
        return tape

    def _comes_from(self, tape: Tape, index: int, hidden: Tensor) -> bool:
        """Whether a changed hidden state was computed from the one that the layer before returned.

        Seen from its graph, once for each layer; without a graph it is taken for granted.
        """
        visible = tape.visible
        if visible is not None and not tape.arithmetic.exact and hidden.data_ptr() == visible.data_ptr():
            return False  # changed in place, and a float stream is that very memory
        if visible is None or not visible.requires_grad:
            return True
        if not hidden.requires_grad:
            return False
        if index in self._spliced or hidden is visible:
            return True
        self._spliced.add(index)
        return leads_to(hidden, visible)

    def _refuse_unread(self, what: str, index: int) -> None:
        """Only the newest stream can be read where nobody knew that the run would end."""
        coupling = self.plan.coupling
        if coupling is not None and coupling.output != (0, 1):
            raise UnsupportedModelError(
                f"Layer {self.name}.{index} of {self.model} is {what} by code outside the layers, where the "
                f"output rule of {coupling.name} would have to be applied before. Use output='newest', or leave this "
                "stack out with stacks=[...]."
            )

    def _close(self) -> None:
        """Ends the running tape in good order: what it computed is used."""
        tape = self._running.pop(threading.get_ident(), None)
        if tape is not None:
            tape.abandon()
            tape.check_magnitudes()

    @contextmanager
    def weights_fixed(self, layer: nn.Module) -> Iterator[None]:
        """Lets gradients through a frozen layer, and none to its weights; says so once if some ask for them."""
        asking = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        if asking and self._first("frozen"):
            warnings.warn(
                f"{len(asking)} parameters of {self.name} of {self.model} require gradients, but lie in the lowest "
                f"{self.plan.frozen_layers} layers, which frozen_layers={self.plan.frozen_layers} keeps as they are: "
                "they get none. Choose a smaller frozen_layers to train them, or freeze them (requires_grad_(False)).",
                MeftWarning,
                stacklevel=2,
            )
        for parameter in asking:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)

    def note_change(self, target: Any, attribute: str, before: Any) -> None:
        """Notes, once, what `undo` is to give an attribute back that is changed in training."""
        if not any(changed is target and name == attribute for changed, name, _ in self.changes):
            self.changes.append((target, attribute, before))

    def unwrap(self, model: nn.Module, args: Any) -> None:
        """A forward pre-hook on the model whose loop runs the layers: takes activation wrappers off them."""
        if torch.compiler.is_compiling():
            return
        found = [index for index, layer in enumerate(self.layers) if is_wrapped(layer)]
        if not found or self.plan.coupling is None:
            return
        warn_dropped([self.layer_name(index) for index in found], self.layers[found[0]])
        for index in found:
            self.layers[index] = inside(self.layers[index])

    def hear_cache(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook on the model that was passed in: says once that a cache the caller passes stays empty.

        One that a model makes for itself, because its configuration says use_cache, is left out without a warning.
        """
        cache = kwargs.get("past_key_values")
        if cache is None or torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self.in_training():
            return
        # A filled one is refused by the first layer.
        filled = int(cache.get_seq_length()) > 0 if hasattr(cache, "get_seq_length") else True
        if not filled and self._first("cache"):
            warnings.warn(
                "A key-value cache is of no use in training with reversible layers: the past_key_values passed to "
                f"{type(model).__name__} are set aside and stay empty. Leave them out in training, or call the model "
                "under torch.no_grad() to fill them.",
                MeftWarning,
                stacklevel=2,
            )

    def _first(self, word: str) -> bool:
        """Tells once for every word that it has not been said."""
        if word in self._said:
            return False
        self._said.add(word)
        return True

    def end(self) -> None:
        """Forgets the running forward pass; its graph, if any, keeps the tape alive."""
        self._below.pop(threading.get_ident(), None)
        tape = self._running.pop(threading.get_ident(), None)
        if tape is not None:
            tape.abandon()

    @torch.compiler.disable
    def check_ended(self, model: nn.Module, args: Any, output: Any) -> None:
        """A forward hook on the model whose loop runs the layers: all of them must have run.

        Raises:
            UnsupportedModelError: the model returned before the last one, so the output rule was never applied.
        """
        tape = self._running.get(threading.get_ident())
        if tape is None:
            self._below.pop(threading.get_ident(), None)
            return
        if self.on_trial:
            self.leave_out(f"{self.position()} of its {self.depth} layers were run")
            self.end()
            return
        done = self.position()
        self.end()
        raise UnsupportedModelError(
            f"{self.model} ran {done} of the {self.depth} layers of {self.name}, or something else between two of "
            "them, and returned. A reversible stack gives its hidden state after the last layer. Remove the layers "
            f"that are not used from {self.name} before the model is made reversible, or leave this stack out with "
            "stacks=[...]."
        )

    def _refuse_other_couplings(self) -> None:
        """Raises ConfigError if some of the layers are to follow another adapter's coupling."""
        couplings: dict[str, list[int]] = {}
        for index, layer in enumerate(self.layers):
            placed: Callable[[], Placement | None] = getattr(layer, "placement", lambda: None)
            placement = placed()
            if placement is None or placement.reversible_stack is not self:
                coupling = None if placement is None else placement.reversible_stack.plan.coupling
                named = "no active adapter" if placement is None else "another adapter"
                couplings.setdefault(named if coupling is None else f"{named} ({coupling.name})", []).append(index)
        if couplings:
            found = "; ".join(f"{name} in layers {indices}" for name, indices in couplings.items())
            mine = "adapter" if self.plan.coupling is None else self.plan.coupling.name
            raise ConfigError(
                f"The layers of {self.name} of {self.model} do not follow one coupling: {mine} in some, but {found}. "
                "Two streams can follow one only. Activate one adapter in all of them with model.set_adapter(name)."
            )

    def first_run(self, index: int) -> bool:
        """Whether a layer has never run as one of the stack."""
        return index not in self._run

    def ran(self, index: int) -> None:
        """Notes that a layer has run in its place."""
        self._run.add(index)

    def _start(self, hidden: Tensor, below: int | None = None) -> Tape:
        self._close()
        if below is not None:
            self._below[threading.get_ident()] = below
        for model in self.heads:
            refresh(model)
        if not hidden.is_floating_point():
            raise UnsupportedModelError(
                f"The hidden state of {self.model} that enters {self.name} has dtype {hidden.dtype}. Reversible layers "
                "need float16, bfloat16, float32 or float64. Load the model in one of these."
            )
        assert self.plan.coupling is not None
        tape = Tape(
            self.plan.coupling,
            self.plan.arithmetic,
            hidden,
            drift_tolerance=self.plan.drift_tolerance,
            anchor_every=self.plan.anchor_every,
            residues=self.plan.residues,
            name=self.name,
            training=torch.is_grad_enabled() and self.in_training(),
            first=self.plan.frozen_layers,
        )
        self._running[threading.get_ident()] = tape
        return tape

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": {}, "_below": {}}


@dataclass(frozen=True)
class Placement:
    """One adapter's view of a layer: where the layer stands, and its bottlenecks by place (`adapters.PLACES`)."""

    reversible_stack: ReversibleStack
    index: int
    adapters: Mapping[str, Bottleneck] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What messages call the layer."""
        return self.reversible_stack.layer_name(self.index)

    @property
    def has_adapters(self) -> bool:
        return bool(self.adapters)

    def adapter(self, place: str) -> Bottleneck | None:
        """The bottleneck at a place, or None."""
        return self.adapters.get(place)


def _followed(tape: Tape, hidden: Tensor) -> bool:
    """Puts the alias that a hook returned in the place of the visible hidden state; False if it was detached.

    Hooks on the gradient of a layer's output (FSDP, full backward hooks) hang on the alias.
    """
    newest, handles = tape.coupling.newest, list(tape.live_handles())
    if hidden.requires_grad != handles[newest].requires_grad:
        return False
    handles[newest] = hidden
    tape.handles = (handles[0], handles[1])
    return True
