"""Aggregates the jobs of a comparison into metrics with their intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from slidetl.compare.config import ALPHA, LOWER_IS_BETTER, METRICS, Comparison, MetricName
from slidetl.compare.groups import members_of, shift_between
from slidetl.compare.plan import Job, permuted
from slidetl.compare.records import JobResult
from slidetl.data.manifest import ManifestRow
from slidetl.data.study import Study
from slidetl.errors import UsageError
from slidetl.evaluation.agreement import (
    Agreement,
    ModelAgainstReader,
    ReaderCeiling,
    model_against_readers,
    reader_agreement,
    reader_ceiling,
)
from slidetl.evaluation.bootstrap import (
    Interval,
    Metric,
    Resampling,
    bca_interval_if_defined,
    share_interval,
)
from slidetl.evaluation.calibration import (
    CalibrationNull,
    CalibrationSlope,
    ReliabilityBin,
    calibration_null,
    calibration_slope,
    reliability,
    with_temperature,
)
from slidetl.evaluation.comparison import (
    CorrectedT,
    PatientResults,
    SignFlip,
    VarianceSplit,
    chance_p,
    corrected_t,
    holm,
    metric_per_fold,
    patient_results,
    per_patient,
    sign_flip_test,
    variance_split,
)
from slidetl.evaluation.conformal import RiskCoverage, SetCoverage, check_coverage, risk_coverage
from slidetl.evaluation.confounding import (
    EmbeddedFold,
    GroupEstimate,
    SiteByGrade,
    SiteDecodability,
    estimate_by_group,
    site_by_grade,
    site_decodability,
    site_decodability_by_fold,
)
from slidetl.evaluation.metrics import (
    MetricOfPredictions,
    ProbabilityMetrics,
    accuracy,
    by_repeat,
    confusion_matrix,
    difference,
    log_loss,
    mae,
    probability_metrics,
    qwk,
    rps,
    told_apart,
)
from slidetl.evaluation.power import PowerRow, StudyDesign, power_table
from slidetl.evaluation.protocol import Fold, splits_sha256
from slidetl.evaluation.repeatability import Repeatability, ScoreShift, repeatability
from slidetl.tiles.features import read_features

RISK = 0.1  # share of patients that sets of grades may miss
_BY_PLACE: tuple[MetricName, ...] = ("accuracy", "qwk")
_LEVEL = 0.95  # of all intervals
# Differences of the true accuracies in the power table.
_DIFFERENCES = (0.0, 0.04, 0.08, 0.12, 0.16, 0.24)

_UNDEFINED = Interval(float("nan"), float("nan"), float("nan"), _LEVEL)

Done = Sequence[tuple[Job, JobResult]]
Place = Literal["site", "scanner"]
PLACES: tuple[Place, ...] = ("site", "scanner")
_PARTS = ("train", "test", "external")  # of a fold


@dataclass(frozen=True)
class Part:
    """Some slides of a study, counted.

    Attributes:
        slides, patients: their numbers.
        sites: named ones, in order.
    """

    slides: int
    patients: int
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Untempered:
    """Metrics of the probabilities of an arm without the temperatures of the inner folds.

    Attributes:
        log_loss, rps: averaged over repeats.
        slope: of the calibration in the first repeat; None without a finite estimate.
    """

    log_loss: float
    rps: float
    slope: float | None


@dataclass(frozen=True, eq=False)
class ArmResult:
    """One arm, its out-of-fold predictions pooled within each repeat.

    R repeats (of a smaller training part, R subsets of slides), N slides in the order of
    :attr:`ComparisonResult.rows`, K grades, M results (patients or slides, by the protocol's unit). Metrics
    are of results; intervals resample patients and repeats, and are exact for the accuracy.

    Attributes:
        arm: its name.
        n_slides: of a smaller training part in each fold; None for the whole one.
        nested: True if all choices were made in inner folds; False also for arms without choices.
        probabilities: ``[R, N, K]``, calibrated by the temperatures of the inner folds, if any.
        results: M of them.
        folds: ``[R, M]``, number of the fold with each result in its test part.
        metrics: by name.
        by_repeat: the same metrics for each repeat alone.
        quality: per threshold and over all, in the first repeat.
        confusion: ``[K, K]``, true by predicted, summed over repeats.
        variance: of the primary metric by seed, fold and patient; None if a fold has a single patient.
        slope, null, bins: calibration in the first repeat.
        untempered: the same arm without its temperatures; None for an arm without inner folds.
        sets: coverage of sets of grades that miss one in ten patients; None for a single fold.
        referral: share of wrong results against the share of results graded at all.
        places: accuracy and QWK by site and by scanner; empty for a single one.
        readers: the model against each reader, and their consensus.
        repeatability: of the score over draws of tiles; None without draws, or if all scores are the same.
        group_shift: of the score between the configured groups, if any.
        chance_p: of the primary metric, against refits on permuted labels (an undefined one counts as one
            that is as good); None without refits, or if the metric is undefined.
        n_permuted: number of complete refits.
        jobs: each with its result.
    """

    arm: str
    n_slides: int | None
    nested: bool
    probabilities: NDArray[np.float64]
    results: PatientResults
    folds: NDArray[np.int64]
    metrics: Mapping[MetricName, Interval]
    by_repeat: Mapping[MetricName, tuple[float, ...]]
    quality: ProbabilityMetrics
    confusion: NDArray[np.int64]
    variance: VarianceSplit | None
    slope: CalibrationSlope
    null: CalibrationNull
    bins: tuple[ReliabilityBin, ...]
    untempered: Untempered | None
    sets: SetCoverage | None
    referral: RiskCoverage
    places: Mapping[Place, Mapping[MetricName, tuple[GroupEstimate, ...]]]
    readers: tuple[ModelAgainstReader, ...]
    repeatability: Repeatability | None
    group_shift: ScoreShift | None
    chance_p: float | None
    n_permuted: int
    jobs: Done

    @property
    def label(self) -> str:
        """Name of the arm, with the number of its training slides."""
        return self.arm if self.n_slides is None else f"{self.arm} ({self.n_slides} slides)"

    @property
    def untold(self) -> int:
        """Number of jobs that gave all the slides they tested the same probabilities."""
        rows = (
            [row.probabilities for row in found.predictions if row.probabilities] for _, found in self.jobs
        )
        return sum(not told_apart(probabilities) for probabilities in rows)


@dataclass(frozen=True)
class PairedDifference:
    """Two arms on the same patients.

    Attributes:
        arm, against: their names.
        n_slides: of a smaller training part of both in each fold; None for the whole one.
        metric: the difference is ``arm`` minus ``against``.
        interval: paired, over patients and repeats; NaN if undefined. If all resamples agree they bound
            nothing: the bounds are exact ones of an accuracy, and NaN of another metric.
        corrected_t: over folds, several trainings with one test part averaged (repeats of the same sites,
            subsets of slides); None for a single fold.
        sign_flip: over patients, on the mean of the repeats.
        p_holm: of the sign-flip test, corrected over the family of all pairs but the primary one; None for
            the primary one. Smaller training parts are a separate family.
    """

    arm: str
    against: str
    n_slides: int | None
    metric: MetricName
    interval: Interval
    corrected_t: CorrectedT | None
    sign_flip: SignFlip
    p_holm: float | None

    @property
    def better(self) -> str:
        """The arm favoured by the sign-flip test; empty if it finds no difference, or is undefined."""
        return self.favoured(self.sign_flip.difference) if self.sign_flip.p <= ALPHA else ""

    def favoured(self, difference: float) -> str:
        """Names the arm that a difference of this sign favours."""
        return self.arm if (difference > 0) != (self.metric in LOWER_IS_BETTER) else self.against

    def is_within(self, margin: float) -> bool:
        """Returns True if the interval lies within a margin: two one-sided tests."""
        return -margin < self.interval.low and self.interval.high < margin


@dataclass(frozen=True, eq=False)
class ComparisonResult:
    """Results of a comparison.

    Attributes:
        comparison: as configured.
        splits_sha256: of all folds.
        fold_sizes: slides to train and to test on, for each fold.
        parts: slides of the folds: ``all``, those in any training part (``train``) or test part (``test``),
            and those of the external site (``external``).
        shared_sites: named sites with slides on both sides of a fold.
        prepared: origins of the tiles or features of all slides, in words.
        rows: of the manifest, of the N tested slides, sorted by identifier.
        true: ``[N]`` grades.
        readings: ``[N, Q]`` of the readers, -1 for none; Q may be 0.
        reader_numbers: of these readers, as in the manifest.
        primary: the declared comparison; None until both its arms are complete.
        arms: complete arms.
        smaller: arms on smaller training parts.
        differences: of all other arms and the reference of the primary comparison.
        smaller_differences: the same on smaller training parts, the declared pair among them.
        incomplete: by arm, numbers of finished and of planned jobs.
        readers: their agreement.
        ceiling: set by two readers' noise; None with fewer readers.
        places: grades by site and by scanner; None for a single one.
        site_in_embeddings: accuracy at telling the site from stored features, by their name, and from the
            trained networks of an arm in the first repeat, by its label.
        power_of: the arm whose observed accuracy the power begins at: the declared pair's reference, or
            another one until that is complete.
        power: to find a difference with as many results, about that accuracy.
        design: the study of :attr:`power`; its arms correlate as the errors observed, if there are any.
        group_shift: of the true grades between the configured groups, if any.
        was_registered: True if the configuration was registered before the first result, by a record made
            then; None without such a record.
    """

    comparison: Comparison
    splits_sha256: str
    fold_sizes: tuple[tuple[int, int], ...]
    parts: Mapping[str, Part]
    shared_sites: tuple[str, ...]
    prepared: tuple[str, ...]
    rows: tuple[ManifestRow, ...]
    true: NDArray[np.int64]
    readings: NDArray[np.int64]
    reader_numbers: tuple[int, ...]
    primary: PairedDifference | None
    arms: tuple[ArmResult, ...]
    smaller: tuple[ArmResult, ...]
    differences: tuple[PairedDifference, ...]
    smaller_differences: tuple[PairedDifference, ...]
    incomplete: Mapping[str, tuple[int, int]]
    readers: tuple[Agreement, ...]
    ceiling: ReaderCeiling | None
    places: Mapping[Place, SiteByGrade | None]
    site_in_embeddings: Mapping[str, SiteDecodability]
    power_of: str
    power: tuple[PowerRow, ...]
    design: StudyDesign
    group_shift: ScoreShift | None
    was_registered: bool | None = None

    def reader(self, place: int | None) -> str:
        """Names a reader by its place in :attr:`readings`; None for the consensus of all."""
        return "consensus" if place is None else f"reader {self.reader_numbers[place]}"


def combine(
    comparison: Comparison,
    study: Study,
    folds: Sequence[Fold],
    done: Sequence[tuple[Job, JobResult | None]],
) -> ComparisonResult:
    """Aggregates all planned jobs, each with its result or None.

    Raises:
        UsageError: no arm is complete yet.
    """
    pooling = _Pooling(comparison, study, folds)
    groups: dict[tuple[str, int | None, int | None], list[tuple[Job, JobResult | None]]] = {}
    for job, result in done:
        groups.setdefault((job.arm, job.n_slides, job.permutation), []).append((job, result))
    complete, incomplete = {}, {}
    for key, members in groups.items():
        found = [(job, result) for job, result in members if result is not None]
        if len(found) == len(members):
            complete[key] = found
        else:
            incomplete[_label(*key)] = len(found), len(members)
    null: dict[str, list[float]] = {}
    for (arm, _, permutation), jobs in complete.items():
        if permutation is not None:
            labelled = permuted(study, comparison.protocol, permutation)
            null.setdefault(arm, []).append(pooling.permuted_metric(jobs, labelled))
    found_arms = [
        pooling.arm(arm, n_slides, jobs, null.get(arm, []) if n_slides is None else [])
        for (arm, n_slides, permutation), jobs in complete.items()
        if permutation is None
    ]
    arms = tuple(arm for arm in found_arms if arm.n_slides is None)
    if not arms:
        raise UsageError("no arm has all its folds yet; run the same command again to go on")
    smaller = tuple(arm for arm in found_arms if arm.n_slides is not None)
    pairs = pooling.differences(arms)
    primary = next((pair for pair in pairs if pair.arm == comparison.primary.arm), None)
    power_of, design, accuracies = pooling.observed_design(arms)
    agreements, ceiling = pooling.readers()
    return ComparisonResult(
        comparison=comparison,
        splits_sha256=splits_sha256(folds),
        fold_sizes=tuple((len(fold.train), len(fold.test)) for fold in folds),
        parts=_parts(study, folds),
        shared_sites=_shared_sites(study, folds),
        prepared=_prepared(study, folds),
        rows=pooling.rows,
        true=pooling.true,
        readings=pooling.readings,
        reader_numbers=pooling.rows[0].readers,
        primary=primary,
        arms=arms,
        smaller=smaller,
        differences=_corrected([pair for pair in pairs if pair is not primary]),
        smaller_differences=_corrected(pooling.differences(smaller)),
        incomplete=incomplete,
        readers=agreements,
        ceiling=ceiling,
        places={place: pooling.by_grade(place) for place in PLACES},
        site_in_embeddings=_site_in_embeddings(comparison, study, [job for job, _ in done], arms, folds),
        power_of=power_of,
        power=_power(accuracies, design),
        design=design,
        group_shift=pooling.group_shift(pooling.true.astype(np.float64)),
    )


class _Pooling:
    """Computes metrics over the N tested slides, in order, and their M results."""

    def __init__(self, comparison: Comparison, study: Study, folds: Sequence[Fold]) -> None:
        self._primary, self._n_grades = comparison.primary, len(comparison.grades)
        self._unit = comparison.protocol.unit
        self._folds = list(dict.fromkeys(fold.name for fold in folds))
        self._how = Resampling(n_draws=comparison.bootstrap_draws, level=_LEVEL)
        tested = {slide for fold in folds for slide in fold.test}
        self.rows = rows = tuple(row for row in study.rows if row.slide_id in tested)
        self.patients = np.array([row.patient_id for row in rows])
        self.true = np.array([row.grade for row in rows], np.int64)
        self._members = members_of(comparison, rows)
        self.readings = np.full((len(rows), max(len(row.reader_grades) for row in rows)), -1, np.int64)
        for readings, row in zip(self.readings, rows, strict=True):
            given = [-1 if grade is None else grade for grade in row.reader_grades]
            readings[: len(given)] = given
        # [M]: patient and one slide of each result
        self._who, self._first = (
            (self.patients, np.arange(len(rows)))
            if self._unit == "slide"
            else np.unique(self.patients, return_index=True)
        )
        read = np.where(self.readings >= 0, self.readings, np.nan)
        grades = np.floor(per_patient(read, self.patients, self._unit) + 0.5)
        # [M, Q]; -1 if a reader did not read all slides of a result
        self._result_readings = np.where(np.isnan(grades), -1, grades).astype(np.int64)

    def arm(self, arm: str, n_slides: int | None, jobs: Done, null: Sequence[float]) -> ArmResult:
        """Computes all metrics of one arm."""
        probabilities, folds = self._pooled(jobs)
        results = self._results(probabilities, self.true)
        true, first, graded = results.true, results.probabilities[0], results.predicted[0]
        who, name, how = results.patients, self._primary.metric, self._how
        metrics = {name: metric_interval(name, results, **how) for name in METRICS}
        is_nested = [result.nested for _, result in jobs]
        fewest = min(len(np.unique(who[row == k])) for row in folds for k in range(len(self._folds)))
        observed = _signed(name, metrics[name].estimate)
        sure = first[np.arange(len(true)), graded]
        return ArmResult(
            arm=arm,
            n_slides=n_slides,
            nested=all(is_nested),
            probabilities=probabilities,
            results=results,
            folds=folds,
            metrics=metrics,
            by_repeat={name: self._by_repeat(name, results) for name in METRICS},
            quality=probability_metrics(true, first),
            confusion=np.sum([confusion_matrix(true, row, self._n_grades) for row in results.predicted], 0),
            variance=variance_split(
                _metric_of(name, self._n_grades), true, _predictions(name, results), folds, who
            )
            if fewest > 1
            else None,
            slope=calibration_slope(true, first, who, **how),
            null=calibration_null(true, first, graded),
            bins=reliability(true, first, graded),
            untempered=self._untempered(jobs) if any(is_nested) else None,
            sets=check_coverage(true, first, who, folds[0], risk=RISK, **how)
            if len(self._folds) > 1
            else None,
            referral=risk_coverage(graded != true, sure, who),
            places={place: self._by_place(results, place) for place in PLACES},
            readers=model_against_readers(
                results.predicted, self._result_readings, who, self._n_grades, **how
            )
            if len(np.unique(who[(self._result_readings >= 0).any(axis=1)])) > 1
            else (),
            repeatability=self._repeatability(jobs),
            group_shift=self.group_shift(probabilities.mean(axis=0) @ np.arange(self._n_grades)),
            chance_p=chance_p(observed, np.where(np.isnan(null), observed, null))
            if null and np.isfinite(observed)
            else None,
            n_permuted=len(null),
            jobs=tuple(jobs),
        )

    def permuted_metric(self, jobs: Done, study: Study) -> float:
        """Computes the primary metric of a cross-validation on permuted labels; higher is better."""
        grade = {row.slide_id: row.grade for row in study.rows}
        true = np.array([grade[row.slide_id] for row in self.rows], np.int64)
        results, name = self._results(self._pooled(jobs)[0], true), self._primary.metric
        return _signed(name, float(np.mean(self._by_repeat(name, results))))

    def differences(self, arms: Sequence[ArmResult]) -> list[PairedDifference]:
        """Tests arms against the primary's reference on as many slides, without Holm's correction."""
        against = {arm.n_slides: arm for arm in arms if arm.arm == self._primary.against}
        return [
            self._difference(arm, against[arm.n_slides])
            for arm in arms
            if arm.n_slides in against and arm.arm != self._primary.against
        ]

    def observed_design(
        self, arms: Sequence[ArmResult]
    ) -> tuple[str, StudyDesign, tuple[tuple[float, float], ...]]:
        """Designs a study of as many results as these, and lists true accuracies from an arm's observed one.

        The others are higher, or lower where the observed one is near the highest that can be simulated.

        The correlation of the errors of the declared pair, after rounding, is taken for that before: a little
        too low, and the power with it.
        """
        by_name = {arm.arm: arm.results for arm in arms}
        name = self._primary.against if self._primary.against in by_name else arms[0].arm
        reference = by_name[name]
        design = StudyDesign(len(np.unique(reference.patients)), len(reference.true), self._n_grades)
        if self._primary.arm in by_name and self._primary.against in by_name:
            pair = (by_name[self._primary.arm], reference)
            errors = [(results.predicted - results.true).mean(axis=0) for results in pair]
            if min(error.std() for error in errors) > 0:
                alike = float(np.clip(np.corrcoef(errors)[0, 1], 0, 0.95))
                design = replace(design, arm_correlation=round(alike, 2))
        observed = float((reference.predicted == reference.true).mean())
        least, most = math.ceil(100 / self._n_grades + 2) / 100, 0.98  # of two digits, as the start is
        start = round(min(max(observed, least), most), 2)
        sign = 1 if start + _DIFFERENCES[1] <= most else -1
        others = (round(start + sign * d, 2) for d in _DIFFERENCES)
        return name, design, tuple((start, other) for other in others if least <= other <= most)

    def readers(self) -> tuple[tuple[Agreement, ...], ReaderCeiling | None]:
        """Computes the agreement of the readers and their ceiling."""
        if self.readings.shape[1] < 2:
            return (), None
        one, other = self.readings[:, 0], self.readings[:, 1]
        ceiling = None
        if len(np.unique(self.patients[(one >= 0) & (other >= 0)])) > 1:
            ceiling = reader_ceiling(one, other, self.patients, self._n_grades, unit=self._unit)
        return reader_agreement(self._result_readings, self._who, self._n_grades, **self._how), ceiling

    def by_grade(self, place: Place) -> SiteByGrade | None:
        """Counts slides by site, or scanner, and grade; None for a single one."""
        groups = [getattr(row, place) for row in self.rows]
        if len(set(groups)) < 2:
            return None
        return site_by_grade(groups, self.true, self.patients, self._n_grades)

    def group_shift(self, scores: NDArray[np.float64]) -> ScoreShift | None:
        """Compares scores ``[N]`` of the configured groups."""
        return shift_between(scores, self._members, self.patients, self._unit)

    def _pooled(self, jobs: Done) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Pools calibrated probabilities ``[R, N, K]``, and folds of the results ``[R, M]``."""
        number = {row.slide_id: n for n, row in enumerate(self.rows)}
        n_repeats = 1 + max(job.fold.repeat for job, _ in jobs)
        probabilities = np.full((n_repeats, len(self.rows), self._n_grades), np.nan)
        folds = np.zeros(probabilities.shape[:2], np.int64)
        for job, result in jobs:
            found = [row for row in result.predictions if row.slide_id in number]  # not the external ones
            where = [number[row.slide_id] for row in found]
            rows = np.array([row.probabilities for row in found])
            probabilities[job.fold.repeat, where] = with_temperature(rows, result.temperature)
            folds[job.fold.repeat, where] = self._folds.index(job.fold.name)
        return probabilities, folds[:, self._first]

    def _results(self, probabilities: NDArray[np.float64], true: NDArray[np.int64]) -> PatientResults:
        return patient_results(true, probabilities, self.patients, self._unit)

    def _metric(self, name: MetricName, results: PatientResults) -> Metric:
        return by_repeat(_metric_of(name, self._n_grades), results.true, _predictions(name, results))

    def _by_repeat(self, name: MetricName, results: PatientResults) -> tuple[float, ...]:
        metric, ones = _metric_of(name, self._n_grades), np.ones(len(results.true))
        return tuple(float(metric(results.true, row, ones)) for row in _predictions(name, results))

    def _untempered(self, jobs: Done) -> Untempered:
        plain, _ = self._pooled([(job, replace(result, temperature=1.0)) for job, result in jobs])
        results = self._results(plain, self.true)
        slope = calibration_slope(results.true, results.probabilities[0], results.patients, n_draws=200).slope
        log_loss, rps = (float(np.mean(self._by_repeat(name, results))) for name in ("log_loss", "rps"))
        return Untempered(log_loss, rps, None if slope is None else slope.estimate)

    def _difference(self, arm: ArmResult, against: ArmResult) -> PairedDifference:
        name, both = self._primary.metric, (arm.results, against.results)
        metric, who = _metric_of(name, self._n_grades), arm.results.patients
        one, other = (_predictions(name, results) for results in both)
        t, folds = None, [job.fold for job, _ in arm.jobs]
        if len(self._folds) > 1:
            by_fold = [metric_per_fold(metric, arm.results.true, rows, arm.folds) for rows in (one, other)]
            tested = {(fold.repeat, self._folds.index(fold.name)): fold.test for fold in folds}
            gaps: dict[tuple[str, ...], list[float]] = {}  # by test part: its trainings are no new folds
            for place, value in np.ndenumerate(by_fold[0] - by_fold[1]):
                gaps.setdefault(tested[place], []).append(value)
            means = [float(np.mean(of_part)) for of_part in gaps.values()]
            if np.isfinite(means).all():  # undefined in a fold of a single grade
                t = corrected_t(means, _test_share(folds))
        gap = difference(*(self._metric(name, results) for results in both))
        interval = bca_interval_if_defined(gap, who, **self._how) or _UNDEFINED
        if interval.is_point:
            low = high = float("nan")
            if name == "accuracy":
                right, other_right = (rows == arm.results.true for rows in (one, other))
                more, less = (share_interval(wins, who, level=_LEVEL)
                              for wins in (right & ~other_right, other_right & ~right))  # fmt: skip
                low, high = more.low - less.high, more.high - less.low
            interval = replace(interval, low=low, high=high)
        return PairedDifference(
            arm=arm.arm,
            against=against.arm,
            n_slides=arm.n_slides,
            metric=name,
            interval=interval,
            corrected_t=t,
            sign_flip=sign_flip_test(metric, arm.results.true, one, other, who),
            p_holm=None,
        )

    def _by_place(self, results: PatientResults, place: Place) -> dict[MetricName, tuple[GroupEstimate, ...]]:
        """Computes metrics by site, or scanner; a patient with slides at several is in their combination."""
        groups = [getattr(row, place) for row in self.rows]
        if len(set(groups)) < 2:
            return {}
        if self._unit != "slide":
            of_patient: dict[str, set[str]] = {}
            for patient, group in zip(self.patients.tolist(), groups, strict=True):
                of_patient.setdefault(patient, set()).add(group)
            groups = [" + ".join(sorted(of_patient[patient])) for patient in self._who.tolist()]
        return {
            name: estimate_by_group(partial(metric_interval, name, results, **self._how), groups, self._who)
            for name in _BY_PLACE
        }

    def _repeatability(self, jobs: Done) -> Repeatability | None:
        """Measures it in the first repeat, so that each result counts once, if all its slides were drawn."""
        draws: dict[str, Sequence[float]] = {}
        for job, result in jobs:
            if job.fold.repeat == 0:
                draws.update(result.draws)
        n_draws = len(next(iter(draws.values()), ()))
        of_slides = [draws.get(row.slide_id, [np.nan] * n_draws) for row in self.rows]
        scores = per_patient(of_slides, self.patients, self._unit)
        drawn = np.isfinite(scores).all(axis=1) & (n_draws > 0)
        with suppress(UsageError):  # too few draws, or scores that are all the same
            if len(np.unique(self._who[drawn])) > 1:
                return repeatability(scores[drawn], self._who[drawn], **self._how)
        return None


def _parts(study: Study, folds: Sequence[Fold]) -> dict[str, Part]:
    """Counts the slides of all folds, and of each of their parts."""
    found = {}
    for part, of in {"all": _PARTS, **{name: (name,) for name in _PARTS}}.items():
        names = {slide for fold in folds for name in of for slide in getattr(fold, name)}
        rows = [row for row in study.rows if row.slide_id in names]
        sites = tuple(sorted({row.site for row in rows} - {""}))
        found[part] = Part(len(rows), len({row.patient_id for row in rows}), sites)
    return found


def _shared_sites(study: Study, folds: Sequence[Fold]) -> tuple[str, ...]:
    """Finds the named sites with slides on both sides of a fold."""
    site = {row.slide_id: row.site for row in study.rows}
    shared = (
        ({site[slide] for slide in fold.train} & {site[slide] for slide in fold.test}) for fold in folds
    )
    return tuple(sorted(set().union(*shared) - {""}))


def _prepared(study: Study, folds: Sequence[Fold]) -> tuple[str, ...]:
    """Names the software behind the tiles or features of the slides of all folds, by their caches."""
    used = {slide for fold in folds for part in _PARTS for slide in getattr(fold, part)}
    headers = [cache.header for cache in study.caches if cache.slide_id in used]
    words = (
        f"features imported from {header.imported}" if header.imported else f"tiles cut by {header.software}"
        for header in headers
    )
    return tuple(sorted(set(words)))


def metric_interval(
    name: MetricName,
    results: PatientResults,
    members: NDArray[np.intp] | slice = slice(None),
    **how: Unpack[Resampling],
) -> Interval:
    """Computes a metric of all, or of some results, by their numbers; NaN if it is undefined."""
    true, who = results.true[members], results.patients[members]
    rows = _predictions(name, results)[:, members]
    if name == "accuracy":
        return share_interval(rows == true, who, level=how.get("level", _LEVEL))
    metric = by_repeat(_metric_of(name, results.probabilities.shape[2]), true, rows)
    return bca_interval_if_defined(metric, who, **how) or _UNDEFINED


@cache
def _power(accuracies: tuple[tuple[float, float], ...], design: StudyDesign) -> tuple[PowerRow, ...]:
    """Simulates the power of a study, once for equal designs: it takes seconds."""
    return power_table(accuracies, design, n_studies=400, n_flips=300)


def _site_in_embeddings(
    comparison: Comparison,
    study: Study,
    jobs: Sequence[Job],
    arms: Sequence[ArmResult],
    folds: Sequence[Fold],
) -> dict[str, SiteDecodability]:
    """Measures how well stored features of jobs, and trained networks of arms, tell the site.

    Empty if a site has a single patient, a patient several sites, or folds leave a site out.

    Raises:
        CacheError: the features are not those of the jobs; they were replaced.
    """
    if site := comparison.protocol.external_site:  # no fold trains on it
        study = replace(study, slides=tuple(slide for slide in study.slides if slide.row.site != site))
    sites, patients = (np.array([getattr(row, k) for row in study.rows]) for k in ("site", "patient_id"))
    site_of = {row.slide_id: row.site for row in study.rows}
    pairs = {(row.patient_id, row.site) for row in study.rows}  # more than patients if one has two sites
    n_patients = Counter(site for _, site in pairs)
    first = [fold for fold in folds if fold.repeat == 0]
    left_out = any({site_of[s] for s in fold.test} - {site_of[s] for s in fold.train} for fold in first)
    is_torn = len(pairs) > len({patient for patient, _ in pairs})
    if len(n_patients) < 2 or min(n_patients.values()) < 2 or is_torn or left_out:
        return {}
    whole = [job for job in jobs if job.n_slides is None and job.permutation is None]
    readers = {name: job for job in whole if "classical" in job.recipe for name in job.features}
    found = {}
    for name in sorted(readers):
        opened = readers[name].open(row.slide_id for row in study.rows)
        caches = {slide.row.slide_id: slide.cache for slide in opened}
        means = [read_features(caches[row.slide_id], name).astype(np.float64).mean(0) for row in study.rows]
        found[f"stored features {name}"] = site_decodability(np.stack(means), sites, patients)
    number = {row.slide_id: place for place, row in enumerate(study.rows)}
    for arm in arms:
        parts = []
        for job, result in arm.jobs:
            if job.fold.repeat == 0 and len(result.embeddings):
                train, test = (np.array([number[s] for s in p]) for p in (job.fold.train, job.fold.test))
                parts.append(EmbeddedFold(train, test, *np.split(result.embeddings, [len(train)])))
        if parts:
            found[arm.label] = site_decodability_by_fold(parts, sites, patients)
    return found


def _test_share(folds: Sequence[Fold]) -> float:
    """Computes the share of the test part, of it and the training part, by the mean ratio of these."""
    ratio = float(np.mean([len(fold.test) / len(fold.train) for fold in folds]))
    return ratio / (1 + ratio)


def _corrected(family: Sequence[PairedDifference]) -> tuple[PairedDifference, ...]:
    """Corrects the p-values of a family of pairs after Holm; those of an undefined metric stay NaN."""
    p = np.array([pair.sign_flip.p for pair in family])
    p[~np.isnan(p)] = holm(p[~np.isnan(p)])
    return tuple(replace(pair, p_holm=float(found)) for pair, found in zip(family, p, strict=True))


def _metric_of(name: MetricName, n_grades: int) -> MetricOfPredictions:
    if name == "qwk":
        return lambda true, predicted, weights: qwk(true, predicted, n_grades, weights)
    return {"accuracy": accuracy, "mae": mae, "rps": rps, "log_loss": log_loss}[name]


def _predictions(name: MetricName, results: PatientResults) -> NDArray[Any]:
    """Returns the input of a metric: grades ``[R, M]``, or probabilities ``[R, M, K]``."""
    return results.probabilities if name in ("rps", "log_loss") else results.predicted


def _signed(name: MetricName, value: float) -> float:
    """Changes the sign of metrics that are better when lower."""
    return -value if name in LOWER_IS_BETTER else value


def _label(arm: str, n_slides: int | None, permutation: int | None) -> str:
    size = "" if n_slides is None else f" ({n_slides} slides)"
    return f"{arm}{size}" + ("" if permutation is None else f" (permuted labels, {permutation})")
