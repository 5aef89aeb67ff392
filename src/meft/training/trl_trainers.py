"""TRL's SFTTrainer and DPOTrainer, with whole checkpoints, exact evaluation and nothing sent anywhere.

Rows come with their token ids, so TRL prepares none of its own; it packs, makes batches and computes losses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from meft.errors import ConfigError

from .arguments import TrainerArguments
from .checkpoints import CheckpointingTrainer
from .data.sources import quiet_datasets
from .data.tokens import CHOSEN

if TYPE_CHECKING:
    from .preparation import Prepared

_REFERENCE_ADAPTER = "ref"


class _OwnRows(CheckpointingTrainer):
    """What both have in common."""

    _metrics: dict[str, Any]
    _total_train_tokens: int
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._scored: list[tuple[float, dict[str, float]]] | None = None
        super().__init__(*args, **kwargs)

    def _send_telemetry(self) -> None:
        """Nothing of a run is told to anybody."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`meft.training.card` writes one."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        weight = self._weight(inputs)
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if self._scored is not None and not self.model.training:
            loss = found[0] if isinstance(found, tuple) else found
            self._scored.append((weight, {"loss": float(loss), **self._scores()}))
        return found

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, with means over all tokens or pairs in place of means over batches' means."""
        self._scored = []
        try:
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
            scored = self._scored
        finally:
            self._scored = None
        sums = {name: sum(weight * scores[name] for weight, scores in scored) for name in scored[0][1]}
        names, total = list(sums), sum(weight for weight, _ in scored)
        values = list(sums.values())
        if self.accelerator.num_processes > 1:
            summed = torch.tensor([*values, total], dtype=torch.float64, device=self.args.device)
            *values, total = self.accelerator.reduce(summed).tolist()
        found = {name: value / max(total, 1) for name, value in zip(names, values, strict=True)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._reported(found).items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, without its means of an evaluation: ours are exact."""
        if not self.model.training:
            self._metrics["eval"].clear()
        super().log(logs, start_time)

    @contextmanager
    def measuring(self) -> Iterator[Callable[[nn.Module, Mapping[str, Tensor]], Tensor]]:
        """Steps whose losses are in no log; yields what computes the loss of a model on a batch."""
        before = copy.deepcopy(self._metrics), getattr(self, "_total_train_tokens", 0)
        try:
            yield lambda model, batch: self.compute_loss(model, dict(batch))
        finally:
            self._metrics, self._total_train_tokens = before

    def _weight(self, inputs: Mapping[str, Tensor]) -> float:
        raise NotImplementedError

    def _scores(self) -> dict[str, float]:
        raise NotImplementedError

    def _reported(self, means: dict[str, float]) -> dict[str, float]:
        return means


class LanguageTrainer(_OwnRows, SFTTrainer):
    """Learns rows token by token."""

    def _weight(self, inputs: Mapping[str, Tensor]) -> float:
        return float((inputs["labels"][..., 1:] != -100).sum())

    def _scores(self) -> dict[str, float]:
        return {"token_accuracy": self._metrics["eval"]["mean_token_accuracy"][-1]}

    def _reported(self, means: dict[str, float]) -> dict[str, float]:
        perplexity = math.exp(means["loss"]) if means["loss"] < 700 else math.inf
        return {"perplexity": perplexity, "token_accuracy": means["token_accuracy"], "loss": means["loss"]}


class PreferenceTrainer(_OwnRows, DPOTrainer):
    """Learns which of two answers is better."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset if CHOSEN in dataset.column_names else super()._prepare_dataset(dataset, *args, **kwargs)

    def _weight(self, inputs: Mapping[str, Tensor]) -> float:
        return float(len(inputs["input_ids"]) // 2)

    def _scores(self) -> dict[str, float]:
        found = self._metrics["eval"]
        return {"preferred": found["rewards/accuracies"][-1], "margin": found["rewards/margins"][-1]}

    def _reported(self, means: dict[str, float]) -> dict[str, float]:
        return {name: means[name] for name in ("preferred", "margin", "loss")}


def build_trl(prepared: Prepared, arguments: TrainerArguments, *, split: str, **ours: Any) -> _OwnRows:
    """The trainer of a language model on own rows.

    Args:
        prepared: The model and its encoded rows.
        arguments: The Trainer's.
        split: What is evaluated.
        **ours: Of `CheckpointingTrainer`.

    Raises:
        ConfigError: An option cannot be used with these rows.
    """
    evaluated = prepared.splits.get(split)
    if evaluated is None and arguments.eval_strategy != IntervalStrategy.NO:
        when = IntervalStrategy(arguments.eval_strategy).value
        raise ConfigError(
            f"eval_strategy is {when}, but there are no rows to evaluate on. "
            "Give --validation_file or a --validation_share above 0."
        )
    trained = prepared.splits.get("train", evaluated)
    data, preferences = prepared.data, prepared.kind.trainer == "dpo"
    assert data is not None
    values = {**arguments.to_dict(), "hub_token": arguments.hub_token}
    # Rows are cut already, but for packing, which needs the length.
    values["max_length"] = prepared.length if not preferences and data.packing else None
    options: dict[str, Any] = {}
    config: Any
    if preferences:
        config = DPOConfig(**values, beta=data.dpo_beta, disable_dropout=False)
        options["ref_model"] = _reference(prepared)
    else:
        config = SFTConfig(**values, packing=data.packing, eval_packing=False, completion_only_loss=False)
    kind: Any = PreferenceTrainer if preferences else LanguageTrainer
    with quiet_datasets():
        trainer = kind(
            model=prepared.model,
            args=config,
            train_dataset=trained,
            eval_dataset=evaluated,
            processing_class=prepared.processor,
            **options,
            **ours,
        )
    _drop_reference_adapter(trainer.model)
    return trainer


def _reference(prepared: Prepared) -> nn.Module | None:
    """What preferences are measured against, where it is not the model without its adapter."""
    if isinstance(prepared.model, PeftModel):
        return None
    assert prepared.reference is not None
    return prepared.reference().eval().requires_grad_(False)


def _drop_reference_adapter(model: Any) -> None:
    """Takes the copy away that TRL makes of an adapter: a new one leaves the model as it is, so none is needed."""
    if isinstance(model, PeftModel) and _REFERENCE_ADAPTER in model.peft_config:
        model.delete_adapter(_REFERENCE_ADAPTER)
