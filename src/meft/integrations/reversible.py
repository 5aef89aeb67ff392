"""`ReversibleCallback`: a model is reversible while a Trainer trains it, and ordinary afterwards."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from meft.backbone.conversion import make_reversible, restore
from meft.backbone.plan import Plan
from meft.backbone.report import reversible_stacks
from meft.engine.sharding import refuse_sharded
from meft.errors import ConfigError, MeftWarning
from meft.options import FUNCTION, checked, documented, option_arguments, options_of, plan_options

from .callbacks import caller

logger = logging.get_logger(__name__)

_made: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The stacks that a `Conversion` made, with its options; what users made reversible themselves stays theirs."""


class Conversion:
    """Makes models reversible for the time of a training, and ordinary again.

    Example:
        >>> conversion = Conversion("ReversibleCallback", {"gamma": 1 / 32, ...})
        >>> conversion.make(model)
        >>> conversion.give_back(model)

    Args:
        name: what messages call it.
        options: all of `make_reversible`'s.

    Raises:
        ConfigError: an option is not valid, by itself or beside the others.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name, self.options = name, checked(FUNCTION, options)
        Plan.make(**{option: self.options[option] for option in plan_options() if option in self.options})

    def make(self, model: nn.Module) -> None:
        """Makes a model reversible; nothing happens if a conversion with these options did so before.

        Raises:
            ConfigError: it is reversible by somebody else's doing.
            UnsupportedModelError: it has no layer stack, or one that the coupling cannot take.
        """
        found = reversible_stacks(model)
        foreign = [name for name, stack in found.items() if stack not in _made]
        if foreign:
            raise ConfigError(
                f"{self.name} makes the model reversible, and {', '.join(foreign)} of {type(model).__name__} is so "
                "already: by make_reversible, or by a MEFT adapter. Leave the callback out, or give the layers back "
                "first: meft.restore(model) after make_reversible, model.unload() with an adapter."
            )
        if any(_made[stack] == self.options for stack in found.values()):
            return
        if found:  # by a callback of a run that was set up, and did not end
            restore(model)
        make_reversible(model, **self.options)
        for stack in reversible_stacks(model).values():
            _made[stack] = self.options

    def give_back(self, model: nn.Module) -> None:
        """Makes a model ordinary again, or says that it stays; nothing happens if no conversion made it reversible."""
        if not any(stack in _made for stack in reversible_stacks(model).values()):
            return
        try:
            refuse_sharded(model)
        except ConfigError:
            warnings.warn(
                f"{type(model).__name__} stays reversible after training, since its weights are spread over processes. "
                "What is saved are the ordinary model's weights, under their own names: load them in a fresh process.",
                MeftWarning,
                stacklevel=2,
            )
            return
        restore(model)

    def compare(self, recorded: Mapping[str, Any]) -> None:
        """Says that a run goes on from a checkpoint that recorded other options.

        Warns:
            MeftWarning: it does.
        """
        changed = [
            f"{name}={recorded[name]!r} there and {value!r} now"
            for name, value in self.options.items()
            if name in recorded and _plain(recorded[name]) != _plain(value)
        ]
        if changed:
            warnings.warn(
                f"This run goes on from a checkpoint that was trained with other options ({', '.join(changed)}), so "
                f"its model computes something else than the one that was saved. Give {self.name} the options of the "
                "checkpoint to go on as if it had never stopped.",
                MeftWarning,
                stacklevel=2,
            )


class ReversibleCallback(TrainerCallback, ExportableState):
    """Makes the model of a Trainer reversible while it is trained, in one line.

    Example:
        >>> Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[meft.ReversibleCallback(gamma=1 / 32)])

    Works in the Trainer of Transformers, in those of TRL (SFT, DPO, GRPO, Reward, ...), in Sentence Transformers' and
    others made from it. The weights are bit for bit those of `meft.make_reversible(model, ...)` before the Trainer
    and `meft.restore(model)` after it.

    - The model becomes reversible at the end of the Trainer's `__init__`, with the adapter that the Trainer put in, and
      before it is wrapped for several processes; with `model_init`, also each model that a run makes.
    - Checkpoints are the ordinary model's throughout. Evaluation during training is that of the coupled model.
    - `train()` gives the layers back when it ends, also by an exception or Ctrl-C, and makes them reversible again when
      it is called once more. Weights that are spread over processes (FSDP2) stay in reversible layers, with a
      `MeftWarning`.
    - A checkpoint records the options; a run that goes on from it with others says so in a `MeftWarning`.
    - `gradient_checkpointing=True` is set aside on reversible layers, with a line in the log.

    Added by `trainer.add_callback` it makes the model reversible when training begins; the first training that ends by
    an exception then leaves it reversible, until `meft.restore(model)`.

    Args:
        options: those of the table (`meft.options`).

    Raises:
        ConfigError: an option is not valid, or the model is reversible already; the latter when the Trainer is made.
        UnsupportedModelError: the model has no layer stack, or one that the coupling cannot take.
    """

    @option_arguments(FUNCTION, positional=("coupling",))
    def __init__(self, options: dict[str, Any]) -> None:
        self._conversion = Conversion(type(self).__name__, options)
        self._ended = True

    def state(self) -> dict[str, Any]:
        """What a checkpoint records of it."""
        return {"args": dict(self._conversion.options), "attributes": {}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._conversion.make(kwargs["model"])
        trainer = caller(inspect.currentframe(), Trainer)
        if trainer is not None:
            _watch(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._ended = False
        self._conversion.make(kwargs["model"])
        trainer = caller(inspect.currentframe(), Trainer)
        if trainer is not None and not _watched(trainer):
            _watch(trainer)
            logger.warning(
                f"{type(self).__name__} was added after the Trainer was made. If this training is ended by an "
                "exception, the model stays reversible until meft.restore(model). Give it in callbacks=[...] to be "
                "rid of this warning."
            )
        states: Any = state.stateful_callbacks or {}
        recorded = states.get(type(self).__name__)
        if isinstance(recorded, dict):
            self._conversion.compare(recorded.get("args", {}))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._give_back(kwargs["model"])

    def _give_back(self, model: Any) -> None:
        if not self._ended:
            self._ended = True
            self._conversion.give_back(model)


ReversibleCallback.__doc__ = documented(ReversibleCallback.__doc__, options_of(FUNCTION).values())


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _watched(trainer: Trainer) -> bool:
    return hasattr(vars(trainer).get("train"), "meft_watches")


def _watch(trainer: Trainer) -> None:
    """Has a Trainer's callbacks told of what the Trainer does not tell them: new models, and how a training ended."""
    if _watched(trainer):
        return
    train, call_model_init = trainer.train, trainer.call_model_init

    def callbacks() -> list[ReversibleCallback]:
        # Looked up each time: a resumed run puts in others, users take them out.
        return [each for each in trainer.callback_handler.callbacks if isinstance(each, ReversibleCallback)]

    @functools.wraps(train)
    def watched(*args: Any, **kwargs: Any) -> Any:
        for callback in callbacks():
            callback._ended = False
            if trainer.model_init is None:
                callback._conversion.make(trainer.model)
        try:
            return train(*args, **kwargs)
        finally:
            for callback in callbacks():
                callback._give_back(trainer.model)

    @functools.wraps(call_model_init)
    def made(*args: Any, **kwargs: Any) -> nn.Module:
        model = call_model_init(*args, **kwargs)
        for callback in callbacks():
            callback._conversion.make(model)
        return model

    watched.meft_watches = True  # type: ignore[attr-defined]
    vars(trainer).update(train=watched, call_model_init=made)
