"""What is measured before a run begins: a step of it, beside a step of plain full fine-tuning."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from torch import nn

from meft.storage.files import read_json, write_json

from .arguments import TrainerArguments
from .costs import StepCosts, autocast_of, measure_costs
from .kinds.base import Say
from .preparation import Prepared

COSTS_FILE = "costs.json"
REFERENCE = "full"


class CostsBeforeTraining:
    """Measures a step once the Trainer has the model ready, and keeps what it found for a resumed run."""

    def __init__(
        self, folder: Path, prepared: Prepared, method: str, steps: int, arguments: TrainerArguments, say: Say
    ) -> None:
        self.prepared, self.method, self.steps, self.arguments, self.say = prepared, method, steps, arguments, say
        self.file = folder / COSTS_FILE
        self.found = StepCosts(**read_json(self.file)) if self.file.is_file() else None

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
        )
        if build is not None and found.reference is None:
            self.say(f"{REFERENCE} fine-tuning does not fit into the memory of {args.device}: there is no time ratio.")
        return found
