"""Aggregates the units of a comparison into metrics with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.compare.config import FIGURES, Comparison, Figure
from slidetl.compare.groups import GroupShift, members_of, shift_between
from slidetl.compare.plan import Unit, permuted
from slidetl.compare.records import UnitResult
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
from slidetl.evaluation.bootstrap import Interval, Metric, bca_interval
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
    MetricOfPredictions,
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
    ProbabilityMetrics,
    accuracy,
    confusion_matrix,
    difference,
    log_loss,
    mae,
    probability_metrics,
    qwk,
    rps,
)
from slidetl.evaluation.power import PowerRow, StudyDesign, power_table
from slidetl.evaluation.protocol import Fold, splits_sha256
from slidetl.evaluation.repeatability import Repeatability, repeatability
from slidetl.tiles.features import read_features

# Share of patients that the sets of grades may miss; accuracies whose difference the power table is about.
RISK = 0.1
_BY_GROUP: tuple[Figure, ...] = ("accuracy", "qwk")
_ACCURACIES = ((0.56, 0.56), (0.56, 0.60), (0.56, 0.64), (0.56, 0.68), (0.56, 0.72), (0.56, 0.80))


@dataclass(frozen=True)
class Untempered:
    """Metrics of the probabilities of an arm without the temperatures of the inner folds.

    Attributes:
        log_loss, rps: of the results, averaged over repeats.
        slope: of the calibration in the first repeat; None where it has no finite estimate.
    """

    log_loss: float
    rps: float
    slope: float | None


@dataclass(frozen=True, eq=False)
class ArmResult:
    """One arm, its out-of-fold predictions pooled within each repeat.

    R repeats, N slides in the order of :attr:`ComparisonResult.slides`, K grades. Intervals resample patients
    and are conditional on the fitted models.

    Attributes:
        arm: its name.
        n_slides: that it was trained on in each fold, of a smaller training part; None for the whole one.
        nested: whether all choices were made in inner folds; False also for arms that choose nothing.
        probabilities: ``[R, N, K]``, calibrated by the temperatures of the inner folds where there are any.
        folds: ``[R, N]``, number of the fold whose test part held each slide.
        results: one for each patient or slide, as the protocol's unit says.
        figures: ``qwk``, ``accuracy``, ``mae``, ``rps`` and ``log_loss`` of ``results``.
        by_repeat: the same figures for each repeat alone.
        quality: per threshold and over all, of ``results`` in the first repeat.
        confusion: ``[K, K]``, true by predicted, of ``results``, summed over repeats.
        variance: of the primary figure by seed, fold and patient; None where a fold has a single patient.
        slope, null, bins: calibration of ``results`` in the first repeat.
        untempered: the same arm without its temperatures; None for an arm without inner folds.
        sets: coverage of sets of grades that miss one in ten patients; None for a single fold.
        referral: share of wrong ``results`` against share of those that are graded at all.
        sites, scanners: accuracy and QWK of ``results`` by group, by figure; empty where there is one group.
        readers: the model against each reader, and their consensus.
        repeatability: of the score over draws of tiles; None for arms without.
        group_shift: of the score between the groups that the configuration names; None without.
        chance_p: of the primary figure, against refits on permuted labels; None where there were none.
        n_permuted: how many of these refits are complete.
        units: each with what it found.
    """

    arm: str
    n_slides: int | None
    nested: bool
    probabilities: NDArray[np.float64]
    folds: NDArray[np.int64]
    results: PatientResults
    figures: Mapping[Figure, Interval]
    by_repeat: Mapping[Figure, tuple[float, ...]]
    quality: ProbabilityMetrics
    confusion: NDArray[np.int64]
    variance: VarianceSplit | None
    slope: CalibrationSlope
    null: CalibrationNull
    bins: tuple[ReliabilityBin, ...]
    untempered: Untempered | None
    sets: SetCoverage | None
    referral: RiskCoverage
    sites: Mapping[Figure, tuple[GroupEstimate, ...]]
    scanners: Mapping[Figure, tuple[GroupEstimate, ...]]
    readers: tuple[ModelAgainstReader, ...]
    repeatability: Repeatability | None
    group_shift: GroupShift | None
    chance_p: float | None
    n_permuted: int
    units: tuple[tuple[Unit, UnitResult], ...]

    @property
    def label(self) -> str:
        """Name of the arm, with the number of its training slides."""
        return self.arm if self.n_slides is None else f"{self.arm} ({self.n_slides} slides)"


@dataclass(frozen=True)
class PairedDifference:
    """Two arms on the same patients.

    Attributes:
        arm, against: their names.
        figure: what is compared; the difference is ``arm`` less ``against``.
        interval: paired, over patients.
        corrected_t: over folds; None where there is only one.
        sign_flip: on the first repeat.
        p_holm: of the sign-flip test, corrected over the family of all pairs but the primary one, which is
            outside of it; None for the primary one. Smaller training parts are a family of their own.
        n_slides: that both were trained on in each fold, of a smaller training part; None for the whole one.
    """

    arm: str
    against: str
    n_slides: int | None
    figure: Figure
    interval: Interval
    corrected_t: CorrectedT | None
    sign_flip: SignFlip
    p_holm: float | None


@dataclass(frozen=True, eq=False)
class ComparisonResult:
    """Results of a comparison.

    Attributes:
        comparison: as configured.
        splits_sha256: of all folds.
        fold_sizes: slides trained and tested on, for each fold.
        slides: identifiers of the tested slides, sorted.
        patients: ``[N]`` of each slide.
        site_of, scanner_of: of each slide, from the manifest.
        true: ``[N]`` grades.
        readings: ``[N, Q]`` of the readers, -1 for none; Q may be 0.
        primary: the comparison that was declared; None until both its arms are complete.
        arms: those that are complete, the primary ones first.
        smaller: arms on smaller training parts.
        differences: of all other arms and the one that the primary is compared against.
        smaller_differences: the same on smaller training parts, the declared pair among them.
        incomplete: arms with units that are not done: how many are, and how many there are.
        readers: their agreement.
        ceiling: what two readers' noise leaves to be reached; None with fewer than two of them.
        sites, scanners: by grade; None where there is one.
        site_in_embeddings: how well stored features tell the site, by their name; and the trained networks of
            an arm in the first repeat, by its label.
        power: what differences as many patients and slides can show.
        group_shift: of the true grades between the groups that the configuration names; None without.
    """

    comparison: Comparison
    splits_sha256: str
    fold_sizes: tuple[tuple[int, int], ...]
    slides: tuple[str, ...]
    patients: NDArray[Any]
    site_of: tuple[str, ...]
    scanner_of: tuple[str, ...]
    true: NDArray[np.int64]
    readings: NDArray[np.int64]
    primary: PairedDifference | None
    arms: tuple[ArmResult, ...]
    smaller: tuple[ArmResult, ...]
    differences: tuple[PairedDifference, ...]
    smaller_differences: tuple[PairedDifference, ...]
    incomplete: Mapping[str, tuple[int, int]]
    readers: tuple[Agreement, ...]
    ceiling: ReaderCeiling | None
    sites: SiteByGrade | None
    scanners: SiteByGrade | None
    site_in_embeddings: Mapping[str, SiteDecodability] = field(default_factory=dict)
    power: tuple[PowerRow, ...] = ()
    group_shift: GroupShift | None = None


def combine(
    comparison: Comparison,
    study: Study,
    folds: Sequence[Fold],
    done: Sequence[tuple[Unit, UnitResult | None]],
) -> ComparisonResult:
    """Aggregates the units.

    Args:
        comparison: as configured.
        study: its slides.
        folds: all of them.
        done: every planned unit, with what it found; None where it is not done.

    Raises:
        UsageError: no arm is complete yet.
    """
    pooling = _Pooling(comparison, study, folds)
    groups: dict[tuple[str, int | None, int | None], list[tuple[Unit, UnitResult | None]]] = {}
    for unit, result in done:
        groups.setdefault((unit.arm, unit.n_slides, unit.permutation), []).append((unit, result))
    complete = {
        key: [(unit, result) for unit, result in members if result is not None]
        for key, members in groups.items()
        if all(result is not None for _, result in members)
    }
    incomplete = {
        _label(*key): (sum(result is not None for _, result in members), len(members))
        for key, members in groups.items()
        if key not in complete
    }
    null: dict[str, list[float]] = {}
    for (arm, _, permutation), members in complete.items():
        if permutation is not None:
            null.setdefault(arm, []).append(pooling.permuted_figure(members, permuted(study, permutation)))
    arms = tuple(
        pooling.arm(arm, None, members, null.get(arm, []))
        for (arm, n_slides, permutation), members in complete.items()
        if n_slides is None and permutation is None
    )
    if not arms:
        raise UsageError("no arm has all its folds yet; run the same command again to go on")
    smaller = tuple(
        pooling.arm(arm, n_slides, members, [])
        for (arm, n_slides, permutation), members in complete.items()
        if n_slides is not None and permutation is None
    )
    primary, differences = pooling.differences({result.arm: result for result in arms})
    return ComparisonResult(
        comparison=comparison,
        splits_sha256=splits_sha256(folds),
        fold_sizes=tuple((len(fold.train), len(fold.test)) for fold in folds),
        slides=pooling.slides,
        patients=pooling.patients,
        site_of=pooling.sites,
        scanner_of=pooling.scanners,
        true=pooling.true,
        readings=pooling.readings,
        primary=primary,
        arms=arms,
        smaller=smaller,
        differences=differences,
        smaller_differences=pooling.smaller_differences(smaller),
        incomplete=incomplete,
        site_in_embeddings=pooling.site_in_embeddings({unit.arm for unit, _ in done}, arms),
        **pooling.about_the_study(),
    )


class _Pooling:
    """Computes metrics over the tested slides, in order."""

    def __init__(self, comparison: Comparison, study: Study, folds: Sequence[Fold]) -> None:
        self._comparison, self._study, self._folds = comparison, study, folds
        self._n_grades = len(comparison.grades)
        self._n_repeats, self._unit = comparison.protocol.repeats, comparison.protocol.unit
        self._names = list(dict.fromkeys(fold.name for fold in folds))
        self._options: dict[str, Any] = {"n_draws": comparison.bootstrap_draws}
        tested = {slide for fold in folds for slide in fold.test}
        self._rows = [row for row in study.rows if row.slide_id in tested]
        self.slides = tuple(row.slide_id for row in self._rows)
        self.patients = np.array([row.patient_id for row in self._rows])
        self._whose = self.patients if self._unit == "slide" else np.unique(self.patients)  # each result
        self.sites = tuple(row.site for row in self._rows)
        self.scanners = tuple(row.scanner for row in self._rows)
        self.true = np.array([row.grade for row in self._rows], np.int64)
        self._members = members_of(comparison, self._rows)
        readers = max(len(row.reader_grades) for row in self._rows)
        self.readings = np.full((len(self._rows), readers), -1, np.int64)
        for number, row in enumerate(self._rows):
            for reader, grade in enumerate(row.reader_grades):
                self.readings[number, reader] = -1 if grade is None else grade

    def arm(
        self,
        arm: str,
        n_slides: int | None,
        units: Sequence[tuple[Unit, UnitResult]],
        null: Sequence[float],
    ) -> ArmResult:
        """Computes all metrics of one arm."""
        probabilities, folds = self._pooled(units)
        results = self._results(probabilities, self.true)
        figures = {name: self._interval(name, results) for name in FIGURES}
        true, first, who = results.true, results.probabilities[0], results.patients
        graded = results.predicted[0]
        several = len(self._names) > 1
        by_group = {name: self._figure(name, results) for name in _BY_GROUP}
        primary = self._comparison.primary.figure
        return ArmResult(
            arm=arm,
            n_slides=n_slides,
            nested=all(result.nested for _, result in units),
            probabilities=probabilities,
            folds=folds,
            results=results,
            figures=figures,
            by_repeat={name: self._by_repeat(name, results) for name in FIGURES},
            quality=probability_metrics(true, first),
            confusion=np.sum(
                [confusion_matrix(true, row, self._n_grades) for row in results.predicted], axis=0
            ),
            variance=self._variance(primary, results, folds),
            slope=calibration_slope(true, first, who, **self._options),
            null=calibration_null(true, first),
            bins=reliability(true, first),
            untempered=self._untempered(units) if any(result.nested for _, result in units) else None,
            sets=check_coverage(
                true, first, who, self._fold_of(results, folds)[0], risk=RISK, **self._options
            )
            if several
            else None,
            referral=risk_coverage(graded != true, first[np.arange(len(true)), graded], who),
            sites=self._by_group(by_group, self.sites, who),
            scanners=self._by_group(by_group, self.scanners, who),
            readers=self._readers(results),
            repeatability=self._repeatability(units),
            group_shift=self._group_shift(probabilities.mean(axis=0) @ np.arange(self._n_grades)),
            chance_p=chance_p(_higher_is_better(primary, figures[primary].estimate), null) if null else None,
            n_permuted=len(null),
            units=tuple(units),
        )

    def _untempered(self, units: Sequence[tuple[Unit, UnitResult]]) -> Untempered:
        plain = [(unit, replace(result, temperature=1.0)) for unit, result in units]
        probabilities, _ = self._pooled(plain)
        results = self._results(probabilities, self.true)
        slope = calibration_slope(results.true, results.probabilities[0], results.patients, n_draws=200).slope
        return Untempered(
            log_loss=float(np.mean(self._by_repeat("log_loss", results))),
            rps=float(np.mean(self._by_repeat("rps", results))),
            slope=None if slope is None else slope.estimate,
        )

    def permuted_figure(self, units: Sequence[tuple[Unit, UnitResult]], study: Study) -> float:
        """Computes the primary metric of a cross-validation on permuted labels; higher is better."""
        grade = {row.slide_id: row.grade for row in study.rows}
        true = np.array([grade[slide] for slide in self.slides], np.int64)
        results = self._results(self._pooled(units)[0], true)
        name = self._comparison.primary.figure
        return _higher_is_better(name, float(self._figure(name, results)(np.ones(len(results.true)))))

    def differences(
        self, arms: Mapping[str, ArmResult]
    ) -> tuple[PairedDifference | None, tuple[PairedDifference, ...]]:
        """Tests the declared comparison, and the family of the others, corrected after Holm."""
        primary = self._comparison.primary
        if primary.against not in arms:
            return None, ()
        declared = None
        if primary.arm in arms:
            declared = self._difference(arms[primary.arm], arms[primary.against], primary.figure)
        family = [
            self._difference(arm, arms[primary.against], primary.figure)
            for name, arm in arms.items()
            if name not in (primary.arm, primary.against)
        ]
        return declared, _corrected(family)

    def smaller_differences(self, smaller: Sequence[ArmResult]) -> tuple[PairedDifference, ...]:
        """Tests arms on fewer slides against the primary's reference on as few slides."""
        primary = self._comparison.primary
        against = {arm.n_slides: arm for arm in smaller if arm.arm == primary.against}
        family = [
            self._difference(arm, against[arm.n_slides], primary.figure)
            for arm in smaller
            if arm.arm != primary.against and arm.n_slides in against
        ]
        return _corrected(family)

    def about_the_study(self) -> dict[str, Any]:
        """Computes the results that depend on no arm."""
        readers: tuple[Agreement, ...] = ()
        ceiling = None
        if self.readings.shape[1] > 1:
            readings, who = self._readings_of_results()
            readers = reader_agreement(readings, who, self._n_grades, **self._options)
            one, other = self.readings[:, 0], self.readings[:, 1]
            if len(set(self.patients[(one >= 0) & (other >= 0)].tolist())) > 1:
                ceiling = reader_ceiling(one, other, self.patients, self._n_grades, unit=self._unit)
        n_patients = len(set(self.patients.tolist()))
        design = StudyDesign(n_patients, len(self.slides), self._n_grades)
        accuracies = [pair for pair in _ACCURACIES if min(pair) > 1 / self._n_grades]
        return {
            "readers": readers,
            "ceiling": ceiling,
            "sites": self._by_grade(self.sites),
            "scanners": self._by_grade(self.scanners),
            "power": power_table(accuracies, design, n_studies=400, n_draws=300),
            "group_shift": self._group_shift(self.true.astype(np.float64)),
        }

    def _pooled(
        self, units: Sequence[tuple[Unit, UnitResult]]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Pools calibrated probabilities ``[R, N, K]`` and folds ``[R, N]``."""
        place = {slide: number for number, slide in enumerate(self.slides)}
        shape = (self._n_repeats, len(self.slides))
        probabilities = np.full((*shape, self._n_grades), np.nan)
        folds = np.zeros(shape, np.int64)
        for unit, result in units:
            where = [place[row.slide_id] for row in result.predictions]
            rows = np.array([row.probabilities for row in result.predictions])
            probabilities[unit.fold.repeat, where] = with_temperature(rows, result.temperature)
            folds[unit.fold.repeat, where] = self._names.index(unit.fold.name)
        return probabilities, folds

    def _results(self, probabilities: NDArray[np.float64], true: NDArray[np.int64]) -> PatientResults:
        return patient_results(true, probabilities, self.patients, self._unit)

    def _figure(self, name: Figure, results: PatientResults) -> Metric:
        return partial(_metric(name, self._n_grades), results.true, _predictions(name, results))

    def _interval(self, name: Figure, results: PatientResults) -> Interval:
        return bca_interval(self._figure(name, results), results.patients, **self._options)

    def _by_repeat(self, name: Figure, results: PatientResults) -> tuple[float, ...]:
        metric, ones = _metric(name, self._n_grades), np.ones(len(results.true))
        return tuple(float(metric(results.true, row, ones)) for row in _predictions(name, results))

    def _fold_of(self, results: PatientResults, folds: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the folds ``[R, M]`` of the results, from those of the slides."""
        if self._unit == "slide":
            return folds
        first = [int(np.flatnonzero(self.patients == patient)[0]) for patient in results.patients]
        return folds[:, first]

    def _variance(
        self, name: Figure, results: PatientResults, folds: NDArray[np.int64]
    ) -> VarianceSplit | None:
        of_result = self._fold_of(results, folds)
        fewest = min(
            len(set(results.patients[row == number].tolist()))
            for row in of_result
            for number in range(len(self._names))
        )
        if fewest < 2:
            return None
        return variance_split(
            _metric(name, self._n_grades),
            results.true,
            _predictions(name, results),
            of_result,
            results.patients,
        )

    def _difference(self, arm: ArmResult, against: ArmResult, name: Figure) -> PairedDifference:
        one, other = arm.results, against.results
        paired = difference(self._figure(name, one), self._figure(name, other))
        metric = _metric(name, self._n_grades)
        t = None
        if len(self._names) > 1:
            folds = self._fold_of(one, arm.folds)
            by_fold = [
                metric_per_fold(metric, results.true, _predictions(name, results), folds)
                for results in (one, other)
            ]
            gaps = by_fold[0] - by_fold[1]
            if np.isfinite(gaps).all():  # a fold whose grades are all one may leave it undefined
                t = corrected_t(gaps, 1 / len(self._names))
        return PairedDifference(
            arm=arm.arm,
            against=against.arm,
            n_slides=arm.n_slides,
            figure=name,
            interval=bca_interval(paired, one.patients, **self._options),
            corrected_t=t,
            sign_flip=sign_flip_test(
                metric, one.true, _predictions(name, one)[0], _predictions(name, other)[0], one.patients
            ),
            p_holm=None,
        )

    def _by_group(
        self, figures: Mapping[Figure, Metric], groups: Sequence[str], of_results: NDArray[Any]
    ) -> dict[Figure, tuple[GroupEstimate, ...]]:
        """Computes metrics by group; a patient with slides in several groups is in none of them."""
        if len(set(groups)) < 2:
            return {}
        of_patient: dict[str, set[str]] = {}
        for patient, group in zip(self.patients.tolist(), groups, strict=True):
            of_patient.setdefault(patient, set()).add(group)
        if self._unit != "slide":
            names = [sorted(of_patient[patient]) for patient in of_results.tolist()]
            groups = [found[0] if len(found) == 1 else " + ".join(found) for found in names]
        return {
            name: estimate_by_group(figure, groups, of_results, **self._options)
            for name, figure in figures.items()
        }

    def _by_grade(self, groups: Sequence[str]) -> SiteByGrade | None:
        if len(set(groups)) < 2:
            return None
        return site_by_grade(groups, self.true, self.patients, self._n_grades)

    def _readings_of_results(self) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Returns grades ``[M, Q]`` of the readers, -1 where one did not read all, and their patients."""
        read = np.where(self.readings >= 0, self.readings, np.nan)
        grades = np.floor(per_patient(read, self.patients, self._unit) + 0.5)
        return np.where(np.isnan(grades), -1, grades).astype(np.int64), self._whose

    def _readers(self, results: PatientResults) -> tuple[ModelAgainstReader, ...]:
        readings, who = self._readings_of_results()
        if len(set(who[(readings >= 0).any(axis=1)].tolist())) < 2:
            return ()
        return model_against_readers(results.predicted, readings, who, self._n_grades, **self._options)

    def _repeatability(self, units: Sequence[tuple[Unit, UnitResult]]) -> Repeatability | None:
        """Uses the first repeat, so that each result counts once, where all of its slides were drawn."""
        draws: dict[str, Sequence[float]] = {}
        for unit, result in units:
            if unit.fold.repeat == 0:
                draws.update(result.draws)
        n_draws = len(next(iter(draws.values()), ()))
        nothing = [np.nan] * n_draws
        scores = per_patient([draws.get(slide, nothing) for slide in self.slides], self.patients, self._unit)
        drawn = np.isfinite(scores).all(axis=1) & (n_draws > 0)
        if len(set(self._whose[drawn].tolist())) < 2 or np.ptp(scores[drawn]) == 0:
            return None
        return repeatability(scores[drawn], self._whose[drawn], n_resamples=self._comparison.bootstrap_draws)

    def _group_shift(self, scores: NDArray[np.float64]) -> GroupShift | None:
        return shift_between(scores, self._members, self.patients, self._unit)

    def site_in_embeddings(self, planned: Set[str], arms: Sequence[ArmResult]) -> dict[str, SiteDecodability]:
        """Measures how well stored features and trained networks tell the site.

        Nothing where a site has a single patient, a patient several sites, or folds leave a site out.

        Args:
            planned: arms whose stored features are looked at.
            arms: whose networks are.
        """
        number = {row.slide_id: place for place, row in enumerate(self._study.rows)}
        sites = np.array([row.site for row in self._study.rows])
        patients = np.array([row.patient_id for row in self._study.rows])
        lone = (len(set(patients[sites == site].tolist())) < 2 for site in set(sites.tolist()))
        torn = len({(row.patient_id, row.site) for row in self._study.rows}) > len(set(patients.tolist()))
        first = [fold for fold in self._folds if fold.repeat == 0]
        site_of = {row.slide_id: row.site for row in self._study.rows}
        left_out = any({site_of[s] for s in fold.test} - {site_of[s] for s in fold.train} for fold in first)
        if len(set(sites.tolist())) < 2 or any(lone) or torn or left_out:
            return {}
        names = {
            name
            for arm_name, arm in self._comparison.arms.items()
            if arm_name in planned and arm.classical is not None
            for name in arm.classical.features
        }
        found = {}
        for name in sorted(names):
            means = [read_features(cache, name).astype(np.float64).mean(0) for cache in self._study.caches]
            found[f"stored features {name}"] = site_decodability(np.stack(means), sites, patients)
        for arm in arms:
            parts = []
            for unit, result in arm.units:
                if unit.fold.repeat == 0 and len(result.embeddings):
                    train = np.array([number[slide] for slide in unit.fold.train])
                    test = np.array([number[slide] for slide in unit.fold.test])
                    rows = result.embeddings
                    parts.append(EmbeddedFold(train, test, rows[: len(train)], rows[len(train) :]))
            if parts:
                found[arm.label] = site_decodability_by_fold(parts, sites, patients)
        return found


def _corrected(family: Sequence[PairedDifference]) -> tuple[PairedDifference, ...]:
    """Corrects the p-values of a family of pairs after Holm."""
    adjusted: NDArray[np.float64] = holm([pair.sign_flip.p for pair in family]) if family else np.empty(0)
    return tuple(replace(pair, p_holm=float(p)) for pair, p in zip(family, adjusted, strict=True))


def _metric(name: Figure, n_grades: int) -> MetricOfPredictions:
    metrics: dict[Figure, MetricOfPredictions] = {
        "qwk": lambda true, predicted, weights: qwk(true, predicted, n_grades, weights),
        "accuracy": accuracy,
        "mae": mae,
        "rps": rps,
        "log_loss": log_loss,
    }
    return metrics[name]


def _predictions(name: Figure, results: PatientResults) -> NDArray[Any]:
    """Returns the input of a metric: grades ``[R, M]``, or probabilities ``[R, M, K]``."""
    return results.probabilities if name in ("rps", "log_loss") else results.predicted


def _higher_is_better(name: Figure, value: float) -> float:
    return value if name in ("qwk", "accuracy") else -value


def _label(arm: str, n_slides: int | None, permutation: int | None) -> str:
    size = "" if n_slides is None else f" ({n_slides} slides)"
    return f"{arm}{size}" + ("" if permutation is None else f" (permuted labels, {permutation})")
