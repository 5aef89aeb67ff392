"""Multiple choice scored by lm-eval (EleutherAI's language model evaluation harness).

lm-eval compares the log-likelihoods of a question's choices after its prompt: `acc` takes the largest, `acc_norm` the
largest divided by the number of characters of its choice. Everything that decides a score is lm-eval's own: the
tokens, the log-likelihoods, the metrics. Only the rows are ours, and they may come from local files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from meft.errors import MissingPackageError

from .multiple_choice import ANSWER, CHOICES, METRICS, PROMPT

# lm-eval cuts what is longer from the left without counting it; here such questions are left out before.
_NO_LIMIT = 10**9


@dataclass(frozen=True)
class ChoiceScores:
    """What lm-eval found.

    Attributes:
        metrics: `acc` and `acc_norm`.
        loglikelihoods: Of each choice of each question, in the order of the rows.
    """

    metrics: dict[str, float]
    loglikelihoods: list[list[float]]


def require_harness() -> None:
    """Refuses to begin what could not be scored in the end.

    Raises:
        MissingPackageError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise MissingPackageError(
            "questions with choices are scored by the package lm-eval, which is not installed. "
            'Install it with: pip install "meft[lab]"'
        )


def score_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Dataset,
    *,
    name: str,
    batch_size: int,
    quiet: bool = False,
) -> ChoiceScores:
    """Scores a language model on questions with choices.

    Args:
        model: A causal language model of Transformers, or a `PeftModel` around one; it is put in eval mode.
        tokenizer: Its tokenizer.
        questions: Rows with `prompt`, `choices` and, unless only `loglikelihoods` are wanted, `answer`. None may be
            longer than the model takes.
        name: The task's name.
        batch_size: Choices to a batch.
        quiet: Show no progress bar.

    Raises:
        MissingPackageError: lm-eval is not installed.
    """
    require_harness()
    from lm_eval.evaluator import evaluate

    if ANSWER not in questions.column_names:
        questions = questions.add_column(ANSWER, [0] * len(questions))
    with _silent():
        scorer = _language_model(model, tokenizer, batch_size, quiet)
        found = evaluate(scorer, {name: _task(name, questions)}, bootstrap_iters=0, log_samples=True)
    scores = found["results"][name]
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return ChoiceScores(
        {metric: float(scores[f"{metric},none"]) for metric in METRICS},
        [[float(choice[0]) for choice in sample["filtered_resps"]] for sample in samples],
    )


@dataclass(frozen=True)
class _Forward:
    """A model as lm-eval calls it, and no more than that.

    Given the model itself, lm-eval would tie its weights anew, which fails where PEFT trains a copy of the head.
    """

    model: Any

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids)


def _language_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int, quiet: bool) -> Any:
    from lm_eval.models.huggingface import HFLM

    class OneBar(HFLM):
        """Shows the progress of the model alone, and no bar for the tokenizer."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, **options)

    return OneBar(
        pretrained=_Forward(model.eval()),
        backend="causal",
        tokenizer=tokenizer,
        max_length=_NO_LIMIT,
        batch_size=batch_size,
    )


def _task(name: str, questions: Dataset) -> Any:
    from lm_eval.api.task import ConfigurableTask

    class Quiet(ConfigurableTask):
        """Builds its requests, the work of a moment, without a progress bar."""

        def build_all_requests(self, **options: Any) -> None:
            with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
                super().build_all_requests(**options)

    return Quiet(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"questions": questions},
            "test_split": "questions",
            "output_type": "multiple_choice",
            # Names of columns, so that no text of a question is taken for a template.
            "doc_to_text": PROMPT,
            "doc_to_choice": CHOICES,
            "doc_to_target": ANSWER,
            "num_fewshot": 0,
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
        }
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Hides lm-eval's log, which reports the steps of every evaluation as warnings."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
