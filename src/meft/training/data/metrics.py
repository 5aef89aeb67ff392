"""The metrics of GLUE, computed with scikit-learn and SciPy, so that nothing has to be downloaded.

GLUE (Wang et al. 2019, arXiv 1804.07461, table 1) scores CoLA by the Matthews correlation, MRPC and QQP by accuracy
and F1 of the positive class, STS-B by the Pearson and Spearman correlations, and the other tasks by accuracy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]


def _correlation(name: str) -> Metric:
    def compute(predictions: np.ndarray, labels: np.ndarray) -> float:
        from scipy import stats

        # A model that predicts one number for every row has no correlation: nan, without SciPy's warning about it.
        if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return float("nan")
        return float(getattr(stats, name)(predictions, labels)[0])

    return compute


def _score(name: str, **options: Any) -> Metric:
    def compute(predictions: np.ndarray, labels: np.ndarray) -> float:
        # Not at the head: it takes seconds, and --help needs none of it.
        from sklearn import metrics

        return float(getattr(metrics, name)(labels, predictions, **options))

    return compute


METRICS: dict[str, Metric] = {
    "accuracy": _score("accuracy_score"),
    "f1": _score("f1_score", zero_division=0.0),
    "f1_macro": _score("f1_score", average="macro", zero_division=0.0),
    "matthews_correlation": _score("matthews_corrcoef"),
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}


def predictions_of(logits: np.ndarray, regression: bool) -> np.ndarray:
    """The predicted class indices, shape (rows,), or for regression the predicted numbers, from (rows, outputs)."""
    return logits.reshape(-1).astype(np.float64) if regression else logits.argmax(axis=-1)


def score(logits: np.ndarray, labels: np.ndarray, names: Sequence[str], regression: bool) -> dict[str, float]:
    """Scores logits of shape (rows, outputs) against labels of shape (rows,) by the named metrics.

    Warns when some logits are not finite: the model has diverged and its scores mean little.
    """
    broken = int((~np.isfinite(logits)).sum())
    if broken:
        warnings.warn(
            f"{broken} of {logits.size} logits are not finite numbers, so the training has diverged. "
            "Lower the learning rate, or train in float32 or bfloat16 instead of float16.",
            stacklevel=2,
        )
    predictions = predictions_of(logits, regression)
    return {name: METRICS[name](predictions, labels) for name in names}
