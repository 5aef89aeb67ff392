"""The couplings: how two streams pass through a layer, forward and inverse, in any arithmetic.

Two streams x1, x2 have the shape of the hidden state, and both start as it. Each layer computes

    y1 = lam  * x1 + F(x2)
    y2 = beta * x2 + G(y1)
    (x1, x2) <- (y2, y1) if switch else (y1, y2)

and, since each line changes one stream by a function of the other, is undone line by line:

    x2 = (y2 - G(y1)) / beta
    x1 = (y1 - F(x2)) / lam

So a coupling is a list of steps, "add to this stream a function of that one". `momentum` has one step,
y1 = F(x2) - gamma * (x2 - x1): it scales the difference x1 - x2 where the others scale x1. With granularity "block" it
takes that step twice a layer, first with the attention block as F, then with the feed-forward block as G, so that only
one of them is rebuilt at a time.

With sign "random" `momentum` draws s = +1 or -1 in training, for each sample in each step, and computes
y1 = F(x2) - s * gamma * (x2 - x1). On average gamma is 0, and at gamma 0 the network is the plain model: so it is in
evaluation. A step takes s times the difference of the streams, which loses nothing, and goes on as without a sign; its
inverse multiplies by s once more.

| coupling   | F                                  | G                                  | lam | beta | switch | output |
|------------|------------------------------------|------------------------------------|-----|------|--------|--------|
| `meft1`    | layer, adapter beside feed-forward | adapter                            | 0.1 | 1    | yes    | mean   |
| `meft2`    | adapter                            | layer, adapter beside feed-forward | 1   | 0.1  | yes    | mean   |
| `meft3`    | attention block, adapter on output | feed-forward block, adapter beside | 0.1 | 0.1  | no     | mean   |
| `momentum` | layer, adapter beside feed-forward | none                               | gamma 1/4  | yes    | newest |
| by blocks  | attention block                    | feed-forward block, adapter beside | gamma 1/4  | no     | newest |

Sources: MEFT, Liao, Tan and Monz 2023 (arXiv 2306.00477), section 3; RevNet, Gomez et al. 2017; momentum residual
networks, Sander et al. 2021 (arXiv 2102.07870); random signs, Zhang et al. 2024 (BDIA transformers, arXiv 2407.09093).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from meft.errors import ConfigError

from .arithmetic import Arithmetic, Coupled

Streams = tuple[Tensor, Tensor]
OutputRule = Literal["mean", "newest"] | tuple[str, float] | Sequence[str | float]

COUPLINGS = ("meft1", "meft2", "meft3", "momentum")
GRANULARITIES = ("layer", "block")
SIGNS = ("fixed", "random")


@dataclass(frozen=True)
class Step:
    """streams[target] <- factor * streams[target] + function(streams[source]).

    With `difference`, factor scales streams[target] - streams[source] instead, and has a sign for each sample: "fixed"
    is +1, "random" is drawn in training, "always" in evaluation too.
    """

    function: Literal["F", "G"]
    target: Literal[0, 1]
    source: Literal[0, 1]
    factor: float
    difference: bool = False
    sign: Literal["fixed", "random", "always"] = "fixed"

    def signs(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Draws the signs of a step, from the generator of the device; nothing is drawn for a fixed sign.

        Args:
            shape: of the hidden state; its first dimension counts the samples.
            device: where the streams are.

        Returns:
            int8 of shape (samples, 1, ..., 1), or None for +1 everywhere.
        """
        if self.sign == "fixed":
            return None
        rows = (shape[0], *(1 for _ in shape[1:]))
        return torch.randint(0, 2, rows, dtype=torch.int8, device=device).mul_(2).sub_(1)

    def forward(
        self, arithmetic: Arithmetic, streams: Streams, f: Tensor | None, signs: Tensor | None = None
    ) -> tuple[Streams, Coupled]:
        """Applies the step; f is the value of its function. Returns the streams after it and what was computed."""
        x = streams[self.target]
        if self.difference:
            x = x - streams[self.source]
            if signs is not None:
                x.mul_(signs)
        coupled = arithmetic.couple(x, f, self.factor)
        return self.with_target(streams, coupled.stream), coupled

    def inverse(
        self,
        arithmetic: Arithmetic,
        streams: Streams,
        f: Tensor | None,
        residue: Tensor | None,
        signs: Tensor | None = None,
        *,
        in_place: bool = False,
    ) -> Streams:
        """Undoes the step; streams are those after it. Returns those before it, in their memory if `in_place`."""
        x = arithmetic.uncouple(streams[self.target], f, self.factor, residue, in_place=in_place)
        if self.difference:
            if signs is not None:
                x = torch.mul(x, signs, out=x if in_place else None)
            x = torch.add(x, streams[self.source], out=x if in_place else None)
        return self.with_target(streams, x)

    def scaled(self, gradient: Tensor, signs: Tensor | None) -> Tensor:
        """The gradient of what the factor scales, from that of the step's result."""
        result = gradient if self.factor == 1 else gradient * self.factor
        return result if signs is None else result * signs

    def with_target(self, streams: Streams, value: Tensor) -> Streams:
        """The streams with another one in the place of that which the step changes."""
        return (value, streams[1]) if self.target == 0 else (streams[0], value)


@dataclass(frozen=True)
class Coupling:
    """The steps of one layer, what happens to the streams after them, and how the last layer's streams are read.

    Attributes:
        name: one of `COUPLINGS`.
        steps: applied in order; the inverse undoes them in reverse order.
        switch: whether the streams change places after the steps.
        newest: index, after switching, of the stream that holds the pretrained layer's output.
        output: weights (older, newest) of the streams in the hidden state that leaves the stack.
        splits: whether F and G are the attention block and the feed-forward block of a layer.
    """

    name: str
    steps: tuple[Step, ...]
    switch: bool
    newest: Literal[0, 1]
    output: tuple[float, float]
    splits: bool = False

    @property
    def random(self) -> bool:
        """Whether signs are drawn in training only, and the network is the plain model in evaluation."""
        return any(step.sign == "random" for step in self.steps)

    def options(self) -> dict[str, Any]:
        """The options of `make_coupling` that make this coupling, but for its name."""
        factors = {name: step.factor for name, step in zip(_factor_names(self.name), self.steps, strict=False)}
        granularity = "block" if self.splits and self.name == "momentum" else "layer"
        return {**factors, "output": self.output, "granularity": granularity, "sign": self.steps[0].sign}

    def switched(self, pair: tuple) -> tuple:
        """Switches a pair (streams, gradients) if this coupling does; it is its own inverse."""
        return (pair[1], pair[0]) if self.switch else (pair[0], pair[1])

    def weights(self) -> tuple[float, float]:
        """Weights of the streams (x1, x2) in the hidden state that leaves the stack."""
        older, newest = self.output
        return (newest, older) if self.newest == 0 else (older, newest)

    def read(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Applies the output rule to the two streams as hidden states."""
        w1, w2 = self.weights()
        if w1 == 0:
            return x2
        return x1 if w2 == 0 else w1 * x1 + w2 * x2

    def check(self, arithmetic: Arithmetic) -> None:
        """Raises ConfigError if the arithmetic cannot invert one of the factors."""
        for name, step in zip(_factor_names(self.name), self.steps, strict=False):
            arithmetic.check_factor(name, step.factor)

    def reach(self, arithmetic: Arithmetic) -> float:
        """Largest magnitude of a hidden state before a stream, or a difference of streams, overflows."""
        return arithmetic.limit / 2 if any(step.difference for step in self.steps) else arithmetic.limit


# What an option that is left open (None) is for each coupling.
_OWN: dict[str, dict[str, Any]] = {
    "meft1": {"lam": 0.1, "beta": 1.0, "output": "mean"},
    "meft2": {"lam": 1.0, "beta": 0.1, "output": "mean"},
    "meft3": {"lam": 0.1, "beta": 0.1, "output": "mean"},
    "momentum": {"gamma": 0.25, "output": "newest"},
}


def own_option(coupling: str | None, name: str) -> Any:
    """What a coupling takes for an option that is left open; None where it has no such option.

    Example:
        >>> own_option("momentum", "gamma")
        0.25
    """
    return _OWN.get(coupling or "", {}).get(name)


def make_coupling(
    name: str,
    *,
    lam: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    output: OutputRule | None = None,
    granularity: str = "layer",
    sign: str = "fixed",
) -> Coupling:
    """Builds a coupling by name.

    Example:
        >>> make_coupling("meft1", lam=1 / 8).steps[0].factor
        0.125

    Args:
        name: "meft1", "meft2", "meft3" or "momentum".
        lam: factor of the first stream (meft1, meft2, meft3); None for the coupling's own.
        beta: factor of the second stream (meft1, meft2, meft3); None for the coupling's own.
        gamma: factor of the difference of the streams (momentum); None for 1/4.
        output: "mean", "newest" or ("sum", s) for newest + s * older; None for the coupling's own.
        granularity: what momentum takes as its F: "layer", or "block" for the attention and the feed-forward block in
            turn.
        sign: that of momentum's gamma: "fixed", or "random" for a draw for each sample in each step of training.

    Raises:
        ConfigError: unknown name, a factor, granularity or sign the coupling does not have, or an output rule that is
            none.
    """
    if name not in COUPLINGS:
        raise ConfigError(
            f"coupling={name!r} is unknown. Valid: {', '.join(map(repr, COUPLINGS))}. Choose one of these."
        )
    given = {"lam": lam, "beta": beta, "gamma": gamma}
    for factor, value in given.items():
        if value is not None and factor not in _factor_names(name):
            raise ConfigError(
                f"{factor}={value!r} was given, but coupling={name!r} has no {factor}. Its factors are "
                f"{' and '.join(_factor_names(name))}: leave {factor} out or choose another coupling."
            )
    if granularity not in GRANULARITIES or (granularity == "block" and name != "momentum"):
        raise ConfigError(
            f'granularity={granularity!r} does not go with coupling={name!r}. Valid: "layer", and for "momentum" also '
            '"block"; "meft3" couples blocks as it is. Choose one of these.'
        )
    if sign not in SIGNS or (sign == "random" and name != "momentum"):
        raise ConfigError(
            f'sign={sign!r} does not go with coupling={name!r}. Valid: "fixed", and for "momentum" also "random", '
            "which draws the sign of gamma in training. Choose one of these."
        )
    weights = output_weights(own_option(name, "output") if output is None else output)
    if name == "momentum":
        own = own_option(name, "gamma") if gamma is None else gamma
        drawn: Literal["fixed", "random"] = "random" if sign == "random" else "fixed"
        steps: tuple[Step, ...] = (Step("F", 0, 1, own, difference=True, sign=drawn),)
        if drawn == "random" and weights != (0, 1):
            raise ConfigError(
                f'output={output!r} does not go with sign="random", which trains for the plain model: that has no '
                'older stream to read. Valid: "newest". Leave output out, or choose sign="fixed".'
            )
        if granularity == "layer":
            return Coupling(name, steps, switch=True, newest=1, output=weights)
        # Twice the one step with a switch: the second adds to the stream that the first one read.
        steps = (*steps, Step("G", 1, 0, own, difference=True, sign=drawn))
        return Coupling(name, steps, switch=False, newest=1, output=weights, splits=True)
    lam = own_option(name, "lam") if lam is None else lam
    beta = own_option(name, "beta") if beta is None else beta
    steps = (Step("F", 0, 1, lam), Step("G", 1, 0, beta))
    # The pretrained layer's output is y1 in meft1 and y2 in meft2 and meft3; meft1 and meft2 switch.
    newest: Literal[0, 1] = 0 if name == "meft2" else 1
    return Coupling(name, steps, switch=name != "meft3", newest=newest, output=weights, splits=name == "meft3")


def _factor_names(name: str) -> tuple[str, ...]:
    return ("gamma",) if name == "momentum" else ("lam", "beta")


def output_weights(rule: OutputRule) -> tuple[float, float]:
    """Turns an output rule into the weights (older, newest).

    Raises:
        ConfigError: it is none.
    """
    if isinstance(rule, str):
        if rule == "mean":
            return 0.5, 0.5
        if rule == "newest":
            return 0.0, 1.0
    elif isinstance(rule, list | tuple) and len(rule) == 2 and isinstance(rule[0], str) and rule[0] == "sum":
        share = rule[1]
        if isinstance(share, int | float) and not isinstance(share, bool) and abs(share) < math.inf:
            return float(share), 1.0
    raise ConfigError(
        f'output={rule!r:.80} is no output rule. Valid: "mean", "newest", ("sum", s) with s a number, for newest + s * '
        "older (sum:0.1 on a command line), or None for the coupling's own. Choose one of these."
    )
