"""Recipes: YAML files that say which runs of `meft train` a sweep is made of.

A recipe has these keys; `arguments`, `grid` and `seeds` are enough for most:

    description: what this reproduces, in a sentence
    arguments:                       # any argument of `meft train`, for every run
      model_name_or_path: roberta-large
      num_train_epochs: 10
    grid:                            # every combination is run
      task: [rte, mrpc]
      method: [full, lora, meft1]    # or names of several arguments: way: {near: {method: meft1, lam: 0.01}, ...}
    special:                         # other arguments for some of them; a later entry wins, null takes one away
      - when: {task: mrpc, method: [lora, meft1]}
        arguments: {num_train_epochs: 20}
    choose:                          # values to be chosen on the first seed before the other seeds run
      among: {learning_rate: [3e-4, 5e-4]}
      per: [task, method]            # one choice for each of these; left out: for each combination of the grid
      on: {task: [mrpc]}             # look at these runs only; left out: at all
      narrow:                        # fewer values for some of them
        - when: {task: rte}
          among: {learning_rate: [5e-4]}
    seeds: [0, 1, 2]
    metric: accuracy                 # what is compared; left out: each task's first metric
    table: {rows: [method], columns: [task]}
    references: [adapter, full]      # rows that the mean score of every row is compared with
    keep_models: true                # false deletes the weights of a run once it is scored
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from meft.errors import ConfigError
from meft.parsing import read_mapping

Point = dict[str, str]
Axes = dict[str, tuple[str, ...]]
_KEYS = (
    "description",
    "arguments",
    "grid",
    "special",
    "choose",
    "seeds",
    "metric",
    "table",
    "references",
    "keep_models",
)
_OWN = ("output_dir", "seed")  # the sweep sets these itself, for every run


@dataclass(frozen=True)
class Special:
    """Arguments for the runs whose point has one of the values in `when`, axis by axis."""

    when: Axes
    arguments: Mapping[str, Any]

    def applies_to(self, point: Point) -> bool:
        return all(point.get(axis) in values for axis, values in self.when.items())


@dataclass(frozen=True)
class Choice:
    """Values to be chosen: `among` these, one choice a combination of the axes `per`, looking at the runs `on`.

    `narrow` has fewer values for the points that have one of the values in `when`, axis by axis.
    """

    among: Axes
    per: tuple[str, ...]
    on: Axes = field(default_factory=dict)
    narrow: tuple[tuple[Axes, Axes], ...] = ()

    def candidates(self, point: Point) -> list[Point]:
        """What is chosen among at a point of the grid."""
        among = dict(self.among)
        for when, fewer in self.narrow:
            if all(point[axis] in values for axis, values in when.items()):
                among |= fewer
        return points(among)

    def group(self, point: Point) -> tuple[str, ...]:
        return tuple(point[axis] for axis in self.per)

    def looks_at(self, point: Point) -> bool:
        return all(point[axis] in values for axis, values in self.on.items())


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says, checked.

    Attributes:
        name: The file's name without its ending.
        description: What the recipe reproduces.
        arguments: Arguments of `meft train` for every run.
        grid: Axes whose every combination is run.
        named: What the values of an axis stand for, where they are names of arguments: by axis and value.
        special: Further arguments for some of the runs, in the order in which they are applied.
        choice: What is chosen on the first seed, if anything.
        seeds: Seeds of the runs.
        metric: The metric compared; `None` for each task's first.
        rows, columns: The axes that make the rows and the columns of the table.
        references: Names of the rows that all others are compared with.
        keep_models: Whether the weights of finished runs stay.
        typed: Arguments typed beside the recipe; they win over all others.
    """

    name: str
    description: str
    arguments: Mapping[str, Any]
    grid: Axes
    named: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    special: tuple[Special, ...] = ()
    choice: Choice | None = None
    seeds: tuple[int, ...] = (0,)
    metric: str | None = None
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    keep_models: bool = True
    typed: Mapping[str, Any] = field(default_factory=dict)

    def row_names(self) -> list[str]:
        """The rows of the table, in order."""
        return row_names(self.grid, self.rows)

    def points(self) -> list[Point]:
        """Every combination of the grid's values."""
        return points(self.grid)

    def arguments_of(self, point: Point) -> dict[str, Any]:
        """The arguments of `meft train` at a point of the grid and of what is chosen, without seed and folder."""
        values = {**self.own_arguments(point), **self.typed}
        return {name: value for name, value in values.items() if value is not None}

    def own_arguments(self, point: Point) -> dict[str, Any]:
        """The same as the recipe has them, without what was typed beside it."""
        values: dict[str, Any] = dict(self.arguments)
        for axis, value in point.items():
            values |= self.named[axis][value] if axis in self.named else {axis: value}
        for special in self.special:
            if special.applies_to(point):
                values |= special.arguments
        return values


def points(axes: Axes) -> list[Point]:
    """Every combination of the axes' values, the last axis turning fastest."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def name_of(point: Point, axes: Sequence[str]) -> str:
    """The name of a row or a column of the table; "score" where no axis tells them apart."""
    return " ".join(point[axis] for axis in axes) or "score"


def row_names(grid: Axes, axes: Sequence[str]) -> list[str]:
    """The names of all rows or columns that the axes make, in order."""
    return list(dict.fromkeys(name_of(point, axes) for point in points(grid)))


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with `meft`, by name."""
    folder = Path(str(resources.files("meft_lab") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(given: str, typed: Mapping[str, Sequence[str]] | None = None) -> Recipe:
    """Reads a recipe and what was typed beside it.

    Example:
        >>> recipe = load_recipe("glue-roberta", {"task": ["rte"], "data_dir": ["glue"]})
        >>> len(recipe.points())
        7

    Args:
        given: A file, or the name of a recipe that comes with `meft`.
        typed: Values by name. The name of an axis narrows the axis to these values; any other name is an argument of
            `meft train` for every run.

    Raises:
        ConfigError: There is no such recipe, or it says something that is not valid.
    """
    path = _find(given)
    content = read_mapping(path)
    _known(content, _KEYS, f"{path} has the unknown key")
    grid = _axes(content.get("grid") or {}, path, "grid")
    named = _named(content.get("grid") or {}, grid, path)
    choice = _choice(content.get("choose"), grid, path)
    arguments = _arguments(content.get("arguments") or {}, path, "arguments")
    special = tuple(_special(entry, grid, choice, path) for entry in _entries(content.get("special"), path))
    typed = dict(typed or {})
    seeds = _seeds(typed.pop("seeds", content.get("seeds", [0])), path)
    full_grid = grid
    grid = {axis: _narrowed(axis, typed.pop(axis, values)) for axis, values in grid.items()}
    if choice is not None:
        among = {axis: _narrowed(axis, typed.pop(axis, values)) for axis, values in choice.among.items()}
        # Narrowed to other tasks than those that a choice looks at, it looks at those there are.
        on = {axis: tuple(value for value in values if value in grid[axis]) for axis, values in choice.on.items()}
        narrow = tuple((when, _kept(fewer, among)) for when, fewer in choice.narrow)
        choice = Choice(among, choice.per, {axis: values for axis, values in on.items() if values}, narrow)
    for name in _OWN:
        if name in typed:
            raise ConfigError(f"--{name} cannot be typed beside a recipe: every run has its own. {_HINTS[name]}")
    if not grid:
        grid = {"method": (str(arguments.get("method", "meft1")),)}
    rows, columns = _table(content.get("table"), grid, path)
    metric = content.get("metric")
    return Recipe(
        name=path.stem,
        description=str(content.get("description", "")),
        arguments=arguments,
        grid=grid,
        named=named,
        special=special,
        choice=choice,
        seeds=seeds,
        metric=None if metric is None else str(metric),
        rows=rows,
        columns=columns,
        references=_references(content.get("references") or [], full_grid, rows, grid, path),
        keep_models=_flag(content.get("keep_models", True), path, "keep_models"),
        typed={name: values[0] if len(values) == 1 else list(values) for name, values in typed.items()},
    )


_HINTS = {
    "output_dir": "The folder of the whole sweep is the option --output_dir of `meft sweep`.",
    "seed": "Give --seeds 0 1 2.",
}


def _find(given: str) -> Path:
    path = Path(given)
    if path.is_file():
        return path
    known = builtin_recipes()
    if given in known:
        return known[given]
    raise ConfigError(
        f"recipe is {given!r}, which is neither a file nor the name of a recipe; those are {', '.join(known)}."
    )


def _known(content: Mapping[str, Any], keys: Sequence[str], wrong: str) -> None:
    for key in content:
        if key not in keys:
            close = get_close_matches(str(key), keys, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{wrong} {key!r}; the keys are {', '.join(keys)}.{hint}")


def _mapping(value: Any, path: Path, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} of {path} is {value!r}; it must be lines such as 'name: value'.")
    return value


def _axes(value: Any, path: Path, name: str) -> Axes:
    axes = {str(axis): _texts(values) for axis, values in _mapping(value, path, name).items()}
    for axis, values in axes.items():
        if not values or len(set(values)) < len(values):
            raise ConfigError(
                f"{axis} in {name} of {path} is {list(values)}; it must be a list of different values, one at least."
            )
        if axis in _OWN:
            raise ConfigError(f"{axis} is in {name} of {path}; the sweep sets it itself. {_HINTS[axis]}")
    return axes


def _named(value: Mapping[str, Any], grid: Axes, path: Path) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The axes of a grid whose values are names, each of several arguments."""
    named: dict[str, dict[str, Mapping[str, Any]]] = {}
    for axis, values in value.items():
        if isinstance(values, Mapping):
            entries = {str(name): _arguments(entry, path, f"{name} of {axis}") for name, entry in values.items()}
            for name, arguments in entries.items():
                both = sorted(arguments.keys() & (grid.keys() - {axis}))
                if both:
                    raise ConfigError(
                        f"{both[0]} is an axis of {path} and an argument of {name}; it must be one of the two."
                    )
            named[str(axis)] = entries
    return named


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(map(str, values)) if isinstance(values, (list, tuple, Mapping)) else (str(values),)


def _narrowed(axis: str, values: Sequence[str]) -> tuple[str, ...]:
    """Values may be typed apart or with commas between them."""
    found = tuple(part for value in values for part in value.split(",") if part)
    if not found:
        raise ConfigError(f"--{axis} stands without a value; give one or several: --{axis} first second.")
    return found


def _arguments(value: Any, path: Path, name: str) -> Mapping[str, Any]:
    arguments = _mapping(value, path, name)
    for own in _OWN:
        if own in arguments:
            raise ConfigError(f"{own} is in {name} of {path}; the sweep sets it itself. {_HINTS[own]}")
    return arguments


def _entries(value: Any, path: Path) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ConfigError(f"special of {path} is {value!r}; it must be a list of entries with 'when' and 'arguments'.")
    return value


def _special(value: Any, grid: Axes, choice: Choice | None, path: Path) -> Special:
    entry = _mapping(value, path, "an entry of special")
    _known(entry, ("when", "arguments"), f"an entry of special in {path} has the unknown key")
    axes = {**grid, **(choice.among if choice else {})}
    when = _axes(entry.get("when") or {}, path, "when")
    for axis, values in when.items():
        if axis not in axes:
            raise ConfigError(f"when names {axis!r} in {path}, which is no axis; the axes are {', '.join(axes)}.")
        wrong = [name for name in values if name not in axes[axis]]
        if wrong:
            raise ConfigError(f"when says {axis}: {wrong[0]} in {path}; the values there are {', '.join(axes[axis])}.")
    arguments = _arguments(entry.get("arguments") or {}, path, "an entry of special")
    both = sorted(axes.keys() & arguments.keys())
    if both:
        raise ConfigError(f"{both[0]} is an axis of {path} and an argument in special; it must be one of the two.")
    return Special(when, arguments)


def _choice(value: Any, grid: Axes, path: Path) -> Choice | None:
    if value is None:
        return None
    entry = _mapping(value, path, "choose")
    _known(entry, ("among", "per", "on", "narrow"), f"choose in {path} has the unknown key")
    among = _axes(entry.get("among") or {}, path, "among")
    if not among:
        raise ConfigError(f"choose in {path} has nothing to choose among. Give 'among: {{learning_rate: [...]}}'.")
    both = sorted(among.keys() & grid.keys())
    if both:
        raise ConfigError(f"{both[0]} is in grid and in choose of {path}; it must be in one of the two.")
    per = _texts(entry["per"]) if "per" in entry else tuple(grid)
    on = _axes(entry.get("on") or {}, path, "on")
    for axis in (*per, *on):
        if axis not in grid:
            raise ConfigError(f"choose names {axis!r} in {path}, which is no axis of grid: {', '.join(grid)}.")
    for axis, values in on.items():
        wrong = [name for name in values if name not in grid[axis]]
        if wrong:
            raise ConfigError(f"on says {axis}: {wrong[0]} in {path}; the values there are {', '.join(grid[axis])}.")
        if axis in per and set(values) < set(grid[axis]):
            raise ConfigError(
                f"choose in {path} looks at some values of {axis} only but chooses for every one of them. Leave "
                f"{axis} out of 'per' or of 'on'."
            )
    return Choice(among, per, on, tuple(_fewer(one, grid, among, per, path) for one in entry.get("narrow") or ()))


def _fewer(value: Any, grid: Axes, among: Axes, per: Sequence[str], path: Path) -> tuple[Axes, Axes]:
    entry = _mapping(value, path, "an entry of narrow")
    _known(entry, ("when", "among"), f"an entry of narrow in {path} has the unknown key")
    when, fewer = (_axes(entry.get(key) or {}, path, key) for key in ("when", "among"))
    for known, given in (({axis: grid[axis] for axis in per}, when), (among, fewer)):
        for axis, values in given.items():
            if axis not in known:
                raise ConfigError(f"narrow names {axis!r} in {path}; it must be one of {', '.join(known)}.")
            wrong = [name for name in values if name not in known[axis]]
            if wrong:
                raise ConfigError(f"narrow says {axis}: {wrong[0]} in {path}; it must be {', '.join(known[axis])}.")
    return when, fewer


def _kept(fewer: Axes, among: Axes) -> Axes:
    """The narrowed axes that what was typed has left as they are; one that was typed means what it says."""
    return {axis: values for axis, values in fewer.items() if set(values) <= set(among[axis])}


def _seeds(values: Any, path: Path) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for value in _texts(values) for part in value.split(",") if part)
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds of {path} is {values!r}; it must be a list of different whole numbers from 0 on.")
    return seeds


def _flag(value: Any, path: Path, name: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} of {path} is {value!r}; it must be true or false.")
    return value


def _table(value: Any, grid: Axes, path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    entry = _mapping(value or {}, path, "table")
    _known(entry, ("rows", "columns"), f"table in {path} has the unknown key")
    columns = _texts(entry["columns"]) if "columns" in entry else tuple(axis for axis in grid if axis == "task")
    rows = _texts(entry["rows"]) if "rows" in entry else tuple(axis for axis in grid if axis not in columns)
    if sorted((*rows, *columns)) != sorted(grid):
        raise ConfigError(
            f"table of {path} has the rows {list(rows)} and the columns {list(columns)}; together they must be the "
            f"axes of grid, each once: {', '.join(grid)}."
        )
    return rows, columns


def _references(value: Any, full: Axes, axes: Sequence[str], grid: Axes, path: Path) -> tuple[str, ...]:
    """Rows of the whole grid; those that what was typed has taken away are left out."""
    names = row_names(full, axes)
    for name in _texts(value):
        if name not in names:
            raise ConfigError(f"references of {path} names {name!r}, which is no row; the rows are {', '.join(names)}.")
    return tuple(name for name in _texts(value) if name in row_names(grid, axes))
