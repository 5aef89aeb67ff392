"""`task.json` says how rows are read and cut. It grants nothing, and only the call says the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meft.errors import CheckpointError, ConfigError, MeftWarning
from meft.parsing import as_words
from meft.training import TRAIN_TYPES
from meft.training.evaluation import parse_evaluation
from meft.training.recorded import ALIKE, read_task
from support.tiny import evaluate, make_model, make_rte, train

# A model whose code writes a file when it is run.
EVIL = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
from transformers import BertConfig, BertForSequenceClassification
class EvilConfig(BertConfig):
    model_type = "evil"
class Evil(BertForSequenceClassification):
    config_class = EvilConfig
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = make_model(folder / "model")
    words = ["--method=full", "--max_steps=1", "--max_seq_length=20", "--per_device_eval_batch_size=3"]
    train(model, ["--task=rte", f"--data_dir={make_rte(folder / 'RTE')}"], folder / "run", *words)
    return folder / "run"


@pytest.fixture
def lying(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(**changed: Any) -> Path:
        folder = shutil.copytree(trained, tmp_path / "lying")
        found = json.loads((folder / "task.json").read_text())
        found["arguments"] |= changed
        (folder / "task.json").write_text(json.dumps(found))
        return folder

    return make


def test_what_was_recorded_is_taken_back(trained: Path) -> None:
    model, data, _, trainer = parse_evaluation([f"--model_name_or_path={trained}"])
    assert (data.task, data.max_seq_length, trainer.per_device_eval_batch_size) == ("rte", 20, 3)
    assert read_task(str(trained)).labels == ["entailment", "not_entailment"]
    _, data, *_ = parse_evaluation([f"--model_name_or_path={trained}", "--max_seq_length=7"])
    assert data.max_seq_length == 7
    assert not model.trust_remote_code and "trust_remote_code" not in json.loads((trained / "task.json").read_text())


def test_code_that_comes_with_a_folder_does_not_run(lying: Callable[..., Path]) -> None:
    folder = lying(trust_remote_code=True)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForSequenceClassification": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": names}))
    (folder / "evil.py").write_text(EVIL)
    with (
        pytest.warns(MeftWarning, match=r"task.json says trust_remote_code, which only the call may say; nothing of"),
        pytest.raises(Exception, match=r"contains custom code|trust_remote_code"),
    ):
        evaluate(folder)
    ran = [path for path in (folder.parent, Path.home() / ".cache") for path in path.rglob("ran")]
    assert not ran


def test_only_the_call_names_other_models_and_outputs(lying: Callable[..., Path]) -> None:
    others = {"config_name": "/evil", "tokenizer_name": "/evil", "output_dir": "/evil", "hub_token": "secret",
              "predictions_file": "/evil", "base_model_name_or_path": "/evil", "cache_dir": "/evil"}  # fmt: skip
    folder = lying(**others)
    with pytest.warns(MeftWarning, match="says config_name, tokenizer_name, output_dir, hub_token, predictions_file, "):
        groups = parse_evaluation([f"--model_name_or_path={folder}"])
    for name in others:
        for group in groups:
            assert getattr(group, name, None) not in ("/evil", "secret")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_seq_length", "7"),
        ("max_seq_length", 0),
        ("max_seq_length", True),
        ("text_column", ["text", "--trust_remote_code"]),
        ("text_column", ["a", "b", "c"]),
        ("text_column", "text"),
        ("label_column", ["label"]),
        ("task", "rte\n--trust_remote_code"),
        ("attn_implementation", "stranger/kernel"),
        ("dtype", "object"),
        ("revision", "--trust_remote_code"),
        ("bf16", "true"),
        ("per_device_eval_batch_size", -1),
        ("per_device_eval_batch_size", 1.5),
        ("validation_share", 2.0),
        ("data_dir", {"a": 1}),
    ],
)
def test_every_value_has_a_type(name: str, value: Any, lying: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=rf"task.json says that {name} is .*; valid is .*give --{name} in the"):
        parse_evaluation([f"--model_name_or_path={lying(**{name: value})}"])


def test_no_word_of_a_list_becomes_an_argument() -> None:
    for word in ("--trust_remote_code", "-x", "--labels=a"):
        with pytest.raises(ConfigError, match=r"recipe has .* in labels, which reads as an argument of its own"):
            as_words({"labels": ["yes", word]}, TRAIN_TYPES, "recipe")
    assert as_words({"labels": ["-1", "-.5", 1]}, TRAIN_TYPES, "recipe") == ["--labels", "-1", "-.5", "1"]


def test_no_argument_of_the_list_can_run_code() -> None:
    named = {name for group in ALIKE.values() for name in group}
    assert not {name for name in named if "trust" in name or "model" in name or "token" in name or "output" in name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds a list"),
        ({"labels": "ab"}, "has 'ab' as 'labels', where a list or null is expected"),
        ({"labels": ["a", 2]}, "has 2 as 'labels', where a str is expected"),
        ({"arguments": [1]}, "has .* as 'arguments', where a dict"),
        ({"trained": "lora"}, "has 'lora' as 'trained'"),
        ({"trained": {"method": 1}}, "has 1 as 'method'"),
        ({"trained": {"options": []}}, "as 'options'"),
    ],
)
def test_fields_of_other_types(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        read_task(str(tmp_path))
