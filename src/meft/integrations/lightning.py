"""`ReversibleCallback` for Lightning's Trainer.

Example:
    >>> from meft.integrations.lightning import ReversibleCallback
    >>> lightning.Trainer(max_epochs=1, callbacks=[ReversibleCallback(gamma=1 / 32)]).fit(module, rows)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meft.errors import MissingPackageError
from meft.options import FUNCTION, documented, option_arguments, options_of

from .reversible import Conversion

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]
    except ImportError:
        raise MissingPackageError(
            "meft.integrations.lightning needs Lightning, which is not installed: pip install lightning. For the "
            "Trainers of Transformers and TRL use meft.ReversibleCallback."
        ) from None


class ReversibleCallback(Callback):
    """Makes the Transformers models in a LightningModule reversible while they are trained, in one line.

    Example:
        >>> Trainer(max_epochs=1, callbacks=[ReversibleCallback(gamma=1 / 32)]).fit(module, rows)

    The models become reversible when `fit` is set up, before a strategy wraps the module, or when it starts if the
    module makes them in `configure_model`. They are ordinary again when `fit` has ended, also by an exception, Ctrl-C,
    and in `validate`, `test` and `predict`. Checkpoints are the ordinary module's.

    Args:
        options: those of the table (`meft.options`).

    Raises:
        ConfigError: an option is not valid, or the model is reversible already; the latter when `fit` begins.
        UnsupportedModelError: the module holds no layer stack, or one that the coupling cannot take.
    """

    @option_arguments(FUNCTION, positional=("coupling",))
    def __init__(self, options: dict[str, Any]) -> None:
        self._conversion = Conversion(type(self).__name__, options)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and next(pl_module.parameters(), None) is not None:
            self._conversion.make(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._conversion.make(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._conversion.give_back(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._conversion.give_back(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._conversion.options)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._conversion.compare(state_dict)


ReversibleCallback.__doc__ = documented(ReversibleCallback.__doc__, options_of(FUNCTION).values())
