"""The layout most families share: attention, then feed-forward, each a sublayer around which the hidden state skips.

    hidden = closing(hidden + after(modules(before(hidden))))

Families differ in what stands before and after the modules and in its names, so theirs is a record of names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .base import Architecture, arguments, named


@dataclass(frozen=True)
class Sublayer:
    """One half of a layer, by the names of the layer's attributes.

    Attributes:
        modules: what computes it, called one after the other; the first one gets the arguments of the layer.
        before: norm of what enters the modules; none in layers that norm afterwards.
        after: what the output goes through before the residual: modules (norm, dropout, layer scale, drop path) are
            called; parameters and numbers are factors; None is skipped.
        closing: norm after the residual.
    """

    modules: tuple[str, ...]
    before: str | None = None
    after: tuple[str, ...] = ()
    closing: str | None = None

    @property
    def children(self) -> set[str]:
        return {*self.modules, *self.after, *(name for name in (self.before, self.closing) if name)}

    def run(self, layer: Any, hidden: Tensor, given: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
        """Returns the hidden state after this half, and what its first module returned besides."""
        first, *others = (getattr(layer, name) for name in self.modules)
        output = first(self.enter(layer, hidden), **given)
        output, rest = (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, ())
        for module in others:
            output = module(output)
        return self.leave(layer, hidden, output), rest

    def enter(self, layer: Any, hidden: Tensor) -> Tensor:
        """What the modules are given of the hidden state."""
        return hidden if self.before is None else getattr(layer, self.before)(hidden)

    def leave(self, layer: Any, hidden: Tensor, output: Tensor) -> Tensor:
        """The hidden state after this half, from that before it and what the modules returned."""
        for step in (getattr(layer, name) for name in self.after):
            if isinstance(step, nn.Module):
                output = step(output)
            elif step is not None:
                output = output * step
        hidden = hidden + output
        return hidden if self.closing is None else getattr(layer, self.closing)(hidden)


def two_residuals(
    attention: Sublayer,
    feed_forward: Sublayer,
    *,
    attention_exit: str | None = None,
    feed_forward_exit: str | None = None,
    withheld: tuple[str, ...] = (),
    extras: bool = True,
    returns_rest: bool = False,
    children: tuple[str, ...] = (),
    refuses: Callable[[Any], str | None] = lambda layer: None,
) -> Architecture:
    """Describes a layer that is `attention`, then `feed_forward`.

    Args:
        attention: the first half.
        feed_forward: the second half.
        attention_exit: as in `Architecture`; None for the whole attention module.
        feed_forward_exit: as in `Architecture`; None for the last of the feed-forward's modules.
        withheld: arguments of the layer that its attention does not get.
        extras: whether the attention gets the arguments that the layer's `forward` does not name.
        returns_rest: whether the layer returns a tuple: the hidden state, and what the attention returned besides.
        children: further children the layer may have.
        refuses: as in `Architecture`.
    """

    def attention_block(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = arguments(layer, args, kwargs)
        given = given if extras else named(layer, given)
        hidden, rest = attention.run(
            layer, hidden, {name: value for name, value in given.items() if name not in withheld}
        )
        return (hidden, *rest) if returns_rest else hidden

    def feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
        return feed_forward.run(layer, hidden, {})[0]

    return Architecture(
        feed_forward_entry=feed_forward.modules[0],
        feed_forward_exit=feed_forward_exit or feed_forward.modules[-1],
        attention_exit=attention_exit or attention.modules[-1],
        attention_block=attention_block,
        feed_forward_block=feed_forward_block,
        children=frozenset({*attention.children, *feed_forward.children, *children}),
        refuses=refuses,
        halves=None if returns_rest else (attention, feed_forward),
        withheld=withheld,
        extras=extras,
    )
