"""From words on the command line, and from a YAML or JSON file, to dataclasses of arguments.

A file is turned into command-line words that stand before the ones typed. So both pass through the same parser, a
word typed later wins, and `5e-5`, which YAML reads as a string, becomes the number that was meant.
"""

from __future__ import annotations

import json
import re
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from transformers import HfArgumentParser

from meft.errors import ConfigError
from meft.options import Option
from meft.options.values import Flag

_BOOL = "tag:yaml.org,2002:bool"
# Every --long_name may also be written --long-name, which argparse adds to its messages.
_ALIAS = re.compile(r"(?<=\w)/--[\w-]+")


class _Help(ArgumentDefaultsHelpFormatter):
    """One name an argument, without the hyphenated alias, the name in capitals, and defaults of None."""

    def _format_action_invocation(self, action: Action) -> str:
        choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
        return next(name for name in action.option_strings if name.startswith("--")) + choices

    def _get_help_string(self, action: Action) -> str | None:
        # The options of the table say their defaults in words.
        said = " Left out: " in (action.help or "")
        return action.help if action.default is None or said else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    @staticmethod
    def _parse_dataclass_field(parser: ArgumentParser, field: Field[Any]) -> None:
        option = field.metadata.get("option")
        if option is None:
            HfArgumentParser._parse_dataclass_field(parser, field)
        else:
            add_option(parser, option, field.default)

    def error(self, message: str) -> NoReturn:
        raise _refused(message, self.prog)


class _OptionParser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _refused(message, self.prog)


def _refused(message: str, command: str) -> ConfigError:
    message = _ALIAS.sub("", message)
    return ConfigError(f"{message[0].upper()}{message[1:]}. See {command} --help.")


def option_parser(command: str, options: Iterable[Option]) -> ArgumentParser:
    """A parser of options of the table alone; it finds those that are given, as words."""
    parser = _OptionParser(prog=command, allow_abbrev=False, add_help=False)
    for option in options:
        add_option(parser, option, SUPPRESS)
    return parser


def add_option(parser: Any, option: Option, default: Any = None) -> None:
    """Adds an option of the table to a parser or a group of one, under its name with underscores and with hyphens.

    A word that stands for no value of the option is kept as it is, for the option's own check to refuse.
    """
    names = list(dict.fromkeys((f"--{option.name}", f"--{option.name.replace('_', '-')}")))
    kind: dict[str, Any] = {"default": default, "help": option.help_text().replace("%", "%%")}
    if isinstance(option.kind, Flag):
        parser.add_argument(*names, type=option.read, nargs="?", const=True, **kind)
        off = list(dict.fromkeys((f"--no_{option.name}", f"--no-{option.name.replace('_', '-')}")))
        parser.add_argument(*off, dest=option.name, action="store_false", default=default, help=SUPPRESS)
    elif option.kind.several:
        parser.add_argument(*names, nargs="+", **kind)
    else:
        parser.add_argument(*names, type=str, **kind)


@cache
def _parser(types: tuple[Any, ...], command: str) -> _Parser:
    """Made once: a sweep parses the arguments of hundreds of runs before the first of them begins."""
    usage = f"meft {command} [arguments.yaml] --model_name_or_path MODEL [--name value ...]"
    return _Parser(list(types), prog=f"meft {command}", usage=usage, allow_abbrev=False, formatter_class=_Help)


def parse(
    types: Sequence[Any], argv: Sequence[str], *, command: str, defaults: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """Builds one instance of each dataclass from the words after `meft train` or `meft evaluate`.

    Args:
        types: Dataclasses of arguments; no two share a name.
        argv: `[file.yaml] [--name value ...]`.
        command: `"train"` or `"evaluate"`, for messages.
        defaults: Values that stand in for words that are neither in the file nor typed.

    Raises:
        ConfigError: An argument is unknown, missing, has no valid value or does not go with another.
    """
    parser = _parser(tuple(types), command)
    words = list(argv)
    from_file: list[str] = []
    if words and not words[0].startswith("-"):
        from_file = as_words(read_mapping(Path(words[0])), types, words[0])
        words = words[1:]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            [*as_words(defaults or {}, types, "defaults"), *from_file, *words],
            return_remaining_strings=True,
            look_for_args_file=False,
        )
    except (ValueError, ImportError) as error:
        # The Trainer's arguments check one another when they are built.
        if isinstance(error, ConfigError):
            raise
        message = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"{message}. See {parser.prog} --help.") from error
    if unknown:
        raise ConfigError(f"Unknown argument {unknown[0]!r}.{_suggestion(unknown[0].lstrip('-'), types)}")
    return tuple(parsed)


class _Loader(yaml.SafeLoader):
    """Safe YAML, where `save_strategy: no` is the word that it looks like: only true and false are booleans."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_BOOL, re.compile("true|True|false|False"), list("tTfF"))


def read_mapping(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} is no file. Arguments are given as --name value, or in a YAML or JSON file.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; it must hold lines such as 'method: meft1'.")
    return content


def as_words(values: Mapping[str, Any], types: Sequence[type], source: str) -> list[str]:
    known = {name.name: name.metadata.get("option") for kind in types for name in fields(kind) if name.init}
    words: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        option = known.get(name)
        off = known.get(name.removeprefix("no_"))
        if name not in known and off is not None and isinstance(off.kind, Flag):
            read = off.read(str(value))
            name, option, value = off.name, off, (not read) if isinstance(read, bool) else value
        if name not in known:
            raise ConfigError(f"{source} has the unknown key {key!r}.{_suggestion(name, types)}")
        if value is None:
            continue
        if option is not None and not option.kind.several:
            value = option.write(value)
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)] if value else []
        else:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def _suggestion(name: str, types: Sequence[type]) -> str:
    known = [entry.name for kind in types for entry in fields(kind) if entry.init]
    close = get_close_matches(name.split("=")[0].replace("-", "_"), known, n=2)
    return f" Did you mean {' or '.join(f'--{word}' for word in close)}?" if close else " --help lists the arguments."
