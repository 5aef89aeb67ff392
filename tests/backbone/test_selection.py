"""Which checkpoint becomes the result, and early stopping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerState

from meft.errors import ConfigError
from meft.training import selection
from meft.training.arguments import TrainerArguments
from meft.training.selection import EarlyStopping, check_early_stopping, check_metric
from meft_lab.tasks.glue import glue_spec
from support.tiny import make_model, make_rte, train

EVERY_EPOCH = ["--eval_strategy=epoch", "--save_strategy=epoch", "--load_best_model_at_end"]


def arguments(**options: Any) -> TrainerArguments:
    return TrainerArguments(output_dir="out", use_cpu=True, **options)


@pytest.mark.parametrize(
    ("patience", "options", "message"),
    [
        (0, {}, r"^early_stopping_patience is 0; it must be at least 1. Leave it out to train on.$"),
        (
            5,
            {},
            r"^early_stopping_patience is 5, but eval_strategy is no, so progress would never be seen. Give --eval_",
        ),
        (
            5,
            {"eval_strategy": "epoch"},
            r"^early_stopping_patience is 5, but load_best_model_at_end is False, so the result would be the model of "
            r"5 evaluations past the best. Give --load_best_model_at_end, with the same --save_strategy as --eval_str",
        ),
    ],
)
def test_early_stopping_needs_evaluations_and_the_best_checkpoint(
    patience: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_early_stopping(patience, arguments(**options))


def test_early_stopping_that_fits() -> None:
    check_early_stopping(None, arguments())
    check_early_stopping(5, arguments(eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True))


@pytest.mark.parametrize(
    ("task", "suffixes", "metrics"),
    [
        ("cola", [""], ["matthews_correlation", "loss"]),
        ("sst2", [""], ["accuracy", "loss"]),
        ("mrpc", [""], ["accuracy", "f1", "loss"]),
        ("stsb", [""], ["pearson", "spearman", "loss"]),
        ("qqp", [""], ["accuracy", "f1", "loss"]),
        ("qnli", [""], ["accuracy", "loss"]),
        ("rte", [""], ["accuracy", "loss"]),
        (
            "mnli",
            ["matched", "mismatched"],
            ["matched_accuracy", "matched_loss", "mismatched_accuracy", "mismatched_loss"],
        ),
    ],
)
def test_metrics_for_the_best_checkpoint(task: str, suffixes: list[str], metrics: list[str]) -> None:
    spec = glue_spec(task)
    for metric in metrics:
        check_metric(arguments(metric_for_best_model=metric), spec, suffixes)
        check_metric(arguments(metric_for_best_model=f"eval_{metric}"), spec, suffixes)
    with pytest.raises(ConfigError) as caught:
        check_metric(arguments(metric_for_best_model="acuracy"), spec, suffixes)
    listed = ", ".join(metrics)
    assert str(caught.value) == (
        f"metric_for_best_model is 'acuracy'; the metrics of {task} are {listed}. Give one of them."
    )


def test_the_default_metric_is_refused_where_the_task_has_none_of_it() -> None:
    """The Trainer takes the loss, and MNLI has two of them."""
    given = arguments(load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch")
    with pytest.raises(ConfigError, match=r"metric_for_best_model is 'loss'; the metrics of mnli are matched_accuracy"):
        check_metric(given, glue_spec("mnli"), ["matched", "mismatched"])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("inputs")
    model, rte = make_model(folder / "model"), make_rte(folder / "RTE")
    data = ["--task=rte", f"--data_dir={rte}", "--per_device_train_batch_size=10", "--method=lora"]
    return model, [*data, *EVERY_EPOCH, "--metric_for_best_model=accuracy", "--num_train_epochs=12"]


def series(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Every epoch has the accuracy given here instead of the true one."""
    from meft.training.checkpoints import CheckpointingTrainer

    evaluate = CheckpointingTrainer.evaluation_loop

    def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = evaluate(self, *args, **kwargs)
        epoch = round(self.state.epoch or 0)
        return output._replace(metrics=output.metrics | {"eval_accuracy": values[epoch - 1]})

    monkeypatch.setattr(CheckpointingTrainer, "evaluation_loop", evaluation_loop)


def test_training_stops_without_progress(
    words: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(monkeypatch, [0.5, 0.6, 0.6, 0.7, 0.7, 0.65, 0.7, *[0.9] * 5])
    model, given = words
    said: list[str] = []
    found = train(model, given, tmp_path / "run", *EVERY_EPOCH, "--early_stopping_patience=3", say=said.append)
    # Two steps an epoch; the best epoch is the fourth, and three more pass.
    assert (found["steps"], found["best_step"], found["stopped_early"]) == (14, 8, True)
    assert said[-1] == "Stopped after step 14: accuracy was best at step 8."
    best, result = (tmp_path / "run" / place / "adapter_model.safetensors" for place in ("checkpoint-8", "."))
    assert best.read_bytes() == result.read_bytes()


def test_with_progress_training_does_not_stop(
    words: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(monkeypatch, [0.5, 0.4, 0.4, 0.6, 0.5, 0.5])
    model, given = words
    more = [*EVERY_EPOCH, "--early_stopping_patience=3", "--num_train_epochs=6"]
    found = train(model, given, tmp_path / "run", *more)
    assert (found["steps"], found["best_step"], found["stopped_early"]) == (12, 8, False)


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("step", [12, 14])
def test_a_resumed_run_stops_where_it_would_have(
    step: int, words: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of its patience, and after it has run out."""
    series(monkeypatch, [0.5, 0.6, 0.6, 0.7, 0.7, 0.65, 0.7, *[0.9] * 5])
    model, given = words
    more = [*EVERY_EPOCH, "--early_stopping_patience=3"]
    whole = train(model, given, tmp_path / "whole", *more)

    class Kill(TrainerCallback):
        def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise _KilledError

    with monkeypatch.context() as patched:
        patched.setattr("meft.training.kinds.base.TaskKind.callbacks", lambda *_: [Kill()])
        with pytest.raises(_KilledError):
            train(model, given, tmp_path / "run", *more)
    found = train(model, given, tmp_path / "run", *more)
    assert found["resumed_from"] == f"checkpoint-{step}"
    for name in ("steps", "best_step", "stopped_early", "metrics"):
        assert found[name] == whole[name]
    results = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "run")]
    assert results[0].read_bytes() == results[1].read_bytes()


def test_the_count_is_in_the_checkpoint(tmp_path: Path) -> None:
    stopping = EarlyStopping(3)
    stopping.early_stopping_patience_counter = 2
    state = TrainerState(stateful_callbacks=[stopping])
    state.save_to_json(str(tmp_path / "state.json"))
    again = EarlyStopping(3)
    assert not again.restore(TrainerState.load_from_json(str(tmp_path / "state.json")))
    assert again.early_stopping_patience_counter == 2
    content = json.loads((tmp_path / "state.json").read_text())
    content["stateful_callbacks"] = {}
    (tmp_path / "state.json").write_text(json.dumps(content))
    again.restore(TrainerState.load_from_json(str(tmp_path / "state.json")))
    assert again.early_stopping_patience_counter == 0 and selection.EarlyStopping(1).stopped is False


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metric_for_best_model=acc"], r"metric_for_best_model is 'acc'; the metrics of rte are accuracy, loss."),
        (["--early_stopping_patience=0"], r"early_stopping_patience is 0; it must be at least 1."),
    ],
)
def test_refused_before_anything_is_written(
    more: list[str], message: str, words: tuple[Path, list[str]], tmp_path: Path
) -> None:
    model, given = words
    with pytest.raises(ConfigError, match=message):
        train(model, given, tmp_path / "run", *EVERY_EPOCH, *more)
    assert not (tmp_path / "run").exists()
