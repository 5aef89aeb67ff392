"""What is to be done with a stack of layers: its options (`meft.options`), checked, and what is made of them."""

from __future__ import annotations

from typing import Any

from meft.engine.arithmetic import Arithmetic, AutomaticGrid, FixedPoint, FloatArithmetic
from meft.engine.couplings import Coupling, make_coupling
from meft.errors import ConfigError
from meft.options import WithOptions, option_dataclass, plan_options

# Below this many tokens tiles save little and cost time. A quarter of the tokens at once takes a feed-forward below the
# attention in memory, and more tiles would only cost time (research/log.md).
_TILED_FROM, _TILES = 1024, 4
# A stage's tile beside attention with its gradients: an eighth of a feed-forward is less than these in most layers.
_STAGE_TILES = 8


def _options_of_part(part: str) -> list[str]:
    return [name for name, option in plan_options().items() if option.part == part]


@option_dataclass([option for option in plan_options().values() if option.part == "plan"], frozen=True)
class Plan(WithOptions):
    """How a stack of layers is run.

    Attributes:
        coupling: how streams pass through a layer; None leaves the layers uncoupled, as they are.
        arithmetic: how streams are stored and inverted.
        reversible: rebuild activations in the backward pass; otherwise keep them.
        post_norm: whether the layers were taken as ending in a norm, where the coupling's own factors depend on it.
        options: those of the table (`meft.options`).
    """

    coupling: Coupling | None
    arithmetic: Arithmetic
    reversible: bool
    post_norm: bool = True

    @classmethod
    def make(cls, *, coupling: str | None, post_norm: bool = True, **options: Any) -> Plan:
        """Checks the options and builds the plan they describe; their meaning is `meft.MeftConfig`'s.

        Args:
            coupling: its name; None for layers that stay as they are.
            post_norm: whether every stack's layers end in a norm (`architectures.ends_in_norm`), which decides about
                what was left to the coupling.
            **options: the others that make up a plan (`meft.options.plan_options`); those left out have their defaults.

        Raises:
            ConfigError: an option has a value that is not valid, alone or beside the others.
            TypeError: there is no such option.
        """
        known = plan_options()
        for name in options:
            if name not in known:
                raise TypeError(f"Plan.make() got an unexpected keyword argument {name!r}. Valid: {', '.join(known)}.")
        values: dict[str, Any] = {}
        for name, option in known.items():
            value = coupling if name == "coupling" else options.get(name, option.default)
            if name == "coupling" and coupling is None:
                continue
            option.check(value)
            values[name] = option.normal(value)
        arithmetic = make_arithmetic(**{name: values[name] for name in _options_of_part("arithmetic")})
        steps = None
        if coupling is not None:
            chosen = {name: values[name] for name in _options_of_part("coupling") if name != "coupling"}
            # What the coupling has no such option for stays out, so that its own error speaks of what was given.
            given = {name: value for name, value in chosen.items() if value is not None}
            steps = make_coupling(coupling, **given, post_norm=post_norm)
            steps.check(arithmetic)
        parts = {name: known[name].resolve(coupling, values[name], post_norm) for name in _options_of_part("plan")}
        return cls(steps, arithmetic, values["backward"] == "reversible", post_norm=post_norm, **parts)

    def options(self) -> dict[str, Any]:
        """The options by the names that users know, with the values that they were resolved to."""
        coupling = {} if self.coupling is None else {"coupling": self.coupling.name, **self.coupling.options()}
        return {
            **coupling,
            "arithmetic": "exact" if self.arithmetic.exact else "float",
            "backward": "reversible" if self.reversible else "cached",
            "fraction_bits": _fraction_bits(self.arithmetic),
            "kernels": self.arithmetic.kernels,
            **{name: getattr(self, name) for name in _options_of_part("plan")},
        }

    def __str__(self) -> str:
        """The plan as its options: "coupling 'momentum', gamma 0.0625, output 'newest', ...; post-norm layers"."""
        options = ", ".join(f"{name} {value!r}" for name, value in self.options().items() if value is not None)
        return f"{options}; {'post-norm' if self.post_norm else 'pre-norm'} layers"

    def tile(self, tokens: int) -> int | None:
        """How many of so many tokens to give a feed-forward block at once; None for all."""
        if self.tile_size == "auto":
            return -(-tokens // _TILES) if tokens >= _TILED_FROM else None
        return None if self.tile_size is None else int(self.tile_size)

    def stage_tile(self, tokens: int) -> int | None:
        """How many of so many tokens to give a token-wise stage at once; None for a layer that runs whole."""
        if self.tile_size == "auto":
            return -(-tokens // _STAGE_TILES) if tokens >= _TILED_FROM else None
        return None if self.tile_size is None else int(self.tile_size)

    def differences(self, other: Plan) -> str:
        """Says in which options another plan differs from this one: "gamma 0.25, not 0.125"; empty if in none."""
        mine, theirs = self.options(), other.options()
        names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
        return "; ".join(f"{name} {theirs.get(name)!r}, not {mine.get(name)!r}" for name in names)

    def check_depth(self, name: str, depth: int) -> None:
        """Raises ConfigError if a stack of `depth` layers is too shallow for the frozen and cached layers."""
        if self.frozen_layers >= depth:
            raise ConfigError(
                f"frozen_layers={self.frozen_layers} leaves nothing to train: {name} has {depth} layers. Use at most "
                f"frozen_layers={depth - 1}."
            )
        if self.frozen_layers + self.cached_layers > depth:
            raise ConfigError(
                f"frozen_layers={self.frozen_layers} and cached_layers={self.cached_layers} are more than the {depth} "
                f"layers of {name}. Their sum must be at most {depth}: use at most "
                f"cached_layers={depth - self.frozen_layers}."
            )


def make_arithmetic(arithmetic: str, fraction_bits: int | str, kernels: str) -> Arithmetic:
    """Makes the arithmetic that the options of this part ask for."""
    if arithmetic == "float":
        if kernels == "triton":
            raise ConfigError(
                'kernels="triton" does not go with arithmetic="float", which has no kernels. Valid there: "auto" and '
                '"reference", which are the same. Leave kernels out, or choose arithmetic="exact".'
            )
        return FloatArithmetic()
    if isinstance(fraction_bits, int):
        return FixedPoint(fraction_bits, kernels=kernels)
    return AutomaticGrid(kernels=kernels)


def _fraction_bits(arithmetic: Arithmetic) -> int | str | None:
    if isinstance(arithmetic, AutomaticGrid):
        return "auto"
    return arithmetic.fraction_bits if isinstance(arithmetic, FixedPoint) else None  # type: ignore[return-value]
