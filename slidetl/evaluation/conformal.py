"""Sets of grades with a chosen coverage of the true one, and referral of unsure slides to a human."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Interval, Resampling, bca_interval, share_interval
from slidetl.evaluation.metrics import check_finite, check_probabilities, weighted_mean
from slidetl.evaluation.shapes import check_lengths, value_of_patient

REFERRAL_POINTS = 10  # thresholds of a risk-coverage curve: its bounds hold for all of them together
_LEVEL = 0.95  # at which they hold


@dataclass(frozen=True)
class GradeSets:
    """A rule that turns the probabilities of a slide into a contiguous set of grades.

    Attributes:
        quantile: a grade is in the set if the grades taken before it have at most this probability.
        risk: share of patients with sets that may miss a true grade, 0..1.
        n_patients: number of patients behind the quantile.
    """

    quantile: float
    risk: float
    n_patients: int

    def __post_init__(self) -> None:
        if not (0 <= self.quantile <= 1 and 0 < self.risk < 1 and self.n_patients > 0):
            raise UsageError(
                f"a rule for grade sets needs a quantile of 0 to 1, a risk between 0 and 1 and patients, not "
                f"{self.quantile}, {self.risk} and {self.n_patients}"
            )

    def sets(self, probabilities: ArrayLike) -> NDArray[np.int64]:
        """Returns the sets of slides: ``[N, K]`` -> ``[N, 2]``, the lowest and the highest grade, inclusive.

        A set always holds the most probable grade.
        """
        inside = _mass_before(probabilities) <= self.quantile
        return np.stack([inside.argmax(axis=1), inside.shape[1] - 1 - inside[:, ::-1].argmax(axis=1)], axis=1)


def fit_grade_sets(
    true: ArrayLike, probabilities: ArrayLike, patients: ArrayLike, *, risk: float = 0.1
) -> GradeSets:
    """Fits cross-conformal sets of grades to out-of-fold probabilities ``[N, K]`` of one repeat, calibrated.

    Grades are taken in turn: the most probable one first, then always the more probable neighbour of those
    taken (Lu, Angelopoulos and Pomerantz, MICCAI 2022), so that a set is contiguous. The score of a slide is
    the probability taken before its true grade; the score of a patient, the unit here, is the highest of its
    slides. The quantile is the ``ceil((n + 1) (1 - risk))``-th lowest score of n patients, or 1 (all
    grades) with fewer patients than that.

    With one model fitted apart from these patients, a new patient of the same population has all its true
    grades in the sets with probability ``1 - risk`` or more: marginal, not for each grade, site or patient.
    Here the scores come from K models, as in cross-conformal prediction (Vovk, Annals of Mathematics and
    Artificial Intelligence 2015); for their vote about ``1 - 2 risk`` is proved (Barber et al., Annals of
    Statistics 2021), for a single model fitted again on all the patients nothing is: see `check_coverage`.
    """
    if not 0 < risk < 1:
        raise UsageError(f"a risk must be between 0 and 1, not {risk}")
    grades, _ = check_probabilities(true, probabilities)
    names, member = np.unique(np.asarray(patients), return_inverse=True)
    check_lengths(grades=grades, patients=member)
    scores = np.zeros(len(names))
    np.maximum.at(scores, member, _mass_before(probabilities)[np.arange(len(grades)), grades])
    # Rounded, so that 10 * 0.9 is not ten and a bit.
    rank = int(np.ceil(round((len(scores) + 1) * (1 - risk), 9)))
    quantile = float(np.sort(scores)[rank - 1]) if rank <= len(scores) else 1.0
    return GradeSets(quantile, risk, len(scores))


@dataclass(frozen=True)
class SetCoverage:
    """Sets made on other folds, checked on each fold in turn.

    Attributes:
        patients_covered: share of patients with all true grades in the sets: ``1 - risk`` was asked.
        mean_size: grades in a set, 1..K.
        sizes: ``[K]`` number of results with a set of 1, 2, ... K grades.
        risk: as asked.
    """

    patients_covered: Interval
    mean_size: Interval
    sizes: tuple[int, ...]
    risk: float


def check_coverage(
    true: ArrayLike,
    probabilities: ArrayLike,
    patients: ArrayLike,
    folds: ArrayLike,
    *,
    risk: float = 0.1,
    **how: Unpack[Resampling],
) -> SetCoverage:
    """Checks how often sets hold the true grade, each fold by the quantile of the other folds.

    Takes out-of-fold probabilities ``[N, K]`` of one repeat, and ``folds [N]``, the fold with each slide in
    its test part; no patient is in two. The models of the other folds were trained on this fold's patients:
    not quite a check on new patients. Intervals are conditional on models and quantiles.

    Raises:
        UsageError: a single fold, or a patient in two.
    """
    grades, rows = np.asarray(true), np.asarray(probabilities, np.float64)
    who, numbers = np.asarray(patients), np.asarray(folds)
    if numbers.shape != grades.shape or len(np.unique(numbers)) < 2:
        raise UsageError("a check of coverage needs the fold of each slide, and two folds at least")
    names, member, _ = value_of_patient(who, numbers, "is in two folds; plan folds by patient")
    ends = np.zeros((len(grades), 2), np.int64)
    for number in np.unique(numbers):
        test = numbers == number
        rule = fit_grade_sets(grades[~test], rows[~test], who[~test], risk=risk)
        ends[test] = rule.sets(rows[test])
    covered = (ends[:, 0] <= grades) & (grades <= ends[:, 1])
    sizes = ends[:, 1] - ends[:, 0] + 1
    missed = np.bincount(member, ~covered) > 0
    return SetCoverage(
        patients_covered=share_interval(~missed, names, level=how.get("level", 0.95)),
        mean_size=bca_interval(partial(weighted_mean, sizes), who, **how),
        sizes=tuple(int(count) for count in np.bincount(sizes, minlength=rows.shape[1] + 1)[1:]),
        risk=risk,
    )


@dataclass(frozen=True)
class ReferralPoint:
    """A rule for referral: slides below a confidence go to a human.

    Attributes:
        confidence: the least of the slides graded by the model.
        coverage: their share of all slides, 0..1.
        risk: share of wrong ones among them.
        upper: upper confidence bound of the share of patients with a wrong one, among those with a slide
            graded.
    """

    confidence: float
    coverage: float
    risk: float
    upper: float


@dataclass(frozen=True)
class RiskCoverage:
    """Gain of leaving the least sure slides to a human.

    Attributes:
        points: in rising coverage.
        area: under risk against coverage over all slides, 0..1: the mean risk.
        level: at which the upper bounds of all points hold together.
    """

    points: tuple[ReferralPoint, ...]
    area: float
    level: float


def risk_coverage(
    wrong: ArrayLike,
    confidence: ArrayLike,
    patients: ArrayLike,
    *,
    n_points: int = REFERRAL_POINTS,
) -> RiskCoverage:
    """Computes the risk-coverage curve (El-Yaniv and Wiener, JMLR 2010), with simultaneous bounds.

    Bounds are one-sided and exact for a binomial share (Clopper and Pearson, Biometrika 1934), at
    ``1 - 0.05 / n_points`` each, as Geifman and El-Yaniv (NeurIPS 2017) do for thresholds tried on one
    sample. Since slides of a patient are not independent, they count patients: one is wrong if any of its
    graded slides is. This exceeds the share of slides, so the bound errs upwards.

    Args:
        wrong: ``[N]`` bool, the event to be rare: not the true grade, or two grades off.
        confidence: ``[N]``, higher is surer, such as the highest probability, out of fold.
        patients: ``[N]``.
        n_points: points at coverages of ``1 / n_points``, ..., 1; points at one threshold are merged.
    """
    from scipy.stats import beta

    errs, sure, who = np.asarray(wrong, bool), np.asarray(confidence, np.float64), np.asarray(patients)
    check_lengths(errors=errs, confidence=sure, patients=who)
    if not np.isfinite(sure).all() or n_points < 1:
        raise UsageError("expected finite confidence, and one point at least")
    falling = np.sort(sure)[::-1]
    steps = np.ceil(len(sure) * np.arange(1, n_points + 1) / n_points).astype(int)
    thresholds = np.unique(falling[steps - 1])[::-1]
    each, points = 1 - (1 - _LEVEL) / n_points, []
    for threshold in thresholds:
        graded = sure >= threshold
        n, k = (len(np.unique(who[some])) for some in (graded, graded & errs))
        upper = 1.0 if k == n else float(beta.ppf(each, k + 1, n - k))
        coverage, risk = float(graded.mean()), float(errs[graded].mean())
        points.append(ReferralPoint(float(threshold), coverage, risk, upper))
    # Slides of equal confidence are graded together: the risk at each is the risk of all of them.
    area = float(np.mean([errs[sure >= value].mean() for value in falling]))
    return RiskCoverage(tuple(points), area, _LEVEL)


def referral_rule(curve: RiskCoverage, risk: float) -> ReferralPoint | None:
    """Finds the point of greatest coverage with an upper bound of at most the chosen risk.

    With probability ``level`` over samples of patients, the share of new patients of the same population
    with a wrong grade by these models is at most ``risk``, a share between 0 and 1. None without such a
    point: then every slide goes to a human, or more patients are needed (even without an error about
    ``ln(n_points / (1 - level)) / risk`` of them).

    Raises:
        UsageError: a risk out of range.
    """
    if not 0 < risk < 1:
        raise UsageError(f"a risk must be between 0 and 1, not {risk}")
    good = [point for point in curve.points if point.upper <= risk]
    return good[-1] if good else None


def _mass_before(probabilities: ArrayLike) -> NDArray[np.float64]:
    """Sums the probability of the grades taken before each grade, ``[N, K]``."""
    rows = np.asarray(probabilities, np.float64)
    if rows.ndim != 2 or rows.shape[1] < 2:
        raise UsageError(f"expected probabilities [N, K], not {rows.shape}")
    check_finite(rows)
    n, n_grades = rows.shape
    each = np.arange(n)
    # The ends of the scale get a neighbour that is never taken.
    padded = np.pad(rows, ((0, 0), (1, 1)), constant_values=-1.0)
    low = high = rows.argmax(axis=1) + 1
    before, taken = np.zeros(padded.shape), padded[each, low].copy()
    for _ in range(n_grades - 1):
        downwards = padded[each, low - 1] >= padded[each, high + 1]
        low, high = np.where(downwards, low - 1, low), np.where(downwards, high, high + 1)
        grade = np.where(downwards, low, high)
        before[each, grade] = taken
        taken = taken + padded[each, grade]
    return np.minimum(before[:, 1:-1], 1)
