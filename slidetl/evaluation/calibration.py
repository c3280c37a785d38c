"""Calibration of the probabilities of grades: the temperature, slope and error."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import (
    Interval,
    Metric,
    Resampling,
    bca_interval_if_defined,
)
from slidetl.evaluation.comparison import chance_p
from slidetl.evaluation.folds import stratified_folds
from slidetl.evaluation.metrics import (
    LEAST_PROBABILITY,
    calibration_error,
    check_finite,
    check_probabilities,
    confidence_bins,
    confidence_of,
    probability_metrics,
)
from slidetl.evaluation.shapes import check_lengths

_BINS = 10
_FOLDS = 5  # of patients, to recalibrate
_RECALIBRATION_PENALTY = 1e-3  # keeps the slope finite where the grades are separated
_TEMPERATURES = (0.05, 20.0)  # beyond these a model is always, or never, sure
_OWN_PATIENTS = 2.0  # weight of a model's own probabilities in the targets of its temperature, as Platt's


def with_temperature(probabilities: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """Raises probabilities ``[..., K]`` to ``1 / temperature`` (above 0) and divides them by their sum.

    For a softmax this divides the logits by the temperature (Guo et al., ICML 2017, section 4.2); for an
    ordinal head it is the same map of its probabilities, which scales no logit. The order of the grades
    stays. Above 1 they are less sure, below 1 surer.
    """
    if not 0 < temperature < np.inf:
        raise UsageError(f"a temperature must be a number above 0, not {temperature}")
    rows = np.asarray(probabilities, np.float64)
    check_finite(rows)
    if temperature == 1:
        return np.asarray(rows / rows.sum(axis=-1, keepdims=True))
    logs = np.log(np.maximum(rows, LEAST_PROBABILITY)) / temperature
    raised = np.exp(logs - logs.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def fit_temperature(true: ArrayLike, probabilities: ArrayLike, patients: ArrayLike) -> float:
    """Finds the temperature of least log loss of probabilities ``[N, K]``, between 0.05 and 20.

    Give it the predictions of inner folds only. Against the grades alone there is no least log loss where
    all slides are graded right: surer is always better. So the target of a slide is its grade with the weight
    of all P patients ``[N]``, and the model's own probabilities with that of two. These are Platt's targets
    ``(P + 1) / (P + 2)`` and ``1 / (P + 2)`` (Advances in Large Margin Classifiers 1999), except that P
    counts all patients, not the slides of the grade, since those of a patient are right or wrong together,
    and the smoothed part goes to the grades as the model shares it out, not evenly: a far grade stays
    improbable. It is a conjugate prior of ``1 / T``, worth two patients of the mean number of slides and with
    its mode at ``T = 1`` (Chen and Ibrahim, Statistica Sinica 2003). The log loss is convex in ``1 / T``, so
    the minimum is unique.

    At a bound the probabilities say nothing about the grades (20), or hardly differ between grades and yet
    are right (0.05): see :func:`is_at_bound`.
    """
    from scipy.optimize import brentq

    grades, (rows,) = check_probabilities(true, probabilities)
    who = np.asarray(patients)
    check_lengths(grades=grades, patients=who)
    logs, n = np.log(np.maximum(rows, LEAST_PROBABILITY)), len(np.unique(who))

    def expected(sharpness: float) -> float:
        """Computes the mean log probability of grades drawn from the sharpened probabilities."""
        raised = np.exp((logs - logs.max(axis=1, keepdims=True)) * sharpness)
        return float(((raised * logs).sum(axis=1) / raised.sum(axis=1)).mean())

    # Of the floored probabilities, by expected(1): certain ones of zeros and a one would bound nothing.
    told = logs[np.arange(len(grades)), grades].mean()
    wanted = (n * told + _OWN_PATIENTS * expected(1)) / (n + _OWN_PATIENTS)
    low, high = _TEMPERATURES
    if expected(1 / high) > wanted - 1e-12:  # equal for uniform probabilities, but for rounding
        return high
    if expected(1 / low) < wanted:
        return low
    return float(1 / brentq(lambda sharpness: expected(sharpness) - wanted, 1 / high, 1 / low))


def is_at_bound(temperature: float) -> bool:
    """Tells if a temperature is within 5 % of a bound, as earlier versions ended there only nearly."""
    low, high = _TEMPERATURES
    return not 1.05 * low < temperature < high / 1.05


def recalibrate(true: ArrayLike, probabilities: ArrayLike, patients: ArrayLike) -> NDArray[np.float64]:
    """Recalibrates a model on a new cohort, each patient by the grades of the others.

    The expected grade is the one feature of an ordinal regression
    (:class:`~slidetl.evaluation.ordinal.ProportionalOdds`), fitted to all of five folds of patients but one
    and applied to that one: a new offset, slope and thresholds. The order of the slides stays, except between
    folds, and turns round where the expected grade falls with the grade.

    Args:
        true: ``[N]`` grades.
        probabilities: ``[N, K]`` by the model.
        patients: ``[N]``.

    Returns:
        ``[N, K]`` probabilities; 0 for a grade that the other folds lack.

    Raises:
        UsageError: fewer patients, or slides of the commonest grade, than folds; or the other folds have a
            single grade.
    """
    from slidetl.evaluation.ordinal import ProportionalOdds

    grades, (rows,) = check_probabilities(true, probabilities)
    who = np.unique(np.asarray(patients), return_inverse=True)[1]
    if min(len(np.unique(who)), np.bincount(grades).max()) < _FOLDS:
        raise UsageError(
            f"expected at least {_FOLDS} patients to recalibrate on, and as many slides of the commonest "
            f"grade, found {len(np.unique(who))} and {np.bincount(grades).max()}"
        )
    scores = (rows @ np.arange(rows.shape[1]))[:, None]
    found = np.zeros_like(rows)
    # Stratified, or a constant score gets the commonest grade of the other folds, the rarest one here.
    for held_out in stratified_folds(grades, who, _FOLDS, seed=0):
        if not len(held_out):
            continue
        train = np.setdiff1d(np.arange(len(grades)), held_out)
        if len(np.unique(grades[train])) < 2:
            raise UsageError("recalibration needs patients of two grades beside those of any fold")
        fitted = ProportionalOdds(penalty=_RECALIBRATION_PENALTY).fit(scores[train], grades[train])
        found[np.ix_(held_out, fitted.classes_)] = fitted.predict_proba(scores[held_out])
    return np.asarray(found)


@dataclass(frozen=True)
class CalibrationSlope:
    """Logistic recalibration of the probabilities that the grade is above each threshold.

    Attributes:
        slope: 1 for a calibrated model, less for one too sure. None without a finite estimate, here or on
            most resamples: the predictions separate the grades completely.
        intercept: log odds of the grades above the predicted ones, at a slope of 1: 0 if they agree on
            average, positive if the model grades too low. None where all slides are of the lowest, or of the
            highest grade, as is the slope: they tell no calibration.
    """

    slope: Interval | None
    intercept: Interval | None


def calibration_slope(
    true: ArrayLike, probabilities: ArrayLike, patients: ArrayLike, **how: Unpack[Resampling]
) -> CalibrationSlope:
    """Fits slope and intercept of observed on predicted log odds.

    Cox, Biometrika 1958; named as in Van Calster et al., BMC Medicine 2019. The outcomes are the K-1
    questions "is the grade above k?" of every slide, stacked: one slope for them all, as in a cumulative
    model. The slope's model has a free intercept; the intercept's has a slope of 1. Questions of a slide and
    slides of a patient are dependent: intervals resample patients. Probabilities ``[N, K]`` of the questions
    are kept 1e-7 from 0 and 1.
    """
    grades, (rows,) = check_probabilities(true, probabilities)
    above = np.clip(rows[:, ::-1].cumsum(axis=1)[:, -2::-1], LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    odds, happened = np.log(above / (1 - above)), grades[:, None] > np.arange(rows.shape[1] - 1)
    if happened.all() or not happened.any():
        return CalibrationSlope(None, None)
    fits = (_recalibration(odds, happened, slope_is_free=free) for free in (True, False))
    return CalibrationSlope(*(bca_interval_if_defined(fit, patients, **how) for fit in fits))


@dataclass(frozen=True)
class CalibrationNull:
    """The expected calibration error beside the error of a calibrated model.

    Attributes:
        error: expected calibration error of the predicted grade, 0..1.
        null_mean, null_high: mean and 95 % quantile of it for grades drawn from these very probabilities.
        p: share of such draws with an error at least as high.
    """

    error: float
    null_mean: float
    null_high: float
    p: float


def calibration_null(
    true: ArrayLike,
    probabilities: ArrayLike,
    predicted: ArrayLike | None = None,
    *,
    n_draws: int = 1000,
) -> CalibrationNull:
    """Computes the calibration error, and its distribution under perfect calibration of as many slides.

    Consistency resampling (Bröcker and Smith, Weather and Forecasting 2007; Vaicenavicius et al., AISTATS
    2019). Grades of slides are drawn independently; slides of one patient are not independent, so with
    several a patient the null is somewhat too narrow, and p somewhat too small. Arguments are those of
    :func:`~slidetl.evaluation.metrics.calibration_error`.
    """
    error = calibration_error(true, probabilities, _BINS, predicted)
    confidence, _ = confidence_of(true, probabilities, predicted)
    null = abs(_null_gaps(confidence, _BINS, n_draws)).sum(axis=1) / len(confidence)
    return CalibrationNull(
        error=error,
        null_mean=float(null.mean()),
        null_high=float(np.quantile(null, 0.95)),
        p=chance_p(error, null),
    )


def judged_probabilities(true: ArrayLike, probabilities: ArrayLike) -> dict[str, Any]:
    """Returns the :class:`~slidetl.evaluation.metrics.ProbabilityMetrics` by name, with None for NaN.

    ``calibration_error_if_calibrated`` is the mean error of a calibrated model on as many slides. Takes
    grades ``[N]`` and probabilities ``[N, K]``.
    """
    null = calibration_null(true, probabilities, n_draws=200)
    metrics = asdict(probability_metrics(true, probabilities))
    metrics["auroc"] = [None if np.isnan(area) else area for area in metrics["auroc"]]
    return {**metrics, "calibration_error_if_calibrated": null.null_mean}


@dataclass(frozen=True)
class ReliabilityBin:
    """One point of a reliability diagram.

    Attributes:
        n: slides in the bin.
        confidence: their mean probability of the predicted grade.
        accuracy: share of them graded right.
        low, high: range of 95 % of such shares if the probabilities were right, by simulation.
    """

    n: int
    confidence: float
    accuracy: float
    low: float
    high: float


def reliability(
    true: ArrayLike,
    probabilities: ArrayLike,
    predicted: ArrayLike | None = None,
    *,
    n_bins: int = _BINS,
    n_draws: int = 1000,
) -> tuple[ReliabilityBin, ...]:
    """Computes a reliability diagram with consistency bars (Bröcker and Smith 2007), in the error's bins.

    Arguments are as for :func:`calibration_null`. Bars are bin by bin, so one of twenty bins is expected
    outside; they take slides for independent. Returns the bins with slides, in rising confidence.
    """
    confidence, right = confidence_of(true, probabilities, predicted)
    bins, gaps = confidence_bins(confidence, n_bins), _null_gaps(confidence, n_bins, n_draws)
    points = []
    for number in np.unique(bins):
        held = bins == number
        mean = float(confidence[held].mean())
        low, high = np.quantile(mean + gaps[:, number] / held.sum(), [0.025, 0.975])
        points.append(
            ReliabilityBin(int(held.sum()), mean, float(right[held].mean()), float(low), float(high))
        )
    return tuple(points)


def _null_gaps(confidence: NDArray[np.float64], n_bins: int, n_draws: int) -> NDArray[np.float64]:
    """Draws right minus expected ones by bin, ``[n_draws, n_bins]``, as if the confidence were the truth."""
    right = np.random.default_rng(0).random((n_draws, len(confidence))) < confidence
    return np.asarray(
        (right - confidence) @ (confidence_bins(confidence, n_bins)[:, None] == np.arange(n_bins))
    )


def _recalibration(odds: NDArray[np.float64], happened: NDArray[np.bool_], *, slope_is_free: bool) -> Metric:
    """Fits a logistic regression on log odds ``[N, T]``: its slope, or its intercept at a slope of 1.

    By Newton's method, for all rows of weights at once; NaN without a finite estimate.
    """
    from scipy.special import expit

    centred = (odds - odds.mean()).ravel()  # keeps intercept and slope apart
    x, offset = (centred, 0.0) if slope_is_free else (np.zeros(odds.size), odds.ravel())
    y = happened.ravel()

    def metric(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        of_question = np.repeat(weights, odds.shape[1], axis=1)
        intercept, slope = np.zeros(len(weights)), np.zeros(len(weights))
        moved = np.full(len(weights), np.inf)
        for _ in range(40):
            expected = expit(intercept[:, None] + slope[:, None] * x + offset)
            left = of_question * (y - expected)
            information = of_question * expected * (1 - expected)
            total, cross = information.sum(axis=1), information @ x
            square = information @ x**2 + (not slope_is_free)  # without x, any number above 0 will do
            determinant = total * square - cross**2
            # Without a finite estimate the fit gets surer and surer, until nothing is left to learn.
            known = determinant > 1e-9 * total * square
            safe = np.where(known, determinant, 1)
            up = np.clip((square * left.sum(axis=1) - cross * (left @ x)) / safe, -2, 2)
            steeper = np.clip((total * (left @ x) - cross * left.sum(axis=1)) / safe, -2, 2)
            intercept, slope = intercept + np.where(known, up, 0), slope + np.where(known, steeper, 0)
            moved = np.where(known, np.maximum(abs(up), abs(steeper)), np.inf)
            if (moved[known] < 1e-7).all():
                break
        return np.where(moved < 1e-7, slope if slope_is_free else intercept, np.nan)

    return metric
