"""The metrics of GLUE, computed with scikit-learn and SciPy, so that nothing has to be downloaded.

GLUE (Wang et al. 2019, arXiv 1804.07461, table 1) scores CoLA by the Matthews correlation, MRPC and QQP by accuracy
and F1 of the positive class, STS-B by the Pearson and Spearman correlations, and the other tasks by accuracy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from sklearn import metrics as sk

Metric = Callable[[np.ndarray, np.ndarray], float]


def _correlation(correlate: Callable[..., tuple[float, float]]) -> Metric:
    def compute(predictions: np.ndarray, labels: np.ndarray) -> float:
        # A model that predicts one number for every row has no correlation: nan, without SciPy's warning about it.
        if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return float("nan")
        return float(correlate(predictions, labels)[0])

    return compute


METRICS: dict[str, Metric] = {
    "accuracy": lambda predictions, labels: float(sk.accuracy_score(labels, predictions)),
    "f1": lambda predictions, labels: float(sk.f1_score(labels, predictions, zero_division=0.0)),
    "f1_macro": lambda predictions, labels: float(sk.f1_score(labels, predictions, average="macro", zero_division=0.0)),
    "matthews_correlation": lambda predictions, labels: float(sk.matthews_corrcoef(labels, predictions)),
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
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
