"""Every option of a reversible stack and of the ways to train, declared once.

An entry is all that an option needs besides its use. From the table are made: the fields of `MeftConfig`, the arguments
of `make_reversible`, the plan of a stack, the options of `meft train`, `evaluate`, `verify`, `estimate` and of sweep
recipes, what a saved adapter's folder records, and the page docs/options.md.

Where an option is used follows from its `part`:

| part         | where its value goes                                                   |
|--------------|------------------------------------------------------------------------|
| "coupling"   | `couplings.make_coupling` takes it, under its name                     |
| "arithmetic" | `plan.make_arithmetic` takes it, under its name                        |
| "backward"   | the plan's `reversible`                                                |
| "plan"       | an attribute of the plan of its name, where engine and layers read it  |
| "adapter"    | read off the configuration by the tuner, which makes the adapters      |
| "model"      | read by `make_reversible` and the tuner, which change the model        |
| "lora"       | PEFT's LoRA takes it                                                   |

To add an option: an entry here, its use, and `python -m meft.options docs/options.md` for the page.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from meft.engine.arithmetic import MAX_FRACTION_BITS, MIN_FRACTION_BITS
from meft.engine.couplings import COUPLINGS, GRANULARITIES, SAVED_BEFORE, SIGNS, own_settings
from meft.engine.kernels.choice import KERNELS

from .places import INIT_STD, PLACES
from .values import Checked, Choice, Flag, Integer, Kind, Names, Number, OutputRule, Text

CONFIG, FUNCTION, METHOD = "MeftConfig", "make_reversible", "meft train"
"""Who reads an option: the PEFT configuration, `make_reversible`, and the ways to train by name, on command lines and
in `apply_method` and `estimate`."""
EVERYWHERE = frozenset({CONFIG, FUNCTION, METHOD})

ADAPTER_ONLY = "adapter"
"""The coupling of adapters on ordinary layers, which couples nothing."""
_WITH_ADAPTERS = (ADAPTER_ONLY, *COUPLINGS)


class Unset(enum.Enum):
    """The value of an option that was not given, where None is a value like any other."""

    UNSET = enum.auto()

    def __repr__(self) -> str:
        return "left out"


UNSET = Unset.UNSET


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: in Python, on command lines (`--name`), in recipes and in saved folders.
        kind: what its values are.
        default: what it is where it is left out. None, where None is said to mean something.
        help: what it does, for a stranger; one sentence or two. Range and default are added from the other entries.
        part: what it is a part of (the table above).
        none: what None means; without it None is not valid.
        words: other values that are valid, and what they mean: {"auto": "..."}.
        own: what None stands for, given the name of the coupling and whether the layers end in a norm. What was used is
            recorded in saved folders, so that an adapter keeps its meaning when defaults change.
        before: what it was, given the name of the coupling, in folders that say nothing of it, or that version 0.1.0
            saved with None.
        methods: the ways to train that it means something to; it is refused beside others on command lines. None: all.
        shared: beside a method that lacks it, it is passed over and not refused, so that one set of options serves a
            comparison of methods.
        readers: who takes it.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    part: str
    none: str | None = None
    words: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    own: Callable[[str | None, bool], Any] | None = None
    before: Callable[[str | None], Any] | None = None
    methods: tuple[str, ...] | None = None
    shared: bool = False
    readers: frozenset[str] = EVERYWHERE

    @property
    def annotation(self) -> Any:
        """The type of its values."""
        kind = self.kind.annotation
        kind = kind | str if self.words and kind is not str else kind
        return kind | None if self.none is not None else kind

    @property
    def valid(self) -> str:
        """Its values in words."""
        return f"{self.kind.valid}{self._or_else()}"

    @property
    def left_out(self) -> Any:
        """What ways to train have where it is not given; `UNSET` where a value given beside others is refused."""
        return self.default if self.shared or not self.default else UNSET

    def check(self, value: Any) -> None:
        """Raises ConfigError if a value is not valid by itself."""
        if value is None and self.none is not None:
            return
        if isinstance(value, str) and value in self.words:
            return
        self.kind.check(self.name, value, self._or_else())

    def normal(self, value: Any) -> Any:
        """A valid value as it is kept: lists for any collection of names, a tuple for an output rule."""
        if isinstance(self.kind, Names) and value is not None:
            return list(value)
        return tuple(value) if isinstance(value, list) else value

    def read(self, word: Any) -> Any:
        """The value that a word stands for; a word that stands for none stays, and `check` refuses it."""
        if isinstance(word, list | tuple) and self.kind.several:
            return self.read(word[0]) if len(word) == 1 and word[0].lower() == "none" else list(word)
        if not isinstance(word, str):
            return word
        if word.lower() == "none" and self.none is not None:
            return None
        return word if word in self.words else self.kind.read(word)

    def write(self, value: Any) -> Any:
        """The word, number or list of words that `read` turns into a value again; what JSON has stays as it is."""
        if value is None:
            return "none"
        if isinstance(self.kind, OutputRule) and not isinstance(value, str):
            return ":".join(map(str, value))
        return list(value) if isinstance(value, tuple | set | frozenset) else value

    def resolve(self, coupling: str | None, value: Any, post_norm: bool = True) -> Any:
        """The value that an option has under a coupling on layers that end in a norm or on others, where it is open."""
        return self.own(coupling, post_norm) if value is None and self.own is not None else value

    def means_something(self, method: str) -> bool:
        """Whether a way to train has this option."""
        return self.methods is None or method in self.methods

    def given(self, value: Any) -> bool:
        """Whether a value asks for something: defaults that are nothing (None, 0) may stand beside any method."""
        return value is not UNSET and (bool(self.default) or value != self.default)

    def help_text(self) -> str:
        """Help with range and default, for a command line."""
        left_out = self.none if self.default is None else self.words.get(str(self.default))
        default = str(self.write(self.default))
        meaning = f" ({left_out})" if left_out and self.default is not None else ""
        for_whom = "" if self.methods is None else f" For {', '.join(self.methods)}."
        valid = f" Valid: {self.valid}." if not isinstance(self.kind, Flag) else ""
        return f"{self.help}{valid} Left out: {left_out if self.default is None else default + meaning}.{for_whom}"

    def _or_else(self) -> str:
        others = [*map(repr, self.words), *(["None"] if self.none is not None else [])]
        return "".join(f" or {other}" for other in others)


def _own(name: str) -> Callable[[str | None, bool], Any]:
    def own(coupling: str | None, post_norm: bool) -> Any:
        return getattr(own_settings(coupling, post_norm=post_norm), name) if coupling in COUPLINGS else None

    return own


def _before(name: str) -> Callable[[str | None], Any]:
    return lambda coupling: getattr(SAVED_BEFORE.get(coupling or ""), name, None)


def _all_places(coupling: str | None, post_norm: bool = True) -> list[str]:
    return list(PLACES.get(coupling or "", {}).values())


_FACTOR = "in exact arithmetic 1/m with m an integer up to 256"
_METHOD = frozenset({METHOD})
_ADAPTERS = frozenset({CONFIG, METHOD})

OPTIONS: tuple[Option, ...] = (
    Option(
        "coupling",
        Choice((*COUPLINGS, ADAPTER_ONLY)),
        "meft1",
        "How the two streams pass through a layer (docs/exactness.md); 'adapter' trains the same adapters on the "
        "ordinary layers, which are then not reversible.",
        "coupling",
        readers=frozenset({CONFIG}),
    ),
    Option(
        "coupling",
        Choice(COUPLINGS),
        "momentum",
        "How the two streams pass through a layer, without the adapters that meft1 to meft3 have in MeftConfig.",
        "coupling",
        readers=frozenset({FUNCTION}),
    ),
    Option(
        "bottleneck_dim",
        Integer(1),
        8,
        "Width of the adapters.",
        "adapter",
        methods=_WITH_ADAPTERS,
        shared=True,
        readers=_ADAPTERS,
    ),
    Option(
        "lora_rank", Integer(1), 8, "Rank of LoRA's updates.", "lora", methods=("lora",), shared=True, readers=_METHOD
    ),
    Option(
        "lora_alpha",
        Number(),
        16,
        "LoRA scales its update by lora_alpha / lora_rank.",
        "lora",
        methods=("lora",),
        shared=True,
        readers=_METHOD,
    ),
    Option(
        "lora_dropout",
        Number(0, 1),
        0.0,
        "Dropout on the input of LoRA's updates.",
        "lora",
        methods=("lora",),
        shared=True,
        readers=_METHOD,
    ),
    Option(
        "lam",
        Number(),
        None,
        f"Factor of the first stream; {_FACTOR}.",
        "coupling",
        none="the coupling's own: 0.1, 1, 0.1 on layers that end in a norm, 1/128, 1, 1/256 on others (docs/gamma.md)",
        own=_own("lam"),
        before=_before("lam"),
        methods=("meft1", "meft2", "meft3"),
    ),
    Option(
        "beta",
        Number(),
        None,
        f"Factor of the second stream; {_FACTOR}.",
        "coupling",
        none="the coupling's own: 1, 0.1, 0.1 on layers that end in a norm, 1, 1/128, 1/256 on others (docs/gamma.md)",
        own=_own("beta"),
        before=_before("beta"),
        methods=("meft1", "meft2", "meft3"),
    ),
    Option(
        "gamma",
        Number(),
        None,
        f"Factor of momentum's difference of the streams; {_FACTOR}.",
        "coupling",
        none="1/32",
        own=_own("gamma"),
        before=_before("gamma"),
        methods=("momentum",),
    ),
    Option(
        "output",
        OutputRule(),
        None,
        "How the hidden state that leaves the stack is made of the two last streams; weighted, for momentum, is "
        "(newest + gamma * older) / (1 + gamma); sum:0.1 on a command line.",
        "coupling",
        none="the coupling's own: mean on layers that end in a norm, newest on others and for momentum, weighted if "
        "compensated",
        own=_own("output"),
        before=_before("output"),
        methods=COUPLINGS,
    ),
    Option(
        "arithmetic",
        Choice(("exact", "float")),
        "exact",
        "exact rebuilds activations bit for bit; float divides, and loses precision in each layer.",
        "arithmetic",
        methods=COUPLINGS,
    ),
    Option(
        "backward",
        Choice(("reversible", "cached")),
        "reversible",
        "reversible rebuilds activations in the backward pass; cached keeps them, the reference to compare with.",
        "backward",
        methods=COUPLINGS,
    ),
    Option(
        "fraction_bits",
        Integer(MIN_FRACTION_BITS, MAX_FRACTION_BITS),
        "auto",
        "Binary places of exact streams: their step is 2 to the minus this, and hidden states lie in "
        "+-2**(31 - fraction_bits).",
        "arithmetic",
        words=MappingProxyType({"auto": "they follow the hidden state that enters"}),
        before=lambda coupling: 16,
        methods=COUPLINGS,
    ),
    Option(
        "kernels",
        Choice(KERNELS[1:]),
        "auto",
        "What couples streams: fused Triton kernels, or plain tensor code; both give the same bits.",
        "arithmetic",
        words=MappingProxyType(
            {"auto": "the kernels on devices that Triton is installed for, and tensor code elsewhere"}
        ),
        methods=COUPLINGS,
    ),
    Option(
        "frozen_layers",
        Integer(0),
        0,
        "Lowest layers of each stack that are left as they are, without adapters or training; they have no backward "
        "pass unless something below or beside them is trained (embeddings, prompts, an encoder).",
        "plan",
        methods=_WITH_ADAPTERS,
    ),
    Option(
        "cached_layers",
        Integer(0),
        0,
        "Highest layers of each stack that keep their activations.",
        "plan",
        methods=COUPLINGS,
    ),
    Option(
        "drift_tolerance",
        Number(0, meaning="no relative error", hint=" Use 1e-2, say."),
        1e-2,
        "Relative error of rebuilt streams past which float arithmetic warns.",
        "plan",
        methods=COUPLINGS,
    ),
    Option(
        "anchor_every",
        Integer(1),
        None,
        "Keep the streams every so many layers and restart the reconstruction there, for kernels that do not repeat "
        "bit for bit; the integrity check then warns past drift_tolerance instead of raising.",
        "plan",
        none="no streams are kept",
        methods=COUPLINGS,
    ),
    Option(
        "residues",
        Choice(("device", "host")),
        "device",
        "Where what reversible layers keep to undo their divisions waits for the backward pass: on the device, or on "
        "the host, from where it is copied back ahead of its use.",
        "plan",
        methods=COUPLINGS,
    ),
    Option(
        "stacks",
        Names("a list of the stacks' names"),
        None,
        "The stacks of layers to take, or modules they lie in (vision_tower).",
        "model",
        none="all of them",
        methods=_WITH_ADAPTERS,
    ),
    Option(
        "feedforward_module",
        Text("the name of a layer's child, as 'mlp'"),
        None,
        "Child of a layer beside which the parallel adapter stands (docs/architectures.md).",
        "plan",
        none="the one that is known of the family, or has a usual name",
        methods=_WITH_ADAPTERS,
        readers=_ADAPTERS,
    ),
    Option(
        "granularity",
        Checked(GRANULARITIES),
        "layer",
        "block couples the attention and the feed-forward block of a layer in turn, so that only one of them is "
        "rebuilt at a time, in families whose layers split.",
        "coupling",
        methods=("momentum",),
    ),
    Option(
        "tile_size",
        Integer(1),
        "auto",
        "Tokens that what acts on each token alone is given at once. A layer whose stages are known runs in three: "
        "before attention in tiles, attention, after it in tiles, so that only one of them is rebuilt at a time. Of "
        "other layers, a feed-forward block that is coupled by itself (meft3, and momentum by blocks) runs in tiles.",
        "plan",
        none="all of them at once, and layers whole",
        words=MappingProxyType(
            {"auto": "from 1024 up an eighth of them, or a quarter for a feed-forward block coupled by itself"}
        ),
        methods=COUPLINGS,
    ),
    Option(
        "fused_loss",
        Flag(),
        True,
        "Take the cross-entropy of a language model in tiles, so that its logits never exist whole in training "
        "(docs/memory.md).",
        "model",
        methods=COUPLINGS,
    ),
    Option(
        "sign",
        Checked(SIGNS),
        "fixed",
        "random draws the sign of gamma in training, for each sample in each step, so that on average the plain "
        "model's layers are trained; evaluation runs these.",
        "coupling",
        methods=("momentum",),
    ),
    Option(
        "compensated",
        Flag(),
        None,
        "Make up for the slower pace that gamma gives the newest stream.",
        "coupling",
        none="no",
        own=_own("compensated"),
        before=_before("compensated"),
        methods=("momentum",),
    ),
    Option(
        "adapter_places",
        Names("a list of places of the coupling's adapters: feed_forward, layer, function or attention"),
        None,
        "Which of the coupling's adapters there are, by their places.",
        "adapter",
        none="all of them",
        own=_all_places,
        before=lambda coupling: _all_places(coupling)[: 1 if coupling == "momentum" else None],
        methods=_WITH_ADAPTERS,
        readers=_ADAPTERS,
    ),
    Option(
        "adapter_init_std",
        Number(0, below=math.inf),
        None,
        "Standard deviation of the adapters' initial weights; 0 for up-projections of zero, so that adapters start as "
        "nothing.",
        "adapter",
        none="0.02, the paper's, on layers that end in a norm, and 0 on others",
        own=lambda coupling, post_norm: INIT_STD if post_norm else 0.0,
        before=lambda coupling: INIT_STD,
        methods=_WITH_ADAPTERS,
        readers=_ADAPTERS,
    ),
    Option(
        "adapter_dropout",
        Number(0, below=1, words="a probability"),
        None,
        "Probability with which an element of a bottleneck is dropped in training, by nn.Dropout modules beside the "
        "adapters.",
        "adapter",
        none="the dropout of hidden states that the model's configuration names",
        methods=_WITH_ADAPTERS,
        readers=_ADAPTERS,
    ),
    Option(
        "adapter_norm",
        Flag(),
        False,
        "Let what an adapter reads pass through a LayerNorm of its own, which is trained.",
        "adapter",
        methods=_WITH_ADAPTERS,
        readers=_ADAPTERS,
    ),
    Option(
        "modules_to_save",
        Names(),
        None,
        "Modules trained in full and saved beside the adapters.",
        "adapter",
        none="the task's head, which PEFT adds",
        methods=("lora", "ia3", "bitfit", *_WITH_ADAPTERS),
        readers=_ADAPTERS,
    ),
)


def options_of(reader: str) -> dict[str, Option]:
    """The options that a reader takes, by name, in the table's order."""
    return {option.name: option for option in OPTIONS if reader in option.readers}


def plan_options() -> dict[str, Option]:
    """The options that make up the plan of a stack, by name."""
    parts = ("coupling", "arithmetic", "backward", "plan")
    return {option.name: option for option in OPTIONS if option.part in parts}


def checked(reader: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a reader's options, each checked by itself and as it is kept.

    Raises:
        ConfigError: one is not valid.
    """
    found = {}
    for name, option in options_of(reader).items():
        option.check(values[name])
        found[name] = option.normal(values[name])
    return found
