"""What is to be done with a stack of layers: the options of `MeftConfig` and `make_reversible`, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meft.engine.arithmetic import (
    MAX_FRACTION_BITS,
    MIN_FRACTION_BITS,
    Arithmetic,
    AutomaticGrid,
    FixedPoint,
    FloatArithmetic,
)
from meft.engine.couplings import Coupling, OutputRule, make_coupling
from meft.errors import ConfigError

ARITHMETICS = ("exact", "float")
BACKWARDS = ("reversible", "cached")

# Below this many tokens tiles save little and cost time. A quarter of the tokens at once takes a feed-forward below the
# attention in memory, and more tiles would only cost time (research/log.md).
_TILED_FROM, _TILES = 1024, 4


@dataclass(frozen=True)
class Plan:
    """How a stack of layers is run.

    Attributes:
        coupling: how streams pass through a layer; None leaves the layers uncoupled, as they are.
        arithmetic: how streams are stored and inverted.
        reversible: rebuild activations in the backward pass; otherwise keep them.
        frozen_layers: lowest layers that run as they are, without adapters or gradients of their weights.
        cached_layers: highest layers that keep their activations.
        drift_tolerance: relative error of rebuilt streams past which float arithmetic warns.
        anchor_every: layers between streams that are kept, or None.
        tile_size: tokens that a feed-forward block is given at once, "auto", or None for all of them.
        post_norm: whether the layers were taken as ending in a norm, where the coupling's own factors depend on it.
        feedforward_module: the child of a layer beside which the parallel adapter stands; None for the known one.
    """

    coupling: Coupling | None
    arithmetic: Arithmetic
    reversible: bool
    frozen_layers: int
    cached_layers: int
    drift_tolerance: float
    anchor_every: int | None = None
    feedforward_module: str | None = None
    tile_size: int | str | None = "auto"
    post_norm: bool = True

    @classmethod
    def make(
        cls,
        *,
        coupling: str | None,
        lam: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        output: OutputRule | None = None,
        arithmetic: str = "exact",
        backward: str = "reversible",
        fraction_bits: int | str = "auto",
        frozen_layers: int = 0,
        cached_layers: int = 0,
        drift_tolerance: float = 1e-2,
        anchor_every: int | None = None,
        feedforward_module: str | None = None,
        granularity: str = "layer",
        tile_size: int | str | None = "auto",
        sign: str = "fixed",
        compensated: bool | None = None,
        post_norm: bool = True,
    ) -> Plan:
        """Checks the options and builds the plan they describe; their meaning is `meft.MeftConfig`'s.

        `post_norm` says whether every stack's layers end in a norm (`architectures.ends_in_norm`), which decides about
        the factors and the output rule that were left open.

        Raises:
            ConfigError: an option has a value that is not valid, alone or beside the others.
        """
        check_choice("arithmetic", arithmetic, ARITHMETICS)
        check_choice("backward", backward, BACKWARDS)
        if fraction_bits != "auto":
            check_integer("fraction_bits", fraction_bits, MIN_FRACTION_BITS, MAX_FRACTION_BITS, other="auto")
        check_integer("frozen_layers", frozen_layers, 0)
        check_integer("cached_layers", cached_layers, 0)
        if anchor_every is not None:
            check_integer("anchor_every", anchor_every, 1)
        if tile_size is not None and tile_size != "auto":
            check_integer("tile_size", tile_size, 1)
        if not isinstance(drift_tolerance, int | float) or not drift_tolerance >= 0:
            raise ConfigError(
                f"drift_tolerance={drift_tolerance!r} is no relative error. Valid: a number from 0 up. Use 1e-2, say."
            )
        numbers: Arithmetic = FloatArithmetic()
        if arithmetic == "exact":
            numbers = FixedPoint(fraction_bits) if isinstance(fraction_bits, int) else AutomaticGrid()
        steps = None
        if coupling is not None:
            steps = make_coupling(
                coupling,
                lam=lam,
                beta=beta,
                gamma=gamma,
                output=output,
                granularity=granularity,
                sign=sign,
                compensated=compensated,
                post_norm=post_norm,
            )
            steps.check(numbers)
        reversible = backward == "reversible"
        return cls(
            steps,
            numbers,
            reversible,
            frozen_layers,
            cached_layers,
            float(drift_tolerance),
            anchor_every,
            feedforward_module,
            tile_size,
            post_norm,
        )

    def __str__(self) -> str:
        """The plan as its options: "coupling 'momentum', gamma 0.0625, output 'newest', ...; post-norm layers"."""
        options = ", ".join(f"{name} {value!r}" for name, value in _options(self).items() if value is not None)
        return f"{options}; {'post-norm' if self.post_norm else 'pre-norm'} layers"

    def tile(self, tokens: int) -> int | None:
        """How many of so many tokens to give a feed-forward block at once; None for all."""
        if self.tile_size == "auto":
            return -(-tokens // _TILES) if tokens >= _TILED_FROM else None
        assert not isinstance(self.tile_size, str)
        return self.tile_size

    def differences(self, other: Plan) -> str:
        """Says in which options another plan differs from this one: "gamma 0.25, not 0.125"; empty if in none."""
        mine, theirs = _options(self), _options(other)
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


def _options(plan: Plan) -> dict[str, Any]:
    """The options of a plan by the names that users know."""
    coupling = plan.coupling
    known = {
        "arithmetic": "exact" if plan.arithmetic.exact else "float",
        "backward": "reversible" if plan.reversible else "cached",
        "fraction_bits": _fraction_bits(plan.arithmetic),
        **{name: getattr(plan, name) for name in ("frozen_layers", "cached_layers", "drift_tolerance")},
        **{name: getattr(plan, name) for name in ("anchor_every", "feedforward_module", "tile_size")},
    }
    return known if coupling is None else {"coupling": coupling.name, **coupling.options(), **known}


def _fraction_bits(arithmetic: Arithmetic) -> int | str | None:
    if isinstance(arithmetic, AutomaticGrid):
        return "auto"
    return arithmetic.fraction_bits if isinstance(arithmetic, FixedPoint) else None  # type: ignore[return-value]


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ConfigError if an option is none of its choices."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown. Valid: {', '.join(map(repr, choices))}. Choose one of these.")


def check_integer(name: str, value: Any, lowest: int, highest: int | None = None, *, other: str | None = None) -> None:
    """Raises ConfigError if an option is no integer of its range; `other` is a word that is valid besides."""
    bounded = f"{lowest} to {highest}" if highest is not None else f"at least {lowest}"
    valid = f"an integer, {bounded}" if other is None else f"{other!r}, or an integer, {bounded}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} is a {type(value).__name__}. Valid: {valid}.")
    if value < lowest or (highest is not None and value > highest):
        raise ConfigError(f"{name}={value} is out of range. Valid: {valid}.")
