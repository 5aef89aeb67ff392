"""The reference page of all options, docs/options.md."""

from __future__ import annotations

from . import table
from .table import CONFIG, FUNCTION, METHOD, Option
from .values import Names

_HEAD = """# Options

Every option of a reversible stack and of the methods, made from the table `meft.options.OPTIONS` by
`python -m meft.options docs/options.md`.

- `MeftConfig` and `make_reversible` take them in Python, under these names.
- `meft.estimate`, `meft train`, `verify`, `estimate`, `study` and the recipes of `meft sweep` take them beside the name
  of a method: `--gamma 0.125` or `--gamma 1/8` on a command line, `gamma: 0.125` in a file.
- On a command line and in a file, `none` is `None` and `auto` is `"auto"` where these are valid; a switch is written
  `--fused_loss`, `--no_fused_loss` or `--fused_loss false`; a list `--stacks encoder decoder`; an output rule
  `--output newest` or `--output sum:0.1`. An option that is left out, or `null` in a file, has its default.
- `adapter_config.json` of a saved adapter records all options of `MeftConfig`. What was left to the coupling is
  recorded as the value that the coupling took.
"""
_READERS = (CONFIG, FUNCTION, METHOD)


def reference_page() -> str:
    """The page in Markdown."""
    return "\n".join([_HEAD, *map(_entry, table.OPTIONS)])


def _entry(option: Option) -> str:
    rows = [("Valid", option.valid), ("Default", _default(option))]
    if option.none is not None:
        rows.append(("`None`", option.none))
    rows += [(f'`"{word}"`', meaning) for word, meaning in option.words.items()]
    rows.append(("For", "all methods" if option.methods is None else ", ".join(option.methods)))
    rows.append(("Taken by", ", ".join(_reader(reader) for reader in _READERS if reader in option.readers)))
    if METHOD in option.readers:
        rows.append(("Written", _written(option)))
    only = len(option.readers) == 1 and any(
        other.name == option.name and other is not option for other in table.OPTIONS
    )
    heading = f"## `{option.name}`" + (f" of `{next(iter(option.readers))}`" if only else "")
    lines = [f"| | |\n|---|---|\n| {rows[0][0]} | {rows[0][1]} |", *(f"| {name} | {text} |" for name, text in rows[1:])]
    return "\n".join([heading, "", option.help, "", *lines, ""])


def _default(option: Option) -> str:
    return f"`{option.default!r}`".replace("'", '"')


def _reader(reader: str) -> str:
    return "command lines, recipes, `meft.estimate`" if reader == METHOD else f"`{reader}`"


def _written(option: Option) -> str:
    if option.annotation is bool:
        return f"`--{option.name}`, `--no_{option.name}`"
    if isinstance(option.kind, Names):
        return f"`--{option.name} A B`"
    return f"`--{option.name} {option.name.upper()}`"
