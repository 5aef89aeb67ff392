"""The loss head of language models, whose logits need never exist whole."""

from .attach import FusedLinear, attach, detach, heads, lazily, refresh
from .lazy import LazyLogits

__all__ = ["FusedLinear", "LazyLogits", "attach", "detach", "heads", "lazily", "refresh"]
