"""AUC, log loss and normalised entropy against values known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from quality import quality


def test_base_rate_as_prediction_has_normalised_entropy_one_and_auc_one_half() -> None:
    labels = np.array([1, 0, 0, 0], np.float32)
    result = quality(labels, np.full(4, 0.25, np.float32))
    assert result.normalised_entropy == pytest.approx(1)
    assert (result.auc, result.base_rate, result.rows) == (0.5, 0.25, 4)


def test_values_by_hand() -> None:
    result = quality(np.array([1, 0, 1, 0], np.float32), np.array([0.9, 0.2, 0.4, 0.5], np.float32))
    loss = -(math.log(0.9) + math.log(0.8) + math.log(0.4) + math.log(0.5)) / 4
    assert result.auc == pytest.approx(3 / 4)
    assert result.log_loss == pytest.approx(loss, rel=1e-6)
    assert result.normalised_entropy == pytest.approx(loss / math.log(2), rel=1e-6)


def test_one_class_has_a_loss_but_no_auc() -> None:
    result = quality(np.zeros(3, np.float32), np.full(3, 0.5, np.float32))
    assert result.auc is None and result.normalised_entropy is None
    assert result.log_loss == pytest.approx(math.log(2))


def test_diverged_training_is_named() -> None:
    with pytest.raises(ValueError, match="diverged"):
        quality(np.array([0, 1], np.float32), np.array([0.5, math.nan], np.float32))
    with pytest.raises(ValueError, match="equally many"):
        quality(np.zeros(2, np.float32), np.zeros(3, np.float32))
