"""The tiny model that checks are made on, its batch, and what the plain model does with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from meft.backbone.conversion import Stack, find_stacks, layer_drop_unsaid, make_reversible
from meft.tuner.config import MeftConfig
from meft.verification.gradients import loss_of

from .family import Family
from .heads import PEFT_TASKS

FULL = "full"
WAYS = ("meft1", "meft2", "meft3", "momentum", FULL)
"""Couplings of `MeftConfig`, and `momentum` by `make_reversible` under full fine-tuning."""


class PlainModelError(Exception):
    """The plain model itself cannot take a training step on its batch; nothing follows for this library."""


@dataclass
class Subject:
    """A family's tiny model with one head, and the batch it is trained on."""

    family: Family
    head: str
    base: PreTrainedModel
    batch: Mapping[str, Any]

    @classmethod
    def make(cls, family: Family, head: str | None = None) -> Subject:
        """Builds the model and its batch.

        Raises:
            PlainModelError: that fails, by whatever error Transformers raises.
        """
        try:
            head = head or family.heads()[0]
            base = family.build(head)
            return cls(family, head, base, family.batch(base, head))
        except Exception as error:
            raise PlainModelError(_first_line(error)) from error

    @cached_property
    def reached(self) -> Mapping[str, frozenset[int]]:
        """Layers of the plain model to which the loss on the batch sends gradients, by name of their stack.

        Raises:
            PlainModelError: the plain model cannot be run and differentiated.
        """
        # Some models leave what they computed on their modules, which then cannot be copied.
        base = copy.deepcopy(self.base).eval()  # in training, layer drop would leave out layers at random
        try:
            with seeded():
                loss_on(base, self.batch).backward()
        except Exception as error:
            raise PlainModelError(_first_line(error)) from error
        return {stack.name: _differentiated(stack) for stack in find_stacks(base)}

    @property
    def idle(self) -> tuple[str, ...]:
        """Layer stacks of which the loss reaches no layer."""
        return tuple(name for name, layers in self.reached.items() if not layers)

    def reached_in(self, stack: Stack) -> frozenset[int]:
        """Indices of the layers that the loss reaches in a stack of the converted model."""
        return next((layers for name, layers in self.reached.items() if stack.name.endswith(name)), frozenset())

    @property
    def options(self) -> dict[str, Any]:
        """The option that chooses the stacks, where not all of them are taken."""
        return {} if self.family.stacks is None else {"stacks": list(self.family.stacks)}

    @layer_drop_unsaid()
    def converted(self, way: str) -> nn.Module:
        """A copy of the model, made reversible, in training mode."""
        base = copy.deepcopy(self.base)
        if way == FULL:
            return make_reversible(base, **self.options)
        config = MeftConfig(task_type=PEFT_TASKS.get(self.head), coupling=way, bottleneck_dim=4, **self.options)
        model = get_peft_model(base, config)
        _enlarge(model)
        return model.train()


def loss_on(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss, or the sum of squares of what a model without one puts out."""
    outputs = model(**batch)
    loss = loss_of(outputs)
    if loss is not None:
        return loss
    return torch.stack([value.square().mean() for value in _floats(outputs).values() if value.requires_grad]).sum()


def outputs_on(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the model puts out in evaluation, by name."""
    model.eval()
    with seeded(), torch.no_grad():
        return _floats(model(**batch))


@contextmanager
def seeded() -> Iterator[None]:
    """Starts from one random state, and leaves the one outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


def _floats(outputs: Any) -> dict[str, Tensor]:
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor) and value.is_floating_point()}


def _differentiated(stack: Stack) -> frozenset[int]:
    """Indices of the layers that have gradients."""
    return frozenset(
        index for index, layer in enumerate(stack.layers) if any(p.grad is not None for p in layer.parameters())
    )


def _enlarge(model: nn.Module) -> None:
    """Fresh adapters are nearly silent, and would hide what they should not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "meft_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
