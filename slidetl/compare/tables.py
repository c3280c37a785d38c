"""A comparison as files and as text; docs/design/compare.md lists the files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from slidetl.compare.aggregate import (
    RISK,
    ArmResult,
    ComparisonResult,
    PairedDifference,
)
from slidetl.compare.groups import GroupShift
from slidetl.compare.learning import CURVE_FIGURES, equal_epochs, learning_of
from slidetl.compare.plan import Unit
from slidetl.compare.records import CurvePoint, UnitResult
from slidetl.compare.report.view import p_is
from slidetl.evaluation.bootstrap import Interval
from slidetl.evaluation.conformal import referral_rule
from slidetl.evaluation.confounding import GroupFigure
from slidetl.training.predictions import safe_cell

# One row a figure. ``section`` says of what: primary, figure, repeat, threshold, variance, calibration, sets,
# site, scanner, reader, repeatability, groups, chance; learning; difference; agreement, ceiling, confounding,
# power.
COLUMNS = (
    *("section", "arm", "train_slides", "against", "figure", "estimate", "low", "high", "level"),
    *("p", "p_holm", "n", "note"),
)


def write_tables(result: ComparisonResult, folder: Path) -> None:
    """Writes all tables of a comparison into a folder."""
    _write(folder / "results.csv", COLUMNS, _result_rows(result))
    names = [f"probability_{grade}" for grade in range(len(result.comparison.grades))]
    columns = ["arm", "train_slides", "repeat", "fold", "slide_id", "patient_id", "site", "scanner"]
    readers = [f"grade_reader{number + 1}" for number in range(result.readings.shape[1])]
    columns += ["grade", *readers, "predicted_grade", *names, "expected_grade", "temperature"]
    _write(folder / "predictions.csv", columns, _prediction_rows(result, result.arms, names, readers))
    # Apart, so that an arm has each slide once a repeat in the table that others read.
    smaller = _prediction_rows(result, result.smaller, names, readers)
    _write(folder / "predictions_smaller.csv", columns, smaller)
    points = ["arm", "train_slides", "repeat", "fold", *(item.name for item in fields(CurvePoint))]
    _write(folder / "curves.csv", points, _curve_rows(result))
    layer = ["arm", "train_slides", "repeat", "fold", "layer"]
    _write(folder / "drift.csv", [*layer, "relative_distance"], _drift_rows(result))
    _write(folder / "similarity.csv", [*layer, "linear_cka"], _similarity_rows(result))
    about = ["arm", "train_slides", "repeat", "fold", "key", "seconds", "nested", "temperature", "chosen"]
    _write(folder / "units.csv", about, _unit_rows(result))


def describe(result: ComparisonResult) -> str:
    """The comparison as text: the declared one first, then the arms, then what limits them."""
    comparison, protocol = result.comparison, result.comparison.protocol
    of = {"worst": "patients (their worst slide)", "mean": "patients (mean of slides)", "slide": "slides"}
    lines = []
    if result.primary is None:
        lines.append(
            f"primary comparison: {comparison.primary.arm} against {comparison.primary.against}: not complete"
        )
    else:
        lines.append(f"primary comparison, declared before: {_difference(result.primary)}")
    folds = f"{protocol.repeats} x {len(result.fold_sizes) // protocol.repeats} folds"
    nested = "choices in inner folds" if protocol.is_nested else "NOT nested: fixed hyper-parameters"
    n_results = len(result.arms[0].results.true)
    patients = len(set(result.patients.tolist()))
    width = max(28, *(len(arm.label) + 1 for arm in (*result.arms, *result.smaller)))
    lines += [
        f"{len(result.slides)} slides of {patients} patients; figures of {n_results} {of[protocol.unit]}; "
        f"{folds}, {nested}; splits {result.splits_sha256[:12]}",
        "",
        f"{'arm':<{width}}{'QWK [95 %]':>20}{'accuracy [95 %]':>20}{'MAE':>7}{'RPS':>7}{'log loss':>10}",
    ]
    for arm in (*result.arms, *result.smaller):
        lines.append(
            f"{arm.label:<{width}}{_short(arm.figures['qwk']):>20}{_short(arm.figures['accuracy']):>20}"
            f"{arm.figures['mae'].estimate:>7.2f}{arm.figures['rps'].estimate:>7.3f}"
            f"{arm.figures['log_loss'].estimate:>10.2f}"
        )
    lines.append("(intervals resample patients and are conditional on the fitted models)")
    if result.differences:
        lines += [
            "",
            f"all others against {comparison.primary.against}, p by sign flips, corrected after Holm:",
        ]
        lines += [_difference(pair) for pair in result.differences]
    if result.smaller_differences:
        lines += ["", "the same of arms trained on fewer slides, a family of their own:"]
        lines += [_difference(pair) for pair in result.smaller_differences]
    if result.ceiling is not None:
        lines += [
            "",
            f"two readers agree with QWK {_short(result.readers[0].qwk)}; their noise leaves an accuracy of "
            f"{result.ceiling.accuracy:.2f} and a QWK of {result.ceiling.qwk:.2f} to be reached",
        ]
    if result.power:
        found = [
            f"{row.accuracy_first:.2f} against {row.accuracy_second:.2f}: {row.power_qwk:.2f} by QWK, "
            f"{row.power_accuracy:.2f} by accuracy"
            for row in result.power
        ]
        lines += ["", "power with so many patients (simulated): " + "; ".join(found)]
    for name, (done, planned) in result.incomplete.items():
        lines.append(f"incomplete: {name}, {done} of {planned} units")
    return "\n".join(lines)


def _difference(pair: PairedDifference) -> str:
    p = p_is(pair.sign_flip.p if pair.p_holm is None else pair.p_holm)
    t = "" if pair.corrected_t is None else f", corrected t {p_is(pair.corrected_t.p)}"
    on = "" if pair.n_slides is None else f" on {pair.n_slides} slides"
    return f"{pair.arm} less {pair.against}{on}: {pair.figure} {_short(pair.interval, sign=True)}, {p}{t}"


def _short(interval: Interval, sign: bool = False) -> str:
    form = "{:+.2f}" if sign else "{:.2f}"
    estimate, low, high = (form.format(value) for value in (interval.estimate, interval.low, interval.high))
    return f"{estimate} [{low}, {high}]"


def _result_rows(result: ComparisonResult) -> Iterator[dict[str, Any]]:
    if result.primary is not None:
        yield from _difference_rows("primary", result.primary)
    for arm in (*result.arms, *result.smaller):
        rows = _arm_rows(arm, result.comparison.referral_risks)
        yield from ({"arm": arm.arm, "train_slides": arm.n_slides, **row} for row in rows)
    yield from _learning_rows(result)
    for pair in (*result.differences, *result.smaller_differences):
        yield from _difference_rows("difference", pair)
    for agreed in result.readers:
        readers = f"readers {agreed.first} and {agreed.second}"
        for name in ("qwk", "kappa", "accuracy"):
            yield _row("agreement", name, getattr(agreed, name), n=agreed.n, note=readers)
    if result.ceiling is not None:
        about = asdict(result.ceiling)
        reached = Interval(about["accuracy"], about["low"], about["high"], about["level"])
        yield _row("ceiling", "accuracy", reached)
        for name in [name for name in about if name not in ("accuracy", "low", "high", "level")]:
            yield _row("ceiling", name, about[name])
    for name, table in (("site", result.sites), ("scanner", result.scanners)):
        if table is not None:
            counts = {place: list(row) for place, row in zip(table.sites, table.slides, strict=True)}
            note = json.dumps(counts)
            yield _row(
                "confounding", f"cramers_v_{name}", table.cramers_v, p=table.p, n=table.n_units, note=note
            )
    for name, told in result.site_in_embeddings.items():
        note = f"{name}; permuted sites reach {told.null_mean:.3f}, at most {told.null_high:.3f}"
        figure = told.balanced_accuracy
        yield _row("confounding", "site_from_embeddings", figure, p=told.p, n=told.n_patients, note=note)
    if result.group_shift is not None:
        yield from _group_rows(result.group_shift)
    for row in result.power:
        note = f"accuracy {row.accuracy_first:.2f} against {row.accuracy_second:.2f}"
        yield _row("power", "qwk", row.power_qwk, note=note)
        yield _row("power", "accuracy", row.power_accuracy, note=note)


def _arm_rows(arm: ArmResult, referral_risks: Sequence[float]) -> Iterator[dict[str, Any]]:
    n = len(arm.results.true)
    name: str
    for name, interval in arm.figures.items():
        yield _row("figure", name, interval, n=n, note="" if arm.nested else "not nested")
    for name, values in arm.by_repeat.items():
        for repeat, value in enumerate(values):
            yield _row("repeat", name, value, n=n, note=f"repeat {repeat}")
    for threshold, area in enumerate(arm.quality.auroc):
        yield _row("threshold", f"auroc_above_{threshold}", area, n=n, note="first repeat")
    if arm.variance is not None:
        for name in ("seed", "fold", "patient"):
            if (value := getattr(arm.variance, name)) is not None:
                yield _row("variance", name, value)
    yield _row("calibration", "slope", arm.slope.slope)
    yield _row("calibration", "intercept", arm.slope.intercept)
    if arm.untempered is not None:
        for name in ("log_loss", "rps", "slope"):
            note = "without the temperatures of the inner folds"
            yield _row("calibration", f"untempered_{name}", getattr(arm.untempered, name), note=note)
    null = f"expected of a calibrated model: {arm.null.null_mean:.3f}, at most {arm.null.null_high:.3f}"
    yield _row("calibration", "ece", arm.null.error, p=arm.null.p, note=null)
    if arm.sets is not None:
        note = f"sets that miss {RISK:.0%} of patients"
        yield _row("sets", "patients_covered", arm.sets.patients_covered, note=note)
        yield _row("sets", "mean_size", arm.sets.mean_size, note=note)
    yield _row("sets", "area_under_risk_coverage", arm.referral.area)
    for risk in referral_risks:
        rule = referral_rule(arm.referral, risk)
        where = "all to a human" if rule is None else f"confidence from {rule.confidence:.6g}"
        note = f"at most {risk:.0%} of patients with a wrong grade, {arm.referral.level:.0%} sure: {where}"
        yield _row("sets", "coverage_at_risk", 0.0 if rule is None else rule.coverage, note=note)
    for section, groups in (("site", arm.sites), ("scanner", arm.scanners)):
        for name, found in groups.items():
            yield from (_group_row(section, name, group) for group in found)
    for one in arm.readers:
        who = "consensus" if one.reader is None else f"reader {one.reader}"
        yield _row("reader", "qwk", one.model.qwk, n=one.model.n, note=who)
        yield _row("reader", "accuracy", one.model.accuracy, n=one.model.n, note=who)
        if one.qwk_less_peers is not None:
            yield _row("reader", "qwk_less_peers", one.qwk_less_peers, n=one.model.n, note=who)
    if arm.repeatability is not None:
        draws = f"{arm.repeatability.n_draws} draws of tiles"
        for name in ("within_sd", "icc", "minimal_detectable_change"):
            interval = getattr(arm.repeatability, name)
            yield _row("repeatability", name, interval, n=arm.repeatability.n, note=draws)
    if arm.group_shift is not None:
        yield from _group_rows(arm.group_shift)
    if arm.chance_p is not None:
        yield _row("chance", "permuted_labels", None, p=arm.chance_p, n=arm.n_permuted)


def _group_rows(found: GroupShift) -> Iterator[dict[str, Any]]:
    """Of the score; without an arm, of the grades in the manifest."""
    shift, how = found.shift, "the same patients" if found.paired else "different patients"
    n = shift.n_first if found.paired else shift.n_first + shift.n_second
    yield _row("groups", "shift", shift.shift, p=shift.p, n=n, note=how)
    yield _row("groups", "superiority", shift.superiority, n=n, note=how)


def _learning_rows(result: ComparisonResult) -> Iterator[dict[str, Any]]:
    """Arms at equal epochs and at their plateaus, as the page has them; curves.csv has every point."""
    found = [learning_of(result.comparison, arm) for arm in result.arms]
    curves = [curve for curve in found if curve is not None]
    shown = equal_epochs(curves)
    for curve in curves:
        about: dict[str, Any] = {"arm": curve.arm}
        of = f"mean of {curve.trainings} trainings, of the results of {curve.part} parts"
        for figure in CURVE_FIGURES:
            for epoch in shown:
                note = f"after {epoch} epochs, {of}"
                yield about | _row("learning", figure, curve.mean(figure, epoch), n=curve.results, note=note)
            plateau = curve.plateau(figure)
            value, note = curve.mean(figure, plateau), f"at its plateau, after {plateau} epochs, {of}"
            yield about | _row("learning", f"plateau_{figure}", value, n=curve.results, note=note)
            note = f"until the plateau of {figure}"
            yield about | _row("learning", "epochs_to_plateau", float(plateau), note=note)


def _difference_rows(section: str, pair: PairedDifference) -> Iterator[dict[str, Any]]:
    about = {"arm": pair.arm, "train_slides": pair.n_slides, "against": pair.against}
    flip = pair.sign_flip
    note = f"p by sign flips of {flip.n_discordant} discordant patients, first repeat"
    figure = _row(section, pair.figure, pair.interval, p=flip.p, note=note)
    yield {**about, **figure, "p_holm": _number(pair.p_holm)}
    if pair.corrected_t is not None:
        t = pair.corrected_t
        interval = Interval(t.difference, t.low, t.high, t.level)
        yield {
            **about,
            **_row(section, pair.figure, interval, p=t.p, note="corrected resampled t over folds"),
        }


def _group_row(section: str, figure: str, group: GroupFigure) -> dict[str, Any]:
    return _row(section, figure, group.figure, n=group.n, note=group.group)


def _row(
    section: str,
    figure: str,
    value: Interval | float | None,
    *,
    p: float | None = None,
    n: int | None = None,
    note: str = "",
) -> dict[str, Any]:
    row: dict[str, Any] = {"section": section, "figure": figure, "p": _number(p), "n": n, "note": note}
    if isinstance(value, Interval):
        row |= {name: _number(getattr(value, name)) for name in ("estimate", "low", "high", "level")}
    else:
        row["estimate"] = _number(value)
    return row


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if abs(value) > 1e-12 else "0"  # else a sum that should be zero says 4e-16


def _prediction_rows(
    result: ComparisonResult, arms: Sequence[ArmResult], names: Sequence[str], readers: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Probabilities are calibrated where the inner folds gave a temperature, which stands beside them."""
    place = {slide: number for number, slide in enumerate(result.slides)}
    for arm in arms:
        for unit, found in arm.units:
            for prediction in found.predictions:
                number = place[prediction.slide_id]
                row = arm.probabilities[unit.fold.repeat, number]
                readings = ["" if grade < 0 else int(grade) for grade in result.readings[number]]
                yield {
                    "arm": arm.arm,
                    "train_slides": arm.n_slides,
                    "repeat": unit.fold.repeat,
                    "fold": unit.fold.name,
                    "slide_id": prediction.slide_id,
                    "patient_id": prediction.patient_id,
                    "site": result.site_of[number],
                    "scanner": result.scanner_of[number],
                    "grade": prediction.grade,
                    **dict(zip(readers, readings, strict=True)),
                    "predicted_grade": int(row.argmax()),
                    **{name: f"{value:.7f}" for name, value in zip(names, row, strict=True)},
                    "expected_grade": f"{sum(grade * value for grade, value in enumerate(row)):.5f}",
                    "temperature": f"{found.temperature:.5g}",
                }


def _units(result: ComparisonResult) -> Iterator[tuple[dict[str, Any], Unit, UnitResult]]:
    """Every unit, with the cells that begin its rows."""
    for arm in (*result.arms, *result.smaller):
        for unit, found in arm.units:
            fold = {"repeat": unit.fold.repeat, "fold": unit.fold.name}
            yield {"arm": arm.arm, "train_slides": arm.n_slides, **fold}, unit, found


def _curve_rows(result: ComparisonResult) -> Iterator[dict[str, Any]]:
    for about, _, found in _units(result):
        yield from ({**about, **asdict(point)} for point in found.curves)


def _drift_rows(result: ComparisonResult) -> Iterator[dict[str, Any]]:
    for about, _, found in _units(result):
        for layer, distance in found.drift.items():
            yield {**about, "layer": layer, "relative_distance": _number(distance)}


def _similarity_rows(result: ComparisonResult) -> Iterator[dict[str, Any]]:
    for about, _, found in _units(result):
        for layer, value in found.similarity.items():
            yield {**about, "layer": layer, "linear_cka": _number(value)}


def _unit_rows(result: ComparisonResult) -> Iterator[dict[str, Any]]:
    for about, unit, found in _units(result):
        yield {
            **about,
            "key": unit.key,
            "seconds": found.seconds,
            "nested": found.nested,
            "temperature": found.temperature,
            "chosen": "" if found.chosen is None else json.dumps(found.chosen),
        }


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Whole or not at all: a reader may look while the next run writes."""
    partial = path.with_suffix(".tmp")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = {name: "" if value is None else _safe_cell(value) for name, value in row.items()}
            writer.writerow(cells)
    partial.rename(path)


def _safe_cell(value: Any) -> Any:
    """Keeps a spreadsheet from running text that came from outside as a formula."""
    return safe_cell(value) if isinstance(value, str) and not _is_number(value) else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
