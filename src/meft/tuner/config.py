"""`MeftConfig`: the options of the PEFT method."""

from __future__ import annotations

import os
from dataclasses import field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from meft.backbone.plan import Plan
from meft.engine.couplings import COUPLINGS
from meft.errors import CheckpointError, ConfigError
from meft.options import (
    ADAPTER_ONLY,
    CONFIG,
    WithOptions,
    check_choice,
    check_places,
    checked,
    option_dataclass,
    options_of,
    plan_options,
    shown,
)
from meft.storage.claims import read_object
from meft.storage.files import check_safetensors

from .peft_type import MEFT

SETTINGS = tuple(name for name, option in options_of(CONFIG).items() if option.own is not None)
"""What may be left open, and is filled in when the adapter is put into a model."""


@option_dataclass(options_of(CONFIG).values())
class MeftConfig(WithOptions, PeftConfig):
    """Options of MEFT as a PEFT method.

    Example:
        >>> model = get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS", coupling="meft1", bottleneck_dim=8))

    Args:
        task_type: as for any PEFT method: "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM",
            "FEATURE_EXTRACTION", or None.
        options: those of the table (`meft.options`).

    What was left open is filled in when the adapter is put into a model, so that a saved configuration says what was
    used. One that was saved by version 0.1.0, which did not say, keeps the values of that version.

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
        self.filled: dict[str, Any] = {}
        values = checked(CONFIG, vars(self))
        _check_base_layers(self.base_layers)
        places = values["adapter_places"]
        if places is not None:
            values["adapter_places"] = check_places(places, values["coupling"])
        for name, value in values.items():
            setattr(self, name, value)
        if self.target_modules is not None:
            raise ConfigError(
                f"target_modules={self.target_modules!r} is not an option of MEFT, which takes every layer of every "
                "stack. Use frozen_layers to leave the lowest ones as they are."
            )
        if self.coupling == ADAPTER_ONLY:
            self._refuse_coupling_options()
        # Injection fills in both, and version 0.1.0 knew one of them only.
        if self.base_layers is not None and places is None:
            for name, value in saved_before(self.coupling).items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        self.plan()

    def fill_in(self, plan: Plan) -> None:
        """Writes what a plan for this configuration took where nothing was chosen, for the saved folder to say."""
        known = plan.options()
        self.filled = {}
        for name in SETTINGS:
            option = options_of(CONFIG)[name]
            if getattr(self, name) is None and option.means_something(self.coupling):
                value = known[name] if name in known else option.resolve(self.coupling, None, plan.post_norm)
                self.filled[name] = value
                setattr(self, name, value)

    def reopen(self) -> None:
        """Takes back what `fill_in` wrote for one model, since another may want something else."""
        for name, value in self.filled.items():
            if getattr(self, name) == value:
                setattr(self, name, None)
        self.filled = {}

    def plan(self, post_norm: bool = True) -> Plan:
        """Builds the checked plan these options describe, for layers that end in a norm or for others."""
        options = {name: getattr(self, name) for name in plan_options() if name in options_of(CONFIG)}
        coupling = None if self.coupling == ADAPTER_ONLY else self.coupling
        return Plan.make(**{**options, "coupling": coupling}, post_norm=post_norm)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> Any:
        """Reads a saved configuration as a dictionary, with what version 0.1.0 took where it says nothing."""
        path = Path(path_json_file)
        found = {name: value for name, value in read_object(path).items() if name != "runtime_config"}
        if found.get("peft_type") == MEFT:
            if "coupling" not in found:
                valid = ", ".join(map(repr, (*COUPLINGS, ADAPTER_ONLY)))
                raise CheckpointError(
                    f"{path} does not say its coupling, without which its weights have no meaning. Valid: {valid}. "
                    "Copy the adapter again, or write in the coupling that it was trained with."
                )
            check_choice("coupling", found["coupling"], (*COUPLINGS, ADAPTER_ONLY))
            # None means what it means today since places are saved; an option that came later is not there at all.
            first_version = "adapter_places" not in found
            for name, value in saved_before(found["coupling"]).items():
                if name not in found or (first_version and found[name] is None):
                    found[name] = value
        return found

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Reads the options of a saved adapter, and looks whether its weights are whole.

        Raises:
            CheckpointError: the folder's weights are truncated or no safetensors file, or the configuration cannot be
                read or does not name its coupling.
        """
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"The adapter_config.json of {pretrained_model_name_or_path} cannot be read: {error}. Copy the adapter "
                "again."
            ) from error
        config.loaded_from = str(pretrained_model_name_or_path)
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        weights = Path(folder, SAFETENSORS_WEIGHTS_NAME)
        if weights.is_file():
            check_safetensors(weights)
        return config

    def _refuse_coupling_options(self) -> None:
        for name, option in options_of(CONFIG).items():
            value = getattr(self, name)
            if option.part == "coupling" and name != "coupling" and value != option.default:
                raise ConfigError(
                    f'{name}={value!r} was given, but coupling="adapter" couples nothing. Leave {name} out, or choose '
                    f"one of {', '.join(COUPLINGS)}."
                )


def _check_base_layers(layers: Any) -> None:
    known = {"layer": str, "layers": int, "hidden_size": int}
    whole = isinstance(layers, list) and all(
        isinstance(stack, dict) and all(isinstance(stack.get(name), kind) for name, kind in known.items())
        for stack in layers
    )
    if layers is not None and not whole:
        raise ConfigError(
            f"base_layers={shown(layers)} does not describe layer stacks. Valid: None, or a list of the layer's name, "
            "the number of layers and hidden_size of each. Leave it None; it is filled in when the adapter is put into "
            "a model."
        )


def saved_before(coupling: str) -> dict[str, Any]:
    """What version 0.1.0 took for a coupling, where its saved configurations say null or nothing."""
    return {
        name: option.before(coupling)
        for name, option in options_of(CONFIG).items()
        if option.before is not None and option.means_something(coupling)
    }
