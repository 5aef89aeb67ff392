"""What a study is made of: rows of a table, each of cells that are computed once, and columns that show them.

A cell is the unit of work that is kept: whoever stops a study loses the cell that is being computed, nothing else. Its
settings say all that decides about its outcome, so equal settings in two studies are one cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from meft.parsing import option, parse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Tick = Callable[[float], None]
"""Called with the share of a cell that is done, from 0 to 1."""
Found = dict[str, Any]
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Cell:
    """One computation.

    Attributes:
        label: What the progress bar says.
        settings: All that decides about the outcome, as JSON can hold it.
        run: Computes it; what it returns is written to a JSON file.
    """

    label: str
    settings: Mapping[str, Any]
    run: Callable[[Tick], Found]


@dataclass(frozen=True)
class Row:
    """One row of a study's table.

    Attributes:
        values: What is known beforehand, by column.
        cells: What has to be computed. Their findings are put together; a `score` that several have (one for each
            seed) becomes its mean, beside `scores` and `score_sd`.
    """

    values: Mapping[str, Any]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, the key in a row's findings, and how a value is written."""

    heading: str
    key: str
    form: Callable[[Any], str] = str


@dataclass(frozen=True)
class Request:
    """A study as it was asked for: its words, parsed.

    Attributes:
        types: The dataclasses of its arguments.
        argv: The words after the study's name.
        defaults: What stands in for words that were left out.
        command: The study's name with `study` before it, for messages.
        say: Called with each sentence meant for the user.
    """

    types: Sequence[Any]
    argv: Sequence[str]
    defaults: Mapping[str, Any]
    command: str
    say: Callable[[str], None] = field(compare=False, default=print)

    def parsed(self, *words: str) -> Parsed:
        """All arguments, with further words that win over the user's."""
        return Parsed(parse(self.types, [*self.argv, *words], command=self.command, defaults=self.defaults))

    def with_defaults(self, **defaults: Any) -> Request:
        return replace(self, defaults={**self.defaults, **defaults})


@dataclass(frozen=True)
class Parsed:
    """One instance of each dataclass of arguments."""

    groups: tuple[Any, ...]

    def __getitem__(self, kind: type[Kind]) -> Kind:
        """The arguments of one dataclass."""
        return next(group for group in self.groups if isinstance(group, kind))


@dataclass
class StudyArguments:
    """How the study is run."""

    _argument_group_name = "study"

    quick: bool = option(
        "A smoke run: a tiny model on tiny data with a small grid, unless you give others. Its figures mean nothing.",
        False,
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Every training is repeated with each of these seeds."}
    )


@dataclass
class FolderArguments:
    """Where a study that trains nothing writes."""

    _argument_group_name = "output"

    output_dir: str = option("Folder for the table, the figure, and the cells that are done.", "studies")
    seed: int = option("Of weights and batches.", 0)


@dataclass(frozen=True)
class Study:
    """A question, and how it is answered.

    Attributes:
        name: After `meft study`.
        title: Over the table and the figure.
        sentence: What it finds out, for the list of studies.
        grid: A dataclass of the study's own arguments.
        kind: What it runs: "training" takes all arguments of `meft train`, "model" a pretrained model, "sizes"
            random models that it makes itself.
        rows: From the request to the rows of the table.
        columns: The table.
        draw: From the rows' values and findings to the figure.
        notes: Below the table.
        quick: Arguments of a smoke run.
    """

    name: str
    title: str
    sentence: str
    grid: type
    kind: str
    rows: Callable[[Request], list[Row]]
    columns: tuple[Column, ...]
    draw: Callable[[Sequence[Found]], Figure]
    notes: tuple[str, ...] = ()
    quick: Mapping[str, Any] = field(default_factory=dict)


def folder_of(parsed: Parsed) -> Path:
    """The folder that the study writes to."""
    return Path(next(group.output_dir for group in parsed.groups if hasattr(group, "output_dir")))
