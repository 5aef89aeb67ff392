"""What all kinds that train a language model from left to right have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from meft.loading import models as loading

from ..data.base import TaskSpec
from .base import TaskKind


class CausalModelling(TaskKind):
    """Texts learnt token by token, by a model that has its head already."""

    what = "causal language modelling"
    task_type = "CAUSAL_LM"
    auto_model = AutoModelForCausalLM

    def configure(self, config: PretrainedConfig, spec: TaskSpec, processor: Any) -> None:
        """A language model takes text as it is."""

    def check_model(self, model: PreTrainedModel, processor: Any, name: str) -> None:
        super().check_model(model, processor, name)
        loading.check_causal(model, name)

    def heads(self, model: PreTrainedModel, new_modules: Sequence[str]) -> tuple[str, ...]:
        """A pretrained language model has its head; only what started at random is trained in full."""
        return tuple(new_modules)
