"""The loss head of language models, whose logits need never exist whole."""

from meft.head.attach import FusedLinear, attach, detach
from meft.head.lazy import LazyLogits

__all__ = ["FusedLinear", "LazyLogits", "attach", "detach"]
