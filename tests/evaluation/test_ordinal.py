from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import check_estimator

from slidetl.evaluation.ordinal import ProportionalOdds


def test_it_is_an_estimator_as_scikit_learn_wants_them() -> None:
    check_estimator(ProportionalOdds(), on_skip=None)  # what is skipped is input as a tensor


@pytest.mark.parametrize("n_grades", [2, 3, 5])
@pytest.mark.parametrize("penalty", [0.1, 10.0])
def test_the_cumulative_link_is_at_the_maximum_of_its_likelihood(n_grades: int, penalty: float) -> None:
    """Against the textbook's formula, maximised without derivatives and without our parameters."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(80, 3))
    y = np.clip(np.rint(x @ [0.8, -0.5, 0.0] + rng.normal(size=80) + (n_grades - 1) / 2), 0, n_grades - 1)
    y = y.astype(np.int64)

    def sigmoid(z: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(1 / (1 + np.exp(-z)))

    def loss(parameters: NDArray[np.float64]) -> float:
        w, thresholds = parameters[:3], parameters[3:]
        if (np.diff(thresholds) <= 0).any():
            return 1e9
        below = np.column_stack([np.zeros(80), *(sigmoid(t - x @ w) for t in thresholds), np.ones(80)])
        return float(
            penalty / 2 * w @ w - np.log(below[np.arange(80), y + 1] - below[np.arange(80), y]).sum()
        )

    fitted = ProportionalOdds(penalty).fit(x, y)
    ours = np.concatenate([fitted.coef_, fitted.intercept_])
    start = np.concatenate([np.zeros(3), np.linspace(-2, 2, n_grades - 1) if n_grades > 2 else [0.0]])
    found = minimize(loss, start, method="Powell", options={"xtol": 1e-8, "ftol": 1e-12, "maxiter": 50_000})
    assert loss(ours) <= found.fun + 1e-6
    np.testing.assert_allclose(ours, found.x, atol=5e-3)


def test_with_two_grades_the_cumulative_link_is_logistic_regression() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 4))
    y = (x[:, 0] + rng.normal(size=60) > 0).astype(np.int64)
    fitted = ProportionalOdds(2.0).fit(x, y)
    reference = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(fitted.predict_proba(x), reference.predict_proba(x), atol=1e-4)


def test_fewer_slides_than_features_are_solved_exactly() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(30, 50))
    y = np.arange(30) % 5
    fitted = ProportionalOdds(3.0).fit(x, y)
    score = x @ fitted.coef_
    bounds = np.concatenate([[-np.inf], fitted.intercept_, [np.inf]])
    upper, lower = (1 / (1 + np.exp(score - bounds[y + side])) for side in (1, 0))
    # At the optimum the gradient of the likelihood equals that of the penalty.
    slope = (upper * (1 - upper) - lower * (1 - lower)) / (upper - lower)
    np.testing.assert_allclose(-x.T @ slope, 3.0 * fitted.coef_, atol=1e-3)
