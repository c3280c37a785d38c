"""Writes the results of a comparison as CSV files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from slidetl.compare.aggregate import RISK, ArmResult, ComparisonResult, PairedDifference
from slidetl.compare.external import external_results
from slidetl.compare.learning import CURVE_METRICS, equal_epochs, learning_of
from slidetl.compare.plan import Job
from slidetl.compare.records import CurvePoint, JobResult
from slidetl.evaluation.bootstrap import Interval
from slidetl.evaluation.calibration import with_temperature
from slidetl.evaluation.conformal import referral_rule
from slidetl.evaluation.repeatability import ScoreShift
from slidetl.files import write_csv

# One row for each number, grouped by ``section``: primary, metric (of an arm), repeat, threshold, variance,
# calibration, sets, site, scanner, reader, repeatability, groups, chance, training; external; learning;
# difference; agreement, ceiling, confounding, power.
COLUMNS = (
    *("section", "arm", "train_slides", "against", "metric", "estimate", "low", "high", "level"),
    *("p", "p_holm", "n", "note"),
)
_JOB = ("arm", "train_slides", "repeat", "fold")
_Cells = Callable[[ArmResult, Job, JobResult], Iterable[dict[str, Any]]]


def write_tables(result: ComparisonResult, folder: Path) -> None:
    """Writes all tables of a comparison into a folder; ``docs/design/compare.md`` lists them.

    Raises:
        OSError: a table cannot be written.
    """
    write_csv(folder / "results.csv", COLUMNS, _result_rows(result))
    grades = [f"probability_{grade}" for grade in range(len(result.comparison.grades))]
    readers = [f"grade_reader{number}" for number in result.reader_numbers]
    slide = ("slide_id", "patient_id", "site", "scanner", "grade", *readers, "predicted_grade", *grades)
    plain = [f"uncalibrated_{grade}" for grade in range(len(grades))]
    columns = (*_JOB, *slide, "expected_grade", "temperature", *plain)
    # Two files, so that predictions.csv has each slide of an arm once a repeat.
    for name, arms in (("predictions", result.arms), ("predictions_smaller", result.smaller)):
        write_csv(folder / f"{name}.csv", columns, _of_jobs(arms, partial(_predictions, result)))
    outside = folder / "predictions_external.csv"
    outside.unlink(missing_ok=True)
    if result.comparison.protocol.external_site:
        columns = (
            *_JOB,
            "slide_id",
            "patient_id",
            "site",
            "grade",
            "predicted_grade",
            *grades,
            "temperature",
        )
        rows = _of_jobs((*result.arms, *result.smaller), partial(_external_predictions, result))
        write_csv(outside, columns, rows)
    found: dict[str, tuple[tuple[str, ...], _Cells]] = {
        "curves": (
            tuple(item.name for item in fields(CurvePoint)),
            lambda _, job, found: map(asdict, found.curves),
        ),
        "jobs": (("key", "seconds", "nested", "temperature", "chosen"), _about_job),
    }
    for name, value in (("drift", "relative_distance"), ("similarity", "linear_cka")):
        found[name] = ("layer", value), partial(_by_layer, name, value)
    for name, (more, cells) in found.items():
        rows = _of_jobs((*result.arms, *result.smaller), cells)
        write_csv(folder / f"{name}.csv", (*_JOB, *more), rows)


def _result_rows(result: ComparisonResult) -> Iterator[dict[str, Any]]:
    if result.primary is not None:
        yield from _difference_rows("primary", result.primary)
        if (margin := result.comparison.primary.margin) is not None:
            note = f"1 if the interval lies within the margin of {margin:g}"
            about = {"arm": result.primary.arm, "against": result.primary.against}
            yield about | _row("primary", "equivalent", result.primary.is_within(margin), note=note)
    for arm in (*result.arms, *result.smaller):
        rows = [*_arm_rows(arm, result)]
        if result.comparison.arms[arm.arm].fit is not None and arm.untold:
            note = "trainings that gave all slides they tested the same probabilities"
            rows.append(_row("training", "learned_nothing", arm.untold, n=len(arm.jobs), note=note))
        yield from ({"arm": arm.arm, "train_slides": arm.n_slides, **row} for row in rows)
    yield from _external_rows(result)
    yield from _learning_rows(result)
    for pair in (*result.differences, *result.smaller_differences):
        yield from _difference_rows("difference", pair)
    for agreed in result.readers:
        readers = f"{result.reader(agreed.first)} and {result.reader(agreed.second)}"
        for name in ("qwk", "kappa", "accuracy"):
            yield _row("agreement", name, getattr(agreed, name), n=agreed.n, note=readers)
    if result.ceiling is not None:
        yield _row("ceiling", "accuracy", result.ceiling.interval)
        for name, value in asdict(result.ceiling).items():
            if name not in ("accuracy", "low", "high", "level"):
                yield _row("ceiling", name, value)
    for name, table in result.places.items():
        if table is not None:
            counts = {place: list(row) for place, row in zip(table.sites, table.slides, strict=True)}
            label, note = f"cramers_v_{name}", json.dumps(counts)
            yield _row("confounding", label, table.cramers_v, p=table.p, n=table.n_units, note=note)
    for name, told in result.site_in_embeddings.items():
        note = f"{name}; permuted sites reach {told.null_mean:.3f}, at most {told.null_high:.3f}"
        value = told.balanced_accuracy
        yield _row("confounding", "site_from_embeddings", value, p=told.p, n=told.n_patients, note=note)
    if result.group_shift is not None:
        yield from _group_rows(result.group_shift)
    for row in result.power:
        note = f"accuracy {row.accuracy_first:.2f} against {row.accuracy_second:.2f}"
        for name in ("qwk", "accuracy"):
            yield _row("power", name, getattr(row, f"power_{name}"), note=note)


def _arm_rows(arm: ArmResult, result: ComparisonResult) -> Iterator[dict[str, Any]]:
    n = len(arm.results.true)
    name: str
    for name, interval in arm.metrics.items():
        yield _row("metric", name, interval, n=n, note="" if arm.nested else "not nested")
    for name, values in arm.by_repeat.items():
        for repeat, value in enumerate(values):
            yield _row("repeat", name, value, n=n, note=f"repeat {repeat}")
    for threshold, area in enumerate(arm.quality.auroc):
        yield _row("threshold", f"auroc_above_{threshold}", area, n=n, note="first repeat")
    if arm.variance is not None:
        for name in ("seed", "fold", "patient"):
            if (value := getattr(arm.variance, name)) is not None:
                yield _row("variance", name, value)
    for name in ("slope", "intercept"):
        yield _row("calibration", name, getattr(arm.slope, name))
    if arm.untempered is not None:
        for name in ("log_loss", "rps", "slope"):
            note = "without the temperatures of the inner folds"
            yield _row("calibration", f"untempered_{name}", getattr(arm.untempered, name), note=note)
    null = f"expected of a calibrated model: {arm.null.null_mean:.3f}, at most {arm.null.null_high:.3f}"
    yield _row("calibration", "ece", arm.null.error, p=arm.null.p, note=null)
    if arm.sets is not None:
        note = f"sets that miss {RISK:.0%} of patients"
        for name in ("patients_covered", "mean_size"):
            yield _row("sets", name, getattr(arm.sets, name), note=note)
    yield _row("sets", "area_under_risk_coverage", arm.referral.area)
    for risk in result.comparison.referral_risks:
        rule = referral_rule(arm.referral, risk)
        where = "all to a human" if rule is None else f"confidence from {rule.confidence:.6g}"
        note = (
            f"at most {100 * risk:g}% of patients with a wrong grade, {arm.referral.level:.0%} sure: {where}"
        )
        yield _row("sets", "coverage_at_risk", 0.0 if rule is None else rule.coverage, note=note)
    for section, groups in arm.places.items():
        for name, found in groups.items():
            yield from (_row(section, name, each.estimate, n=each.n, note=each.group) for each in found)
    for one in arm.readers:
        who = result.reader(one.reader)
        for name in ("qwk", "accuracy"):
            yield _row("reader", name, getattr(one.model, name), n=one.model.n, note=who)
        if one.qwk_less_peers is not None:
            yield _row("reader", "qwk_less_peers", one.qwk_less_peers, n=one.n_shared, note=who)
    if arm.repeatability is not None:
        draws = f"{arm.repeatability.n_draws} draws of tiles"
        for name in ("within_sd", "icc", "minimal_detectable_change"):
            interval = getattr(arm.repeatability, name)
            yield _row("repeatability", name, interval, n=arm.repeatability.n, note=draws)
    if arm.group_shift is not None:
        yield from _group_rows(arm.group_shift)
    if arm.n_permuted:
        yield _row("chance", "permuted_labels", None, p=arm.chance_p, n=arm.n_permuted)


def _external_rows(result: ComparisonResult) -> Iterator[dict[str, Any]]:
    for found in external_results(result):
        for note, metrics in (("as it comes", found.metrics), ("recalibrated", found.recalibrated)):
            for name, interval in metrics.items():
                row = _row("external", name, interval, n=len(found.results.true), note=note)
                yield {"arm": found.arm, "train_slides": found.n_slides, **row}


def _group_rows(found: ScoreShift) -> Iterator[dict[str, Any]]:
    """Yields the shift of the score of an arm, or of the grades in the manifest."""
    how = "the same patients" if found.paired else "different patients"
    n = found.n_first if found.paired else found.n_first + found.n_second
    yield _row("groups", "shift", found.shift, p=found.p, n=n, note=how)
    yield _row("groups", "superiority", found.superiority, n=n, note=how)


def _learning_rows(result: ComparisonResult) -> Iterator[dict[str, Any]]:
    """Yields arms at equal epochs and at their plateaus, as in the report; curves.csv has every point."""
    curves = [curve for arm in result.arms if (curve := learning_of(result.comparison, arm)) is not None]
    shown = equal_epochs(curves)
    for curve in curves:
        about: dict[str, Any] = {"arm": curve.arm}
        of = f"mean of {curve.trainings} trainings, of the results of {curve.part} parts"
        for name in CURVE_METRICS:
            plateau = curve.plateau(name)
            points: list[tuple[str, int, str]]
            points = [(name, epoch, f"after {epoch} epochs, {of}") for epoch in shown]
            if plateau is not None:
                points.append((f"plateau_{name}", plateau, f"at its plateau, after {plateau} epochs, {of}"))
            for label, epoch, note in points:
                yield about | _row("learning", label, curve.mean(name, epoch), n=curve.results, note=note)
            note = f"until the plateau of {name}"
            yield about | _row("learning", "epochs_to_plateau", plateau, note=note)


def _difference_rows(section: str, pair: PairedDifference) -> Iterator[dict[str, Any]]:
    about = {"arm": pair.arm, "train_slides": pair.n_slides, "against": pair.against}
    flip, t = pair.sign_flip, pair.corrected_t
    note = f"p by sign flips of {flip.n_discordant} discordant patients, all repeats"
    row = _row(section, pair.metric, pair.interval, p=flip.p, note=note)
    yield {**about, **row, "p_holm": _number(pair.p_holm)}
    if t is not None:
        yield about | _row(section, pair.metric, t.interval, p=t.p, note="corrected resampled t over folds")


def _row(
    section: str,
    name: str,
    value: Interval | float | None,
    *,
    p: float | None = None,
    n: int | None = None,
    note: str = "",
) -> dict[str, Any]:
    row: dict[str, Any] = {"section": section, "metric": name, "p": _number(p), "n": n, "note": note}
    if isinstance(value, Interval) and value.is_point:  # all resamples agree: there are no bounds
        return row | {"estimate": _number(value.estimate), "level": _number(value.level)}
    if isinstance(value, Interval):
        return row | {bound: _number(getattr(value, bound)) for bound in ("estimate", "low", "high", "level")}
    return row | {"estimate": _number(value)}


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.6g}" if abs(value) > 1e-12 else "0"  # not 4e-16 for a sum of zero


def _of_jobs(arms: Iterable[ArmResult], cells: _Cells) -> Iterator[dict[str, Any]]:
    """Yields the rows of every job, each with the name of the job."""
    for arm in arms:
        for job, found in arm.jobs:
            start = (arm.arm, arm.n_slides, job.fold.repeat, job.fold.name)
            yield from (dict(zip(_JOB, start, strict=True)) | row for row in cells(arm, job, found))


def _predictions(
    result: ComparisonResult, arm: ArmResult, job: Job, found: JobResult
) -> Iterator[dict[str, Any]]:
    """Yields a row for each slide.

    ``probability_K`` is for reading: calibrated by the temperature of the inner folds, if any, and rounded.
    ``uncalibrated_K`` is the output of the model with all digits, for the computation of evidence.
    """
    numbers = {row.slide_id: number for number, row in enumerate(result.rows)}
    for prediction in found.predictions:
        if prediction.slide_id not in numbers:  # of the external site
            continue
        number = numbers[prediction.slide_id]
        row = arm.probabilities[job.fold.repeat, number]
        readings = zip(result.reader_numbers, result.readings[number].tolist(), strict=True)
        yield {
            "slide_id": prediction.slide_id,
            "patient_id": prediction.patient_id,
            "site": result.rows[number].site,
            "scanner": result.rows[number].scanner,
            "grade": prediction.grade,
            **{f"grade_reader{reader}": "" if grade < 0 else grade for reader, grade in readings},
            "predicted_grade": int(row.argmax()),
            **{f"probability_{grade}": f"{value:.7f}" for grade, value in enumerate(row)},
            "expected_grade": f"{sum(grade * value for grade, value in enumerate(row)):.5f}",
            "temperature": f"{found.temperature:.5g}",
            **{f"uncalibrated_{grade}": p for grade, p in enumerate(prediction.probabilities)},
        }


def _external_predictions(
    result: ComparisonResult, _: ArmResult, job: Job, found: JobResult
) -> Iterator[dict[str, Any]]:
    """Yields a row for each slide of the external site, with calibrated probabilities."""
    external = set(job.fold.external)
    own = [row for row in found.predictions if row.slide_id in external]
    calibrated = with_temperature([row.probabilities for row in own], found.temperature)
    for row, values in zip(own, calibrated, strict=True):
        yield {
            **{name: getattr(row, name) for name in ("slide_id", "patient_id", "site", "grade")},
            "predicted_grade": int(values.argmax()),
            **{f"probability_{grade}": f"{value:.7f}" for grade, value in enumerate(values)},
            "temperature": f"{found.temperature:.5g}",
        }


def _by_layer(name: str, column: str, _: ArmResult, job: Job, found: JobResult) -> list[dict[str, Any]]:
    return [{"layer": layer, column: _number(value)} for layer, value in getattr(found, name).items()]


def _about_job(_: ArmResult, job: Job, found: JobResult) -> list[dict[str, Any]]:
    about = {name: getattr(found, name) for name in ("seconds", "nested", "temperature")}
    return [{"key": job.key, **about, "chosen": None if found.chosen is None else json.dumps(found.chosen)}]
