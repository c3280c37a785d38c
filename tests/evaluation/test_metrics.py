from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, cohen_kappa_score, mean_absolute_error
from sklearn.metrics import confusion_matrix as sklearn_confusion

from slidetl.evaluation.metrics import confusion_matrix, grade_metrics, quadratic_weighted_kappa

grades = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(grades)
def test_agrees_with_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    true, predicted = np.array(pairs).T
    metrics = grade_metrics(true, predicted, 5)
    assert metrics.n == len(pairs)
    assert metrics.accuracy == pytest.approx(accuracy_score(true, predicted))
    assert metrics.mae == pytest.approx(mean_absolute_error(true, predicted))
    np.testing.assert_array_equal(metrics.confusion, sklearn_confusion(true, predicted, labels=range(5)))
    if len(set(true) | set(predicted)) > 1:
        expected = cohen_kappa_score(true, predicted, labels=range(5), weights="quadratic")
        assert metrics.qwk == pytest.approx(expected)


def test_kappa_where_it_is_not_defined_shows_nothing() -> None:
    assert quadratic_weighted_kappa([2, 2], [2, 2], 5) == 0
    assert quadratic_weighted_kappa([0, 4], [0, 4], 5) == 1
    assert quadratic_weighted_kappa([0, 4], [4, 0], 5) == -1


@pytest.mark.parametrize(
    ("true", "predicted"), [([], []), ([0, 1], [0]), ([5], [0]), ([-1], [0]), ([0.5], [0])]
)
def test_grades_off_the_scale_are_refused(true: list[float], predicted: list[float]) -> None:
    with pytest.raises(ValueError, match="grades"):
        confusion_matrix(true, predicted, 5)
