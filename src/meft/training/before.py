"""What is measured before a run begins: a step of it, beside a step of plain full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from meft.backbone.layers import ReversibleLayer
from meft.errors import CheckpointError
from meft.integrations.callbacks import FirstBatch
from meft.storage.claims import read_object
from meft.storage.files import finite, read_json, write_json
from meft.verification.distance import Distance, plain

from .arguments import TrainerArguments
from .checkpoints import CheckpointingTrainer
from .costs import StepCosts, autocast_of, measure_costs
from .kinds.base import Say
from .preparation import Prepared

Measured = TypeVar("Measured", Distance, StepCosts)
COSTS_FILE, START_FILE, BEFORE_FILE = "costs.json", "start.json", "before.json"
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

    def __call__(self, model: nn.Module, trainer: CheckpointingTrainer) -> None:
        if self.found is None and self.steps and self.arguments.should_save:
            own_rows = self.prepared.kind.trainer != "classic"
            self.found = self._measure_own_rows(model, trainer) if own_rows else self._measure(model)
            write_json(self.file, asdict(self.found))

    def _measure(self, model: nn.Module) -> StepCosts:
        args = self.arguments
        rows = self.prepared.splits["train"]
        size = min(args.per_device_train_batch_size, len(rows))
        batch = self.prepared.collator([rows[index] for index in range(size)])
        build = self.prepared.reference if self.method != REFERENCE else None
        self._announce("" if build is None else f" beside {REFERENCE} fine-tuning")
        found = measure_costs(
            model,
            {name: value.to(args.device) for name, value in batch.items()},
            steps=self.steps,
            reference=None if build is None else lambda: build().to(args.device),
            reference_name=REFERENCE,
            autocast=autocast_of(args),
            surroundings=self._surroundings,
        )
        if build is not None and found.reference is None:
            self.say(f"{REFERENCE} fine-tuning does not fit into the memory of {args.device}: there is no time ratio.")
        return found

    def _measure_own_rows(self, model: nn.Module, trainer: Any) -> StepCosts:
        """Beside the same model without its coupling, which takes no second copy of it."""
        args, way = self.arguments, self.prepared.way
        rows = trainer.train_dataset
        size = min(args.per_device_train_batch_size, len(rows))
        batch = trainer.data_collator([rows[index] for index in range(size)])
        layers = [module for module in model.modules() if isinstance(module, ReversibleLayer)]
        beside = way.method.name if way is not None and way.under is not None else None
        self._announce("" if beside is None else f" beside {beside}, which keeps its activations,")
        with trainer.measuring() as loss:
            return measure_costs(
                model,
                {name: value.to(args.device) if isinstance(value, Tensor) else value for name, value in batch.items()},
                steps=self.steps,
                reference=None if beside is None else lambda: model,
                reference_name=beside,
                autocast=autocast_of(args),
                surroundings=self._surroundings,
                reference_surroundings=lambda: plain(layers),
                loss=loss,
                rows=size,
            )

    def _announce(self, beside: str) -> None:
        steps = "a step" if self.steps == 1 else f"{self.steps} steps"
        self.say(f"Measuring {steps}{beside} before training; --measure_steps 0 leaves this out.")

    def _surroundings(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.prepared.way is None else self.prepared.way.surroundings()


class LossBeforeTraining:
    """Evaluates the pretrained model, so that a run can say what it has learnt; kept for a resumed run."""

    def __init__(self, folder: Path, arguments: TrainerArguments) -> None:
        self.file, self.arguments = folder / BEFORE_FILE, arguments
        self.found: dict[str, float | None] | None = read_json(self.file) if self.file.is_file() else None

    def __call__(self, evaluate: Callable[[], dict[str, float | None]], *, resumed: bool) -> None:
        """Evaluates once, unless a run goes on; the random state is left as it was."""
        if self.found is None and not resumed:
            with torch.random.fork_rng():
                self.found = evaluate()
            if self.arguments.should_save and self.found:
                write_json(self.file, self.found)
