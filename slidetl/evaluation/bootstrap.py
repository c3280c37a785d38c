"""Intervals over patients, since slides of one patient are not independent, and over repeats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError
from slidetl.evaluation.shapes import check_lengths, value_of_patient

# Maps weights [B, N] of N results to B values, or to [R, B] of R repeats of an experiment (other folds, seeds
# or training slides). Whole weights are resamples, zeros leave results out: one function gives the estimate,
# the bootstrap, the jackknife and the metric of a fold or of a site. NaN where the weights leave nothing to
# compute it from.
Metric = Callable[[NDArray[np.float64]], NDArray[np.float64]]

LEAST_PATIENTS = 5
"""Of a bootstrap, and on either side of a comparison: intervals of fewer are far too short
(``docs/evidence/intervals.md``)."""

_BLOCK = 1 << 21  # weights at a time: 16 MB
_DECIMALS = 12


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; all NaN for a metric that is undefined.

    Attributes:
        estimate: the statistic on the data as they are.
        low, high: bounds of the interval.
        level: its nominal coverage, 0..1.
    """

    estimate: float
    low: float
    high: float
    level: float

    @property
    def is_point(self) -> bool:
        """True if there are no bounds: nothing varied but by rounding, or patients are too few to tell."""
        return abs(self.high - self.low) < 1e-12

    def __format__(self, form: str) -> str:
        """Formats the estimate and its bounds, if it has any."""
        if self.is_point:
            return f"{self.estimate:{form}} (no interval)"
        return f"{self.estimate:{form}} [{self.low:{form}}, {self.high:{form}}]"


def proven(intervals: Mapping[str, Interval | None]) -> dict[str, tuple[float, float, float]]:
    """Returns estimate, low and high by name, without undefined metrics (None) and without points.

    A point proves no certainty.
    """
    return {
        name: (one.estimate, one.low, one.high)
        for name, one in intervals.items()
        if one is not None and one.low < one.high and not one.is_point
    }


class Resampling(TypedDict, total=False):
    """Options of an interval, each with a default.

    Attributes:
        level: nominal coverage, between 0 and 1; 0.95.
        n_draws: number of resamples of the patients, at least 2; 5000.
        seed: of the resampling; 0.
    """

    level: float
    n_draws: int
    seed: int


def bca_interval(
    metric: Metric,
    patients: ArrayLike,
    *,
    strata: ArrayLike | None = None,
    sides: ArrayLike | None = None,
    **how: Unpack[Resampling],
) -> Interval:
    """Computes the bias-corrected and accelerated bootstrap over patients, and repeats (Efron, JASA 1987).

    Patients are drawn with replacement, each with all its results (Davison and Hinkley 1997, section 3.8).
    The bias correction is the normal quantile of the share of draws below the estimate, draws equal to it
    counting half (values are rounded to 12 decimals, so that equal ones tie); the acceleration is
    ``sum(d^3) / (6 sum(d^2)^1.5)`` over the leave-one-patient-out estimates, d being their mean minus each
    (with strata, d of each stratum over its own size). For one result a patient it equals
    ``scipy.stats.bootstrap``.

    Repeats are averaged, and resampled along with the patients (Owen, "The pigeonhole bootstrap", Annals of
    Applied Statistics 2007): each draw takes R - 1 of them with replacement. The variance of their mean is
    the unbiased one of a mean of R (Rao and Wu, JASA 1988), and it stays within the range of the metric.
    Few repeats say little of other trainings: where nothing but these varies, the interval of two holds the
    truth in .50 of studies, of three in .75, of five in .86.

    Without repeats the interval is conditional on the fitted models: it covers other patients, not another
    training. At 95 % it covers a metric of one arm 94 to 96 % of the time with 60 patients or 20, a
    difference of two 92 % with 60 and 90 to 92 % with 20 (``docs/evidence/intervals.md``). If all draws agree
    or there are fewer than :data:`LEAST_PATIENTS`, it is the estimate itself, which is no proof of certainty:
    take :func:`share_interval` for a share. Draws with an undefined metric (NaN) are left out.

    Args:
        metric: weights ``[B, N]`` -> ``[B]`` or ``[R, B]``; of a paired comparison, the difference of two.
        patients: ``[N]``.
        strata: ``[N]``, groups of patients sampled separately (treated and not): each is resampled at its own
            size. A patient lies in one stratum.
        sides: ``[N]``, the two sides that the metric compares, as an AUROC does: fewer than
            :data:`LEAST_PATIENTS` on either are too few, however many there are on the other.
        **how: options.

    Raises:
        UsageError: fewer than two patients in a stratum, a patient in two strata, or a metric undefined on
            the data or on more than half of the draws.
    """
    interval = bca_interval_if_defined(metric, patients, strata=strata, sides=sides, **how)
    if interval is None:
        raise UsageError(
            "the metric is undefined on these results, or on most resamples of their patients: too few for it"
        )
    return interval


def bca_interval_if_defined(
    metric: Metric,
    patients: ArrayLike,
    *,
    level: float = 0.95,
    n_draws: int = 5000,
    seed: int = 0,
    strata: ArrayLike | None = None,
    sides: ArrayLike | None = None,
) -> Interval | None:
    """Computes :func:`bca_interval`; None where the metric is undefined on the data or on most draws."""
    from scipy.special import ndtr, ndtri

    if not 0 < level < 1 or n_draws < 2:
        raise UsageError(f"level must be between 0 and 1, n_draws at least 2, not {level} and {n_draws}")
    member, stratum = _patients_and_strata(patients, strata)
    estimate = float(metric(np.ones((1, len(member)))).mean())
    if np.isnan(estimate):
        return None
    side = np.zeros(len(member)) if sides is None else np.asarray(sides)
    if min(len(np.unique(member[side == one])) for one in np.unique(side)) < LEAST_PATIENTS:
        return Interval(estimate, estimate, estimate, level)
    rng = np.random.default_rng(seed)
    draws = _with_repeats(_resampled(metric, member, stratum, n_draws, rng), rng)
    # Equal values differ in the last bits, by the order of their sums, and must tie. Adding 0 makes -0 a 0.
    estimate, draws = round(estimate, _DECIMALS) + 0.0, draws.round(_DECIMALS) + 0.0
    defined = draws[~np.isnan(draws)]
    if 2 * len(defined) < n_draws:
        return None
    # Half a draw from either end at most: the estimate of a discrete metric may lie outside all draws.
    below = np.clip(
        (np.sum(defined < estimate) + np.sum(defined <= estimate)) / (2 * len(defined)),
        0.5 / len(defined),
        1 - 0.5 / len(defined),
    )
    bias = ndtri(below)
    acceleration = _acceleration(metric, member, stratum)
    normal = bias + ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
    shares = ndtr(bias + normal / (1 - acceleration * normal))
    low, high = np.quantile(defined, shares)
    return Interval(estimate, float(low), float(high), level)


def share_interval(
    held: ArrayLike, patients: ArrayLike, *, level: float = 0.95, most: int | None = None
) -> Interval:
    """Computes the exact interval of a share of results, such as an accuracy.

    A bootstrap of 20 results that all are right is a point, and of a true share of .97 it holds the truth in
    44 % of studies. This one is of Clopper and Pearson (Biometrika 1934) for as many trials as the results
    are worth after Korn and Graubard (Survey Methodology 1998): ``p (1 - p)`` over the variance of the share,
    by patients (with all their results) and repeats, and never more than the number of patients. For one
    result a patient and one repeat it is Clopper's and Pearson's own, and covers at least ``level``.

    Args:
        held: ``[N]`` bool, or ``[R, N]`` of R repeats.
        patients: ``[N]``.
        level: of the interval, between 0 and 1.
        most: trials at most, instead of the number of patients, where a patient's results are new draws, such
            as of who is in a training. Where nothing varies, patients count.
    """
    from scipy.stats import beta

    rows, who = np.atleast_2d(np.asarray(held, np.float64)), np.asarray(patients)
    check_lengths(results=rows.T, patients=who)
    if not 0 < level < 1:
        raise UsageError(f"level must be between 0 and 1, not {level}")
    names, member = np.unique(who, return_inverse=True)
    share = float(rows.mean())
    of_patient = np.bincount(member, rows.mean(axis=0) - share)
    variance = float((of_patient**2).sum()) / len(who) ** 2
    if len(rows) > 1:
        variance += float(rows.mean(axis=1).var(ddof=1)) / len(rows)
    trials = len(names) if variance <= 0 else min(most or len(names), share * (1 - share) / variance)
    hits = share * trials
    low = beta.ppf((1 - level) / 2, hits, trials - hits + 1) if share > 0 else 0.0
    high = beta.ppf((1 + level) / 2, hits + 1, trials - hits) if share < 1 else 1.0
    return Interval(share, float(low), float(high), level)


def resampled_metric(
    metric: Metric, patients: ArrayLike, *, n_draws: int = 2000, seed: int = 0
) -> NDArray[np.float64]:
    """Computes the metric on ``n_draws`` resamples: ``[n_draws]``, NaN if undefined.

    The draws are those of :func:`bca_interval` with this seed.

    Raises:
        UsageError: fewer than two patients.
    """
    member, stratum = _patients_and_strata(patients, None)
    rng = np.random.default_rng(seed)
    return _with_repeats(_resampled(metric, member, stratum, n_draws, rng), rng)


def _with_repeats(draws: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Resamples repeats: draws of patients ``[n]``, or ``[R, n]``, to ``[n]``."""
    if draws.ndim == 1 or len(draws) == 1:
        return draws.reshape(-1)
    drawn = rng.integers(len(draws), size=(len(draws) - 1, draws.shape[1]))
    return np.asarray(np.take_along_axis(draws, drawn, axis=0).mean(axis=0))


def _patients_and_strata(
    patients: ArrayLike, strata: ArrayLike | None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Returns the patient of each result ``[N]`` and the stratum of each patient ``[P]``."""
    who = np.asarray(patients)
    of_result = np.zeros(len(who), np.intp) if strata is None else np.unique(strata, return_inverse=True)[1]
    _, member, stratum = value_of_patient(
        who, of_result, "is in two strata; compare such patients with themselves"
    )
    fewest = int(np.bincount(stratum).min())
    if fewest < 2:
        raise UsageError(f"a bootstrap over patients needs at least 2, found {fewest}")
    return member, stratum


def _resampled(
    metric: Metric,
    member: NDArray[np.intp],
    stratum: NDArray[np.intp],
    n_draws: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    n_patients = len(stratum)
    groups = [np.flatnonzero(stratum == number) for number in range(stratum.max() + 1)]
    values = []
    step = max(1, _BLOCK // len(member))
    for start in range(0, n_draws, step):
        n = min(step, n_draws - start)
        drawn = np.concatenate([group[rng.integers(len(group), size=(n, len(group)))] for group in groups], 1)
        flat = (drawn + n_patients * np.arange(n)[:, None]).ravel()
        counts = np.bincount(flat, minlength=n * n_patients).reshape(n, n_patients)
        values.append(metric(counts[:, member].astype(np.float64)))
    return np.concatenate(values, axis=-1)


def _acceleration(metric: Metric, member: NDArray[np.intp], stratum: NDArray[np.intp]) -> float:
    """Computes the acceleration from the leave-one-patient-out estimates; 0 if they do not vary."""
    n_patients = len(stratum)
    step = max(1, _BLOCK // len(member))
    blocks = np.split(np.arange(n_patients), range(step, n_patients, step))
    values = [metric((member != block[:, None]).astype(np.float64)) for block in blocks]
    estimates = np.concatenate(values, axis=-1).reshape(-1, n_patients).mean(axis=0)
    squares = cubes = 0.0
    for number in range(stratum.max() + 1):
        of_group = estimates[(stratum == number) & ~np.isnan(estimates)]
        if len(of_group):
            influence = (len(of_group) - 1) * (of_group.mean() - of_group) / len(of_group)
            squares += float((influence**2).sum())
            cubes += float((influence**3).sum())
    return cubes / (6 * squares**1.5) if squares > 1e-24 else 0.0
