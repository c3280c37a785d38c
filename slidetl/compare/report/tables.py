"""Makes the tables of a comparison's report.

Their titles and notes are in ``templates/report.txt``; a table without rows is left out of the report.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slidetl.analysis.similarity import merge_layers
from slidetl.compare.aggregate import ArmResult, PairedDifference, Place
from slidetl.compare.config import LENGTH, METRICS, MetricName
from slidetl.compare.learning import CurveMetric
from slidetl.compare.report.view import COLOURS, NAMES, View, form_of
from slidetl.compare.table import Table, format_percent, format_range
from slidetl.evaluation.calibration import is_at_bound
from slidetl.evaluation.conformal import RiskCoverage, referral_rule
from slidetl.version import VERSION

_BASELINES = {
    "prior": "how common each grade is among the training slides",
    "site": "how common each grade is at the slide's site",
    "colour_area": "mean colour and tissue area; the best of three classifiers",
    "collagen": "area stained as collagen, by colour deconvolution; the best of three classifiers",
}
_GRADED: tuple[MetricName, ...] = ("qwk", "accuracy")
_SOFTWARE = ("torch", "pytorch-lightning", "timm", "scikit-learn", "scipy", "numpy")
_95 = "95\N{NO-BREAK SPACE}%"


def tables_of(view: View) -> dict[str, Table]:
    """Makes all tables, by their names in ``templates/report.txt``."""
    result = view.result
    primary = view.comparison.primary
    return {
        "metrics": Table(
            ("Arm", *((NAMES[name], form_of(name)) for name in METRICS)),
            [(arm.arm, *(arm.metrics[name] for name in METRICS)) for arm in view.arms],
            strong=(primary.arm, primary.against),
        ),
        "configured": Table(
            ("Arm", "What it is", "Choices"),
            [(arm.arm, *_configured(view, arm)) for arm in view.arms],
            words=(1, 2),
        ),
        "external": Table(
            ("Arm", "Training slides", "QWK", "Accuracy", "QWK, recalibrated", "Accuracy, recalibrated"),
            [
                (
                    *(found.arm, found.n_slides),
                    *(
                        metrics.get(name)
                        for metrics in (found.metrics, found.recalibrated)
                        for name in _GRADED
                    ),
                )
                for found in view.external
            ],
            strong=(primary.arm, primary.against),
        ),
        "slides": Table(
            ("", *view.comparison.grades, "all"),
            [("slides", *np.bincount(result.true, minlength=len(view.comparison.grades)), len(result.true))],
        ),
        "differences": _differences(view),
        "smaller_differences": Table(
            ("Arm", "Training slides", *_difference_columns(view)),
            [(pair.arm, pair.n_slides, *_difference(pair)) for pair in result.smaller_differences],
        ),
        "chance": Table(
            ("Arm", (view.metric, view.form), "Refits", ("p", "p")),
            [
                (arm.arm, arm.metrics[primary.metric], arm.n_permuted, arm.chance_p)
                for arm in view.arms
                if arm.n_permuted
            ],
        ),
        "thresholds": Table(
            ("Arm", *(f"above {grade}" for grade in view.comparison.grades[:-1])),
            [(arm.arm, *arm.quality.auroc) for arm in view.arms],
        ),
        "epochs_first": _equal_epochs(view, view.learned[0]),
        "epochs_second": _equal_epochs(view, view.learned[1]),
        "speed": _speed(view),
        "sizes": _sizes(view),
        "calibration": Table(
            (
                *("Arm", "Slope", ("Intercept (log odds)", "+.2f"), ("ECE", ".3f")),
                *(f"ECE if calibrated: mean ({_95})", ("p", "p")),
            ),
            [
                (
                    *(arm.arm, arm.slope.slope, arm.slope.intercept, arm.null.error),
                    *(f"{arm.null.null_mean:.3f} (up to {arm.null.null_high:.3f})", arm.null.p),
                )
                for arm in view.arms
            ],
        ),
        "temperatures": _temperatures(view),
        "grade_sets": Table(
            (
                *("Arm", "Patients covered", "Grades in a set, mean"),
                f"{view.units} with sets of 1 to {len(view.comparison.grades)}",
            ),
            [
                (arm.arm, sets.patients_covered, sets.mean_size, " / ".join(map(str, sets.sizes)))
                for arm in view.arms
                if (sets := arm.sets) is not None
            ],
        ),
        "wrong_grades": _wrong_grades(view),
        "referral_rules": _referral_rules(view),
        "reader_agreement": Table(
            ("Readers", view.units, "QWK", "Kappa", "Equal grades"),
            [
                (
                    f"{result.reader(two.first)} and {result.reader(two.second)}",
                    two.n,
                    two.qwk,
                    two.kappa,
                    two.accuracy,
                )
                for two in result.readers
            ],
        ),
        "against_readers": Table(
            (
                *("Arm", "Against", view.units, "QWK", "Equal grades", "Shared", "QWK of other readers"),
                ("Model minus readers", "+.2f"),
            ),
            [
                (
                    *(arm.arm, result.reader(one.reader), one.model.n, one.model.qwk, one.model.accuracy),
                    *(one.n_shared or None, one.peer_qwk, one.qwk_less_peers),
                )
                for arm in view.serious
                for one in arm.readers
                if one.reader is None or arm.arm in (primary.arm, primary.against)
            ],
            words=(1,),
        ),
        "site_by_grade": _places_by_grade(view, "site"),
        "scanner_by_grade": _places_by_grade(view, "scanner"),
        "site_in_embeddings": Table(
            ("Embeddings of", "Balanced accuracy", f"Permuted sites: mean ({_95})", ("p", "p"), "Patients"),
            [
                (
                    *(name, told.balanced_accuracy, f"{told.null_mean:.2f} (up to {told.null_high:.2f})"),
                    *(told.p, told.n_patients),
                )
                for name, told in result.site_in_embeddings.items()
            ],
        ),
        "metric_by_site": _metric_by_place(view, "site"),
        "metric_by_scanner": _metric_by_place(view, "scanner"),
        "repeatability": Table(
            (
                *("Arm", view.units, "Draws", ("SD of a draw (grades)", ".3f"), ("ICC", ".3f")),
                ("Minimal detectable change (grades)", ".3f"),
            ),
            [
                (arm.arm, found.n, found.n_draws, found.within_sd, found.icc, found.minimal_detectable_change)
                for arm in view.arms
                if (found := arm.repeatability) is not None
            ],
        ),
        "group_shifts": _group_shifts(view),
        "variance": Table(
            ("Arm", *((name, ".3f") for name in ("Seed", "Fold", "Patient", "Standard error of the metric"))),
            [
                (arm.arm, *map(_sd, (split.seed, split.fold, split.patient)), split.standard_error)
                for arm in view.arms
                if (split := arm.variance) is not None
            ],
        ),
        "power": Table(
            ("True accuracies", "True QWK", "Power by QWK", "Power by accuracy"),
            [
                (
                    f"{row.accuracy_first:.2f} against {row.accuracy_second:.2f}",
                    f"{row.qwk_first:.2f} against {row.qwk_second:.2f}",
                    *(row.power_qwk, row.power_accuracy),
                )
                for row in result.power
            ],
        ),
        "drift": _layer_means(view, "drift"),
        "similarity": _layer_means(view, "similarity"),
        "provenance": _provenance(view),
        "jobs": Table(
            (
                *("Arm", "Jobs", ("Seconds a job, mean", ".1f"), ("Minutes in all", ".1f")),
                *("Epochs", "Temperature"),
            ),
            [_jobs(arm) for arm in (*view.arms, *result.smaller)],
        ),
    }


def forest(view: View) -> Table:
    """Makes the table of the primary metric of each arm, and of its paired difference or None."""
    primary = view.comparison.primary
    pairs = {pair.arm: pair.interval for pair in view.result.differences}
    if view.result.primary is not None:
        pairs[primary.arm] = view.result.primary.interval
    return Table(
        (
            *("Arm", (view.metric, view.form)),
            (f"difference in {view.metric}, arm minus {primary.against}", f"+{view.form}"),
        ),
        [(arm.arm, arm.metrics[primary.metric], pairs.get(arm.arm)) for arm in view.arms],
    )


def by_layer(view: View, name: str) -> dict[str, dict[str, list[float]]]:
    """Collects ``drift`` or ``similarity`` of the jobs of each arm, by layer, lowest first."""
    jobs = {arm.arm: [getattr(found, name) for _, found in arm.jobs] for arm in view.serious}
    return {
        arm: {
            layer: [float(values[layer]) for values in found if layer in values]
            for layer in merge_layers(found)
        }
        for arm, found in jobs.items()
        if any(found)
    }


def risk_at(curve: RiskCoverage, coverage: float) -> float:
    """Returns the risk at the first point of at least this coverage."""
    return next(point.risk for point in curve.points if point.coverage >= coverage - 1e-12)


def _differences(view: View) -> Table:
    order, declared = [arm.arm for arm in view.arms], view.result.primary
    pairs = sorted(view.result.differences, key=lambda pair: order.index(pair.arm))
    pairs = [*([declared] if declared else []), *pairs]
    strong = (declared.arm,) if declared else ()
    return Table(
        ("Arm", *_difference_columns(view)), [(pair.arm, *_difference(pair)) for pair in pairs], strong
    )


def _difference_columns(view: View) -> tuple[tuple[str, str], ...]:
    signed = f"+{view.form}"
    return (
        *(("Difference", signed), ("p, sign flips", "p"), ("p, after Holm", "p")),
        *(("Difference over folds", signed), ("p, corrected t", "p")),
    )


def _difference(pair: PairedDifference) -> tuple[Any, ...]:
    t, holm = pair.corrected_t, "primary" if pair.p_holm is None else pair.p_holm
    over_folds = (None, None) if t is None else (t.interval, t.p)
    return pair.interval, pair.sign_flip.p, holm, *over_folds


def _equal_epochs(view: View, metric: CurveMetric) -> Table:
    name = NAMES[metric]
    columns = (f"{name} after\N{NO-BREAK SPACE}{epoch}" for epoch in view.epochs)
    rows = []
    for arm, curve in view.curves.items():
        plateau, means = curve.plateau(metric), [curve.mean(metric, epoch) for epoch in view.epochs]
        rows.append((arm, *means, plateau, curve.mean(metric, plateau)))
    return Table(("Arm", *columns, "Plateau after", f"{name} there"), rows)


def _speed(view: View) -> Table:
    rows: list[tuple[Any, ...]] = []
    for arm, curve in view.curves.items():
        plateau, last = curve.plateau(view.learned[0]), curve.epochs[-1]
        seconds = curve.seconds_until(plateau), curve.seconds[-1] / last
        rows.append((arm, plateau, *seconds, last, curve.trainings, curve.results))
    seconds_columns = ("Seconds to plateau", ".0f"), ("Seconds an epoch", ".2g")
    return Table(("Arm", "Epochs to plateau", *seconds_columns, "Last epoch", "Trainings", "Results"), rows)


def _sizes(view: View) -> Table:
    whole = float(np.mean([train for train, _ in view.result.fold_sizes]))
    names = list(dict.fromkeys(arm.arm for arm in view.result.smaller))
    rows = [
        (arm.arm, float(arm.n_slides or whole), arm.metrics["qwk"], arm.metrics["accuracy"])
        for arm in (*view.result.smaller, *view.arms)
        if arm.arm in names
    ]
    rows.sort(key=lambda row: (names.index(row[0]), row[1]))
    return Table(("Arm", ("Training slides", ".0f"), "QWK", "Accuracy"), rows)


def _temperatures(view: View) -> Table:
    def fitted(arm: ArmResult) -> str:
        found = [result.temperature for _, result in arm.jobs]
        return format_range(found, ".2f") + ", at a bound" * any(map(is_at_bound, found))

    rows = [
        (
            *(arm.arm, fitted(arm)),
            *(plain.log_loss, arm.metrics["log_loss"].estimate, plain.rps, arm.metrics["rps"].estimate),
            *(plain.slope, arm.slope.slope and arm.slope.slope.estimate),
        )
        for arm in view.arms
        if (plain := arm.untempered) is not None
    ]
    log_loss_columns = ("Log loss before", ".3f"), ("after", ".3f")
    columns = "Arm", "Temperature", *log_loss_columns, ("RPS before", ".3f"), ("after", ".3f")
    return Table((*columns, "Slope before", "after"), rows)


def _wrong_grades(view: View) -> Table:
    surer = (f"of the surer {format_percent(share)}" for share in (0.8, 0.5))
    return Table(
        ("Arm", "of all", *surer, ("Area", ".3f")),
        [
            (arm.arm, *(risk_at(arm.referral, share) for share in (1.0, 0.8, 0.5)), arm.referral.area)
            for arm in view.serious
        ],
    )


def _referral_rules(view: View) -> Table:
    risks = view.comparison.referral_risks

    def cell(curve: RiskCoverage, risk: float) -> str:
        rule = referral_rule(curve, risk)
        return f"{format_percent(rule.coverage)}, from {rule.confidence:.6g} up" if rule else "none"

    rows = [(arm.arm, *(cell(arm.referral, risk) for risk in risks)) for arm in view.serious]
    return Table(
        ("Arm", *(f"at most {100 * risk:g}\N{NO-BREAK SPACE}% of patients wrong" for risk in risks)), rows
    )


def _places_by_grade(view: View, name: Place) -> Table:
    found = view.result.places[name]
    columns = (name.capitalize(), *view.comparison.grades, "all")
    if found is None or (name == "scanner" and view.one_scanner_each):
        return Table(columns, [])
    places = zip(found.sites, found.slides, strict=True)
    return Table(columns, [(place or "(none given)", *counts, sum(counts)) for place, counts in places])


def _metric_by_place(view: View, name: Place) -> Table:
    if name == "scanner" and view.one_scanner_each:
        return Table((), [])
    groups = {arm.arm: arm.places[name].get("qwk", ()) for arm in view.arms}
    first = next(filter(None, groups.values()), ())
    return Table(
        ("Arm", *(f"{group.group or '(none given)'} ({group.n})" for group in first)),
        [(arm, *(group.estimate for group in found)) for arm, found in groups.items() if found],
    )


def _group_shifts(view: View) -> Table:
    labels, rows = view.result.group_shift, []
    scores = (("grades in the manifest", labels), *((arm.arm, arm.group_shift) for arm in view.arms))
    for name, found in scores if labels is not None else ():
        if found is not None:
            patients = found.n_first if found.paired else f"{found.n_first} and {found.n_second}"
            rows.append((name, patients, found.shift, found.p, found.superiority))
    return Table(("Score", "Patients", ("Shift (grades)", "+.2f"), ("p", "p"), "Superiority"), rows)


def _sd(variance: float | None) -> float | None:
    return None if variance is None else float(np.sqrt(max(variance, 0)))


def _layer_means(view: View, name: str) -> Table:
    """Averages over all layers and over each third of the depth; there may be a hundred layers."""
    rows = []
    for arm, found in by_layer(view, name).items():
        means = np.array([np.mean(values) for values in found.values()])
        thirds = [float(part.mean()) if len(part) else None for part in np.array_split(means, 3)]
        rows.append((arm, len(means), float(means.mean()), *thirds))
    names = ("Mean", "Lowest third", "Middle third", "Highest third")
    return Table(("Arm", "Layers", *((name, ".3f") for name in names)), rows)


def _provenance(view: View) -> Table:
    protocol, result = view.protocol, view.result
    folds = dict.fromkeys(job.fold for arm in result.arms for job, _ in arm.jobs)
    near = view.comparison.near_duplicates
    return Table(
        ("What", "Value"),
        [
            ("slidetl", VERSION),
            ("Python", platform.python_version()),
            *((name, importlib.metadata.version(name)) for name in _SOFTWARE),
            ("Splits, SHA-256", result.splits_sha256),
            ("Seed of the splits", protocol.seed),
            ("Seeds of the folds", ", ".join(f"{f.name} of repeat {f.repeat}: {f.seed}" for f in folds)),
            ("Repeats", protocol.repeats),
            ("Bootstrap draws", view.comparison.bootstrap_draws),
            ("Near-duplicates", f"looked for from a correlation of {near:g}" if near else "not looked for"),
        ],
        words=(1,),
    )


def _jobs(arm: ArmResult) -> tuple[Any, ...]:
    seconds = [found.seconds for _, found in arm.jobs]
    epochs = [int(found.chosen["epochs"]) for _, found in arm.jobs if found.chosen]
    temperatures = [found.temperature for _, found in arm.jobs if found.nested]
    chosen = format_range(epochs) if epochs else None
    spread = format_range(temperatures, ".2f") if temperatures else None
    return arm.label, len(seconds), float(np.mean(seconds)), sum(seconds) / 60, chosen, spread


def _configured(view: View, result: ArmResult) -> tuple[str, str | None]:
    """Describes an arm by its configuration, and its choices."""
    arm = view.comparison.arms[result.arm]
    if arm.baseline is not None:
        return f"trivial: {_BASELINES[arm.baseline]}", "its classifier" if arm.baseline in COLOURS else None
    if arm.classical is not None:
        pool = arm.classical.pool + (f" {arm.classical.k}" if arm.classical.pool == "top-k" else "")
        features = " and ".join(arm.classical.features)
        about = f"{arm.classical.model} on stored features ({features}), {pool} pooling"
        return about, None if arm.classical.model == "trees" else "its penalty"
    config = view.comparison.fit_config(result.arm)
    model, trainer = config["model"], config["trainer"]
    backbone = model.get("backbone", {})
    parts = [_named(model.get("transfer"), "as 'slidetl fit' by default")]
    parts.append(str(backbone.get("name", "default backbone")))
    if backbone.get("pretrained") and any(found.drift for _, found in result.jobs):
        parts.append(f"pretrained: {Path(str(backbone['pretrained'])).name}")
    parts += [_named(model[key], "") for key in ("aggregator", "head") if key in model]
    parts += [f"lr {model['lr']:g}"] if isinstance(model.get("lr"), int | float) else []
    parts += (
        [f"{trainer['max_epochs']} epochs"] if "max_epochs" in trainer and LENGTH not in arm.choices else []
    )
    chosen = [f"{key.split('.')[-1]} of {_list(values)}" for key, values in arm.choices.items()]
    return "; ".join(parts), ", ".join(chosen) or None


def _named(value: Any, default: str) -> str:
    """Names the class of a configuration, with its arguments."""
    if not isinstance(value, Mapping) or "class_path" not in value:
        return default
    given = value.get("init_args", {}).items()
    arguments = ", ".join(f"{key} {_list(v) if isinstance(v, list) else v}" for key, v in given)
    name = str(value["class_path"]).rsplit(".", 1)[-1]
    return f"{name} ({arguments})" if arguments else name


def _list(values: Iterable[object] | Sequence[object]) -> str:
    return " / ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
