"""How good predicted probabilities are: AUC, log loss and normalised entropy."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score


class Quality(NamedTuple):
    """Figures of one set of rows; the entropy is normalised by that set's own share of ones."""

    rows: int
    base_rate: float
    auc: float | None  # None where only one class occurs
    log_loss: float
    normalised_entropy: float | None  # None where only one class occurs


def quality(labels: NDArray[np.float32], probabilities: NDArray[np.float32]) -> Quality:
    """Figures of predictions against labels.

    The normalised entropy (He et al. 2014, "Practical lessons from predicting clicks on ads at Facebook") is the log
    loss over the entropy of the labels' mean: 1 says no more than the base rate does, lower is better.

    Args:
        labels: [rows], 0 or 1.
        probabilities: [rows], in [0, 1].

    Raises:
        ValueError: shapes differ, there is no row, or a probability is not a number.
    """
    if labels.shape != probabilities.shape or labels.size == 0:
        raise ValueError(
            f"labels {labels.shape} and probabilities {probabilities.shape} must be equally many, at least one"
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities hold NaN or infinity: the training diverged; try a smaller learning rate")
    base_rate = float(labels.mean(dtype=np.float64))
    loss = float(log_loss(labels, probabilities.astype(np.float64), labels=[0, 1]))
    if base_rate in (0.0, 1.0):
        return Quality(labels.size, base_rate, None, loss, None)
    entropy = -base_rate * math.log(base_rate) - (1 - base_rate) * math.log(1 - base_rate)
    return Quality(labels.size, base_rate, float(roc_auc_score(labels, probabilities)), loss, loss / entropy)
