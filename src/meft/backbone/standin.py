"""A module that stands in for another one: what users set, read or delete on it is the other's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .checkpointing import FLAG
from .patching import Patched, wraps


class StandIn(nn.Module):
    """Hands attributes on to the `pretrained` module, but for its own.

    Its own are private ones, those of its class, and `own_names`. Parameters, buffers and children are set on the
    other module too, whose registries a subclass may share.
    """

    own_names = frozenset({"training", "compiler", FLAG})

    pretrained: Any

    def __getattr__(self, name: str) -> Any:
        """Some models read attributes of their layers in the loop; the pretrained layer has them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("pretrained", "base_layer", "_modules"):
                raise
            return getattr(self.pretrained, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What is set on the wrapper is meant for the layer: `layer.dropout = 0`, another attention module."""
        if name == "forward" and self._stands_in():
            self._set_forward(value)
        elif self._is_own(name):
            super().__setattr__(name, value)
            if name == "training" and self._stands_in():
                self.pretrained.training = value
        else:
            setattr(self.pretrained, name, value)

    def __delattr__(self, name: str) -> None:
        if name == "forward" and name not in self.__dict__:
            patch = vars(self.pretrained).get(name)
            if type(patch) is Patched:
                patch.take_off(self.pretrained)
        elif name in self.__dict__ or self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self.pretrained, name)

    def _is_own(self, name: str) -> bool:
        return name.startswith("_") or name in self.own_names or hasattr(type(self), name) or not self._stands_in()

    def _stands_in(self) -> bool:
        """Whether there is a layer yet: PyTorch and PEFT set attributes before."""
        return "pretrained" in self.__dict__ or "base_layer" in self.__dict__.get("_modules", ())

    def _set_forward(self, forward: Callable[..., Any]) -> None:
        """Replaces what the layer computes; what goes on to this wrapper's own stands around it instead.

        Accelerate's hooks are such, and code that changes what the model's loop hands to the layer.
        """
        own = type(self).forward.__get__(self)
        if forward == own:
            del self.forward
        elif wraps(forward, own):
            self.__dict__["forward"] = forward
        else:
            Patched.put_on(self.pretrained, forward)
