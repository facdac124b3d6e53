"""What predictions are worth, beside the loss: by the counts of a confusion matrix, and by correlation.

In plain torch: the definitions are scikit-learn's and SciPy's, to which the tests compare them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def of_classes(predicted: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """`accuracy`, `f1` and `matthews` of class numbers below `classes`, [rows] each, int64.

    `f1` is the mean over all classes that are predicted or are a label of some row; `matthews` is 0 where the rows have
    one class or one prediction alone.
    """
    counts = torch.bincount(labels * classes + predicted, minlength=classes * classes)
    confusion = counts.reshape(classes, classes).double()  # row: the label, column: the prediction
    right, labelled, guessed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    rows = confusion.sum()
    seen = labelled + guessed > 0
    f1 = (2 * right / (labelled + guessed))[seen].mean()
    spread = (rows**2 - guessed @ guessed) * (rows**2 - labelled @ labelled)
    matthews = (right.sum() * rows - guessed @ labelled) / spread.sqrt()
    return {
        "accuracy": float(right.sum() / rows),
        "f1": float(f1),
        "matthews": float(matthews) if spread > 0 else 0.0,
    }


def of_numbers(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """`pearson` and `spearman`, the correlations of numbers and of their ranks, [rows] each; NaN for constant ones."""
    return {"pearson": _correlation(predicted, labels), "spearman": _correlation(_ranks(predicted), _ranks(labels))}


def _correlation(one: Tensor, other: Tensor) -> float:
    one, other = one.double() - one.double().mean(), other.double() - other.double().mean()
    if not (one.any() and other.any()):
        return float("nan")
    return float((one / one.norm()) @ (other / other.norm()))


def _ranks(values: Tensor) -> Tensor:
    """The place of each number among all; equal numbers share the mean of their places. [rows], float64."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    means: Tensor = counts.cumsum(0) - (counts.double() - 1) / 2
    return means[place]
