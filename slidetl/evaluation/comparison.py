"""Comparison of arms with each other and with chance, on the same patients and the same folds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Interval, Metric, resampled_metric
from slidetl.evaluation.metrics import MetricOfPredictions
from slidetl.evaluation.shapes import check_lengths

Unit = Literal["worst", "mean", "slide"]

# So many discordant patients give 2^14 ways to swap them: all are tried.
_EXACT_PATIENTS = 14
_LEVEL = 0.95  # of the interval of the corrected t-test


@dataclass(frozen=True, eq=False)
class PatientResults:
    """Grades and predictions of M results: one a patient, or one a slide.

    Attributes:
        patients: ``[M]``.
        true: ``[M] int64`` grades.
        predicted: ``[R, M] int64`` grades, for each repeat.
        probabilities: ``[R, M, K]``; rows sum to one.
    """

    patients: NDArray[Any]
    true: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probabilities: NDArray[np.float64]


def patient_results(
    true: ArrayLike, probabilities: ArrayLike, patients: ArrayLike, unit: Unit
) -> PatientResults:
    """Makes the slides of a patient one result.

    The predicted grade of a slide is the most probable one, the lower in a tie. By ``unit``:

    - ``worst``: the highest true grade; the highest predicted one, with its slide's probabilities (of several
      such slides, of the one with the highest expected grade). The highest of several noisy grades is biased
      upwards, for readers and models alike.
    - ``mean``: the mean true grade and the mean predicted grade, each rounded half up; the mean of the
      probabilities, with a peak that may lie elsewhere if slides differ.
    - ``slide``: slides as they are. Intervals still resample patients.

    Args:
        true: ``[N]`` whole numbers 0..K-1.
        probabilities: ``[R, N, K]`` out of fold, for each repeat; ``[N, K]`` for a single one.
        patients: ``[N]``.
        unit: ``worst``, ``mean`` or ``slide``.

    Returns:
        Patients in the order of their sorted identifiers, or slides in the given order.
    """
    truth, rows, who = np.asarray(true), np.asarray(probabilities, np.float64), np.asarray(patients)
    rows = rows[None] if rows.ndim == 2 else rows
    if rows.ndim != 3 or truth.shape != (rows.shape[1],) or who.shape != truth.shape or not len(truth):
        raise UsageError(
            f"expected grades [N], probabilities [R, N, K] and patients [N], not {truth.shape}, "
            f"{np.shape(probabilities)} and {who.shape}"
        )
    truth = truth.astype(np.int64)
    graded = rows.argmax(axis=2)
    if unit == "slide":
        return PatientResults(who, truth, graded, rows)
    names, member = np.unique(who, return_inverse=True)
    slides_of = [np.flatnonzero(member == number) for number in range(len(names))]
    if unit == "mean":
        mean_true, mean_graded = (
            np.floor(per_patient(grades.T, who, unit) + 0.5).astype(np.int64).T for grades in (truth, graded)
        )
        averaged = np.stack([rows[:, slides].mean(axis=1) for slides in slides_of], axis=1)
        return PatientResults(names, mean_true, mean_graded, averaged)
    if unit != "worst":
        raise UsageError(f"unit must be worst, mean or slide, not {unit!r}")
    # Expected grades lie within 0..K-1, so a grade of difference outweighs any of them.
    rank = graded * rows.shape[2] + rows @ np.arange(rows.shape[2])
    worst = np.stack([slides[rank[:, slides].argmax(axis=1)] for slides in slides_of], axis=1)  # [R, M]
    return PatientResults(
        names,
        np.array([truth[slides].max() for slides in slides_of]),
        np.take_along_axis(graded, worst, axis=1),
        np.take_along_axis(rows, worst[..., None], axis=1),
    )


def per_patient(values: ArrayLike, patients: ArrayLike, unit: Unit) -> NDArray[np.float64]:
    """Combines the slides of a patient into one value, as :func:`patient_results` does with grades.

    Args:
        values: ``[N, ...]`` of slides, such as scores, or readers' grades.
        patients: ``[N]``.
        unit: ``worst``, the highest; ``mean``; or ``slide``, the values as they are.

    Returns:
        ``[M, ...]`` in the order of :attr:`PatientResults.patients`; NaN if one slide has NaN.
    """
    rows = np.asarray(values, np.float64)
    if unit == "slide":
        return rows
    names, member = np.unique(np.asarray(patients), return_inverse=True)
    make = np.max if unit == "worst" else np.mean
    return np.stack([make(rows[member == number], axis=0) for number in range(len(names))])


def metric_per_fold(
    metric: MetricOfPredictions, true: ArrayLike, predicted: ArrayLike, folds: ArrayLike
) -> NDArray[np.float64]:
    """Computes the metric within each test fold of each repeat, ``[R, K]``, as :func:`corrected_t` needs it.

    Args:
        metric: such as :func:`slidetl.evaluation.metrics.accuracy`; NaN in a fold stays NaN.
        true: ``[N]`` grades.
        predicted: ``[R, N]`` grades, or ``[R, N, K]`` probabilities, to suit the metric.
        folds: ``[R, N]`` the fold with each result in its test part, 0..K-1.

    Raises:
        UsageError: a fold without results.
    """
    truth, rows, numbers = np.asarray(true), np.asarray(predicted), np.asarray(folds)
    if numbers.ndim != 2 or rows.shape[:2] != numbers.shape or truth.shape != numbers.shape[1:]:
        raise UsageError(
            f"expected grades [N], predictions [R, N] and folds [R, N], not {truth.shape}, {rows.shape} "
            f"and {numbers.shape}"
        )
    n_folds = int(numbers.max()) + 1
    held = numbers[:, None, :] == np.arange(n_folds)[:, None]  # [R, K, N]
    if not held.any(axis=2).all():
        raise UsageError(f"folds must be numbered from 0 to {n_folds - 1} in each repeat, none of them empty")
    weights = held.astype(np.float64)
    return np.stack([metric(truth, *of_repeat) for of_repeat in zip(rows, weights, strict=True)])


@dataclass(frozen=True)
class CorrectedT:
    """The corrected resampled t-test.

    Attributes:
        interval: of the mean difference over folds and repeats.
        standard_error: corrected for overlapping training parts.
        t: the mean over its standard error, on ``degrees`` degrees of freedom.
        p: two-sided.

    All but the mean are NaN if the differences are all equal: nothing tells their spread.
    """

    interval: Interval
    standard_error: float
    t: float
    degrees: int
    p: float


def corrected_t(differences: ArrayLike, test_share: float) -> CorrectedT:
    """Tests differences of two arms over the folds of a repeated cross-validation.

    Nadeau and Bengio, Machine Learning 52 (2003), for R repeats of K folds as in Bouckaert and Frank, PAKDD
    2004: the variance of the mean is ``(1 / RK + n_test / n_train)`` times the sample variance of the RK
    differences, with RK - 1 degrees of freedom. That counts on folds drawn anew in each repeat. Of repeats of
    the same folds give the K means: other trainings are no other patients. (Of three sites in ten repeats .13
    of studies were rejected at .05 instead of .04.) The correction is a heuristic, and so is normality for
    kappa in small folds: a secondary test. It counts the variance of another training, as a bootstrap over
    patients alone does not.

    Args:
        differences: ``[R, K]`` of the metric, first arm minus second, by fold; no test part twice.
        test_share: share of the results in a test part, as 0.2 for five folds.

    Raises:
        UsageError: fewer than two differences, or a share outside of 0..1.
    """
    from scipy.stats import t as student

    values = np.asarray(differences, np.float64).ravel()
    if len(values) < 2 or not np.isfinite(values).all():
        raise UsageError(
            "expected at least two differences, all of them finite; fewer folds make larger ones"
        )
    if not 0 < test_share < 1:
        raise UsageError(f"the share of a test part must be between 0 and 1, not {test_share}")
    mean, degrees = float(values.mean()), len(values) - 1
    error = float(np.sqrt((1 / len(values) + test_share / (1 - test_share)) * values.var(ddof=1)))
    if error <= 1e-12:
        error = float("nan")
    half = float(student.ppf((1 + _LEVEL) / 2, degrees)) * error
    ratio = mean / error
    p = float(2 * student.sf(abs(ratio), degrees))
    return CorrectedT(Interval(mean, mean - half, mean + half, _LEVEL), error, ratio, degrees, p)


@dataclass(frozen=True)
class SignFlip:
    """The patient-clustered sign-flip test.

    Attributes:
        difference: of the metric, first arm minus second, averaged over repeats.
        p: two-sided; NaN if the metric is undefined.
        n_discordant: patients with differing predictions in any repeat; the others carry no information.
        exact: True if all ways to swap were tried, not a sample of them.
    """

    difference: float
    p: float
    n_discordant: int
    exact: bool


def sign_flip_test(
    metric: MetricOfPredictions,
    true: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    patients: ArrayLike,
    *,
    n_flips: int = 10_000,
) -> SignFlip:
    """Swaps two arms' predictions of whole patients, and counts how often the difference gets as large.

    Under the null hypothesis the two predictions of a patient are exchangeable, all slides of the patient
    together; McNemar's test would take slides for independent. For a mean over slides a swap flips
    the sign of the patient's contribution (Good, Permutation Tests, 2nd ed. 2000); kappa is recomputed. p is
    the share of all swaps with 14 discordant patients or fewer, and otherwise ``(1 + hits) / (1 + n_flips)``
    (Phipson and Smyth 2010); a swap with an undefined metric is a hit. Repeats share their patients: all
    repeats of a patient are swapped together, and the metric is averaged over them.

    Conditional on the fitted models.

    Args:
        metric: such as :func:`slidetl.evaluation.metrics.accuracy`.
        true: ``[N]`` grades.
        first: predictions ``[R, N]`` of one arm, or ``[R, N, K]`` probabilities, to suit the metric; ``[N]``
            of a single repeat.
        second: those of the other.
        patients: ``[N]``.
        n_flips: number of random swaps.
    """
    truth, a, b = np.asarray(true), np.atleast_2d(first), np.atleast_2d(second)
    names, member = np.unique(np.asarray(patients), return_inverse=True)
    if a.shape != b.shape:
        raise UsageError(f"expected two arms of one shape, not {a.shape} and {b.shape}")
    check_lengths(grades=truth, predictions=a.swapaxes(0, 1), patients=member)
    both = partial(metric, np.concatenate([truth, truth]), np.concatenate([a, b], axis=1))
    differs = (a != b).swapaxes(0, 1).reshape(len(truth), -1).any(axis=1)
    discordant = np.unique(member[differs])
    n = len(discordant)

    def differences(keeps: NDArray[np.bool_]) -> NDArray[np.float64]:
        by_patient = np.ones((len(keeps), len(names)), bool)
        by_patient[:, discordant] = keeps
        own = by_patient[:, member].astype(np.float64)
        return both(np.concatenate([own, 1 - own], axis=1)) - both(np.concatenate([1 - own, own], axis=1))

    observed = float(differences(np.ones((1, n), bool))[0])
    if np.isnan(observed):
        return SignFlip(observed, observed, n, False)
    exact = n <= _EXACT_PATIENTS
    if exact:
        keeps = np.array(list(itertools.product([True, False], repeat=n)), bool).reshape(2**n, n)
    else:
        keeps = np.random.default_rng(0).random((n_flips, n)) < 0.5
    # Sums in another order differ in the last bit; a tie must count.
    step = max(1, (1 << 22) // len(truth))
    hits = sum(
        int((~(abs(differences(keeps[start : start + step])) < abs(observed) - 1e-12)).sum())
        for start in range(0, len(keeps), step)
    )
    p = hits / len(keeps) if exact else (1 + hits) / (1 + n_flips)
    return SignFlip(observed, float(p), n, exact)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjusts the p-values ``[n]`` of a family of tests, in the order given.

    Holm, Scandinavian Journal of Statistics 1979: whatever the dependence between the tests, rejecting those
    at or below 0.05 errs once or more in at most 5 % of families.

    Raises:
        UsageError: not a list of numbers from 0 to 1.
    """
    values = np.asarray(p_values, np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise UsageError(f"expected p-values from 0 to 1, not {values.tolist()}")
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def chance_p(observed: float, null_metrics: ArrayLike, tolerance: float = 1e-12) -> float:
    """Computes the p-value of a metric against its values ``[n]`` under the null hypothesis.

    ``(1 + hits) / (1 + n)`` (Phipson and Smyth, Statistical Applications in Genetics and Molecular Biology
    2010), a hit being a null metric at least as high; at least 19 are needed to reach 0.05. It tests a whole
    procedure if every null metric comes from labels permuted over patients *before* training, with all inner
    choices made again. Higher metrics are better; one that is less by the tolerance counts as equal.
    """
    null = np.asarray(null_metrics, np.float64)
    if null.ndim != 1 or not len(null) or not (np.isfinite(null).all() and np.isfinite(observed)):
        raise UsageError("expected a finite metric, and at least one of permuted labels")
    return float((1 + (null >= observed - tolerance).sum()) / (1 + len(null)))


@dataclass(frozen=True)
class VarianceSplit:
    """Sources of the variance of a cross-validated metric, in the metric's unit squared.

    Attributes:
        seed: between repeats (another split and initialisation) on the same patients; None for one repeat.
        fold: between folds of a repeat, beyond the effect of the few patients in each; may fall below zero.
            None for a single fold, and if the metric is undefined in a fold.
        patient: of the metric averaged over repeats, over samples of patients.
        n_repeats: R.
    """

    seed: float | None
    fold: float | None
    patient: float
    n_repeats: int

    @property
    def standard_error(self) -> float:
        """Standard error of the metric averaged over repeats, if not less: ``sqrt(patient + seed / R)``."""
        return float(np.sqrt(self.patient + (self.seed or 0.0) / self.n_repeats))


def variance_split(
    metric: MetricOfPredictions,
    true: ArrayLike,
    predicted: ArrayLike,
    folds: ArrayLike,
    patients: ArrayLike,
    *,
    n_draws: int = 2000,
) -> VarianceSplit:
    """Splits the variance of a metric into seed, fold and patient.

    - seed: the sample variance (R - 1 in the denominator) of the repeats' pooled metrics. Given the patients,
      repeats are independent draws of split and initialisation: unbiased for the variance of one repeat.
    - patient: the bootstrap variance over patients of the metric averaged over repeats, given the models.
    - fold: by the method of moments, the mean over repeats of the sample variance between folds, minus the
      mean bootstrap variance over patients within a fold. The rest is between training parts. Stratified
      folds differ less than random folds, so it errs downwards.

    Bootstrap variances over P patients are multiplied by ``P / (P - 1)``: unbiased for a mean over patients
    of one size, about so for other metrics.

    Args:
        metric: such as :func:`slidetl.evaluation.metrics.accuracy`.
        true: ``[N]`` grades.
        predicted: ``[R, N]`` grades, or ``[R, N, K]`` probabilities, to suit the metric.
        folds: ``[R, N]`` whole numbers 0..K-1.
        patients: ``[N]``; no patient is in two folds of a repeat.
        n_draws: resamples of the patients.

    Raises:
        UsageError: a fold of fewer than two patients.
    """
    truth, rows, numbers = np.asarray(true), np.asarray(predicted), np.asarray(folds)
    who = np.asarray(patients)
    by_fold = metric_per_fold(metric, truth, rows, numbers)
    n_repeats, n_folds = by_fold.shape
    pooled = np.array([metric(truth, of_repeat, np.ones(len(truth))) for of_repeat in rows])
    within = []  # variance between the patients of a fold alone
    for of_repeat, number in itertools.product(range(n_repeats), range(n_folds)):
        held = numbers[of_repeat] == number
        of_fold = partial(metric, truth[held], rows[of_repeat][held])
        within.append(_patient_variance(of_fold, who[held], n_draws))
    fold = float(by_fold.var(axis=1, ddof=1).mean() - np.mean(within)) if n_folds > 1 else None
    return VarianceSplit(
        seed=float(pooled.var(ddof=1)) if n_repeats > 1 else None,
        fold=fold if fold is not None and np.isfinite(fold) else None,
        patient=_patient_variance(partial(metric, truth, rows), who, n_draws),
        n_repeats=n_repeats,
    )


def _patient_variance(metric: Metric, patients: NDArray[Any], n_draws: int) -> float:
    n_patients = len(np.unique(patients))
    drawn = resampled_metric(metric, patients, n_draws=n_draws)
    drawn = drawn[~np.isnan(drawn)]
    return float(drawn.var(ddof=1) * n_patients / (n_patients - 1)) if len(drawn) > 1 else float("nan")
