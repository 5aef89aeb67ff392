from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meft.errors import ConfigError
from meft.training import TRAIN_TYPES
from meft.training.arguments import DataArguments, MeftArguments, parse

REQUIRED = "--model_name_or_path=m"


def parsed(*words: str, **options: Any) -> dict[str, Any]:
    groups = parse(TRAIN_TYPES, words, command="train", **options)
    return {name: value for group in groups for name, value in vars(group).items()}


def test_words() -> None:
    found = parsed(REQUIRED, "--method", "momentum", "--gamma=0.125", "--text_column", "a", "b", "--seed=7")
    assert (found["method"], found["gamma"], found["text_column"], found["seed"]) == ("momentum", 0.125, ["a", "b"], 7)
    assert found["trust_remote_code"] is False and found["dtype"] == "float32"


def test_yaml_with_words_that_override_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_name_or_path: m\nmethod: meft1\nlearning_rate: 5e-5\ntext_column: [a, b]\nbf16: true\ngamma: null\n"
        "use_cpu: true\nlr_scheduler_kwargs: {num_cycles: 2}\noverwrite-run: yes\nsave_strategy: no\n"
    )
    found = parsed(str(path), "--method", "lora")
    # YAML 1.1 reads 5e-5 as a string; the parser makes it the number that was meant.
    assert (found["method"], found["learning_rate"], found["text_column"]) == ("lora", 5e-5, ["a", "b"])
    assert (found["bf16"], found["gamma"], found["overwrite_run"]) == (True, None, True)
    assert found["save_strategy"] == "no"  # not False, as in YAML 1.1
    assert found["lr_scheduler_kwargs"] == {"num_cycles": 2}


def test_json_file_and_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "lora_rank": 4}))
    found = parsed(str(path), "--lora_alpha=3", defaults={"lora_rank": 1, "lora_alpha": 1, "bottleneck_dim": 1})
    assert (found["lora_rank"], found["lora_alpha"], found["bottleneck_dim"]) == (4, 3, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([REQUIRED, "--taks", "rte"], r"^Unknown argument '--taks'. Did you mean --stacks or --task\?$"),
        ([REQUIRED, "--zzz=1"], r"^Unknown argument '--zzz=1'. --help lists the arguments.$"),
        ([REQUIRED, "stray"], "^Unknown argument 'stray'. --help lists the arguments.$"),
        ([REQUIRED, "--max_steps", "x"], "^Argument --max_steps: invalid int value: 'x'. See meft train --help.$"),
        (
            [REQUIRED, "--resume", "maybe"],
            r"^Argument --resume: invalid choice: 'maybe' \(choose from '?auto'?, '?never",
        ),
        (["--task=rte"], "^The following arguments are required: --model_name_or_path. See meft train --help.$"),
        ([REQUIRED, "--out=a"], r"^Unknown argument '--out=a'."),
        # The Trainer's own check of its arguments.
        (
            [REQUIRED, "--load_best_model_at_end", "--output_dir=a"],
            "save and eval strategy to match.*: SaveStrategy.STEPS. See meft train",
        ),
        (["none.yaml"], "^'none.yaml' is no file. Arguments are given as --name value, or in a YAML or JSON file.$"),
    ],
)
def test_bad_words(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("methd: lora\n", r"run.yaml has the unknown key 'methd'. Did you mean --method\?"),
        ("- a\n", "run.yaml holds a list; it must hold lines such as 'method: meft1'."),
        ("a: [\n", "run.yaml is not valid YAML: "),
    ],
)
def test_bad_yaml(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parsed(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "rte", "train_file": "a"}, "--task rte stands beside --train_file; give one of the two."),
        ({"data_dir": "a"}, "--data_dir a stands without --task; name the task, --task rte say."),
        (
            {"train_file": "a"},
            "There is no data: give --task with the name of one, or your own rows with --validation_f",
        ),
        (
            {},
            "There is no data: give --task with the name of one, or your own rows with --train_file and --validation_f",
        ),
        (
            {"task": "rte", "max_eval_samples": 0},
            "max_eval_samples is 0; it must be at least 1. Leave it out for no li",
        ),
        (
            {"task": "rte", "regression": True},
            "regression is True beside --task rte; it describes your own files. Leave it out.",
        ),
        (
            {"task": "sciq", "text_column": ["a"]},
            r"text_column is \['a'\] beside --task sciq; it describes your own files. Leave it out.",
        ),
    ],
)
def test_sources_of_data(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataArguments(**options).check_source(["train", "validation"])


def test_number_of_labels() -> None:
    assert DataArguments(num_labels=3).file_options().labels == ("0", "1", "2")
    assert DataArguments().file_options(["a", "b"]).labels == ("a", "b")
    assert DataArguments(labels=["c", "d"]).file_options(["a", "b"]).labels == ("c", "d")
    for options in ({"num_labels": 1}, {"num_labels": 3, "regression": True}, {"num_labels": 2, "labels": ["a", "b"]}):
        with pytest.raises(
            ConfigError, match=r"num_labels is \d; it must be at least 2 and stand without --labels and"
        ):
            DataArguments(**options).file_options()


def test_output_rule() -> None:
    assert MeftArguments(output="sum:0.1").options().output == ("sum", 0.1)
    assert MeftArguments(output="mean").options().output == "mean"
    with pytest.raises(ConfigError, match=r"output='sum:x' is no output rule. .* \(sum:0.1 on a command line"):
        MeftArguments(output="sum:x").options()


def test_the_examples_parse() -> None:
    examples = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
    assert examples
    for path in examples:
        assert parsed(str(path), REQUIRED)["task"]


def test_help_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert "usage: meft train [arguments.yaml] --model_name_or_path MODEL [--name value ...]\n" in text
    for expected in ("model:", "data:", "method:", "run:", "Trainer of Transformers:", "--resume {auto,never}"):
        assert f"\n{expected}" in text or f"\n  {expected}" in text
    assert "(default: None)" not in text and "--model-name-or-path" not in text
