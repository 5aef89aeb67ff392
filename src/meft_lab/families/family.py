"""One row of the catalogue: how the tiny model of a family is made, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from meft.errors import UnsupportedModelError

from .heads import HEADS, OF_IMAGES, OF_TEXT, heads_of, labels_for, prepare
from .inputs import guessed, pixels, text, token_id, words
from .shrink import tiny_config

_DECODER_LENGTH = 5


@dataclass(frozen=True)
class Family:
    """How the tiny model of one family is made.

    Example:
        >>> family = Family("gpt_neox", {"use_parallel_residual": False}, name="gpt_neox, sequential")
        >>> model = family.build()
        >>> model(**family.batch(model)).loss

    Attributes:
        model_type: as in `config.model_type`.
        changes: attributes of its configuration that the general rules of `tiny_config` do not give.
        name: what the row is called, where one model type has several layouts; the model type otherwise.
        inputs: makes what the model is called with, from a configuration and a generator; None to go by the name of
            the model's main input.
        head: its natural head, where that is not the first of `HEADS` that Transformers has for it.
        stacks: the layer stacks that are made reversible; None for all of them.
        guessed: the model type is not in the catalogue, so that general rules are all there is.
    """

    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    inputs: Callable[[PretrainedConfig, torch.Generator], dict[str, Tensor]] | None = text
    head: str | None = None
    stacks: tuple[str, ...] | None = None
    guessed: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.model_type)

    def heads(self) -> tuple[str, ...]:
        """The heads that the installed Transformers has for the family, the natural one first."""
        found = heads_of(tiny_config(self.model_type, self.changes))
        if not found:
            raise UnsupportedModelError(
                f"No Auto class of Transformers makes a model of {self.model_type} that can be trained by itself; it "
                "is a part of other models. Try one of those."
            )
        first = self.head or found[0]
        return (first, *(head for head in found if head != first))

    def build(self, head: str | None = None, seed: int = 0) -> PreTrainedModel:
        """The family's tiny model with random weights, in training mode; the generator outside is left untouched.

        Raises:
            ConfigError: the installed Transformers has no such model type.
            UnsupportedModelError: the tiny configuration does not fit.
        """
        head = head or self.heads()[0]
        config = tiny_config(self.model_type, self.changes)
        prepare(config, head)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = HEADS[head].from_config(config)
            _perturb(model)
        return model.float().train()

    def batch(self, model: PreTrainedModel, head: str | None = None, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments for a training step of `build(head)`, labels included."""
        head = head or self.heads()[0]
        generator = torch.Generator().manual_seed(seed)
        inputs = text if head in OF_TEXT else pixels if head in OF_IMAGES else self.inputs or guessed(model)
        made = inputs(model.config, generator)
        if head == "question_answering":
            # Longformer tells the question from the text by three of them; the last one stands at the end.
            made["input_ids"][:, (2, 4)] = token_id(model.config.get_text_config(), "eos_token_id", 2)
        if head == "base" and model.config.is_encoder_decoder:
            made["decoder_input_ids"] = words(len(next(iter(made.values()))), _DECODER_LENGTH, generator)
        return {**made, **labels_for(head, made, generator)}


def _perturb(model: PreTrainedModel) -> None:
    """Norm weights of one, biases of zero and weights near zero would hide a part that is left out or used twice."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # fixed sinusoids are computed again on loading
                parameter.add_(0.1 * torch.randn_like(parameter))
