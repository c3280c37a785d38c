"""Agreement of readers, a model in a reader's place, and the ceiling set by the readers' noise."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import (
    LEAST_PATIENTS,
    Interval,
    Metric,
    Resampling,
    bca_interval_if_defined,
    resampled_metric,
    share_interval,
)
from slidetl.evaluation.comparison import Unit, per_patient
from slidetl.evaluation.metrics import by_repeat, difference, kappa, qwk, qwk_of_table

_DEVIATIONS = np.arange(1, 100, dtype=np.float64) * 0.02  # of a reader's error, to choose from


@dataclass(frozen=True)
class Agreement:
    """Agreement of two sets of grades of the same slides.

    Attributes:
        first, second: numbers of the readers, from 0; None for the consensus, or the model.
        n, n_patients: results graded by both, and their patients.
        accuracy: share of equal grades.
        kappa: Cohen's, unweighted.
        qwk: quadratic-weighted kappa.
    """

    first: int | None
    second: int | None
    n: int
    n_patients: int
    accuracy: Interval
    kappa: Interval
    qwk: Interval


@dataclass(frozen=True)
class ModelAgainstReader:
    """The model in a reader's place.

    Attributes:
        reader: number of the reader to compare with, from 0; None for the consensus of all.
        model: the model's agreement with it.
        n_shared: results read by it and by another reader, its peer.
        peer_qwk: QWK of each peer with it on the results that both read, averaged over the peers; None for
            the consensus (they are part of it), without a peer, or if undefined.
        qwk_less_peers: the model's QWK minus the peer's on the same results, averaged likewise; None as
            above.
    """

    reader: int | None
    model: Agreement
    n_shared: int = 0
    peer_qwk: Interval | None = None
    qwk_less_peers: Interval | None = None


@dataclass(frozen=True)
class ReaderCeiling:
    """Metrics of a model without any error, judged by noisy readers.

    Attributes:
        reader_sd: standard deviation of a reader's error, in grades, before rounding, from 0.02 to 1.98.
        at_bound: True if it is one of these ends: the fit would go on, and the ceiling is a bound itself.
        accuracy, qwk: against one reader's grades; all three QWKs are NaN if all slides have one grade.
        consensus_accuracy, consensus_qwk: against the rounded mean of two readers' grades (between two of
            them, the higher).
        together_accuracy, together_qwk: against the grade of two readers looking together: the mean of
            their scores before rounding, rounded; its error is smaller by the square root of two.
        qwk_by_attenuation: square root of the readers' QWK with each other; assumes only that readers err
            independently and alike. None if their QWK is not above 0.
        low, high: percentile bounds of ``accuracy`` over resampled patients; equal to it for fewer than five.
        level: their nominal coverage.
    """

    reader_sd: float
    at_bound: bool
    accuracy: float
    qwk: float
    consensus_accuracy: float
    consensus_qwk: float
    together_accuracy: float
    together_qwk: float
    qwk_by_attenuation: float | None
    low: float
    high: float
    level: float

    @property
    def interval(self) -> Interval:
        """:attr:`accuracy` with its bounds, if it has any."""
        return Interval(self.accuracy, self.low, self.high, self.level)


def reader_agreement(
    readings: ArrayLike, patients: ArrayLike, n_grades: int, **how: Unpack[Resampling]
) -> tuple[Agreement, ...]:
    """Computes the agreement of each pair of Q readers on the slides graded by both, with intervals.

    ``readings [N, Q]`` are grades 0..K-1; below 0 for none. Returns one for each pair with slides of two
    patients or more in common, in the order (0, 1), (0, 2), ...; without pairs of undefined kappa, both
    having given one and the same grade to nearly all slides.
    """
    grades, who = _readings(readings, patients, n_grades)
    pairs = []
    for first, second in itertools.combinations(range(grades.shape[1]), 2):
        both = (grades[:, [first, second]] >= 0).all(axis=1)
        if len(np.unique(who[both])) > 1:
            one, other = grades[both, first], grades[both, second]
            pairs.append(_agreement(first, second, one, other, who[both], n_grades, **how))
    return tuple(pair for pair in pairs if pair is not None)


def consensus_grades(readings: ArrayLike) -> NDArray[np.int64]:
    """Returns the median ``[N]`` of the readers of a slide; between two grades, the higher.

    Readings ``[N, Q]`` are below 0 for none; the median is then of the others, or -1.
    """
    consensus = []
    for of_slide in np.asarray(readings, np.int64):
        given = of_slide[of_slide >= 0]
        consensus.append(int(np.ceil(np.median(given))) if len(given) else -1)
    return np.array(consensus, np.int64)


def model_against_readers(
    predicted: ArrayLike,
    readings: ArrayLike,
    patients: ArrayLike,
    n_grades: int,
    **how: Unpack[Resampling],
) -> tuple[ModelAgainstReader, ...]:
    """Compares the model with each reader, beside the other readers, and with their consensus.

    Predictions ``[N]`` or ``[R, N]`` are out of fold; readings as for :func:`reader_agreement`. Returns one
    for each reader with slides of two patients or more, then one for the consensus; without those of
    undefined kappa. An interval of ``qwk_less_peers`` that holds zero does not prove the model as good as a
    reader: for that its low bound must be above a loss that does not matter, named beforehand.

    Raises:
        UsageError: no readings.
    """
    grades, who = _readings(readings, patients, n_grades)
    rows = np.atleast_2d(np.asarray(predicted))
    if rows.shape[1:] != who.shape:
        raise UsageError(f"expected predictions [N] or [R, N] of {len(who)} slides, not {rows.shape}")
    against = []
    for reader in range(grades.shape[1]):
        own = grades[:, reader] >= 0
        if len(np.unique(who[own])) < 2:
            continue
        model = _agreement(None, reader, grades[own, reader], rows[:, own], who[own], n_grades, **how)
        if model is None:
            continue
        # Not on what all read: one reader of disagreements alone would choose these for the others.
        shared = {other: own & (grades[:, other] >= 0) for other in range(grades.shape[1]) if other != reader}
        shared = {other: both for other, both in shared.items() if len(np.unique(who[both])) > 1}
        if not shared:
            against.append(ModelAgainstReader(reader, model))
            continue
        some = np.any(list(shared.values()), axis=0)
        peers, gains = [], []
        for other, both in shared.items():
            true = grades[both, reader]
            peers.append((both[some], partial(qwk, true, grades[both, other], n_grades)))
            gain = difference(_qwk_by_repeat(true, rows[:, both], n_grades), peers[-1][1])
            gains.append((both[some], gain))
        peer_qwk, less = (
            bca_interval_if_defined(partial(_mean, each), who[some], **how) for each in (peers, gains)
        )
        against.append(ModelAgainstReader(reader, model, int(some.sum()), peer_qwk, less))
    consensus = consensus_grades(grades)
    known = consensus >= 0
    if len(np.unique(who[known])) < 2:
        raise UsageError("a comparison with readers needs slides of two patients that were read")
    model = _agreement(None, None, consensus[known], rows[:, known], who[known], n_grades, **how)
    return (*against, *([] if model is None else [ModelAgainstReader(None, model)]))


def reader_ceiling(
    first: ArrayLike,
    second: ArrayLike,
    patients: ArrayLike,
    n_grades: int,
    *,
    unit: Unit = "slide",
    level: float = 0.95,
    n_draws: int = 200,
    seed: int = 0,
) -> ReaderCeiling:
    """Estimates the ceiling set by two readers' noise from their agreement.

    Model: a slide has a true grade; each reader adds an independent normal error of one common standard
    deviation and rounds to the scale. This deviation and the shares of the true grades maximise the
    likelihood of the table of both readings (EM over a grid of deviations, steps of 0.02 grades). If readers
    share an error (the same habit, the same bad section), or slides lie between grades, the true ceiling is
    lower: this is a bound from the noise in which readers differ.

    For a patient with several slides, true and read grades are combined by ``unit``; each slide's truth is as
    likely as its two readings make it, independently of the patient's other slides: the worst of several
    noisy readings is more often wrong than one. For slides of nearly equal grade the ceiling is still a
    little too high (by 0.024 for two slides, within a grade of each other, and a deviation of 0.5).

    For QWK the attenuation formula (Spearman 1904; kappa as an intraclass correlation, Fleiss and Cohen
    1973) gives a second opinion: ``sqrt(QWK of the readers)``.

    Args:
        first: ``[N]`` grades 0..K-1 of one reader; below 0 for none.
        second: ``[N]``, of the other.
        patients: ``[N]``.
        n_grades: K.
        unit: as in :func:`~slidetl.evaluation.comparison.patient_results`.
        level: of the interval of the accuracy.
        n_draws: resamples of patients.
        seed: of the resampling.

    Raises:
        UsageError: slides of fewer than two patients graded by both.
    """
    grades, who = _readings(np.stack([np.asarray(first), np.asarray(second)], axis=1), patients, n_grades)
    both = (grades >= 0).all(axis=1)
    grades, who = grades[both], who[both]
    if len(np.unique(who)) < 2:
        raise UsageError("the readers' ceiling needs slides of two patients that both of them graded")
    cells = (grades[:, 0] * n_grades + grades[:, 1])[:, None] == np.arange(n_grades**2)  # [N, K * K]

    def fitted(weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return _fit_readers((weights @ cells).reshape(-1, n_grades, n_grades))

    whose = np.arange(len(who)) if unit == "slide" else np.unique(who, return_inverse=True)[1]
    of_patient = np.zeros(whose.max() + 1, np.int64)  # a row of each patient, to find its weight
    of_patient[whose] = np.arange(len(whose))

    def table(
        weights: NDArray[np.float64],
        shares: NDArray[np.float64],
        reads: NDArray[np.float64],
        judge: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Computes shares ``[truth, grade]`` of results, graded by ``judge``."""
        likely = shares * (reads[:, grades[:, 0]] * reads[:, grades[:, 1]]).T  # [N, truth]
        likely /= np.maximum(likely.sum(axis=1, keepdims=True), 1e-300)
        results = _of_patients(likely[:, :, None] * judge, whose, unit)  # [M, truth, grade]
        weight = weights[of_patient]
        return np.asarray(np.einsum("m,mtg->tg", weight, results) / weight.sum())

    def reached(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        deviations, shares = fitted(weights)
        judges = readings_given_truth(deviations, n_grades)
        drawn = zip(weights, shares, judges, strict=True)
        return np.array([np.trace(table(weight, share, reads, reads)) for weight, share, reads in drawn])

    everyone = np.ones(len(who))
    deviations, shares = fitted(everyone[None])
    reads = readings_given_truth(deviations, n_grades)[0]  # [truth, reading]
    # Two readers of one slide err independently; between two grades their consensus is the higher.
    mean = np.zeros((n_grades, n_grades))
    for one, other in itertools.product(range(n_grades), repeat=2):
        mean[:, (one + other + 1) // 2] += reads[:, one] * reads[:, other]
    both_look = readings_given_truth(deviations / np.sqrt(2), n_grades)[0]
    alone, agreed, together = (table(everyone, shares[0], reads, judge) for judge in (reads, mean, both_look))
    of_readers = per_patient(grades, who, unit)
    graded = np.floor(of_readers + 0.5).astype(np.int64)
    between = float(qwk(graded[:, 0], graded[:, 1], n_grades))
    low = high = accuracy = float(np.trace(alone))
    if len(np.unique(who)) >= LEAST_PATIENTS:
        drawn = resampled_metric(reached, who, n_draws=n_draws, seed=seed)
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return ReaderCeiling(
        reader_sd=float(deviations[0]),
        at_bound=bool(deviations[0] in (_DEVIATIONS[0], _DEVIATIONS[-1])),
        accuracy=accuracy,
        qwk=float(qwk_of_table(alone)),
        consensus_accuracy=float(np.trace(agreed)),
        consensus_qwk=float(qwk_of_table(agreed)),
        together_accuracy=float(np.trace(together)),
        together_qwk=float(qwk_of_table(together)),
        qwk_by_attenuation=float(np.sqrt(between)) if between > 0 else None,
        low=float(low),
        high=float(high),
        level=level,
    )


def _readings(
    readings: ArrayLike, patients: ArrayLike, n_grades: int
) -> tuple[NDArray[np.int64], NDArray[np.generic]]:
    grades, who = np.asarray(readings), np.asarray(patients)
    if grades.ndim != 2 or who.shape != grades.shape[:1] or not grades.size:
        raise UsageError(f"expected readings [N, Q] and patients [N], not {grades.shape} and {who.shape}")
    if (grades % 1 != 0).any() or (grades >= n_grades).any():
        raise UsageError(f"grades must be whole numbers from 0 to {n_grades - 1}, or below 0 for none")
    return grades.astype(np.int64), who


def _agreement(
    first: int | None,
    second: int | None,
    true: NDArray[np.int64],
    rows: NDArray[np.int64],
    patients: NDArray[np.generic],
    n_grades: int,
    **how: Unpack[Resampling],
) -> Agreement | None:
    """Computes the agreement of two; None if a kappa is undefined. ``rows`` are ``[N]`` or ``[R, N]``."""
    rows = np.atleast_2d(rows)
    measures = (
        by_repeat(lambda true, graded, weights: kappa(true, graded, n_grades, weights), true, rows),
        _qwk_by_repeat(true, rows, n_grades),
    )
    plain, quadratic = (bca_interval_if_defined(each, patients, **how) for each in measures)
    if plain is None or quadratic is None:
        return None
    share = share_interval(rows == true, patients, level=how.get("level", 0.95))
    return Agreement(first, second, len(true), len(np.unique(patients)), share, plain, quadratic)


def _qwk_by_repeat(true: NDArray[np.int64], rows: NDArray[np.int64], n_grades: int) -> Metric:
    return by_repeat(lambda true, graded, weights: qwk(true, graded, n_grades, weights), true, rows)


def _mean(
    metrics: Sequence[tuple[NDArray[np.bool_], Metric]], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Averages metrics, each of some of the results."""
    return np.asarray(np.mean([metric(weights[:, members]) for members, metric in metrics], axis=0))


def readings_given_truth(deviations: NDArray[np.float64], n_grades: int) -> NDArray[np.float64]:
    """Maps ``[S]`` to ``[S, truth, reading]``: normal errors, rounded to the scale."""
    from scipy.special import ndtr

    edges = np.arange(n_grades - 1) + 0.5
    reached = ndtr((edges - np.arange(n_grades)[:, None]) / deviations[:, None, None])
    return np.diff(reached, axis=2, prepend=0, append=1)


def _fit_readers(tables: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fits two readings ``[B, K, K]``: deviations ``[B]`` and shares of the true grades ``[B, K]``."""
    n_grades = tables.shape[1]
    reads = readings_given_truth(_DEVIATIONS, n_grades)
    # [S, K, K * K]
    pairs = (reads[:, :, :, None] * reads[:, :, None, :]).reshape(len(_DEVIATIONS), n_grades, -1)
    counts = (tables + tables.transpose(0, 2, 1)).reshape(len(tables), 1, -1) / 2  # [B, 1, K * K]
    total = counts.sum(axis=2, keepdims=True)
    shares = np.full((len(tables), len(_DEVIATIONS), n_grades), 1 / n_grades)
    for _ in range(100):
        expected = np.maximum(np.einsum("bsk,skc->bsc", shares, pairs, optimize=True), 1e-300)
        shares = shares * np.einsum("bsc,skc->bsk", counts / expected, pairs, optimize=True) / total
    expected = np.maximum(np.einsum("bsk,skc->bsc", shares, pairs, optimize=True), 1e-300)
    best = (counts * np.log(expected)).sum(axis=2).argmax(axis=1)
    return _DEVIATIONS[best], shares[np.arange(len(tables)), best]


def _of_patients(slides: NDArray[np.float64], whose: NDArray[np.int64], unit: Unit) -> NDArray[np.float64]:
    """Maps ``[N, truth, grade]`` of independent slides to ``[M, truth, grade]`` of their patients.

    The worst is within a corner of the table if all slides are; means are distributed as sums.
    """
    if unit == "slide":
        return slides
    order = np.argsort(whose, kind="stable")
    counts = np.bincount(whose)
    starts = counts.cumsum() - counts
    if unit == "worst":
        corners = np.multiply.reduceat(slides.cumsum(axis=1).cumsum(axis=2)[order], starts, axis=0)
        return np.diff(np.diff(corners, axis=1, prepend=0), axis=2, prepend=0)
    from scipy.signal import convolve2d

    means = np.zeros((len(counts), *slides.shape[1:]))
    for mean, mine in zip(means, np.split(slides[order], starts[1:]), strict=True):
        sums = functools.reduce(convolve2d, mine)  # sums of true grades by sums of read grades
        rounded = np.floor(np.arange(len(sums)) / len(mine) + 0.5).astype(np.int64)
        np.add.at(mean, (rounded[:, None], rounded), sums)
    return means
