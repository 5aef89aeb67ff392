"""What a run says about whether it has learnt, and its model card."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset

from meft.training.card import model_card
from meft.training.verdict import verdict

ARGUMENTS: Any = SimpleNamespace(learning_rate=1e-3, num_train_epochs=3.0, max_steps=-1)


def judged(trainer: str, metrics: dict[str, Any], before: Any = None, log: Any = (), labels: Any = None) -> Any:
    splits = {} if labels is None else {"validation": Dataset.from_dict({"label": labels})}
    prepared: Any = SimpleNamespace(
        kind=SimpleNamespace(trainer=trainer), splits=splits, spec=SimpleNamespace(labels=("no", "yes"))
    )
    return verdict(prepared, metrics, before, log, ARGUMENTS)


@pytest.mark.parametrize(
    ("before", "after", "learnt", "text"),
    [
        (3.0, 2.5, True, "The validation loss fell from 3.000 to 2.500."),
        (3.0, 2.995, False, "Nothing was learnt: the validation loss was 3.000 and is 2.995. Give a larger"),
        (3.0, 3.5, False, "Nothing was learnt: the validation loss rose from 3.000 to 3.500. Give a smaller"),
        (3.0, float("nan"), False, "The validation loss is nan: the training has diverged. Give a smaller"),
    ],
)
def test_a_loss_is_held_against_that_before(before: float, after: float, learnt: bool, text: str) -> None:
    found = judged("sft", {"loss": after}, {"loss": before})
    assert (found.learnt, found.text.startswith(text)) == (learnt, True)


def test_without_validation_the_training_loss_is_looked_at() -> None:
    assert judged("sft", {}, None, [{"loss": 3.0}, {"eval_loss": 1.0}, {"loss": 2.0}]).text == (
        "The training loss fell from 3.000 to 2.000."
    )
    assert judged("sft", {}, None, [{"loss": 3.0}]).learnt is None


@pytest.mark.parametrize(("accuracy", "learnt"), [(0.6, False), (0.63, False), (0.7, True)])
def test_an_accuracy_is_held_against_the_most_frequent_label(accuracy: float, learnt: bool) -> None:
    """100 rows: one standard deviation of guessing is 0.049."""
    found = judged("classic", {"accuracy": accuracy}, labels=[1] * 60 + [0] * 40)
    assert found.learnt is learnt and "the most frequent label, yes, alone gives 0.600" in found.text
    assert ("--learning_rate (3e-03 instead of 1e-03), --num_train_epochs 6" in found.text) is not learnt
    assert judged("classic", {"pearson": 0.1}, labels=[0.1, 0.2]).learnt is None


@pytest.mark.parametrize(("preferred", "margin", "learnt"), [(0.8, 0.1, True), (0.5, 0.1, False), (0.8, -0.1, False)])
def test_preferences_are_held_against_chance(preferred: float, margin: float, learnt: bool) -> None:
    assert judged("dpo", {"preferred": preferred, "margin": margin}).learnt is learnt


def results(**more: Any) -> dict[str, Any]:
    found = {
        "method": "lora+momentum",
        "task": "conversations",
        "model": "somebody/model",
        "metrics": {"loss": 1.0},
        "metrics_before": {"loss": 2.0},
        "deployed_metrics": {"loss": 1.5},
        "rows": {"train": 180, "validation": 20},
        "trains": "LoRA",
        "coupling": "momentum",
        "settings": {"gamma": 0.03125},
        "steps": 23,
        "trainable_parameters": 10,
        "total_parameters": 100,
        "costs": {
            "peak_activation_bytes": 3 * 2**20,
            "reference": "lora",
            "reference_peak_activation_bytes": 9 * 2**20,
        },
        "arguments": {"learning_rate": 5e-4, "train_file": "data/chats.jsonl", "lora_rank": 8, "dpo_beta": 0.1},
        "data": {"columns": ["messages"]},
        "versions": {"meft": "0.1.0", "torch": "2.13"},
        "verdict": "The validation loss fell.",
    }
    return {**found, **more}


def test_the_card_says_how_it_was_trained() -> None:
    card = model_card(results(), adapter=True)
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "somebody/model" and head["library_name"] == "peft"
    for said in (
        "| validation loss | 1.5000 (before training 2.0000) |",
        "| validation loss as trained, with the coupling | 1.0000 |",
        "| memory of a step (activations) | 3.0 MiB |",
        "| the same of lora | 9.0 MiB |",
        "| rows | 180 train, 20 validation |",
        "| data | `chats.jsonl` |",
        "| coupling | gamma 0.03125 |",
        "| lora_rank | 8 |",
        "AutoPeftModelForCausalLM",
        "meft 0.1.0, torch 2.13.",
    ):
        assert said in card
    assert "dpo_beta" not in card and "import meft" not in card


def test_the_card_of_a_local_base_names_no_hub(tmp_path: Any) -> None:
    card = model_card(results(model=str(tmp_path), method="meft1", task="preferences"), adapter=True)
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert "import meft  # which makes the method known to PEFT" in card and "| dpo_beta | 0.1 |" in card
    assert "AutoModelForCausalLM.from_pretrained" in model_card(results(method="full", coupling=None), adapter=False)
