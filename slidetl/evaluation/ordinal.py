"""Ordinal regression as a scikit-learn estimator."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data


class ProportionalOdds(ClassifierMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn ships no types
    """Predicts grades by a cumulative link, ``P(grade <= k) = sigmoid(intercept_k - x . coef)``.

    McCullagh, JRSS B 1980, with a penalty on the coefficients alone: the fit minimises
    ``penalty / 2 * |coef|^2`` plus the sum of the negative log-likelihood, by L-BFGS. scikit-learn has no
    ordinal model, and those of statsmodels and mord are not penalised, or approximate the likelihood.

    Attributes:
        penalty: strength of the L2 penalty, 0 or more.
        classes_: ``[K]``, the grades of the training part, lowest first.
        coef_: ``[D]``.
        intercept_: ``[K - 1]`` thresholds, rising.
    """

    def __init__(self, penalty: float = 1.0) -> None:
        self.penalty = penalty

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # on classes without an order
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:  # scikit-learn's name
        """Fits to features ``[n, D]`` and grades ``[n]`` of at least two kinds.

        Raises:
            ValueError: shapes do not fit, a value is not finite, or all grades are one.
        """
        x, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, ranks = np.unique(y, return_inverse=True)
        n_grades, n_features = len(self.classes_), x.shape[1]
        if n_grades < 2:
            raise ValueError(f"expected grades of at least two kinds, found one class: {self.classes_[0]!r}")

        # Thresholds are a first one and the logarithms of the gaps, which keeps them in order.
        def thresholds_of(free: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.concatenate([free[:1], free[0] + np.cumsum(np.exp(free[1:]))])

        def objective(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            w, free = parameters[:n_features], parameters[n_features:]
            score = x @ w
            # Ends of the scale: so far off that the sigmoid is exactly 0 and 1 there.
            bounds = np.concatenate([[-1e4], thresholds_of(free), [1e4]])
            low, high = bounds[ranks] - score, bounds[ranks + 1] - score
            gap = np.maximum(high - low, 1e-12)
            # log(sigmoid(high) - sigmoid(low)), without cancellation however far off the score is.
            log_likelihood = log_expit(high) + log_expit(-low) + np.log(-np.expm1(-gap))
            slope = np.exp(-gap) / -np.expm1(-gap)
            to_high, to_low = expit(-high) + slope, -expit(low) - slope  # derivatives of the log-likelihood
            by_threshold = np.bincount(ranks + 1, to_high, n_grades + 1) + np.bincount(
                ranks, to_low, n_grades + 1
            )
            above = np.cumsum(by_threshold[-2:0:-1])[::-1]  # a gap moves every threshold behind it
            by_free = np.concatenate([above[:1], above[1:] * np.exp(free[1:])])
            gradient = np.concatenate([x.T @ (to_high + to_low) + self.penalty * w, -by_free])
            return float(self.penalty / 2 * (w @ w) - log_likelihood.sum()), gradient

        reached = np.cumsum(np.bincount(ranks) + 0.5)[:-1] / (len(ranks) + 0.5 * n_grades)
        start = np.log(reached / (1 - reached))
        found = minimize(
            objective,
            np.concatenate([np.zeros(n_features), start[:1], np.log(np.diff(start))]),
            jac=True,
            method="L-BFGS-B",
            # A step of the line search must not send a gap to nothing, or a threshold to infinity.
            bounds=[(None, None)] * n_features + [(-30, 30)] + [(-15, 5)] * (n_grades - 2),
            options={"maxiter": 2000, "gtol": 1e-6, "ftol": 1e-12},
        )
        self.coef_, self.intercept_ = found.x[:n_features], thresholds_of(found.x[n_features:])
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Returns probabilities ``[n, K]`` of the grades in ``classes_`` from features ``[n, D]``."""
        check_is_fitted(self)
        score = validate_data(self, X, dtype=np.float64, reset=False) @ self.coef_
        below = expit(self.intercept_ - score[:, None])
        return np.diff(np.pad(below, ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1))), axis=1)

    def predict(self, X: ArrayLike) -> NDArray[np.generic]:
        """Returns the most probable grade ``[n]`` from features ``[n, D]``."""
        rows = self.predict_proba(X)
        return np.asarray(self.classes_[rows.argmax(axis=1)])
