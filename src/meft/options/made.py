"""What is made from the table of options: fields of dataclasses, signatures and docstrings."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from .table import Option, options_of

Class = TypeVar("Class", bound=type)
Result = TypeVar("Result")
PLACE = "options: those of the table (`meft.options`)."
"""Stands in a docstring where the options are to be described."""
_WIDTH = 116


class WithOptions:
    """Base of dataclasses that get fields from the table, for type checkers, which cannot see these."""

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

        def __init__(self, *args: Any, **options: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...


def option_dataclass(
    options: Iterable[Option],
    default: Callable[[Option], Any] = lambda option: option.default,
    *,
    own_first: bool = False,
    **how: Any,
) -> Callable[[Class], Class]:
    """Makes a class a dataclass, with a field for each option beside those that it declares itself.

    Args:
        options: the table's entries.
        default: the field's default, of an option.
        own_first: whether all fields that the class declares come first, and not only those without a default.
        **how: passed on to `dataclasses.dataclass`.
    """
    options = tuple(options)

    def make(cls: Class) -> Class:
        own = inspect.get_annotations(cls)
        needed = {name: kind for name, kind in own.items() if own_first or name not in cls.__dict__}
        added: dict[str, Any] = {}
        for option in options:
            added[option.name] = option.annotation
            # The help is what parsers and PEFT's tools look for; the option lets a parser of ours read words.
            metadata = {"help": option.help_text(), "option": option}
            setattr(cls, option.name, dataclasses.field(default=default(option), metadata=metadata))
        cls.__annotations__ = {**needed, **added, **own}
        cls.__doc__ = documented(cls.__doc__, options)
        return cast(Class, dataclasses.dataclass(**how)(cls))

    return make


def option_arguments(
    reader: str, *, positional: tuple[str, ...] = ()
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Gives a function the options of a reader as arguments: keywords, but for those named as positional.

    The function takes its first argument and the dictionary of all options. Signature and docstring show them. Of a
    class decorate `__init__`; `documented` then describes them in the docstring of the class.
    """

    def make(function: Callable[..., Result]) -> Callable[..., Result]:
        options = options_of(reader)
        hints = inspect.signature(function, eval_str=True)
        first = next(iter(hints.parameters.values()))
        parameters = [first]
        for name in sorted(options, key=lambda name: name not in positional):
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if name in positional else inspect.Parameter.KEYWORD_ONLY
            option = options[name]
            parameters.append(inspect.Parameter(name, kind, default=option.default, annotation=option.annotation))
        signature = hints.replace(parameters=parameters)

        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Result:
            try:
                bound = signature.bind(*args, **keywords)
            except TypeError as error:
                name = function.__qualname__.removesuffix(".__init__")
                raise TypeError(f"{name}() {error}. Its options are {', '.join(options)}.") from None
            bound.apply_defaults()
            return function(bound.arguments.pop(first.name), bound.arguments)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": signature.return_annotation}
        call.__doc__ = documented(function.__doc__, options.values())
        return call

    return make


def documented(text: str | None, options: Iterable[Option]) -> str | None:
    """A docstring with the options described where `PLACE` stands."""
    lines = []
    for line in (text or "").split("\n"):
        if line.strip() != PLACE:
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        for option in options:
            entry = f"{option.name}: {option.help_text()}"
            lines += textwrap.wrap(
                entry, _WIDTH, initial_indent=indent, subsequent_indent=indent + "    ", break_on_hyphens=False
            )
    return "\n".join(lines) if text is not None else None
