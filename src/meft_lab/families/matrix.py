"""The matrix: one row a family, one cell a coupling, found out by running them on this machine.

Example:
    >>> row = row_of(CATALOGUE["llama"])
    >>> row.cells["meft1"].state
    'works'
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches

import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.utils import logging

from meft.backbone.architectures import feed_forward_of
from meft.backbone.conversion import find_stacks
from meft.errors import ConfigError, UnsupportedModelError

from .catalogue import CATALOGUE
from .check import FAILED, FULL, REFUSED, WAYS, PlainModelError, Subject, Verdict, check, check_head
from .family import Family

HEAD_WAYS = ("meft1", FULL)


@dataclass(frozen=True)
class Row:
    """What was found of one family.

    Attributes:
        family: which one.
        problem: why its plain model could not be built or run, so that nothing was checked; empty otherwise.
        layers: classes of the layers, in order of the stacks.
        feed_forward: where the parallel adapter goes in each of them, "first:last" where that is two modules, empty
            where it is not known.
        cells: verdicts by coupling, of the family's natural head.
        heads: verdicts by head and coupling, of all others.
        idle: layer stacks that the batch does not reach.
    """

    family: Family
    problem: str = ""
    layers: tuple[str, ...] = ()
    feed_forward: tuple[str, ...] = ()
    cells: dict[str, Verdict] = field(default_factory=dict)
    heads: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    idle: tuple[str, ...] = ()

    @property
    def failures(self) -> dict[str, str]:
        """What failed, by coupling or head."""
        everything = {**self.cells, **{f"{head} ({way})": found for (head, way), found in self.heads.items()}}
        return {name: found.detail for name, found in everything.items() if found.state == FAILED}

    @property
    def refusals(self) -> dict[str, str]:
        """Reasons by coupling."""
        return {way: found.detail for way, found in self.cells.items() if found.state == REFUSED}


def families_of(model_types: Sequence[str]) -> list[Family]:
    """The rows for model types: those of the catalogue, or one by general rules for a type that is not in it.

    Raises:
        ConfigError: the installed Transformers has no such model type.
    """
    found: list[Family] = []
    for model_type in model_types:
        known = [family for family in CATALOGUE.values() if model_type in (family.model_type, family.name)]
        if not known and model_type not in CONFIG_MAPPING:
            raise _unknown(model_type)
        found += known or [Family(model_type, inputs=None, guessed=True)]
    return list({family.name: family for family in found}.values())


def row_of(family: Family, ways: Iterable[str] = WAYS, *, heads: bool = True) -> Row:
    """Checks one family: its natural head under each coupling, and its other heads under two of them."""
    with quiet():
        try:
            subject = Subject.make(family)
            cells = {way: check(subject, way) for way in ways}
        except PlainModelError as error:
            return Row(family, problem=str(error))
        layers, feed_forward = _anatomy(subject.base)
        if all(cell.state == REFUSED for cell in cells.values()):
            return Row(family, "", layers, feed_forward, cells)
        return Row(family, "", layers, feed_forward, cells, _heads(family) if heads else {}, subject.idle)


def matrix(families: Iterable[Family], advance: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Checks one family after the other, telling of each when it is done."""
    rows = []
    for family in families:
        rows.append(row_of(family))
        advance(rows[-1])
    return rows


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Transformers from reporting on the loading of tiny models."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _heads(family: Family) -> dict[tuple[str, str], Verdict]:
    found: dict[tuple[str, str], Verdict] = {}
    for head in family.heads()[1:]:
        try:
            subject = Subject.make(family, head)
            found |= {(head, way): check_head(subject, way) for way in HEAD_WAYS}
        except PlainModelError as error:
            found[head, FULL] = Verdict(FAILED, f"the plain model: {error}")
    return found


def _anatomy(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    try:
        layers = [stack.layers[0] for stack in find_stacks(model)]
    except UnsupportedModelError:
        return (), ()
    classes = dict.fromkeys(type(layer).__name__ for layer in layers)
    return tuple(classes), tuple(dict.fromkeys(_feed_forward(layer) for layer in layers))


def _feed_forward(layer: nn.Module) -> str:
    try:
        ends = feed_forward_of(layer, type(layer).__name__)
    except UnsupportedModelError:
        return ""
    names = {module: name for name, module in layer.named_modules()}
    return ":".join(dict.fromkeys(names[end] for end in ends))


def _unknown(model_type: str) -> ConfigError:
    close = get_close_matches(model_type, list(CONFIG_MAPPING), n=5)
    meant = f" Did you mean {', '.join(close)}?" if close else ""
    types = sorted({family.model_type for family in CATALOGUE.values()})
    return ConfigError(
        f"model_type is {model_type!r}, which Transformers {transformers.__version__} does not have.{meant} Give "
        "model_type as in the config.json of a checkpoint. Any that Transformers has is tried; in the catalogue are "
        f"{', '.join(types)}."
    )
