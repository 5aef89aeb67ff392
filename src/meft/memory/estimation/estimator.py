"""Estimates of one model and one method, for as many sizes as wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from meft.errors import ConfigError
from meft.methods.registry import read_way
from meft.storage.results import format_bytes

from ..measurement.causes import CAUSES, GRADIENTS, OPTIMIZER_STATE
from .blueprint import Blueprint, check_seq_len, read_dtype
from .optimizers import optimizer_maker
from .predict import Predictor, StepPeak, optimizer_bytes
from .report import WEIGHTS, BudgetError, MemoryEstimate
from .search import largest

# torch.cuda's caching allocator hands out multiples of this many bytes.
_CUDA_ROUNDING = 512
_MOST_ROWS, _MOST_TOKENS = 2**16, 2**20


class Estimator:
    """Estimates of one model and one method, for as many sizes as wanted.

    Args:
        blueprint: the model.
        method: as in `estimate`.
        device: "cpu" or "cuda".
        optimizer: as in `estimate`.
        autocast: as in `estimate`.
        options: of the method.
        progress: called with a description before every step that is run.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        method: str,
        device: str,
        optimizer: str,
        autocast: str | torch.dtype | None,
        options: Mapping[str, Any],
        progress: Callable[[str], None] | None = None,
    ) -> None:
        make_optimizer = optimizer_maker(optimizer, foreach=device == "cuda")
        self.blueprint, self.device, self.optimizer = blueprint, device, optimizer
        self.way = read_way(method, options)
        mixed = None if autocast is None else read_dtype(autocast)
        self.progress = progress or (lambda _: None)
        self.progress(f"{self.way.name}: building")
        self.rounding = _CUDA_ROUNDING if device == "cuda" else 1
        self.predictor = Predictor(blueprint, self.way, mixed, self.rounding)
        trained = self.predictor.model
        self.trainable = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in trained.parameters())
        tensors = {id(tensor): tensor for tensor in (*trained.parameters(), *trained.buffers())}
        self.weights = sum(map(self._rounded, tensors.values()))
        self.gradients = sum(map(self._rounded, self.trainable))
        self.state, self.stepping = optimizer_bytes(self.trainable, make_optimizer)
        self._found: dict[tuple[int, int], StepPeak] = {}

    def at(self, batch_size: int, seq_len: int, *, limited: bool = False) -> MemoryEstimate:
        """The estimate for one size.

        Raises:
            ConfigError: the model has no more positions.
        """
        if not self.blueprint.of_images:
            check_seq_len(self.blueprint, self.predictor.model, seq_len)
        step = self._step(batch_size, seq_len)
        total = self._total(step)
        return MemoryEstimate(
            model=self.blueprint.name,
            method=self.way.name,
            task_type=self.blueprint.task_type,
            dtype=str(self.blueprint.dtype).removeprefix("torch."),
            optimizer=self.optimizer,
            device=self.device,
            batch_size=batch_size,
            seq_len=seq_len,
            parameters=self.parameters,
            trainable_parameters=sum(parameter.numel() for parameter in self.trainable),
            weights_bytes=self.weights,
            optimizer_bytes=self.state,
            gradient_bytes=self.gradients,
            peak_bytes=sum(step.peak.values()),
            activation_peak_bytes=sum(step.activations.values()),
            causes=step.peak,
            activation_causes=step.activations,
            total_bytes=sum(total.values()),
            total_causes=total,
            code=self.way.code(self.blueprint.task_type),
            host_peak_bytes=step.host,
            limited=limited,
        )

    def within(self, budget: int, longest: str, batch_size: int, seq_len: int) -> MemoryEstimate:
        """The estimate for the largest batch, or the longest sequence, that fits into `budget` bytes.

        Raises:
            BudgetError: not even the smallest fits.
            ConfigError: a model of images has no sequences.
        """
        sequence = longest == "sequence"
        if sequence and self.blueprint.of_images:
            raise ConfigError(
                f"longest is 'sequence', but {self.blueprint.name} is a model of images, whose size is fixed. Ask for "
                "the largest batch: 'batch'."
            )
        limit, _ = self.blueprint.positions(self.predictor.model)
        low, high = (2, limit or _MOST_TOKENS) if sequence else (1, _MOST_ROWS)

        def shape(size: int) -> tuple[int, int]:
            return (batch_size, size) if sequence else (size, seq_len)

        def need(size: int) -> int:
            return sum(self._total(self._step(*shape(size))).values())

        if not sequence and not self.blueprint.of_images:
            check_seq_len(self.blueprint, self.predictor.model, seq_len)
        size, smallest = largest(need, budget, low, high)
        if size is None:
            rows, tokens = shape(low)
            raise BudgetError(
                f"budget is {format_bytes(budget)}, in which nothing fits: {self.way.name} needs at least "
                f"{format_bytes(smallest)} ({rows} x {tokens} tokens), {format_bytes(self.weights)} of it for weights. "
                f"Give a larger budget, another method, or a smaller {'batch_size' if sequence else 'seq_len'}.",
                smallest,
            )
        return self.at(*shape(size), limited=size == high)

    def _step(self, batch_size: int, seq_len: int) -> StepPeak:
        size = batch_size, seq_len
        if size not in self._found:
            self.progress(f"{self.way.name}: {batch_size} x {seq_len}")
            self._found[size] = self.predictor.at(batch_size, seq_len)
        return self._found[size]

    def _total(self, step: StepPeak) -> dict[str, int]:
        """Everything live at the worst moment of a step: in its passes, or while the optimizer steps."""
        passes = {**step.peak, WEIGHTS: self.weights}
        passes[OPTIMIZER_STATE] += self.state
        stepping = {**dict.fromkeys(CAUSES, 0), WEIGHTS: self.weights, GRADIENTS: self.gradients}
        stepping[OPTIMIZER_STATE] = self.state + self.stepping
        return max(passes, stepping, key=lambda causes: sum(causes.values()))

    def _rounded(self, tensor: torch.Tensor) -> int:
        return -(-tensor.nbytes // self.rounding) * self.rounding
