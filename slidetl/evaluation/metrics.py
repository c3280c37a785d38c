"""Figures of merit for ordinal grades. Nothing here is ever NaN: what is not defined is None, or refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Probabilities below this count as this in the logarithm, so that one slide cannot decide it alone.
_LEAST_PROBABILITY = 1e-7


@dataclass(frozen=True)
class GradeMetrics:
    """How well grades were predicted.

    Attributes:
        n: number of slides.
        accuracy: share of slides with exactly the right grade.
        balanced_accuracy: the mean of that share over the grades that occur.
        qwk: quadratic-weighted kappa over the full scale.
        mae: mean absolute error, in grades.
        macro_f1: the mean F1 over the grades that occur or were predicted.
        confusion: ``[K, K]`` counts; rows are true grades, columns predicted ones.
    """

    n: int
    accuracy: float
    balanced_accuracy: float
    qwk: float
    mae: float
    macro_f1: float
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ProbabilityMetrics:
    """How good the probabilities of the grades were.

    Attributes:
        n: number of slides.
        auroc: for each threshold k = 0..K-2 the area under the ROC curve of "the grade is above k", by its
            probability; None where no slide lies on one of its sides, which leaves nothing to tell apart.
        rps: ranked probability score, 0 (sure and right) to 1 (sure and at the other end of the scale).
        log_loss: mean negative logarithm of the true grade's probability, which counts as 1e-7 at least.
        calibration_error: expected calibration error of the most probable grade, 0..1.
    """

    n: int
    auroc: tuple[float | None, ...]
    rps: float
    log_loss: float
    calibration_error: float


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
    hits, is_true, is_predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    occurs, met = is_true > 0, is_true + is_predicted > 0
    return GradeMetrics(
        n=n,
        accuracy=float(hits.sum() / n),
        balanced_accuracy=float((hits[occurs] / is_true[occurs]).mean()),
        qwk=quadratic_weighted_kappa(true, predicted, n_grades),
        mae=float((counts * abs(grades[:, None] - grades)).sum() / n),
        macro_f1=float((2 * hits[met] / (is_true + is_predicted)[met]).mean()),
        confusion=tuple(tuple(int(count) for count in row) for row in counts),
    )


def probability_metrics(true: ArrayLike, probabilities: ArrayLike) -> ProbabilityMetrics:
    """Computes them all.

    Args:
        true: ``[N]`` whole numbers 0..K-1.
        probabilities: ``[N, K]``, each row summing to one within 1e-3; rows are rescaled to exactly one.

    Raises:
        ValueError: no slides, shapes that do not fit, a grade off the scale, or rows that are no
            distributions.
    """
    grades, rows = _checked(true, probabilities)
    n_grades = rows.shape[1]
    # P(grade > k), [N, K-1]. Rounded, so that sums of equal terms tie whatever their order was.
    above = rows[:, ::-1].cumsum(1)[:, -2::-1].round(12)
    is_above = grades[:, None] > np.arange(n_grades - 1)
    return ProbabilityMetrics(
        n=len(grades),
        auroc=tuple(auroc(is_above[:, k], above[:, k]) for k in range(n_grades - 1)),
        # Epstein, J. Applied Meteorology 1969, in the form of Murphy 1971, over K-1.
        rps=float(((above - is_above) ** 2).sum(1).mean() / (n_grades - 1)),
        log_loss=float(-np.log(np.maximum(rows[np.arange(len(grades)), grades], _LEAST_PROBABILITY)).mean()),
        calibration_error=calibration_error(grades, rows),
    )


def auroc(positive: ArrayLike, scores: ArrayLike) -> float | None:
    """Area under the ROC curve: how often a positive scores above a negative, ties counting half.

    By ranks (Mann and Whitney, Annals of Mathematical Statistics 1947).

    Args:
        positive: ``[N]`` bool.
        scores: ``[N]``.

    Returns:
        0..1, or None where there is no positive or no negative.
    """
    positive, scores = np.asarray(positive, bool), np.asarray(scores, np.float64)
    n_positive = int(positive.sum())
    n_pairs = n_positive * (len(positive) - n_positive)
    if not n_pairs:
        return None
    _, member, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[member]  # from 1; the mean of its tied ones
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / n_pairs)


def calibration_error(true: ArrayLike, probabilities: ArrayLike, n_bins: int = 10) -> float:
    """Expected calibration error of the most probable grade, over bins of equal width.

    Naeini et al., AAAI 2015, for the most probable class as in Guo et al., ICML 2017: the mean over slides
    of the distance between the accuracy of their bin and its mean confidence. Bins without a slide do not
    count. On a hundred slides it is biased upwards by several hundredths; compare it with that of a
    calibrated model, not with zero.

    Args:
        true: ``[N]`` whole numbers 0..K-1.
        probabilities: ``[N, K]``, rows summing to one.
        n_bins: bins ``(0, 1/n], (1/n, 2/n], ...``.
    """
    grades, rows = _checked(true, probabilities)
    confidence, right = rows.max(1), rows.argmax(1) == grades
    bins = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    gaps = np.bincount(bins, right - confidence, minlength=n_bins)  # summed over the slides of a bin
    return float(abs(gaps).sum() / len(grades))


def confusion_matrix(true: ArrayLike, predicted: ArrayLike, n_grades: int) -> NDArray[np.int64]:
    """Counts ``[K, K]``, rows true, columns predicted. Raises ValueError as :func:`grade_metrics`."""
    true, predicted = np.asarray(true), np.asarray(predicted)
    if true.ndim != 1 or true.shape != predicted.shape or not len(true):
        raise ValueError(
            f"expected two lists of grades of one length, found shapes {true.shape}, {predicted.shape}"
        )
    both = np.stack([true, predicted])
    if not np.isin(both, np.arange(n_grades)).all():
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


def _checked(true: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    grades, rows = np.asarray(true), np.asarray(probabilities, np.float64)
    if grades.ndim != 1 or not len(grades) or rows.ndim != 2 or len(rows) != len(grades) or rows.shape[1] < 2:
        raise ValueError(
            f"expected grades [N] and probabilities [N, K], found shapes {grades.shape} and {rows.shape}"
        )
    if not np.isin(grades, np.arange(rows.shape[1])).all():
        raise ValueError(f"grades must be whole numbers from 0 to {rows.shape[1] - 1}")
    sums = rows.sum(1)
    if not (np.isfinite(rows).all() and (rows >= 0).all() and (abs(sums - 1) < 1e-3).all()):
        worst = int(np.argmax(~(np.isfinite(rows).all(1) & (rows >= 0).all(1) & (abs(sums - 1) < 1e-3))))
        raise ValueError(
            f"probabilities must be from 0 to 1 and sum to one; row {worst} is {rows[worst].tolist()}"
        )
    return grades.astype(np.int64), rows / sums[:, None]
