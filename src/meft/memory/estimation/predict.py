"""Peaks of a training step on tensors without values, at any depth, batch and sequence.

Layers are alike, so the step need not run at full depth. It is cut into phases (`measurement.causes`): every layer's
forward and backward pass, what lies between, the loss head. Within a phase the same tensors come and go whatever the
depth; only what was live when it began grows, by the same amount for each further layer. The peak of each phase is
therefore linear in the depth, and the peak of the step is the largest of them. Layers are told by their distance from
the nearer end of their stack, so the first and the last ones keep phases of their own. A stack is run at two depths and
carried on from there. Layers with other weights or settings than their neighbours are looked for, and a third depth has
to come out as predicted in every phase, to the byte; else the model is run whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from meft.backbone.conversion import find_stacks, layer_drop_unsaid
from meft.backbone.stack import Container
from meft.errors import UnsupportedModelError, first_line
from meft.methods.registry import OFFLOAD, Way

from ..measurement.causes import Attribution, Phase
from ..measurement.marks import watched
from .blueprint import Blueprint
from .fake import make_fake, offloaded, record_fake

# Layers at either end of a stack that are told apart from those in the middle.
_ENDS = 2

Causes = dict[str, int]
Key = tuple[str, ...]


@dataclass(frozen=True)
class StepPeak:
    """Bytes above the start of a forward and backward pass, by cause: at the peak, and at that of the activations.

    On the host, where causes are not told apart, the most that lay there at once.
    """

    peak: Causes
    activations: Causes
    host: int


class Predictor:
    """Predicts the peak of a forward and backward pass for one way to train one model.

    Args:
        blueprint: the model.
        way: how it is trained.
        autocast: dtype of mixed precision, or None.
        rounding: every block takes a multiple of this many bytes.
    """

    def __init__(self, blueprint: Blueprint, way: Way, autocast: torch.dtype | None, rounding: int) -> None:
        self.blueprint, self.way, self.autocast, self.rounding = blueprint, way, autocast, rounding
        base = blueprint.build()
        alike = all(_alike(stack.layers) for stack in find_stacks(base))
        self.model = self._trainable(base)
        self.depths = tuple(len(stack.layers) for stack in find_stacks(self.model))
        fixed = int(way.options.get("frozen_layers") or 0) + int(way.options.get("cached_layers") or 0)
        shallow = fixed + 2 * _ENDS
        self._shallow = tuple(min(depth, shallow) for depth in self.depths)
        self.whole = not alike or bool(way.options.get("anchor_every")) or max(self.depths) <= shallow + 2
        self._checked = False
        self._built: dict[tuple[int, ...], tuple[FakeTensorMode, nn.Module]] = {}
        self._low = int(way.options.get("frozen_layers") or 0) + _ENDS

    def at(self, batch_size: int, seq_len: int) -> StepPeak:
        """The peak for a batch of `batch_size` rows of `seq_len` tokens (which models of images do not look at).

        Raises:
            UnsupportedModelError: the model looks at the values of its tensors, or cannot run at this size.
        """
        if not self.whole:
            found = self._carried_on(batch_size, seq_len)
            if found is not None:
                return found
            self.whole = True
        return _largest(self._phases(self.depths, batch_size, seq_len))

    def _carried_on(self, batch_size: int, seq_len: int) -> StepPeak | None:
        """The peak from runs of a few layers, or None where layers turn out not to be alike."""
        base = self._phases(self._shallow, batch_size, seq_len)
        deeper: list[tuple[int, dict[Key, StepPeak]]] = []
        for stack, (full, few) in enumerate(zip(self.depths, self._shallow, strict=True)):
            if full > few:
                more = tuple(depth + (other == stack) for other, depth in enumerate(self._shallow))
                deeper.append((stack, self._phases(more, batch_size, seq_len)))
        if not self._checked:
            check = tuple(min(full, few + 2) for full, few in zip(self.depths, self._shallow, strict=True))
            run = self._phases(check, batch_size, seq_len)
            if self._linear(base, deeper, check) != {key: run.get(key) for key in base}:
                return None
            self._checked = True
        return _largest(self._linear(base, deeper, self.depths))

    def _linear(
        self, base: dict[Key, StepPeak], deeper: Sequence[tuple[int, dict[Key, StepPeak]]], depths: Sequence[int]
    ) -> dict[Key, StepPeak]:
        def extended(key: Key, kind: str) -> Causes:
            start: Causes = getattr(base[key], kind)
            found = dict(start)
            for stack, run in deeper:
                steps = depths[stack] - self._shallow[stack]
                for cause, value in getattr(run[key], kind).items():
                    found[cause] += steps * (value - start[cause])
            return found

        def on_host(key: Key) -> int:
            start = base[key].host
            return start + sum((depths[s] - self._shallow[s]) * (run[key].host - start) for s, run in deeper)

        return {key: StepPeak(extended(key, "peak"), extended(key, "activations"), on_host(key)) for key in base}

    def _phases(self, depths: tuple[int, ...], batch_size: int, seq_len: int) -> dict[Key, StepPeak]:
        """Runs a step with so many layers in each stack and returns the peak of every phase."""
        mode, model = self._model(depths)
        try:
            with mode:
                batch = self.blueprint.batch(batch_size, seq_len)
                known = [*model.parameters(), *model.buffers(), *batch.values()]
                with watched(model, model.parameters()):
                    timeline = record_fake(
                        lambda: self._step(model, batch), known, self.rounding, cpu_kernels=self.rounding == 1
                    )
        except (UnsupportedModelError, MemoryError):
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"A step of {self.blueprint.name} ({type(model).__name__}) by {self.way.name} with batch_size="
                f"{batch_size} and seq_len={seq_len} cannot run on tensors without values: {type(error).__name__}: "
                f"{first_line(error)} Measure a real step with meft.measure instead, or choose another task_type."
            ) from error
        finally:
            for parameter in model.parameters():
                parameter.grad = None
        found: dict[Key, StepPeak] = {}
        for phase, key in self._keys(Attribution(timeline), depths):
            found[key] = phase
        return found

    def _keys(self, attribution: Attribution, depths: tuple[int, ...]) -> list[tuple[StepPeak, Key]]:
        keyed: list[tuple[StepPeak, Key]] = []
        before: Key = ()
        for found in attribution.phase_peaks():
            own = self._key(found.phase, depths)
            key = own if found.phase.layer else (*own, *before)
            keyed.append((StepPeak(found.peak, found.activations, found.host), key))
            before = own
        return keyed

    def _key(self, phase: Phase, depths: tuple[int, ...]) -> Key:
        """What a phase is called at every depth: layers near the upper end of a stack are counted from there."""
        if not phase.layer:
            return (phase.kind,)
        stack, index = map(int, phase.layer.split("."))
        place = index if index < self._low else index - depths[stack]
        return phase.kind, str(stack), str(place)

    def _model(self, depths: tuple[int, ...]) -> tuple[FakeTensorMode, nn.Module]:
        if depths not in self._built:
            base = self.blueprint.build()
            for stack, depth in zip(find_stacks(base), depths, strict=True):
                del stack.layers[depth:]
            model = self._trainable(base)
            mode = FakeTensorMode()
            make_fake(model, mode)
            self._built[depths] = mode, model
        return self._built[depths]

    @layer_drop_unsaid()
    def _trainable(self, model: PreTrainedModel) -> nn.Module:
        return self.way.apply(model, self.blueprint.task_type).train()

    def _step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        around = offloaded() if self.way.around == OFFLOAD else nullcontext()
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None), around:
            loss = _loss(model(**batch))  # the logits are not held any longer
        loss.backward()


def _loss(output: Any) -> Tensor:
    return output[0].float().mean() if getattr(output, "loss", None) is None else output.loss


def _alike(layers: Container) -> bool:
    """Whether the layers of a stack, but for the lowest ones, have the same modules, weights and settings."""
    return len({_description(layer) for layer in list(layers)[_ENDS:]}) <= 1


def _description(layer: nn.Module) -> tuple[Any, ...]:
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    settings = tuple(
        (name, type(module), attribute, value)
        for name, module in layer.named_modules()
        for attribute, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, str)) and "idx" not in attribute and "layer_id" not in attribute
    )
    return shapes, settings


def _largest(phases: Mapping[Key, StepPeak]) -> StepPeak:
    def total(kind: str) -> Callable[[StepPeak], int]:
        return lambda found: sum(getattr(found, kind).values())

    values = list(phases.values())
    return StepPeak(
        max(values, key=total("peak")).peak,
        max(values, key=total("activations")).activations,
        max(found.host for found in values),
    )


def optimizer_bytes(
    parameters: Sequence[Tensor], make: Callable[[Any], torch.optim.Optimizer] | None
) -> tuple[int, int]:
    """Bytes of an optimizer's state for these parameters, and the most that it makes besides while it steps."""
    if make is None or not parameters:
        return 0, 0
    copies = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in parameters]
    for copy in copies:
        copy.grad = torch.empty_like(copy)
    optimizer = make(copies)
    known = [*copies, *(copy.grad for copy in copies)]
    record_fake(optimizer.step, known, numbers=True)  # makes the state
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    stepped = Attribution(record_fake(optimizer.step, [*known, *state], numbers=True))
    return sum(value.nbytes for value in state), sum(stepped.peak().values())
