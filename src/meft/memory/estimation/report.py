"""What `meft.estimate` answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from meft.errors import ConfigError
from meft.loading.tasks import IMAGES
from meft.storage.results import format_bytes

from ..measurement.causes import CAUSES

WEIGHTS = "weights"


class BudgetError(ConfigError):
    """Not even the smallest batch fits into the budget.

    Attributes:
        needed: Bytes that it needs.
    """

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True)
class Tried:
    """One setting that was tried.

    Attributes:
        method: the way to train.
        options: its options, but for those that every setting had.
        total_bytes: what a whole step needs.
        fits: whether that is within the budget.
    """

    method: str
    options: dict[str, Any]
    total_bytes: int
    fits: bool

    @property
    def name(self) -> str:
        """The setting in words: "lora+momentum, cached_layers 3"."""
        return ", ".join([self.method, *(f"{name} {value}" for name, value in self.options.items())])


@dataclass(frozen=True)
class MemoryEstimate:
    """What `estimate` predicts for one way to train one model; every figure is in bytes.

    Attributes:
        model, method, task_type, dtype, optimizer, device: What was asked for.
        batch_size, seq_len: Shape of the batch; with a budget, the largest that fits.
        parameters, trainable_parameters: How many there are.
        weights_bytes: Parameters and buffers.
        optimizer_bytes: State of the optimizer.
        gradient_bytes: Gradients of the trainable parameters, all of them.
        peak_bytes: The peak of a forward and backward pass above what is live before it (weights and optimizer
            state), with new gradients: what `meft.measure` reports under this name.
        activation_peak_bytes: The same with gradients of parameters left out of the sum.
        causes, activation_causes: These two by cause (`meft.memory.measurement.causes.CAUSES`).
        total_bytes: The most that a whole step with the optimizer needs, with weights and optimizer state.
        total_causes: The same by cause.
        code: The lines of Python that train in this way.
        host_peak_bytes: The most that lies on the host at once for the step (residues="host", "lora+offload").
        tried: With longest="setting", everything that was tried, in the order of trying.
        limited: With a budget: that more would fit than the model has positions for, or than is looked for.
    """

    model: str
    method: str
    task_type: str
    dtype: str
    optimizer: str
    device: str
    batch_size: int
    seq_len: int
    parameters: int
    trainable_parameters: int
    weights_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    peak_bytes: int
    activation_peak_bytes: int
    causes: dict[str, int]
    activation_causes: dict[str, int]
    total_bytes: int
    total_causes: dict[str, int]
    code: str
    host_peak_bytes: int = 0
    limited: bool = False
    tried: list[Tried] = field(default_factory=list)

    @property
    def shape(self) -> str:
        """The batch in words."""
        rows = f"batch {self.batch_size}"
        return rows if self.task_type == IMAGES else f"{rows} x {self.seq_len}"

    def as_dict(self) -> dict[str, Any]:
        """Everything in builtin types, as JSON can write it."""
        return asdict(self)

    def table(self) -> Table:
        """The bytes by cause."""
        title = f"{self.method}: {self.model}, {self.dtype}, {self.shape}, {self.optimizer}"
        table = Table(title=title, title_justify="left")
        table.add_column("at the peak of")
        table.add_column("a training step", justify="right")
        table.add_column("its activations", justify="right")
        for cause in (WEIGHTS, *CAUSES):
            whole, activations = self.total_causes[cause], self.activation_causes.get(cause, 0)
            if whole or activations:
                table.add_row(cause, format_bytes(whole), format_bytes(activations) if activations else "")
        table.add_section()
        table.add_row("sum", format_bytes(self.total_bytes), format_bytes(self.activation_peak_bytes))
        if self.host_peak_bytes:
            table.add_row("on the host besides", format_bytes(self.host_peak_bytes), format_bytes(self.host_peak_bytes))
        return table

    def __rich__(self) -> Group:
        return Group(self.table(), Text(self.code))
