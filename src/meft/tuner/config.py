"""`MeftConfig`: the options of the PEFT method."""

from __future__ import annotations

import os
from dataclasses import field
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from meft.backbone.plan import Plan
from meft.engine.couplings import COUPLINGS
from meft.errors import CheckpointError, ConfigError
from meft.options import ADAPTER_ONLY, CONFIG, WithOptions, checked, option_dataclass, options_of, plan_options

from .peft_type import MEFT


@option_dataclass(options_of(CONFIG).values())
class MeftConfig(WithOptions, PeftConfig):
    """Options of MEFT as a PEFT method.

    Example:
        >>> model = get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS", coupling="meft1", bottleneck_dim=8))

    Args:
        task_type: as for any PEFT method: "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM",
            "FEATURE_EXTRACTION", or None.
        options: those of the table (`meft.options`).

    Raises:
        ConfigError: an option is not valid, alone or beside the others.
    """

    target_modules: None = field(default=None, metadata={"help": "Unused: MEFT takes every layer of every stack."})
    base_layers: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "The layer stacks the adapter was made for; filled in on injection."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MEFT
        # Where this object came from and went, which is not saved.
        self.loaded_from: str | None = None
        self.injected = False
        self._recorded: dict[str, Any] = {}
        for name, value in checked(CONFIG, vars(self)).items():
            setattr(self, name, value)
        if self.target_modules is not None:
            raise ConfigError(
                f"target_modules={self.target_modules!r} is not an option of MEFT, which takes every layer of every "
                "stack. Use frozen_layers to leave the lowest ones as they are."
            )
        if self.base_layers is not None:
            self._resolve_as_saved()
        elif self.coupling == ADAPTER_ONLY:
            self._refuse_coupling_options()
        self.plan()

    def plan(self) -> Plan:
        """Builds the checked plan these options describe."""
        self._reopen()
        options = {name: getattr(self, name) for name in plan_options() if name in options_of(CONFIG)}
        return Plan.make(**{**options, "coupling": None if self.coupling == ADAPTER_ONLY else self.coupling})

    def record(self, plan: Plan) -> None:
        """Notes what was left open and is known now, so that a saved adapter keeps its meaning when defaults change.

        Args:
            plan: of the stacks that the adapter stands in.
        """
        known = plan.options()
        found = {
            name: known[name] if option.later and name in known else option.resolve(self.coupling, getattr(self, name))
            for name, option in options_of(CONFIG).items()
            if option.later or option.own is not None
        }
        self._recorded |= {name: value for name, value in found.items() if getattr(self, name) != value}
        self._recorded_for = self.coupling
        for name, value in found.items():
            setattr(self, name, value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Reads the options of a saved adapter, and looks whether its weights are whole.

        Raises:
            CheckpointError: the folder's weights are truncated or no safetensors file.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.loaded_from = str(pretrained_model_name_or_path)
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        check_safetensors(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
        return config

    def _reopen(self) -> None:
        """Of a configuration that serves another coupling now, what the former one decided is open again."""
        if self._recorded and self.coupling != self._recorded_for:
            for name, value in self._recorded.items():
                if getattr(self, name) == value:
                    setattr(self, name, options_of(CONFIG)[name].default)
            self._recorded = {}

    def _resolve_as_saved(self) -> None:
        """What a saved adapter left open is what it meant when it was saved, and not what it would mean today."""
        for name, option in options_of(CONFIG).items():
            meaning = option.before or option.own
            if meaning is not None and getattr(self, name) is None:
                setattr(self, name, meaning(self.coupling))

    def _refuse_coupling_options(self) -> None:
        for name, option in options_of(CONFIG).items():
            value = getattr(self, name)
            if option.part == "coupling" and name != "coupling" and value != option.default:
                raise ConfigError(
                    f'{name}={value!r} was given, but coupling="adapter" couples nothing. Leave {name} out, or choose '
                    f"one of {', '.join(COUPLINGS)}."
                )


def check_safetensors(path: str) -> None:
    """Raises CheckpointError if a safetensors file that exists cannot be read whole."""
    if not os.path.isfile(path):
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({os.path.getsize(path)} bytes; {error}). It cannot be loaded "
            "in part. Copy it again, or save the adapter anew."
        ) from error
