"""Figures of merit as functions of weights, as the bootstrap needs them.

Each ``*_of`` fixes grades and predictions and returns a :data:`~slidetl.evaluation.bootstrap.Figure`:
weights ``[B, N]`` -> ``[B]``. Repeats ``[R, N]`` of a cross-validation are each pooled over their folds,
and the figures of the repeats are averaged: repeats share the patients, and are never treated as if they were
more of them. With weights of one, each gives what :mod:`slidetl.evaluation.metrics` does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Figure

# As in metrics: one slide cannot decide the logarithm alone.
_LEAST_PROBABILITY = 1e-7


def mean_of(values: ArrayLike) -> Figure:
    """The weighted mean of ``[N]`` or ``[R, N]`` values; NaN without any weight."""
    by_result = np.atleast_2d(np.asarray(values, np.float64)).mean(axis=0)

    def figure(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights.sum(axis=1)
        return np.where(total > 0, weights @ by_result / np.where(total > 0, total, 1), np.nan)

    return figure


def accuracy_of(true: ArrayLike, predicted: ArrayLike) -> Figure:
    """Share of results with exactly the right grade.

    Args:
        true: ``[N]`` grades.
        predicted: ``[N]`` or ``[R, N]`` grades.

    Raises:
        UsageError: lengths that differ, or no results.
    """
    truth, rows = _repeats(true, predicted)
    return mean_of(rows == truth)


def mae_of(true: ArrayLike, predicted: ArrayLike) -> Figure:
    """Mean absolute error in grades; arguments and errors as :func:`accuracy_of`."""
    truth, rows = _repeats(true, predicted)
    return mean_of(abs(rows - truth))


def qwk_of(true: ArrayLike, predicted: ArrayLike, n_grades: int) -> Figure:
    """Quadratic-weighted kappa over the full scale, from weighted confusion counts.

    Where weights leave both lists one and the same constant, it is 0, as in
    :func:`slidetl.evaluation.metrics.quadratic_weighted_kappa`.

    Args:
        true: ``[N]`` whole numbers 0..K-1.
        predicted: ``[N]`` or ``[R, N]`` whole numbers 0..K-1.
        n_grades: K.

    Raises:
        UsageError: lengths that differ, no results, or a grade off the scale.
    """
    truth, rows = _repeats(true, predicted)
    scale = np.arange(n_grades)
    if not (np.isin(truth, scale).all() and np.isin(rows, scale).all()):
        raise UsageError(f"grades must be whole numbers from 0 to {n_grades - 1}")
    # sum of (i - j)^2 over pairs of margins = E[i^2] + E[j^2] - 2 E[i] E[j]: three weighted means do it.
    repeated = np.broadcast_to(truth, rows.shape)
    terms = [np.ones(rows.shape), rows, rows**2, (rows - truth) ** 2, repeated, repeated**2]
    columns = np.stack(terms, axis=2).astype(np.float64)  # [R, N, 6]

    def figure(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.zeros(len(weights))
        for of_repeat in columns:
            n, p, pp, squares, t, tt = (weights @ of_repeat).T
            safe = np.where(n > 0, n, 1)
            chance = (pp + tt) / safe - 2 * (p / safe) * (t / safe)
            known = chance > 1e-12
            total += np.where(known, 1 - squares / safe / np.where(known, chance, 1), 0)
        return np.where(weights.sum(axis=1) > 0, total / len(columns), np.nan)

    return figure


def rps_of(true: ArrayLike, probabilities: ArrayLike) -> Figure:
    """Ranked probability score over K-1 (Epstein 1969; Murphy 1971), 0..1, lower is better.

    Args:
        true: ``[N]`` whole numbers 0..K-1.
        probabilities: ``[N, K]`` or ``[R, N, K]``, rows summing to one.

    Raises:
        UsageError: shapes that do not fit, or a grade off the scale.
    """
    truth, rows = _distributions(true, probabilities)
    reached = truth[:, None] <= np.arange(rows.shape[2] - 1)
    return mean_of(((rows.cumsum(axis=2)[..., :-1] - reached) ** 2).mean(axis=2))


def log_loss_of(true: ArrayLike, probabilities: ArrayLike) -> Figure:
    """Mean negative logarithm of the true grade's probability, 1e-7 at least; arguments as :func:`rps_of`."""
    truth, rows = _distributions(true, probabilities)
    of_truth = np.take_along_axis(rows, np.broadcast_to(truth[:, None], (*rows.shape[:2], 1)), axis=2)[..., 0]
    return mean_of(-np.log(np.maximum(of_truth, _LEAST_PROBABILITY)))


def auroc_of(true: ArrayLike, probabilities: ArrayLike, threshold: int) -> Figure:
    """Area under the ROC curve of "the grade is above the threshold", by its probability; ties count half.

    NaN where weights leave one side empty.

    Args:
        true: ``[N]`` whole numbers 0..K-1.
        probabilities: ``[N, K]`` or ``[R, N, K]``.
        threshold: 0..K-2.

    Raises:
        UsageError: shapes that do not fit, a grade off the scale, or no such threshold.
    """
    truth, rows = _distributions(true, probabilities)
    if not 0 <= threshold < rows.shape[2] - 1:
        raise UsageError(f"threshold must be from 0 to {rows.shape[2] - 2}, not {threshold}")
    positive = truth > threshold
    # Rounded, so that sums of equal terms tie whatever their order was.
    scores = rows[..., threshold + 1 :].sum(axis=2).round(12)

    def figure(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.zeros(len(weights))
        for of_repeat in scores:
            order = np.argsort(of_repeat, kind="stable")
            starts = np.flatnonzero(np.diff(of_repeat[order], prepend=-np.inf) > 0)
            above = np.add.reduceat((weights * positive)[:, order], starts, axis=1)
            below = np.add.reduceat((weights * ~positive)[:, order], starts, axis=1)
            pairs = above.sum(axis=1) * below.sum(axis=1)
            won = (above * (below.cumsum(axis=1) - below / 2)).sum(axis=1)
            total += np.where(pairs > 0, won / np.where(pairs > 0, pairs, 1), np.nan)
        return total / len(scores)

    return figure


def difference(first: Figure, second: Figure) -> Figure:
    """The first less the second, on the same weights: a paired comparison."""
    return lambda weights: first(weights) - second(weights)


def _repeats(true: ArrayLike, predicted: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    truth, rows = np.asarray(true), np.asarray(predicted)
    rows = rows[None] if rows.ndim == 1 else rows
    if truth.ndim != 1 or not truth.size or rows.ndim != 2 or not len(rows) or rows.shape[1] != len(truth):
        raise UsageError(
            f"expected grades [N] and [N] or [R, N], not {truth.shape} and {np.shape(predicted)}"
        )
    if (truth % 1 != 0).any() or (rows % 1 != 0).any():
        raise UsageError("grades must be whole numbers")
    return truth.astype(np.int64), rows.astype(np.int64)


def _distributions(
    true: ArrayLike, probabilities: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    truth, rows = np.asarray(true), np.asarray(probabilities, np.float64)
    rows = rows[None] if rows.ndim == 2 else rows
    if truth.ndim != 1 or not truth.size or rows.ndim != 3 or not len(rows) or rows.shape[1] != len(truth):
        raise UsageError(
            f"expected grades [N] and probabilities [N, K] or [R, N, K], not {truth.shape} and "
            f"{np.shape(probabilities)}"
        )
    if not np.isin(truth, np.arange(rows.shape[2])).all():
        raise UsageError(f"grades must be whole numbers from 0 to {rows.shape[2] - 1}")
    sums = rows.sum(axis=2)
    if not (np.isfinite(rows).all() and (rows >= 0).all() and (abs(sums - 1) < 1e-3).all()):
        raise UsageError("probabilities must be from 0 to 1, and those of a slide sum to one")
    return truth.astype(np.int64), rows / sums[..., None]
