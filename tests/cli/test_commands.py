"""One parser for every command: help, mistakes and forms of writing are alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from meft import cli
from meft.cli.commands import Commands, all_commands
from meft.cli.estimate import EstimateArguments
from meft.cli.export import ExportArguments
from meft.errors import ConfigError
from meft.methods.arguments import OptionArguments
from meft.parsing import option, parse, parse_known
from meft_lab.cli.demo import DemoArguments
from meft_lab.cli.families import FamiliesArguments
from meft_lab.cli.sweep import SweepArguments

NAMES = (
    "train",
    "evaluate",
    "chat",
    "verify",
    "doctor",
    "export",
    "estimate",
    "run",
    "sweep",
    "study",
    "demo",
    "demo-llm",
    "families",
)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    shown = capsys.readouterr()
    return int(end.value.code or 0), shown.out, shown.err


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(all_commands().known) == NAMES
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"  {name} " in out for name in NAMES)
    assert run(capsys)[:2] == (2, out)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "study"])
def test_every_command_has_help_in_groups(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: meft {name} ") and "\noptions:\n" in out
    assert (all_commands().known[name].__doc__ or "").split("\n")[0][:40] in out.replace("\n", " ")
    groups = {"train": ("model", "data", "method", "run", "Trainer of Transformers"), "estimate": ("estimate",)}
    assert all(f"\n{group}:\n" in out for group in groups.get(name, ()))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "study"])
def test_every_command_says_mistakes_alike(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {
        "export": ["a", "--output_dir=b"],
        "estimate": ["m"],
        "chat": ["m"],
        "doctor": ["m"],
        "sweep": ["no-such-recipe"],
    }
    if name == "run":
        code, out, err = run(capsys, name, "--no_such_thing=1")
        assert (code, out) == (2, "") and err.startswith("Error: ") and "names no program behind '--'" in err
        return
    words = needed.get(name, ["--model_name_or_path=m"] if name in ("train", "evaluate", "verify") else [])
    code, out, err = run(capsys, name, *words, "--no_such_thing=1")
    assert (code, out) == (2, "") and err.startswith("Error: ") and err.count("\n") == 1
    assert "Unknown argument '--no_such_thing=1'." in err or name == "sweep"


@pytest.mark.parametrize("name", ["export", "estimate", "sweep"])
def test_what_is_missing_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, name)
    assert code == 2 and "Error: The following arguments are required: " in err


def test_a_command_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such command 'exprot'. Did you mean 'export'?" in run(capsys, "exprot")[2]
    assert "No such command 'zzz'. The commands are train, evaluate," in run(capsys, "zzz")[2]


def test_switches_that_may_be_left_out() -> None:
    def merge(*words: str) -> Any:
        return parse((ExportArguments,), ["run", "--output_dir=out", *words], command="export")[0].merge

    assert [merge(), merge("--merge"), merge("--no-merge"), merge("--no_merge"), merge("--merge=false")] == [
        None,
        True,
        False,
        False,
        False,
    ]


def test_names_that_are_separated_in_any_way() -> None:
    for words in (["--method", "lora momentum"], ["--method", "lora", "momentum"], ["--method=lora,momentum"]):
        arguments = parse((EstimateArguments, OptionArguments), ["m", *words], command="estimate")[0]
        assert (arguments.model, arguments.methods()) == ("m", ["lora", "momentum"])
    for words in (["--methods", "lora momentum"], ["--methods", "lora", "momentum"]):
        assert parse((DemoArguments,), words, command="demo")[0].chosen() == {"methods": ["lora", "momentum"]}
    for words in (
        ["--model_type", "a", "--model_type", "b"],
        ["--model_type", "a", "b"],
        ["--model-type=a", "--model_type=b"],
    ):
        assert parse((FamiliesArguments,), words, command="families")[0].model_type == ["a", "b"]
    assert parse((FamiliesArguments,), [], command="families")[0].model_type == []


def test_the_words_after_a_recipe_are_left_for_it() -> None:
    words = ["glue", "--task", "rte", "mrpc", "--output_dir", "here", "--seeds=0", "--dry_run"]
    arguments, more = parse_known((SweepArguments,), words, command="sweep")
    assert (arguments.recipe, arguments.output_dir, arguments.dry_run) == ("glue", "here", True)
    assert more == ["--task", "rte", "mrpc", "--seeds=0"]


def test_packages_add_commands(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Arguments:
        _argument_group_name = "greeting"

        name: str = field(metadata={"help": "Whom.", "positional": True})
        times: int = option("How often.", 1)

    def greet(words: Any, line: str) -> int:
        """Greet somebody."""
        (arguments,) = parse((Arguments,), words, command="greet", description=greet.__doc__)
        print(f"{arguments.name} " * arguments.times, line)
        return 3

    commands = Commands()
    commands.add(greet)
    assert commands.run(["greet", "Ada", "--times", "2"], "meft greet") == 3
    assert capsys.readouterr().out == "Ada Ada  meft greet\n"
    commands.show()
    assert "greet" in (out := capsys.readouterr().out) and "Greet somebody." in out
    with pytest.raises(ConfigError, match=r"Argument --times: invalid int value: .x.\. See meft greet --help"):
        commands.run(["greet", "Ada", "--times=x"], "")
