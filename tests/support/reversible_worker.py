"""`ReversibleCallback` in a Trainer with two processes, held against `make_reversible` before the Trainer."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import meft
from meft.backbone.report import reversible_stacks
from meft.errors import MeftWarning
from support import models


class Rows(Dataset):
    columns = models.batch("opt", "CAUSAL_LM", size=16, padding=None)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


class Wrapping(TrainerCallback):
    """Notes what stands around the model while it is trained."""

    found: str | None = None
    trainer: Any = None
    reversible = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = self.trainer.model_wrapped.__class__.__name__
        self.reversible = bool(reversible_stacks(self.trainer.model_wrapped))


def lora() -> nn.Module:
    base = models.build("opt", "CAUSAL_LM", layers=3)
    torch.manual_seed(3)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4))


def train(model: nn.Module, folder: Path, callbacks: list[Any]) -> tuple[Trainer, Wrapping]:
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    seen = Wrapping()
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[*callbacks, seen])
    seen.trainer = trainer
    trainer.train()
    return trainer, seen


def main() -> None:
    folder = Path(sys.argv[1]).parent
    by_hand, _ = train(meft.make_reversible(lora(), gamma=1 / 16), folder, [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained, seen = train(lora(), folder, [meft.ReversibleCallback(gamma=1 / 16)])
    mine, theirs = trained.model.state_dict(), by_hand.model.state_dict()
    found = {
        "wrapped in": seen.found,
        "reversible in training": seen.reversible,
        "reversible afterwards": bool(reversible_stacks(trained.model)),
        "equal": mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine),
        "losses": [entry["loss"] for entry in trained.state.log_history if "loss" in entry],
        "warnings": [str(each.message) for each in caught if issubclass(each.category, MeftWarning)],
    }
    if PartialState().is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
