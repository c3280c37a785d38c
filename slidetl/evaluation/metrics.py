"""Figures of merit for ordinal grades."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class GradeMetrics:
    """How well grades were predicted.

    Attributes:
        n: number of slides.
        accuracy: share of slides with exactly the right grade.
        qwk: quadratic-weighted kappa over the full scale.
        mae: mean absolute error, in grades.
        confusion: ``[K, K]`` counts; rows are true grades, columns predicted ones.
    """

    n: int
    accuracy: float
    qwk: float
    mae: float
    confusion: tuple[tuple[int, ...], ...]


def grade_metrics(true: ArrayLike, predicted: ArrayLike, n_grades: int) -> GradeMetrics:
    """Computes them all.

    Args:
        true: ``[N]`` whole numbers 0..K-1.
        predicted: ``[N]`` whole numbers 0..K-1.
        n_grades: K.

    Raises:
        ValueError: no slides, lengths that differ, or a grade off the scale.
    """
    counts = confusion_matrix(true, predicted, n_grades)
    grades = np.arange(n_grades)
    n = int(counts.sum())
    return GradeMetrics(
        n=n,
        accuracy=float(np.trace(counts) / n),
        qwk=quadratic_weighted_kappa(true, predicted, n_grades),
        mae=float((counts * abs(grades[:, None] - grades)).sum() / n),
        confusion=tuple(tuple(int(count) for count in row) for row in counts),
    )


def confusion_matrix(true: ArrayLike, predicted: ArrayLike, n_grades: int) -> NDArray[np.int64]:
    """Counts ``[K, K]``, rows true, columns predicted. Raises ValueError as :func:`grade_metrics`."""
    true, predicted = np.asarray(true), np.asarray(predicted)
    if true.ndim != 1 or true.shape != predicted.shape or not len(true):
        raise ValueError(
            f"expected two lists of grades of one length, found shapes {true.shape}, {predicted.shape}"
        )
    both = np.stack([true, predicted])
    if both.min() < 0 or both.max() >= n_grades or (both != both.astype(np.int64)).any():
        raise ValueError(f"grades must be whole numbers from 0 to {n_grades - 1}")
    flat = both[0].astype(np.int64) * n_grades + both[1].astype(np.int64)
    return np.bincount(flat, minlength=n_grades**2).reshape(n_grades, n_grades)


def quadratic_weighted_kappa(true: ArrayLike, predicted: ArrayLike, n_grades: int) -> float:
    """Cohen's weighted kappa with weights ``(i - j)^2`` (Cohen, Psychological Bulletin 1968).

    Where both lists are one and the same constant, chance agreement is complete and kappa is not
    defined: 0 is returned, since nothing was shown beyond chance.
    """
    counts = confusion_matrix(true, predicted, n_grades)
    grades = np.arange(n_grades)
    weights = (grades[:, None] - grades) ** 2
    expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    disagreement = float((weights * expected).sum())
    return 1 - float((weights * counts).sum()) / disagreement if disagreement else 0.0
