from __future__ import annotations

import math

import numpy as np
import pytest

from meft.training.data.metrics import METRICS, predictions_of, score
from meft_lab.tasks import GLUE_TASKS

PREDICTED, LABELS = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])


def test_classification_by_hand() -> None:
    # 2 true positives, 1 false positive, 1 true negative, 1 false negative.
    assert METRICS["accuracy"](PREDICTED, LABELS) == pytest.approx(3 / 5)
    assert METRICS["f1"](PREDICTED, LABELS) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert METRICS["f1_macro"](PREDICTED, LABELS) == pytest.approx((2 / 3 + 1 / 2) / 2)
    expected = (2 * 1 - 1 * 1) / math.sqrt((2 + 1) * (2 + 1) * (1 + 1) * (1 + 1))
    assert METRICS["matthews_correlation"](PREDICTED, LABELS) == pytest.approx(expected)


def test_correlations_by_hand() -> None:
    predicted, labels = np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 3.0, 2.0, 4.0])
    # Deviations from the means 4 and 2.5: (-3, -2, -1, 6) and (-1.5, .5, -.5, 1.5).
    assert METRICS["pearson"](predicted, labels) == pytest.approx(13 / math.sqrt(50 * 5))
    assert METRICS["spearman"](predicted, labels) == pytest.approx(1 - 6 * 2 / (4 * 15))


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_has_no_correlation(name: str) -> None:
    assert math.isnan(METRICS[name](np.ones(3), np.arange(3.0)))
    assert math.isnan(METRICS[name](np.arange(1.0), np.arange(1.0)))


def test_no_positive_prediction_is_no_warning() -> None:
    assert METRICS["f1"](np.zeros(3, int), np.array([0, 1, 0])) == 0
    assert METRICS["matthews_correlation"](np.zeros(3, int), np.array([0, 1, 0])) == 0


def test_every_task_has_glues_metrics() -> None:
    named = {"cola": ("matthews_correlation",), "stsb": ("pearson", "spearman")}
    named |= {"mrpc": ("accuracy", "f1"), "qqp": ("accuracy", "f1")}
    assert {name: task.metrics for name, task in GLUE_TASKS.items()} == {
        name: named.get(name, ("accuracy",)) for name in GLUE_TASKS
    }


def test_logits_become_predictions() -> None:
    logits = np.array([[0.1, 0.9, 0.0], [2.0, -1.0, 1.0]])
    assert predictions_of(logits, regression=False).tolist() == [1, 0]
    assert predictions_of(np.array([[0.5], [1.5]], dtype=np.float32), regression=True).tolist() == [0.5, 1.5]
    assert score(logits, np.array([1, 2]), ["accuracy"], False) == {"accuracy": 0.5}


def test_diverged_training_is_said() -> None:
    message = "1 of 4 logits are not finite numbers, so the training has diverged. Lower the learning rate"
    with pytest.warns(UserWarning, match=message):
        score(np.array([[np.nan, 1], [0, 1]]), np.array([1, 1]), ["accuracy"], False)
