"""Repeatability of a continuous score, and its shift between two groups or two times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Interval, Metric, Resampling, bca_interval
from slidetl.evaluation.shapes import check_lengths, value_of_patient


@dataclass(frozen=True)
class Repeatability:
    """Repeatability of a slide's score over draws of tiles.

    Attributes:
        n, n_draws: results (slides or patients) and draws behind it.
        within_sd: standard deviation over draws of a slide's score, pooled over slides: the standard error of
            measurement (SEM) of one draw.
        icc: share of a single draw's variance between slides, ICC(1,1); may fall below zero.
        minimal_detectable_change: ``1.96 * sqrt(2) * SEM``: two scores of one slide differ by more in 5 % of
            pairs; a smaller change of a patient's score is noise of the draw.
    """

    n: int
    n_draws: int
    within_sd: Interval
    icc: Interval
    minimal_detectable_change: Interval


def repeatability(scores: ArrayLike, patients: ArrayLike, **how: Unpack[Resampling]) -> Repeatability:
    """Splits the variance of scores into slides and draws, by a one-way analysis of variance.

    ICC(1,1) as in Shrout and Fleiss (Psychological Bulletin 1979), the minimal detectable change as in Weir
    (Journal of Strength and Conditioning Research 2005), for one draw; the mean of d draws has it
    divided by ``sqrt(d)``. It measures the noise of drawing tiles only, neither of cutting another section
    nor of scanning again. ``scores [N, D]`` are of N slides (or patients) in each of D independent draws.

    Raises:
        UsageError: fewer than two slides or draws, or scores that are all the same.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all():
        raise UsageError(
            f"expected finite scores [N, D] of two slides and draws at least, not {values.shape}"
        )
    n_draws = values.shape[1]
    means = values.mean(axis=1)
    squares = ((values - means[:, None]) ** 2).sum(axis=1)

    def mean_squares(weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Computes the mean squares between and within slides; a slide drawn twice is two slides."""
        n = weights.sum(axis=1)
        centre = weights @ means / n
        between = n_draws * (weights @ means**2 - n * centre**2)
        # Two slides at least, or there is nothing between them.
        between = np.where(n > 1, between / np.maximum(n - 1, 1), np.nan)
        return between, weights @ squares / (n * (n_draws - 1))

    def icc(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        between, within = mean_squares(weights)
        total = between + (n_draws - 1) * within
        return np.where(total > 1e-24, (between - within) / np.where(total > 1e-24, total, 1), np.nan)

    def within_sd(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.sqrt(mean_squares(weights)[1])

    sd = bca_interval(within_sd, patients, **how)
    factor = 1.96 * 2**0.5
    change = Interval(factor * sd.estimate, factor * sd.low, factor * sd.high, sd.level)
    return Repeatability(len(values), n_draws, sd, bca_interval(icc, patients, **how), change)


@dataclass(frozen=True)
class ScoreShift:
    """Shift of one group's scores from another's.

    Attributes:
        paired: True if the same patients are in both groups.
        n_first, n_second: patients.
        shift: Hodges-Lehmann estimate, second minus first, with its bootstrap interval.
        p: two-sided, of the rank test.
        superiority: how often the second is above the first, ties counting half: 0.5 without a shift.
    """

    paired: bool
    n_first: int
    n_second: int
    shift: Interval
    p: float
    superiority: float


def compare_groups(
    scores: ArrayLike, is_second: ArrayLike, patients: ArrayLike, **how: Unpack[Resampling]
) -> ScoreShift:
    """Compares scores of two groups of different patients, such as treated and not.

    A patient's score is the mean over its slides. The shift is the median of all differences between the
    groups (Hodges and Lehmann, Annals of Mathematical Statistics 1963), its interval resamples the patients
    of each group (five or more; of fewer there is none); the test is that of Mann and Whitney (exact for a
    group of 8 patients or fewer without ties, else normal, corrected for ties). Groups not drawn by lot
    differ in more than the treatment.
    ``is_second [N] bool`` is True for slides of patients in the second group.

    Raises:
        UsageError: fewer than two patients in a group, or a patient in both.
    """
    from scipy.stats import mannwhitneyu

    values = np.asarray(scores, np.float64)
    problem = "is in both groups; compare such patients with compare_paired"
    who, member, group = value_of_patient(patients, np.asarray(is_second, bool), problem)
    check_lengths(scores=values, patients=member)
    if not np.isfinite(values).all():
        raise UsageError("scores must be finite numbers")
    if min(group.sum(), (~group).sum()) < 2:
        raise UsageError("a comparison of groups needs two patients in each")
    means = np.bincount(member, values) / np.bincount(member)
    gaps = means[group][None, :] - means[~group][:, None]  # [first, second]
    metric = _median_of(gaps.ravel(), lambda row: np.outer(row[~group], row[group]).ravel())
    shift = bca_interval(metric, who, strata=group, sides=group, **how)
    p = float(mannwhitneyu(means[group], means[~group], alternative="two-sided").pvalue)
    superiority = float(((gaps > 0) + (gaps == 0) / 2).mean())
    return ScoreShift(False, gaps.shape[0], gaps.shape[1], shift, p, superiority)


def compare_paired(before: ArrayLike, after: ArrayLike, **how: Unpack[Resampling]) -> ScoreShift:
    """Compares two scores of the same patients, such as before and after treatment.

    The shift is the median of the means of all pairs of changes, a change with itself included (Hodges and
    Lehmann 1963); the test is Wilcoxon's of signed ranks (exact up to 50 patients without ties or unchanged
    ones, else normal). Without untreated patients beside them it shows a change, not its cause. Takes one
    score of each patient, ``[P]``, twice in the same order; average the slides first.

    Raises:
        UsageError: fewer than two patients.
    """
    from scipy.stats import wilcoxon

    one, other = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if one.ndim != 1 or one.shape != other.shape or len(one) < 2:
        raise UsageError(f"expected two scores for each of two patients, not {one.shape} and {other.shape}")
    change = other - one
    if not np.isfinite(change).all():
        raise UsageError("scores must be finite numbers")

    n = len(change)
    one_of, other_of = np.triu_indices(n)

    def weigh(row: NDArray[np.float64]) -> NDArray[np.float64]:
        """Counts the pairs of a patient's copies with another's, or among themselves."""
        return np.where(one_of == other_of, row[one_of] * (row[one_of] + 1) / 2, row[one_of] * row[other_of])

    metric = _median_of((change[one_of] + change[other_of]) / 2, weigh)
    shift = bca_interval(metric, np.arange(n), **how)
    p = float(wilcoxon(change, method="auto").pvalue) if change.any() else 1.0
    return ScoreShift(True, n, n, shift, p, float(((change > 0) + (change == 0) / 2).mean()))


def _median_of(
    values: NDArray[np.float64], weigh: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> Metric:
    """Makes a metric of the median of ``[M]`` values; ``weigh`` maps patients' weights ``[P]`` to ``[M]``."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]

    def metric(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        medians = []
        for row in weights:
            reached = np.cumsum(weigh(row)[order])
            # Where half of the weight is just reached between two values: their mean.
            low, high = (np.searchsorted(reached, reached[-1] / 2, side) for side in ("left", "right"))
            medians.append((ordered[low] + ordered[min(high, len(ordered) - 1)]) / 2)
        return np.array(medians)

    return metric
