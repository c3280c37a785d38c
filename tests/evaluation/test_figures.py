from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from slidetl.evaluation.bootstrap import Figure
from slidetl.evaluation.figures import (
    accuracy_of,
    auroc_of,
    difference,
    log_loss_of,
    mae_of,
    mean_of,
    qwk_of,
    rps_of,
)
from slidetl.evaluation.metrics import grade_metrics, probability_metrics

K = 5


def results(n: int = 40, repeats: int = 3, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, K, n)
    return true, rng.dirichlet(np.ones(K), (repeats, n)).round(2) * 0.9 + 0.1 * np.eye(K)[true]


def normal(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rows / rows.sum(-1, keepdims=True))


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_copies_of_slides_and_repeats_are_averaged(seed: int) -> None:
    """Against the figures of metrics.py on the copied slides."""
    true, rows = results(seed=seed)
    rows = normal(rows)
    graded = rows.argmax(2)
    weights = np.random.default_rng(100 + seed).integers(0, 3, (4, len(true)))
    figures: dict[str, Figure] = {
        "accuracy": accuracy_of(true, graded),
        "mae": mae_of(true, graded),
        "qwk": qwk_of(true, graded, K),
        "rps": rps_of(true, rows),
        "log_loss": log_loss_of(true, rows),
    }
    for of_draw in weights:
        copies = np.repeat(np.arange(len(true)), of_draw)
        by_grade = [grade_metrics(true[copies], repeat[copies], K) for repeat in graded]
        by_row = [probability_metrics(true[copies], repeat[copies]) for repeat in rows]
        for name in ("accuracy", "mae", "qwk"):
            expected = np.mean([getattr(metrics, name) for metrics in by_grade])
            assert figures[name](of_draw[None].astype(float))[0] == pytest.approx(expected)
        for name in ("rps", "log_loss"):
            expected = np.mean([getattr(metrics, name) for metrics in by_row])
            assert figures[name](of_draw[None].astype(float))[0] == pytest.approx(expected)
        for threshold in range(K - 1):
            expected = np.mean([metrics.auroc[threshold] for metrics in by_row])
            got = auroc_of(true, rows, threshold)(of_draw[None].astype(float))[0]
            assert got == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3), st.integers(0, 6)),
        min_size=2,
        max_size=30,
    )
)
def test_kappa_and_auroc_agree_with_scikit_learn_under_any_weights(
    slides: list[tuple[int, int, int, int]],
) -> None:
    true, predicted, weights, sixths = np.array(slides).T
    kept = weights > 0
    if kept.any() and len(set(true[kept]) | set(predicted[kept])) > 1:
        expected = cohen_kappa_score(
            true, predicted, labels=range(K), weights="quadratic", sample_weight=weights
        )
        assert qwk_of(true, predicted, K)(weights[None].astype(float))[0] == pytest.approx(expected)
    positive = true > 1
    rows = np.stack([1 - sixths / 6, 0 * sixths, sixths / 6], 1)
    got = auroc_of(np.where(positive, 2, 0), rows, 0)(weights[None].astype(float))[0]
    if positive[kept].any() and not positive[kept].all():
        assert got == pytest.approx(roc_auc_score(positive, sixths, sample_weight=weights))
    else:
        assert np.isnan(got)


def test_without_weights_nothing_is_known_and_constants_show_nothing() -> None:
    none = np.zeros((1, 3))
    assert np.isnan(accuracy_of([0, 1, 2], [0, 1, 1])(none)[0])
    assert np.isnan(qwk_of([0, 1, 2], [0, 1, 1], 3)(none)[0])
    assert qwk_of([2, 2], [2, 2], 5)(np.ones((1, 2)))[0] == 0
    assert qwk_of([0, 4], [4, 0], 5)(np.ones((1, 2)))[0] == -1


def test_a_difference_is_taken_on_the_same_weights() -> None:
    gap = difference(mean_of([1.0, 2.0]), mean_of([0.0, 0.0]))
    np.testing.assert_allclose(gap(np.array([[1.0, 1.0], [1.0, 3.0]])), [1.5, 1.75])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: accuracy_of([0, 1], [0]), "expected grades"),
        (lambda: mae_of([], []), "expected grades"),
        (lambda: accuracy_of([0, 1], [0, 0.5]), "whole numbers"),
        (lambda: qwk_of([0, 5], [0, 1], 5), "from 0 to 4"),
        (lambda: qwk_of([0, 1], [0, -1], 5), "from 0 to 4"),
        (lambda: rps_of([0], [0.5, 0.5]), "expected grades"),
        (lambda: rps_of([2], [[0.5, 0.5]]), "from 0 to 1"),
        (lambda: log_loss_of([0], [[0.5, 0.6]]), "sum to one"),
        (lambda: auroc_of([0], [[0.5, 0.5]], 1), "threshold must be from 0 to 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
