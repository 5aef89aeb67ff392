"""`MeftConfig`: the options of the PEFT method."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from meft.backbone.adapters import INIT_STD, PLACES, check_places
from meft.backbone.plan import Plan, check_choice, check_integer
from meft.engine.couplings import COUPLINGS, SAVED_BEFORE
from meft.errors import CheckpointError, ConfigError

from .peft_type import MEFT

ADAPTER_ONLY = "adapter"
SETTINGS = ("lam", "beta", "gamma", "output", "compensated", "adapter_places", "adapter_init_std")
"""What may be left open, and is filled in when the adapter is put into a model."""


@dataclass
class MeftConfig(PeftConfig):
    """Options of MEFT as a PEFT method.

    Example:
        >>> model = get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS", coupling="meft1", bottleneck_dim=8))

    Args:
        task_type: as for any PEFT method: "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM",
            "FEATURE_EXTRACTION", or None.
        coupling: "meft1", "meft2", "meft3" or "momentum" (`couplings`); "adapter" trains the same adapters on the
            ordinary layers, which are then not reversible.
        bottleneck_dim: width of the adapters, at least 1.
        adapter_dropout: probability with which an element of a bottleneck is dropped in training, by `nn.Dropout`
            modules beside the adapters; None for the dropout of hidden states that the model's configuration names.
        adapter_init_std: standard deviation of the adapters' initial weights; 0 for up-projections of zero, so that
            adapters start as nothing. None for 0.02, the paper's, on layers that end in a norm, and 0 on others.
        adapter_norm: whether what an adapter reads passes through a `LayerNorm` of its own, which is trained.
        lam: factor of the first stream; None for the coupling's own: on layers that end in a norm the paper's (0.1, 1,
            0.1), on others smaller ones (docs/gamma.md). In exact arithmetic 1/m with m an integer up to 256, as beta
            and gamma.
        beta: factor of the second stream; None for the coupling's own (the paper's are 1, 0.1, 0.1).
        gamma: factor of `momentum`; None for 1/32.
        output: how the last streams are read: "mean", "newest", ("sum", s) for newest + s * older, "weighted" for
            (newest + gamma * older) / (1 + gamma) (`momentum`), None for the coupling's own.
        arithmetic: "exact" rebuilds activations bit for bit; "float" divides, and loses precision in each layer.
        backward: "reversible" rebuilds activations; "cached" keeps them, the reference.
        fraction_bits: binary places of exact streams: "auto" follows the hidden state that enters; 4 to 24 holds hidden
            states in +-2**(31 - fraction_bits).
        frozen_layers: lowest layers of each stack, without adapters, and without any backward pass unless something
            below or beside them is trained (new tokens, an encoder), whose gradients pass through them.
        cached_layers: highest layers of each stack, with stored activations.
        drift_tolerance: relative error of rebuilt streams past which float arithmetic warns.
        anchor_every: keep the streams every so many layers and restart the reconstruction there, for kernels that are
            not deterministic; the integrity check then warns past `drift_tolerance` instead of raising.
        stacks: names of the layer stacks to take, or of modules they lie in ("vision_tower"); None for all.
        feedforward_module: child of a layer, as "mlp", beside which the parallel adapter stands; None for the one that
            is known of the family, or has a usual name (docs/architectures.md).
        granularity: "block" couples the attention and the feed-forward block of a layer in turn, so that only one of
            them is rebuilt at a time (`momentum`, in families whose layers split).
        tile_size: tokens that a feed-forward block is given at once where it is coupled by itself ("block", `meft3`);
            "auto" for a quarter of them from 1024 up, None for all.
        fused_loss: take the cross-entropy of a language model in tiles, so that its logits never exist whole in
            training (`meft.loss`).
        sign: "random" draws the sign of gamma in training, for each sample in each step, so that on average ordinary
            layers are trained; in evaluation they are run as such, beside the adapters (`momentum`).
        compensated: make up for the slower pace that gamma gives the newest stream (`momentum`); None for no.
        adapter_places: which of the coupling's adapters there are, by their places (`backbone.adapters.PLACES`); None
            for all of them.
        modules_to_save: modules besides the adapters to train and save; PEFT adds the task's head.

    What was left open is filled in when the adapter is put into a model, so that a saved configuration says what was
    used. One that was saved by version 0.1.0, which did not say, keeps the values of that version.

    Raises:
        ConfigError: an option is not valid, alone or beside the others.
    """

    coupling: str = field(default="meft1", metadata={"help": "meft1, meft2, meft3, momentum, or adapter."})
    bottleneck_dim: int = field(default=8, metadata={"help": "Width of the adapters."})
    adapter_dropout: float | None = field(default=None, metadata={"help": "Dropout of adapters; None: the model's."})
    adapter_norm: bool = field(default=False, metadata={"help": "A layer norm before each adapter."})
    lam: float | None = field(default=None, metadata={"help": "Factor of the first stream."})
    beta: float | None = field(default=None, metadata={"help": "Factor of the second stream."})
    gamma: float | None = field(default=None, metadata={"help": "Factor of momentum."})
    output: Any = field(default=None, metadata={"help": 'mean, newest, or ["sum", s].'})
    arithmetic: str = field(default="exact", metadata={"help": "exact or float."})
    backward: str = field(default="reversible", metadata={"help": "reversible or cached."})
    fraction_bits: int | str = field(default="auto", metadata={"help": "Binary places of exact streams, or auto."})
    frozen_layers: int = field(default=0, metadata={"help": "Lowest layers without adapters and backward pass."})
    cached_layers: int = field(default=0, metadata={"help": "Highest layers with stored activations."})
    drift_tolerance: float = field(default=1e-2, metadata={"help": "Relative error past which float warns."})
    anchor_every: int | None = field(default=None, metadata={"help": "Layers between streams that are kept."})
    stacks: list[str] | None = field(default=None, metadata={"help": "Layer stacks to take; all by default."})
    feedforward_module: str | None = field(default=None, metadata={"help": "The feed-forward's name in a layer."})
    granularity: str = field(default="layer", metadata={"help": "layer, or block for momentum."})
    tile_size: int | str | None = field(default="auto", metadata={"help": "Tokens to a feed-forward block, or auto."})
    fused_loss: bool = field(default=True, metadata={"help": "Language-model losses without whole logits."})
    sign: str = field(default="fixed", metadata={"help": "fixed, or random for momentum."})
    compensated: bool | None = field(default=None, metadata={"help": "Make up for gamma's slower pace (momentum)."})
    adapter_places: list[str] | None = field(default=None, metadata={"help": "Places of the adapters; all by default."})
    adapter_init_std: float | None = field(default=None, metadata={"help": "Standard deviation of new adapters."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
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
        if isinstance(self.output, list):
            self.output = tuple(self.output)
        check_choice("coupling", self.coupling, (*COUPLINGS, ADAPTER_ONLY))
        check_integer("bottleneck_dim", self.bottleneck_dim, 1)
        if self.adapter_dropout is not None:
            _check_number("adapter_dropout", self.adapter_dropout, "a probability from 0 up to, but not, 1, or None", 1)
        if self.adapter_init_std is not None:
            valid = "a number from 0 up (0.02 is the paper's), or None for the coupling's own"
            _check_number("adapter_init_std", self.adapter_init_std, valid, float("inf"))
        if not isinstance(self.adapter_norm, bool):
            raise ConfigError(f"adapter_norm={self.adapter_norm!r} is no choice. Valid: True or False.")
        if self.target_modules is not None:
            raise ConfigError(
                f"target_modules={self.target_modules!r} is not an option of MEFT, which takes every layer of every "
                "stack. Use frozen_layers to leave the lowest ones as they are."
            )
        if self.coupling == ADAPTER_ONLY:
            self._refuse_coupling_options()
        if self.adapter_places is not None:
            self.adapter_places = check_places(self.adapter_places, self.coupling)
        # Injection fills in both, and version 0.1.0 knew one of them only.
        if self.base_layers is not None and self.adapter_places is None:
            for name, value in saved_before(self.coupling).items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        self.plan()

    def fill_in(self, plan: Plan) -> None:
        """Writes what a plan for this configuration took where nothing was chosen, for the saved folder to say."""
        taken: dict[str, Any] = {
            "adapter_places": list(PLACES[self.coupling].values()),
            "adapter_init_std": INIT_STD if plan.post_norm else 0.0,
        }
        if plan.coupling is not None:
            options = plan.coupling.options()
            names = _open_names(self.coupling)
            taken |= {name: options[name] for name in names}
        self.filled = {name: value for name, value in taken.items() if getattr(self, name) is None}
        for name, value in self.filled.items():
            setattr(self, name, value)

    def reopen(self) -> None:
        """Takes back what `fill_in` wrote for one model, since another may want something else."""
        for name, value in self.filled.items():
            if getattr(self, name) == value:
                setattr(self, name, None)
        self.filled = {}

    def plan(self, post_norm: bool = True) -> Plan:
        """Builds the checked plan these options describe, for layers that end in a norm or for others."""
        return Plan.make(
            coupling=None if self.coupling == ADAPTER_ONLY else self.coupling,
            lam=self.lam,
            beta=self.beta,
            gamma=self.gamma,
            output=self.output,
            arithmetic=self.arithmetic,
            backward=self.backward,
            fraction_bits=self.fraction_bits,
            frozen_layers=self.frozen_layers,
            cached_layers=self.cached_layers,
            drift_tolerance=self.drift_tolerance,
            anchor_every=self.anchor_every,
            feedforward_module=self.feedforward_module,
            granularity=self.granularity,
            tile_size=self.tile_size,
            sign=self.sign,
            compensated=self.compensated,
            post_norm=post_norm,
        )

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> Any:
        """Reads a saved configuration as a dictionary, with what version 0.1.0 took where it says nothing."""
        found = super().from_json_file(path_json_file, **kwargs)
        if "adapter_places" not in found and found.get("peft_type") == MEFT:
            before = saved_before(found.get("coupling", "meft1"))
            found |= {name: value for name, value in before.items() if found.get(name) is None}
        return found

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

    def _refuse_coupling_options(self) -> None:
        unset_values = {"lam": None, "beta": None, "gamma": None, "output": None, "sign": "fixed", "compensated": None}
        for name, unset in unset_values.items():
            value = getattr(self, name)
            if value != unset:
                raise ConfigError(
                    f'{name}={value!r} was given, but coupling="adapter" couples nothing. Leave {name} out, or choose '
                    f"one of {', '.join(COUPLINGS)}."
                )


def _check_number(name: str, value: Any, valid: str, below: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
        raise ConfigError(f"{name}={value!r} is out of range. Valid: {valid}. Use one of these.")


def saved_before(coupling: str) -> dict[str, Any]:
    """What version 0.1.0 took for a coupling, where its saved configurations say null or nothing."""
    places = list(PLACES.get(coupling, {}).values())
    found: dict[str, Any] = {"adapter_places": places, "adapter_init_std": INIT_STD, "fraction_bits": 16}
    if coupling == "momentum":
        found["adapter_places"] = places[:1]
    own = SAVED_BEFORE.get(coupling)
    if own is None:
        return found
    return found | {name: getattr(own, name) for name in _open_names(coupling)}


def _open_names(coupling: str) -> tuple[str, ...]:
    """The options of a coupling that have a value of its own where they are left open."""
    return ("gamma", "output", "compensated") if coupling == "momentum" else ("lam", "beta", "output")


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
