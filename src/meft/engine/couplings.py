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

To first order a small gamma lets the newest stream of `momentum` move 1 / (1 + gamma) as fast as the plain model.
`compensated` undoes that. With f(x) = F(x) - x, the layer without its residual,

    y1 = x2 + (1 + gamma) * f(x2) - gamma * (x2 - x1) = (1 + gamma) * F(x2) - gamma * x2 - gamma * (x2 - x1)

so that the weighted mean (newest + gamma * older) / (1 + gamma), which is its output, moves by exactly f(x2) a layer.
What x1 is scaled by stays gamma, and what is added to it stays a function of x2: one division, one residue, as without.

| coupling   | F                                  | G                                  | lam | beta | switch | output |
|------------|------------------------------------|------------------------------------|-----|------|--------|--------|
| `meft1`    | layer, adapter beside feed-forward | adapter                            | 0.1 | 1    | yes    | mean   |
| `meft2`    | adapter                            | layer, adapter beside feed-forward | 1   | 0.1  | yes    | mean   |
| `meft3`    | attention block, adapter on output | feed-forward block, adapter beside | 0.1 | 0.1  | no     | mean   |
| `momentum` | layer, adapters beside and behind  | none                               | gamma 1/32 | yes    | newest |
| by blocks  | attention block                    | feed-forward, beside and behind    | gamma 1/32 | no     | newest |

The factors and output rules of `meft1`, `meft2` and `meft3` are the paper's, for layers that end in a norm (BERT's). In
a pre-norm stack, where hidden states add up, the output is the newest stream, and the factors that stand at 0.1 are
smaller: `own_settings`.

Sources: MEFT, Liao, Tan and Monz 2023 (arXiv 2306.00477), section 3; RevNet, Gomez et al. 2017; momentum residual
networks, Sander et al. 2021 (arXiv 2102.07870); random signs, Zhang et al. 2024 (BDIA transformers, arXiv 2407.09093).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from meft.errors import ConfigError

from .arithmetic import Arithmetic, Coupled, FixedPoint

Streams = tuple[Tensor, Tensor]
OutputRule = Literal["mean", "newest", "weighted"] | tuple[str, float] | Sequence[str | float]

COUPLINGS = ("meft1", "meft2", "meft3", "momentum")
GRANULARITIES = ("layer", "block")
SIGNS = ("fixed", "random")


@dataclass(frozen=True)
class Step:
    """streams[target] <- factor * streams[target] + function(streams[source]).

    With `difference`, factor scales streams[target] - streams[source] instead, and has a sign for each sample: "fixed"
    is +1, "random" is drawn in training, "always" in evaluation too. With `compensated`, what is added is function(x) +
    factor * (function(x) - x), x being streams[source].
    """

    function: Literal["F", "G"]
    target: Literal[0, 1]
    source: Literal[0, 1]
    factor: float
    difference: bool = False
    sign: Literal["fixed", "random", "always"] = "fixed"
    compensated: bool = False

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
        if arithmetic.fuses(x, f):
            from .kernels import fused

            assert isinstance(arithmetic, FixedPoint)
            coupled = fused.couple(self, arithmetic, streams, f, signs)
            return self.with_target(streams, coupled.stream), coupled
        if self.difference:
            x = x - streams[self.source]
            if signs is not None:
                x.mul_(signs)
        coupled = arithmetic.couple(x, self._added(arithmetic, streams, f), self.factor)
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
        checksums: list[Tensor] | None = None,
    ) -> Streams:
        """Undoes the step; streams are those after it. Returns those before it, in their memory if `in_place`.

        To `checksums` that of the stream which the step changed is added, where it was found in passing.
        """
        if arithmetic.fuses(streams[self.target], f):
            from .kernels import fused

            assert isinstance(arithmetic, FixedPoint)
            x, checksum = fused.uncouple(self, arithmetic, streams, f, residue, signs, in_place=in_place)
            if checksums is not None:
                checksums.append(checksum)
            return self.with_target(streams, x)
        added = self._added(arithmetic, streams, f)
        x = arithmetic.uncouple(streams[self.target], added, self.factor, residue, in_place=in_place)
        if self.difference:
            if signs is not None:
                x = torch.mul(x, signs, out=x if in_place else None)
            x = torch.add(x, streams[self.source], out=x if in_place else None)
        return self.with_target(streams, x)

    def _added(self, arithmetic: Arithmetic, streams: Streams, f: Tensor | None) -> Tensor | None:
        """What the step adds, from the value f of its function."""
        if f is None or not self.compensated:
            return f
        wide = torch.promote_types(f.dtype, torch.float32)
        source = arithmetic.decode(streams[self.source], wide)
        # Each operation rounds once and by itself: forward and inverse agree however kernels split the work.
        return f.to(wide).mul(1 + self.factor).sub_(source * self.factor)

    def scaled(self, gradient: Tensor, signs: Tensor | None) -> Tensor:
        """The gradient of what the factor scales, from that of the step's result."""
        result = gradient if self.factor == 1 else gradient * self.factor
        return result if signs is None else result * signs

    def to_source(self, scaled: Tensor) -> Tensor | None:
        """The gradient that the stream which the function read gets beside the function, from the scaled one."""
        if not self.difference:
            return None
        return scaled * -2 if self.compensated else -scaled

    def to_value(self, gradient: Tensor) -> Tensor:
        """The gradient of the function's value, from that of the step's result."""
        return gradient * (1 + self.factor) if self.compensated else gradient

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
        rule: the output rule that the weights stand for, as `make_coupling` takes it.
    """

    name: str
    steps: tuple[Step, ...]
    switch: bool
    newest: Literal[0, 1]
    output: tuple[float, float]
    splits: bool = False
    rule: OutputRule = "newest"

    @property
    def random(self) -> bool:
        """Whether signs are drawn in training only, and the network is the plain model in evaluation."""
        return any(step.sign == "random" for step in self.steps)

    def options(self) -> dict[str, Any]:
        """The options of `make_coupling` that make this coupling, but for its name."""
        factors = {name: step.factor for name, step in zip(_factor_names(self.name), self.steps, strict=False)}
        granularity = "block" if self.splits and self.name == "momentum" else "layer"
        momentum = {"granularity": granularity, "sign": self.steps[0].sign, "compensated": self.steps[0].compensated}
        return {**factors, "output": self.rule, **momentum}

    def switched(self, pair: tuple) -> tuple:
        """Switches a pair (streams, gradients) if this coupling does; it is its own inverse."""
        return (pair[1], pair[0]) if self.switch else (pair[0], pair[1])

    def weights(self) -> tuple[float, float]:
        """Weights of the streams (x1, x2) in the hidden state that leaves the stack."""
        older, newest = self.output
        return (newest, older) if self.newest == 0 else (older, newest)

    def unread(self) -> set[str]:
        """Functions that the highest layer runs for a stream that the output rule leaves out."""
        found: set[str] = set()
        weights = list(self.switched(self.weights()))
        for step in reversed(self.steps):
            if weights[step.target]:
                weights[step.source] = 1.0
            else:
                found.add(step.function)
        return found

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

    def reach(self, arithmetic: Arithmetic) -> Tensor | float:
        """Largest magnitude of a hidden state before a stream, or a difference of streams, overflows."""
        return arithmetic.limit / 2 if any(step.difference for step in self.steps) else arithmetic.limit


@dataclass(frozen=True)
class Own:
    """What a coupling takes where nothing was chosen; factors that it does not have are None."""

    lam: float | None = None
    beta: float | None = None
    gamma: float | None = None
    output: OutputRule = "mean"
    compensated: bool = False


# The paper's factors, which hold for post-norm encoders: their norms take the older stream's share back in every layer.
_POST_NORM = {
    "meft1": Own(lam=0.1, beta=1.0),
    "meft2": Own(lam=1.0, beta=0.1),
    "meft3": Own(lam=0.1, beta=0.1),
    "momentum": Own(gamma=1 / 32, output="newest"),
}
# In a pre-norm stack hidden states add up, and so does every share of the older stream (docs/gamma.md).
_PRE_NORM = {
    "meft1": Own(lam=1 / 128, beta=1.0, output="newest"),
    "meft2": Own(lam=1.0, beta=1 / 128, output="newest"),
    "meft3": Own(lam=1 / 256, beta=1 / 256, output="newest"),
    "momentum": Own(gamma=1 / 32, output="newest"),
}
SAVED_BEFORE = {**_POST_NORM, "momentum": Own(gamma=0.25, output="newest")}
"""What couplings took in version 0.1.0, whatever the model: for adapters that were saved without saying."""


def own_settings(name: str, *, post_norm: bool) -> Own:
    """What a coupling takes where nothing was chosen, on layers that end in a norm or on others."""
    return (_POST_NORM if post_norm else _PRE_NORM)[name]


def make_coupling(
    name: str,
    *,
    lam: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    output: OutputRule | None = None,
    granularity: str = "layer",
    sign: str = "fixed",
    compensated: bool | None = None,
    post_norm: bool = True,
) -> Coupling:
    """Builds a coupling by name.

    Example:
        >>> make_coupling("meft1", lam=1 / 8).steps[0].factor
        0.125

    Args:
        name: "meft1", "meft2", "meft3" or "momentum".
        lam: factor of the first stream (meft1, meft2, meft3); None for the coupling's own.
        beta: factor of the second stream (meft1, meft2, meft3); None for the coupling's own.
        gamma: factor of the difference of the streams (momentum); None for 1/32.
        output: "mean", "newest", ("sum", s) for newest + s * older, "weighted" for (newest + gamma * older) /
            (1 + gamma) (momentum); None for the coupling's own: "weighted" if compensated.
        granularity: what momentum takes as its F: "layer", or "block" for the attention and the feed-forward block in
            turn.
        sign: that of momentum's gamma: "fixed", or "random" for a draw for each sample in each step of training.
        compensated: whether momentum makes up for the slower pace that gamma gives the newest stream; None for no.
        post_norm: whether the layers end in a norm, as BERT's; the factors and the output rule of meft1, meft2 and
            meft3 differ where they do not.

    Raises:
        ConfigError: unknown name, a factor, granularity, sign or compensation the coupling does not have, or an output
            rule that is none.
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
    _check_compensated(compensated, name, sign)
    own = own_settings(name, post_norm=post_norm)
    lam, beta, gamma = (
        default if value is None else value for value, default in ((lam, own.lam), (beta, own.beta), (gamma, own.gamma))
    )
    if name == "momentum":
        assert gamma is not None
        drawn: Literal["fixed", "random"] = "random" if sign == "random" else "fixed"
        if compensated is None:
            compensated = own.compensated and drawn == "fixed"
        rule = ("weighted" if compensated else own.output) if output is None else output
        steps: tuple[Step, ...] = (Step("F", 0, 1, gamma, difference=True, sign=drawn, compensated=compensated),)
        weights = output_weights(rule, gamma)
        if drawn == "random" and weights != (0, 1):
            raise ConfigError(
                f'output={output!r} does not go with sign="random", which trains for the plain model: that has no '
                'older stream to read. Valid: "newest". Leave output out, or choose sign="fixed".'
            )
        if granularity == "layer":
            return Coupling(name, steps, switch=True, newest=1, output=weights, rule=rule)
        # Twice the one step with a switch: the second adds to the stream that the first one read.
        steps = (*steps, replace(steps[0], function="G", target=1, source=0))
        return Coupling(name, steps, switch=False, newest=1, output=weights, splits=True, rule=rule)
    assert lam is not None and beta is not None
    rule = own.output if output is None else output
    steps = (Step("F", 0, 1, lam), Step("G", 1, 0, beta))
    # The pretrained layer's output is y1 in meft1 and y2 in meft2 and meft3; meft1 and meft2 switch.
    newest: Literal[0, 1] = 0 if name == "meft2" else 1
    weights = output_weights(rule, None)
    return Coupling(
        name, steps, switch=name != "meft3", newest=newest, output=weights, splits=name == "meft3", rule=rule
    )


def _factor_names(name: str) -> tuple[str, ...]:
    return ("gamma",) if name == "momentum" else ("lam", "beta")


def _check_compensated(compensated: bool | None, name: str, sign: str) -> None:
    if compensated is not None and not isinstance(compensated, bool):
        raise ConfigError(
            f"compensated={compensated!r} is a {type(compensated).__name__}. Valid: True, False, or None for the "
            "coupling's own."
        )
    if compensated and name != "momentum":
        raise ConfigError(
            f"compensated=True does not go with coupling={name!r}: what it makes up for is the pace that gamma takes "
            'from the newest stream of "momentum". Leave compensated out, or choose coupling="momentum".'
        )
    if compensated and sign == "random":
        raise ConfigError(
            'compensated=True does not go with sign="random": with a sign drawn for each sample gamma is 0 on average, '
            'and there is nothing to make up for. Leave compensated out, or choose sign="fixed".'
        )


def output_weights(rule: OutputRule, gamma: float | None) -> tuple[float, float]:
    """Turns an output rule into the weights (older, newest).

    Args:
        rule: as `make_coupling` takes it.
        gamma: momentum's; None for couplings without it, which have no "weighted".

    Raises:
        ConfigError: it is none.
    """
    if isinstance(rule, str):
        if rule == "mean":
            return 0.5, 0.5
        if rule == "newest":
            return 0.0, 1.0
        if rule == "weighted" and gamma is not None:
            return gamma / (1 + gamma), 1 / (1 + gamma)
    elif isinstance(rule, list | tuple) and len(rule) == 2 and isinstance(rule[0], str) and rule[0] == "sum":
        share = rule[1]
        if isinstance(share, int | float) and not isinstance(share, bool) and abs(share) < math.inf:
            return float(share), 1.0
    weighted = "" if gamma is None else '"weighted" for (newest + gamma * older) / (1 + gamma), '
    raise ConfigError(
        f'output={rule!r:.80} is no output rule. Valid: "mean", "newest", {weighted}("sum", s) with s a number, for '
        "newest + s * older (sum:0.1 on a command line), or None for the coupling's own. Choose one of these."
    )
