"""The way to train and its options, as command lines, files and recipes have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from meft.options import METHOD, UNSET, Option, WithOptions, option_dataclass, options_of
from meft.parsing import option

from .registry import NAMED, Way, read_way
from .table import MethodOptions

USUAL = "meft1"
"""The way to train where none is asked for."""


def _left_out(entry: Option) -> Any:
    return None if entry.left_out is UNSET else entry.left_out


@option_dataclass(options_of(METHOD).values(), _left_out, own_first=True)
class MeftArguments(WithOptions):
    """How to fine-tune: a method and its options, as JSON has them.

    None is an option that was left out, the word "none" an option that is None.
    """

    _argument_group_name: ClassVar[str] = "method"

    method: str | None = option(
        f"{NAMED}. Left out: {USUAL}, and in meft train lora+momentum for language models on own rows."
    )

    def __post_init__(self) -> None:
        for name, entry in options_of(METHOD).items():
            value = getattr(self, name)
            if value is not None:
                value = entry.read(value)
                entry.check(value)
                setattr(self, name, entry.write(value))

    def options(self) -> MethodOptions:
        """The same as `meft.methods` takes them."""
        given = {name: value for name in options_of(METHOD) if (value := getattr(self, name)) is not None}
        return MethodOptions(**{name: options_of(METHOD)[name].read(value) for name, value in given.items()})

    def way(self, *, settings: Mapping[str, Any] | None = None) -> Way:
        """The way to train that is asked for; `settings` stand in for what was left open.

        Raises:
            ConfigError: There is no such way, or an option means nothing to it.
        """
        given = self.options().given()
        opened = {name: value for name, value in (settings or {}).items() if given.get(name) is None}
        return read_way(self.method or USUAL, {**given, **opened})


@option_dataclass(options_of(METHOD).values(), lambda entry: None)
class OptionArguments(WithOptions):
    """Options of the methods, for commands that look at several of them.

    None is an option that was left out, the word "none" an option that is None.
    """

    _argument_group_name: ClassVar[str] = "options of the methods"

    def given(self) -> dict[str, Any]:
        """The options that were given, as Python has them.

        Raises:
            ConfigError: One is not valid by itself.
        """
        known = options_of(METHOD)
        words = {name: value for name in known if (value := getattr(self, name)) is not None}
        values = {name: known[name].read(word) for name, word in words.items()}
        for name, value in values.items():
            known[name].check(value)
        return values
