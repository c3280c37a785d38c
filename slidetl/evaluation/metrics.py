"""Metrics of ordinal grades and of their probabilities, each written once.

Accuracy, MAE, QWK, kappa, RPS and log loss take weights of the results, as resampling needs them:

- Probabilities sum to one within 1e-3 and are rescaled to exactly one. Repeats R of a cross-validation are
  each pooled over their folds and averaged: they share the patients, and never count as more of them.
- ``weights`` ``[N]`` or ``[B, N]`` float64, at least 0; by default all 1. Whole weights are copies.
- They return float64 of shape ``[]`` or ``[B]``. **An undefined metric is NaN**, never a plausible number:
  without any weight, or a kappa of grades that are all the same.
- Other shapes, grades that are not whole numbers on the scale, and probabilities that are not finite, in 0..1
  and of sum one raise a :class:`~slidetl.errors.UsageError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import (
    Interval,
    Metric,
    bca_interval_if_defined,
    proven,
    share_interval,
)

# Floor of a probability in a logarithm, so that one slide cannot decide a log loss alone.
LEAST_PROBABILITY = 1e-7

_SAME = 1e-5  # greatest difference of a log probability that is none: rounding makes 1e-6

Weights = NDArray[np.float64] | None

# True grades [N], predictions [N] or [R, N] (or probabilities) and weights [B, N] -> [B]: `accuracy`, or
# `lambda true, predicted, weights: qwk(true, predicted, 5, weights)`.
MetricOfPredictions = Callable[[NDArray[Any], NDArray[Any], NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class GradeMetrics:
    """Metrics of predicted grades.

    Attributes:
        n: number of slides.
        accuracy: share of slides with exactly the right grade.
        balanced_accuracy: the mean of that share over the grades that occur.
        qwk: quadratic-weighted kappa over the full scale; NaN if undefined.
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

    def format_qwk(self, digits: int) -> str:
        """Returns the QWK with so many digits, or ``undefined``."""
        return "undefined" if np.isnan(self.qwk) else f"{self.qwk:.{digits}f}"

    def to_json(self) -> dict[str, Any]:
        """Returns the metrics by name, with None for NaN, which JSON lacks."""
        return {**asdict(self), "qwk": None if np.isnan(self.qwk) else self.qwk}


@dataclass(frozen=True)
class NumberMetrics:
    """Metrics of predicted numbers, in their unit.

    Attributes:
        n: number of slides.
        mae: mean absolute error.
        rmse: root of the mean squared error.
    """

    n: int
    mae: float
    rmse: float

    def to_json(self) -> dict[str, Any]:
        """Returns the metrics by name."""
        return asdict(self)


@dataclass(frozen=True)
class ProbabilityMetrics:
    """Metrics of the probabilities of the grades.

    Attributes:
        n: number of slides.
        auroc: for each threshold k = 0..K-2 the area under the ROC curve of "the grade is above k"; NaN if
            all slides lie on one side.
        rps: ranked probability score, 0 (sure and right) to 1 (sure and at the other end of the scale).
        log_loss: mean negative logarithm of the true grade's probability, floored at 1e-7.
        calibration_error: expected calibration error of the most probable grade, 0..1.
    """

    n: int
    auroc: tuple[float, ...]
    rps: float
    log_loss: float
    calibration_error: float


def grade_metrics(true: ArrayLike, predicted: ArrayLike, n_grades: int) -> GradeMetrics:
    """Computes all metrics of predicted grades ``[N]`` against true ones ``[N]``, both 0..K-1."""
    counts = confusion_matrix(true, predicted, n_grades)
    hits, is_true, is_predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    occurs, met = is_true > 0, is_true + is_predicted > 0
    return GradeMetrics(
        n=int(counts.sum()),
        accuracy=float(accuracy(true, predicted)),
        balanced_accuracy=float((hits[occurs] / is_true[occurs]).mean()),
        qwk=float(qwk(true, predicted, n_grades)),
        mae=float(mae(true, predicted)),
        macro_f1=float((2 * hits[met] / (is_true + is_predicted)[met]).mean()),
        confusion=tuple(tuple(int(count) for count in row) for row in counts),
    )


def number_metrics(true: ArrayLike, predicted: ArrayLike) -> NumberMetrics:
    """Computes the metrics of predicted numbers ``[N]`` against true ones ``[N]``."""
    errors = np.asarray(predicted, np.float64) - np.asarray(true, np.float64)
    check_finite(errors)
    return NumberMetrics(len(errors), float(abs(errors).mean()), float(np.sqrt((errors**2).mean())))


def probability_metrics(true: ArrayLike, probabilities: ArrayLike) -> ProbabilityMetrics:
    """Computes all metrics of probabilities ``[N, K]`` against true grades ``[N]``."""
    grades, (rows,) = check_probabilities(true, probabilities)
    # P(grade > k), [N, K-1]. Rounded, so that sums of equal terms tie in any order.
    above = rows[:, ::-1].cumsum(1)[:, -2::-1].round(12)
    return ProbabilityMetrics(
        n=len(grades),
        auroc=tuple(auroc(grades > k, above[:, k]) for k in range(above.shape[1])),
        rps=float(rps(grades, rows)),
        log_loss=float(log_loss(grades, rows)),
        calibration_error=calibration_error(grades, rows),
    )


def weighted_mean(values: ArrayLike, weights: Weights = None) -> NDArray[np.float64]:
    """Returns the weighted mean of values ``[N]``, or ``[R, N]`` averaged over R."""
    by_result = np.atleast_2d(np.asarray(values, np.float64)).mean(axis=0)
    weights = np.ones(len(by_result)) if weights is None else weights
    total = weights.sum(axis=-1)
    return np.asarray(np.where(total > 0, weights @ by_result / np.where(total > 0, total, 1), np.nan))


def accuracy(true: ArrayLike, predicted: ArrayLike, weights: Weights = None) -> NDArray[np.float64]:
    """Returns the share of results with exactly the right grade, 0..1."""
    truth, rows = _check_grades(true, predicted)
    return weighted_mean(rows == truth, weights)


def mae(true: ArrayLike, predicted: ArrayLike, weights: Weights = None) -> NDArray[np.float64]:
    """Returns the mean absolute error in grades."""
    truth, rows = _check_grades(true, predicted)
    return weighted_mean(abs(rows - truth), weights)


def qwk(true: ArrayLike, predicted: ArrayLike, n_grades: int, weights: Weights = None) -> NDArray[np.float64]:
    """Returns Cohen's kappa with penalties ``(i - j)^2`` over the full scale, up to 1.

    Cohen, Psychological Bulletin 1968. NaN if all grades, true and predicted, are equal: chance then agrees
    completely and there is nothing to divide by. (0 would call such predictions no better than chance, 1
    would call them proven.) NaN in one repeat makes the mean NaN.
    """
    return _kappa(true, predicted, _squares(n_grades), weights)


def kappa(
    true: ArrayLike, predicted: ArrayLike, n_grades: int, weights: Weights = None
) -> NDArray[np.float64]:
    """Returns Cohen's unweighted kappa (Educational and Psychological Measurement 1960); NaN as `qwk`."""
    return _kappa(true, predicted, 1 - np.eye(n_grades), weights)


def kappa_of_table(tables: ArrayLike, penalties: ArrayLike) -> NDArray[np.float64]:
    """Returns the weighted kappa of tables ``[..., K, K]`` of counts or shares: ``[...]``.

    Args:
        tables: rows are true grades, columns predicted ones.
        penalties: ``[K, K]``, 0 on the diagonal.

    Returns:
        One minus the penalty over the penalty expected by chance; NaN if the latter is 0, or so small (1e-9
        of the total) that it is left over by rounding.
    """
    counts, by_cell = np.asarray(tables, np.float64), np.asarray(penalties, np.float64)
    total = counts.sum(axis=(-2, -1))
    least = 1e-9 * total
    chance = ((counts.sum(axis=-1) @ by_cell) * counts.sum(axis=-2)).sum(axis=-1)
    chance = chance / np.where(total > 0, total, 1)
    observed = (counts * by_cell).sum(axis=(-2, -1))
    return np.asarray(np.where(chance > least, 1 - observed / np.where(chance > least, chance, 1), np.nan))


def qwk_of_table(tables: ArrayLike) -> NDArray[np.float64]:
    """Returns the quadratic-weighted kappa of tables ``[..., K, K]``, as :func:`kappa_of_table`."""
    return kappa_of_table(tables, _squares(np.shape(tables)[-1]))


def rps(true: ArrayLike, probabilities: ArrayLike, weights: Weights = None) -> NDArray[np.float64]:
    """Returns the ranked probability score over K-1, 0..1, lower is better (Epstein 1969; Murphy 1971)."""
    truth, rows = check_probabilities(true, probabilities)
    reached = truth[:, None] <= np.arange(rows.shape[2] - 1)
    return weighted_mean(((rows.cumsum(axis=2)[..., :-1] - reached) ** 2).mean(axis=2), weights)


def log_loss(true: ArrayLike, probabilities: ArrayLike, weights: Weights = None) -> NDArray[np.float64]:
    """Returns the mean negative logarithm of the true grade's probability, floored at 1e-7."""
    truth, rows = check_probabilities(true, probabilities)
    of_truth = rows[:, np.arange(len(truth)), truth]
    return weighted_mean(-np.log(np.maximum(of_truth, LEAST_PROBABILITY)), weights)


def patient_intervals(
    true: ArrayLike, probabilities: ArrayLike, patients: ArrayLike
) -> dict[str, tuple[float, float, float]]:
    """Computes accuracy, log loss and AUROCs with their 95 % intervals over patients, given the model.

    Args:
        true: grades ``[N]``.
        probabilities: ``[N, K]``.
        patients: ``[N]``.

    Returns:
        The :func:`~slidetl.evaluation.bootstrap.proven` ones; none with a single patient, and no AUROC with
        fewer than five patients on either side.
    """
    grades, (rows,) = check_probabilities(true, probabilities)
    who = np.asarray(patients)
    if len(np.unique(who)) < 2:
        return {}
    above = rows[:, ::-1].cumsum(1)[:, -2::-1].round(12)
    found: dict[str, Interval | None] = {
        "accuracy": share_interval(rows.argmax(1) == grades, who),
        "log_loss": bca_interval_if_defined(lambda weights: log_loss(grades, rows, weights), who),
    }
    for k in range(above.shape[1]):
        metric = auroc_metric(grades > k, above[:, k])
        found[f"auroc_above_{k}"] = bca_interval_if_defined(metric, who, sides=grades > k)
    return proven(found)


def auroc_metric(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> Metric:
    """Returns :func:`auroc` as a function of weights; ties count half."""
    order = np.argsort(scores, kind="stable")
    ranked, is_positive = scores[order], positive[order]
    first, end = np.searchsorted(ranked, ranked, "left"), np.searchsorted(ranked, ranked, "right")

    def metric(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        of_positives, of_negatives = weights[:, order] * is_positive, weights[:, order] * ~is_positive
        below = np.pad(of_negatives.cumsum(axis=1), ((0, 0), (1, 0)))
        pairs = of_positives.sum(axis=1) * of_negatives.sum(axis=1)
        above = (of_positives * (below[:, first] + below[:, end]) / 2).sum(axis=1)
        return np.asarray(np.where(pairs > 0, above / np.where(pairs > 0, pairs, 1), np.nan))

    return metric


def by_repeat(metric: MetricOfPredictions, true: ArrayLike, predicted: ArrayLike) -> Metric:
    """Returns the metric of each repeat, weights ``[B, N]`` -> ``[R, B]``, for intervals over repeats, too.

    Args:
        metric: such as :func:`accuracy`.
        true: ``[N]`` grades.
        predicted: ``[R, N]`` grades, or ``[R, N, K]`` probabilities, to suit the metric.
    """
    truth, rows = np.asarray(true), np.asarray(predicted)
    return lambda weights: np.stack([metric(truth, of_repeat, weights) for of_repeat in rows])


def difference(first: Metric, second: Metric) -> Metric:
    """Returns the first metric minus the second on the same weights: a paired comparison."""
    return lambda weights: first(weights) - second(weights)


def auroc(positive: ArrayLike, scores: ArrayLike) -> float:
    """Computes the area under the ROC curve: how often positives score above negatives, ties counting half.

    Of ``positive [N] bool`` and ``scores [N]`` (Mann and Whitney, Annals of Mathematical Statistics 1947).
    Returns 0..1, or NaN without a positive or without a negative.
    """
    values = np.asarray(scores, np.float64)
    check_finite(values)
    return float(auroc_metric(np.asarray(positive, bool), values)(np.ones((1, len(values))))[0])


def calibration_error(
    true: ArrayLike, probabilities: ArrayLike, n_bins: int = 10, predicted: ArrayLike | None = None
) -> float:
    """Computes the expected calibration error of the predicted grade, over bins of equal width.

    Naeini et al., AAAI 2015, for the most probable class as in Guo et al., ICML 2017: the mean over slides
    of the distance between the accuracy of their bin ``(0, 1/n], (1/n, 2/n], ...`` and its mean confidence.
    Empty bins do not count. On a hundred slides it is biased upwards by several hundredths; compare it with
    the error of a calibrated model, not with zero. ``predicted [N]`` are the grades that are reported, by
    default the most probable ones: of several slides of a patient they may be others.
    """
    confidence, right = confidence_of(true, probabilities, predicted)
    gaps = np.bincount(confidence_bins(confidence, n_bins), right - confidence, minlength=n_bins)
    return float(abs(gaps).sum() / len(right))  # gaps are summed over the slides of a bin


def confidence_of(
    true: ArrayLike, probabilities: ArrayLike, predicted: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns the probability of the predicted grade, and whether it is right: ``[N]`` both.

    Arguments are those of :func:`calibration_error`.
    """
    grades, (rows,) = check_probabilities(true, probabilities)
    graded = (
        rows.argmax(axis=1) if predicted is None else _check_grades(grades, predicted, rows.shape[1])[1][0]
    )
    return rows[np.arange(len(rows)), graded], graded == grades


def confidence_bins(confidence: NDArray[np.float64], n_bins: int) -> NDArray[np.intp]:
    """Returns the bin ``[N]`` of each probability: ``(0, 1/n], (1/n, 2/n], ...``."""
    return np.asarray(np.clip(np.ceil(confidence * n_bins).astype(np.intp) - 1, 0, n_bins - 1))


def confusion_matrix(true: ArrayLike, predicted: ArrayLike, n_grades: int) -> NDArray[np.int64]:
    """Counts results ``[K, K]``: rows true ``[N]``, columns predicted ``[N]``."""
    truth, (graded,) = _check_grades(true, predicted, n_grades)
    return np.bincount(truth * n_grades + graded, minlength=n_grades**2).reshape(n_grades, n_grades)


def check_finite(values: NDArray[np.float64]) -> None:
    """Refuses NaN and infinity, which an ``argmax`` or a rank would take for a number.

    Raises:
        UsageError: a value is not finite.
    """
    if not np.isfinite(values).all():
        place = tuple(np.argwhere(~np.isfinite(values))[0].tolist())
        raise UsageError(f"expected finite numbers, found {values[place]} at {place} of {values.shape}")


def check_probabilities(
    true: ArrayLike, probabilities: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns grades ``[N] int64`` and probabilities ``[R, N, K]``, each row rescaled to sum to one.

    ``[N, K]`` probabilities are one repeat; rows must sum to one within 1e-3.
    """
    truth, rows = np.asarray(true), np.asarray(probabilities, np.float64)
    rows = rows[None] if rows.ndim == 2 else rows
    fits = truth.ndim == 1 and rows.ndim == 3 and rows.size and rows.shape[1:2] == truth.shape
    if not fits or rows.shape[2] < 2:
        raise UsageError(
            f"expected grades [N] and probabilities [N, K] or [R, N, K], not {truth.shape} and "
            f"{np.shape(probabilities)}"
        )
    check_grades(truth, rows.shape[2])
    sums = rows.sum(axis=2, keepdims=True)
    bad = ~(np.isfinite(rows) & (rows >= 0) & (abs(sums - 1) < 1e-3)).all(axis=2)
    if bad.any():
        repeat, worst = np.argwhere(bad)[0]
        raise UsageError(
            f"probabilities must be from 0 to 1 and sum to one; row {worst} is {rows[repeat, worst].tolist()}"
        )
    return truth.astype(np.int64), rows / sums


def _check_grades(
    true: ArrayLike, predicted: ArrayLike, n_grades: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns ``[N]`` and ``[R, N]``, whole numbers, on the scale if one is given."""
    truth, rows = np.asarray(true), np.atleast_2d(predicted)
    if truth.ndim != 1 or rows.ndim != 2 or not rows.size or rows.shape[1:] != truth.shape:
        raise UsageError(
            f"expected grades [N] and [N] or [R, N], not {truth.shape} and {np.shape(predicted)}"
        )
    for grades in (truth, rows):
        check_grades(grades, n_grades)
    return truth.astype(np.int64), rows.astype(np.int64)


def check_grades(grades: NDArray[Any], n_grades: int | None) -> None:
    """Raises a UsageError unless grades are whole numbers, from 0 to K-1 if K is given."""
    is_whole = np.isfinite(grades).all() and not (grades % 1 != 0).any()
    if not is_whole or (n_grades is not None and not ((grades >= 0) & (grades < n_grades)).all()):
        reach = "" if n_grades is None else f" from 0 to {n_grades - 1}"
        raise UsageError(f"grades must be whole numbers{reach}")


def _squares(n_grades: int) -> NDArray[np.int64]:
    return np.subtract.outer(np.arange(n_grades), np.arange(n_grades)) ** 2


def _kappa(
    true: ArrayLike, predicted: ArrayLike, penalties: NDArray[Any], weights: Weights
) -> NDArray[np.float64]:
    n_grades = len(penalties)
    truth, rows = _check_grades(true, predicted, n_grades)
    weights = np.ones(len(truth)) if weights is None else weights
    cells = np.arange(n_grades**2)
    by_repeat = []
    for graded in rows:
        counts = weights @ (truth[:, None] * n_grades + graded[:, None] == cells).astype(np.float64)
        by_repeat.append(kappa_of_table(counts.reshape(*counts.shape[:-1], n_grades, n_grades), penalties))
    return np.asarray(np.mean(by_repeat, axis=0))


def told_apart(probabilities: Sequence[Sequence[float]]) -> bool:
    """Tells if any two slides differ in their probabilities ``[N, K]``; true for fewer than two."""
    logs = np.log(np.maximum(probabilities, 1e-30))
    return len(logs) < 2 or bool(np.ptp(logs, axis=0).max() > _SAME)
