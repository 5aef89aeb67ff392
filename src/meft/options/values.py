"""What the value of an option may be: how it is checked, and read from a word of a command line or of a file.

Reading is lenient, checking is strict: a word that cannot be read stays a word, which the check then refuses. So the
same wrong value gives the same text whichever way it came.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from meft.engine.couplings import output_weights
from meft.errors import ConfigError

_LARGEST = 2.0**1023
_FRACTION = re.compile(r"\s*[+-]?\d+(\.\d*)?\s*/\s*\d+\s*")


def shown(value: Any) -> str:
    """The value in one line of a message: a tensor or an array may be large."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ConfigError if an option is none of its choices."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(
            f"{name}={shown(value)} is unknown. Valid: {', '.join(map(repr, choices))}. Choose one of these."
        )


def check_integer(name: str, value: Any, lowest: int, highest: int | None = None, *, or_else: str = "") -> None:
    """Raises ConfigError if an option is no integer of its range."""
    valid = f"{_integer(lowest, highest)}{or_else}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(
            f"{name}={shown(value)} is a {type(value).__name__}. Valid: {valid}.{_instead(name, value, whole=True)}"
        )
    if value < lowest or (highest is not None and value > highest):
        raise ConfigError(f"{name}={value} is out of range. Valid: {valid}.")


@dataclass(frozen=True)
class Integer:
    """A whole number of a range."""

    lowest: int
    highest: int | None = None
    several: ClassVar[bool] = False

    @property
    def valid(self) -> str:
        return _integer(self.lowest, self.highest)

    @property
    def annotation(self) -> Any:
        return int

    def check(self, name: str, value: Any, or_else: str = "") -> None:
        check_integer(name, value, self.lowest, self.highest, or_else=or_else)

    def read(self, word: str) -> Any:
        return _number(word)


@dataclass(frozen=True)
class Number:
    """A real number; `meaning` is said of one that is not from `lowest` to `highest`, and below `below`."""

    lowest: float | None = None
    highest: float | None = None
    below: float | None = None
    words: str = "a number"
    meaning: str = "out of range"
    hint: str = ""
    several: ClassVar[bool] = False

    @property
    def valid(self) -> str:
        if self.lowest is None:
            return self.words
        if self.below is not None and self.below < math.inf:
            return f"{self.words} from {self.lowest:g} up to, but not, {self.below:g}"
        return f"{self.words} from {self.lowest:g} {'up' if self.highest is None else f'to {self.highest:g}'}"

    @property
    def annotation(self) -> Any:
        return float

    def check(self, name: str, value: Any, or_else: str = "") -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(
                f"{name}={shown(value)} is a {type(value).__name__}. Valid: {self.valid}{or_else}."
                f"{_instead(name, value) or self.hint}"
            )
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ConfigError(f"{name}={shown(value)} is out of range. Valid: {self.valid}{or_else}.{self.hint}")
        outside = (self.lowest is not None and not value >= self.lowest) or (
            self.highest is not None and not value <= self.highest
        )
        if outside or not math.isfinite(value) or (self.below is not None and not value < self.below):
            raise ConfigError(f"{name}={value!r} is {self.meaning}. Valid: {self.valid}{or_else}.{self.hint}")

    def read(self, word: str) -> Any:
        return _number(word)


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    choices: tuple[str, ...]
    several: ClassVar[bool] = False

    @property
    def valid(self) -> str:
        return ", ".join(map(repr, self.choices))

    @property
    def annotation(self) -> Any:
        return str

    def check(self, name: str, value: Any, or_else: str = "") -> None:
        check_choice(name, value, self.choices)

    def read(self, word: str) -> Any:
        return word


@dataclass(frozen=True)
class Checked:
    """A word whose check is another's: the coupling's for what depends on the coupling."""

    words: tuple[str, ...]
    several: ClassVar[bool] = False

    @property
    def valid(self) -> str:
        return ", ".join(map(repr, self.words))

    @property
    def annotation(self) -> Any:
        return str

    def check(self, name: str, value: Any, or_else: str = "") -> None:
        if not isinstance(value, str):
            check_choice(name, value, self.words)

    def read(self, word: str) -> Any:
        return word


@dataclass(frozen=True)
class Flag:
    """True or False."""

    several: ClassVar[bool] = False
    valid: ClassVar[str] = "True or False"

    @property
    def annotation(self) -> Any:
        return bool

    def check(self, name: str, value: Any, or_else: str = "") -> None:
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={shown(value)} is a {type(value).__name__}. Valid: {self.valid}{or_else}.")

    def read(self, word: str) -> Any:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        return words.get(word.lower(), word)


@dataclass(frozen=True)
class Text:
    """A name."""

    words: str = "a name"
    several: ClassVar[bool] = False

    @property
    def valid(self) -> str:
        return self.words

    @property
    def annotation(self) -> Any:
        return str

    def check(self, name: str, value: Any, or_else: str = "") -> None:
        if not isinstance(value, str):
            raise ConfigError(f"{name}={shown(value)} is a {type(value).__name__}. Valid: {self.words}{or_else}.")
        if not value:
            raise ConfigError(f"{name}={value!r} is empty. Valid: {self.words}{or_else}.")

    def read(self, word: str) -> Any:
        return word


@dataclass(frozen=True)
class Names:
    """A list of names."""

    words: str = "a list of names"
    several: ClassVar[bool] = True

    @property
    def valid(self) -> str:
        return self.words

    @property
    def annotation(self) -> Any:
        return list[str]

    def check(self, name: str, value: Any, or_else: str = "") -> None:
        if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(each, str) for each in value):
            write = f" Write {name}=[{value!r}]." if isinstance(value, str) else ""
            raise ConfigError(f"{name}={shown(value)} is no list of names. Valid: {self.words}{or_else}.{write}")

    def read(self, word: str) -> Any:
        return word


@dataclass(frozen=True)
class OutputRule:
    """How the two last streams become a hidden state: "mean", "newest", "weighted" or ("sum", s)."""

    several: ClassVar[bool] = False
    valid: ClassVar[str] = "'mean', 'newest', 'weighted', or ('sum', s) for newest + s * older"

    @property
    def annotation(self) -> Any:
        return str | tuple[Literal["sum"], float]

    def check(self, name: str, value: Any, or_else: str = "") -> None:
        output_weights(value, 1.0)

    def read(self, word: str) -> Any:
        if word.startswith("sum"):
            number = _number(word.removeprefix("sum").lstrip(":= "))
            return word if isinstance(number, str) else ("sum", number)
        return word


Kind = Integer | Number | Choice | Checked | Flag | Text | Names | OutputRule


def _integer(lowest: int, highest: int | None) -> str:
    return f"an integer, {lowest} to {highest}" if highest is not None else f"an integer, at least {lowest}"


def _number(word: str) -> Any:
    """A number from "16", "0.25", "1e-2" or "1/4"; the word itself if it is none."""
    readers: tuple[Callable[[str], Any], ...] = (int, float)
    for reader in readers:
        try:
            return reader(word)
        except ValueError:
            continue
    try:
        return float(Fraction(word.replace(" ", ""))) if _FRACTION.fullmatch(word) else word
    except (ValueError, ZeroDivisionError):
        return word


def _instead(name: str, value: Any, *, whole: bool = False) -> str:
    """What to write in the place of something that stands for a number: a Decimal, a tensor, text."""
    if isinstance(value, bool):
        return ""
    try:
        number = _number(value) if isinstance(value, str) else float(value)
        if not isinstance(number, int | float) or not math.isfinite(number):
            return ""
        if whole:
            return f" Write {name}={int(number)}." if number == int(number) and not isinstance(value, float) else ""
        return f" Write {name}={number!r}."
    except Exception:  # whatever the conversion of a foreign object raises
        return ""
