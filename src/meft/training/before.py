"""What is measured before a run begins: a step of it, beside a step of plain full fine-tuning."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from torch import nn

from meft.errors import CheckpointError
from meft.integrations.callbacks import FirstBatch
from meft.storage.claims import read_object
from meft.storage.files import finite, write_json
from meft.verification.distance import Distance

from .arguments import TrainerArguments
from .costs import StepCosts, autocast_of, measure_costs
from .kinds.base import Say
from .preparation import Prepared

Measured = TypeVar("Measured", Distance, StepCosts)
COSTS_FILE, START_FILE = "costs.json", "start.json"
REFERENCE = "full"


def forget_measurements(folder: Path, arguments: TrainerArguments, *, begun: bool) -> None:
    """Removes what was measured with other options; the start stays that of a run which has begun to learn."""
    if arguments.should_save:
        for name in (COSTS_FILE,) if begun else (COSTS_FILE, START_FILE):
            (folder / name).unlink(missing_ok=True)


class StartBeforeTraining:
    """Compares the coupled model with the plain one on the first batch, and keeps what it found for a resumed run."""

    def __init__(self, folder: Path, arguments: TrainerArguments, say: Say) -> None:
        self.file, self.arguments, self.say = folder / START_FILE, arguments, say
        self.found = _measured(self.file, Distance)

    def __call__(self, model: nn.Module, *, resumed: bool) -> None:
        """Waits for the model's first call in training, unless that goes on with what was trained before."""
        if self.found is None and not resumed:
            FirstBatch(self._tell).wait(model)

    def _tell(self, found: Distance) -> None:
        self.found = found
        if self.arguments.should_save:
            write_json(self.file, finite(asdict(found)))
        loss = "" if found.loss is None else f"loss {found.loss:.4f}, of the plain model {found.plain_loss:.4f}"
        kl = "" if found.kl is None else f"predictions {found.kl:.4f} nats (KL) from the plain model's"
        self.say(f"Start, on the first batch: {'; '.join(part for part in (loss, kl) if part)}.")


def _measured(file: Path, kind: type[Measured]) -> Measured | None:
    """What an earlier start of the run measured; None where it did not, or its file is not whole."""
    if not file.is_file():
        return None
    try:
        return kind(**read_object(file))
    except (TypeError, CheckpointError):
        return None  # which is measured again


class CostsBeforeTraining:
    """Measures a step once the Trainer has the model ready, and keeps what it found for a resumed run."""

    def __init__(
        self, folder: Path, prepared: Prepared, method: str, steps: int, arguments: TrainerArguments, say: Say
    ) -> None:
        self.prepared, self.method, self.steps, self.arguments, self.say = prepared, method, steps, arguments, say
        self.file = folder / COSTS_FILE
        self.found = _measured(self.file, StepCosts)

    def __call__(self, model: nn.Module) -> None:
        if self.found is None and self.steps and self.arguments.should_save:
            self.found = self._measure(model)
            write_json(self.file, asdict(self.found))

    def _measure(self, model: nn.Module) -> StepCosts:
        args = self.arguments
        rows = self.prepared.splits["train"]
        size = min(args.per_device_train_batch_size, len(rows))
        batch = self.prepared.collator([rows[index] for index in range(size)])
        build = self.prepared.reference if self.method != REFERENCE else None
        beside = "" if build is None else f" beside {REFERENCE} fine-tuning"
        self.say(f"Measuring {self.steps} steps{beside} before training; --measure_steps 0 leaves this out.")
        found = measure_costs(
            model,
            {name: value.to(args.device) for name, value in batch.items()},
            steps=self.steps,
            reference=None if build is None else lambda: build().to(args.device),
            reference_name=REFERENCE,
            autocast=autocast_of(args),
            surroundings=nullcontext if self.prepared.way is None else self.prepared.way.surroundings,
        )
        if build is not None and found.reference is None:
            self.say(f"{REFERENCE} fine-tuning does not fit into the memory of {args.device}: there is no time ratio.")
        return found
