"""From words on the command line, and from a YAML or JSON file, to dataclasses of arguments: for every command.

Example:
    >>> @dataclass
    ... class ExportArguments:
    ...     source: str = field(metadata={"help": "The folder of a run.", "positional": True})
    ...     merge: bool | None = option("Fold the adapter into its base.")
    >>> parse((ExportArguments,), ["runs/rte", "--no-merge"], command="export")

A file is turned into command-line words that stand before the ones typed. So both pass through the same parser, a
word typed later wins, and `5e-5`, which YAML reads as a string, becomes the number that was meant.
"""

from __future__ import annotations

import json
import re
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from meft.errors import ConfigError, MeftError
from meft.options import Option
from meft.options.values import Flag

_BOOL = "tag:yaml.org,2002:bool"
_NEGATIVE = re.compile(r"-(\d+|\d*\.\d+)")
# Every --long_name may also be written --long-name, which argparse adds to its messages.
_ALIAS = re.compile(r"(?<=\w)/--[\w-]+")


def option(help_text: str, default: Any = None) -> Any:
    """A field of a dataclass of arguments, with the sentence that `--help` says of it.

    Fields that this cannot say have metadata of their own: `positional` for one that is given without its name,
    `several` for one whose name may stand several times and whose values add up.
    """
    return field(default=default, metadata={"help": help_text})


class _Help(ArgumentDefaultsHelpFormatter):
    """One name an argument, without the hyphenated alias, the name in capitals, and defaults of None."""

    def _format_action_invocation(self, action: Action) -> str:
        choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
        names = (name for name in action.option_strings if name.startswith("--"))
        return next(names, action.dest) + choices

    def _get_help_string(self, action: Action) -> str | None:
        # The options of the table say their defaults in words.
        said = "Left out: " in (action.help or "")
        nothing = action.default in (None, SUPPRESS) or not action.option_strings
        return action.help if nothing or said else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    @staticmethod
    def _parse_dataclass_field(parser: ArgumentParser, field: Field[Any]) -> None:
        option, help_text = field.metadata.get("option"), str(field.metadata.get("help", "")).replace("%", "%%")
        if option is not None:
            _add_option(parser, option, field.default)
        elif field.metadata.get("positional"):
            parser.add_argument(field.name, help=help_text)
        elif field.metadata.get("several"):
            parser.add_argument(*_names(field.name), nargs="+", action="extend", default=[], help=help_text)
        elif field.type in (bool | None, "bool | None"):
            _add_switch(parser, field.name, string_to_bool, default=field.default, help=help_text)
        else:
            HfArgumentParser._parse_dataclass_field(parser, field)

    def error(self, message: str) -> NoReturn:
        raise _refused(message, self.prog)


def _refused(message: str, command: str) -> ConfigError:
    message = _ALIAS.sub("", message)
    return ConfigError(f"{message[0].upper()}{message[1:]}. See {command} --help.")


def _add_option(parser: Any, option: Option, default: Any) -> None:
    """Adds an option of the table to a parser or a group of one.

    A word that stands for no value of the option is kept as it is, for the option's own check to refuse.
    """
    how: dict[str, Any] = {"default": default, "help": option.help_text().replace("%", "%%")}
    if isinstance(option.kind, Flag):
        _add_switch(parser, option.name, option.read, **how)
    elif option.kind.several:
        parser.add_argument(*_names(option.name), nargs="+", **how)
    else:
        parser.add_argument(*_names(option.name), type=str, **how)


def _add_switch(parser: Any, name: str, read: Any, *, default: Any, **how: Any) -> None:
    """Adds `--name`, `--name false` and `--no_name`."""
    parser.add_argument(*_names(name), type=read, nargs="?", const=True, default=default, **how)
    off = [*_names(f"no_{name}"), f"--no-{name}"]
    parser.add_argument(*dict.fromkeys(off), dest=name, action="store_false", default=default, help=SUPPRESS)


def _names(name: str) -> list[str]:
    """A name with underscores and with hyphens."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


@cache
def _parser(types: tuple[Any, ...], command: str, description: str | None) -> _Parser:
    """Made once: a sweep parses the arguments of hundreds of runs before the first of them begins."""
    known = [field for kind in types for field in fields(kind) if field.init]
    words = [field.name.upper() for field in known if field.metadata.get("positional")] or ["[arguments.yaml]"]
    words += [f"--{field.name} {field.name.split('_')[0].upper()}" for field in known if _required(field)]
    return _Parser(
        list(types),
        prog=f"meft {command}",
        usage=" ".join(["meft", command, *words, "[--name value ...]"]),
        description=description,
        allow_abbrev=False,
        formatter_class=_Help,
    )


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING and not field.metadata.get("positional")


def parse(
    types: Sequence[Any],
    argv: Sequence[str],
    *,
    command: str,
    defaults: Mapping[str, Any] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Builds one instance of each dataclass from the words after a command.

    Args:
        types: Dataclasses of arguments; no two share a name. A field whose metadata has `positional` is given without
            its name; without any such, a file of arguments may stand first.
        argv: `[file.yaml] [--name value ...]`.
        command: `"train"` or `"evaluate"`, say, for messages.
        defaults: Values that stand in for words that are neither in the file nor typed.
        description: What `--help` says of the command.

    Raises:
        ConfigError: An argument is unknown, missing, has no valid value or does not go with another.
    """
    *parsed, unknown = parse_known(types, argv, command=command, defaults=defaults, description=description)
    if unknown:
        raise ConfigError(f"Unknown argument {unknown[0]!r}.{_suggestion(unknown[0].lstrip('-'), types)}")
    return tuple(parsed)


def parse_known(
    types: Sequence[Any],
    argv: Sequence[str],
    *,
    command: str,
    defaults: Mapping[str, Any] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """As `parse`, with the words that belong to none of the dataclasses as its last element."""
    parser = _parser(tuple(types), command, description)
    words = list(argv)
    for word in words:
        _check_unicode(word, "The command line")
    from_file: list[str] = []
    positional = any(field.metadata.get("positional") for kind in types for field in fields(kind))
    if words and not words[0].startswith("-") and not positional:
        from_file = as_words(read_mapping(Path(words[0])), types, words[0])
        words = words[1:]
    try:
        return parser.parse_args_into_dataclasses(
            [*as_words(defaults or {}, types, "defaults"), *from_file, *words],
            return_remaining_strings=True,
            look_for_args_file=False,
        )
    except (ValueError, ImportError, TypeError, AttributeError, KeyError, OverflowError, RuntimeError) as error:
        # The Trainer's arguments check one another when they are built, in part by stumbling over one another.
        if isinstance(error, MeftError):
            raise
        message = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"{message}. See {parser.prog} --help.") from error


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
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply; it must hold lines such as 'method: meft1'.") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
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
        for part in value if isinstance(value, (list, tuple)) else [value]:
            _check_unicode(str(part), f"{source}, in {name},")
        if value is None:
            continue
        if option is not None and not option.kind.several:
            value = option.write(value)
        if isinstance(value, (list, tuple)):
            _refuse_names(source, name, value)
            words += [f"--{name}", *map(str, value)] if value else []
        else:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def _check_unicode(word: str, source: str) -> None:
    """Half a character, which a terminal or a file in another encoding gives, can be neither printed nor saved."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{source} has {word!a}, which is no Unicode: {error.object[error.start]!r} alone is half a character. "
            "Write it in UTF-8."
        ) from error


def _refuse_names(source: str, name: str, values: Sequence[Any]) -> None:
    """Words of a list follow one another, so one that looks like another argument would become that argument."""
    for value in values:
        if str(value).startswith("-") and not _NEGATIVE.fullmatch(str(value)):
            raise ConfigError(
                f"{source} has {value!r} in {name}, which reads as an argument of its own. Leave its hyphen out."
            )


def _suggestion(name: str, types: Sequence[type]) -> str:
    known = [entry.name for kind in types for entry in fields(kind) if entry.init]
    close = get_close_matches(name.split("=")[0].replace("-", "_"), known, n=2)
    return f" Did you mean {' or '.join(f'--{word}' for word in close)}?" if close else " --help lists the arguments."
