"""Sections of the page about the models: what they grade, how they learned, and how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from slidetl.evaluation.bootstrap import Interval
from slidetl.experiments.compare.report_view import NONE, View, p_value, three
from slidetl.experiments.compare.result import RISK, ArmResult
from slidetl.experiments.compare.unit import CurvePoint, UnitResult
from slidetl.report.experiment import Part, Table
from slidetl.report.experiment_figures import (
    LearningCurve,
    draw_confusions,
    draw_layers,
    draw_learning,
    draw_referral,
    draw_reliability,
    draw_sizes,
    looks_of,
    percent,
    risk_at,
    spoken,
)

# As the choice of an epoch in the inner folds: a smaller difference in RPS says nothing on twenty slides.
_PLATEAU = 0.02
_LAYERS = "Lines are means over folds, bands from the least to the greatest; the lowest layer is on the left."


def confusion(view: View) -> tuple[Part, ...]:
    """Which grades are taken for which."""
    counts = {arm.arm: arm.confusion for arm in view.arms}
    grades = view.comparison.grades
    return (
        draw_confusions(view.folder, counts, grades, view.protocol.repeats),
        Table(
            "How well each arm tells grades above a threshold from those up to it: area under the ROC "
            "curve, first repeat. 0.5 is chance.",
            ("Arm", *(f"above {grade}" for grade in grades[:-1])),
            tuple(
                (arm.arm, *(NONE if area is None else f"{area:.2f}" for area in arm.quality.auroc))
                for arm in view.arms
            ),
        ),
    )


def learning(view: View) -> tuple[Part, ...]:
    """Figures in the course of training, at equal epochs and at the plateau."""
    curves = {arm.arm: curve for arm in view.serious if (curve := _curve(view, arm)) is not None}
    if not curves:
        return ("No arm has epochs: there is no curve.",)
    nested = view.protocol.is_nested
    part = "the held-out parts of the inner folds" if nested else "the test parts, which chose nothing"
    common = sorted(set.intersection(*(set(curve.epochs.tolist()) for curve in curves.values())))
    shown = [common[round(place)] for place in np.linspace(0, len(common) - 1, min(4, len(common)))]
    rows = []
    for name, curve in curves.items():
        qwk, rps = curve.values["qwk"].mean(axis=0), curve.values["rps"].mean(axis=0)
        plateau = int(np.flatnonzero(rps <= rps.min() * (1 + _PLATEAU))[0])
        at = [f"{qwk[curve.epochs.tolist().index(epoch)]:.2f}" for epoch in shown]
        seconds = curve.seconds[-1] / curve.epochs[-1]
        rows.append(
            (
                name,
                *at,
                str(curve.epochs[plateau]),
                f"{curve.seconds[plateau]:.0f}",
                f"{qwk[plateau]:.2f}",
                f"{seconds:.2g}",
            )
        )
    primary = view.comparison.primary
    return (
        "The same arms at equal epochs, and at convergence: part of a gap may be speed alone."
        + (
            " In the inner folds every training runs to its last epoch, so these curves are whole; they are "
            "of smaller training parts than the figures above."
            if nested
            else ""
        ),
        draw_learning(
            view.folder,
            curves,
            view.looks,
            {"qwk": "QWK", "rps": "RPS (lower is better)"},
            (primary.arm, primary.against),
            part,
        ),
        Table(
            "QWK at equal epochs, and at the plateau: the earliest point whose RPS is within "
            f"{percent(_PLATEAU)} of the arm's best. Per slide of {part}; means over trainings, on the "
            "machines that ran them.",
            (
                "Arm",
                *(f"QWK after\N{NO-BREAK SPACE}{epoch}" for epoch in shown),
                "Epochs to plateau",
                "Seconds to plateau",
                "QWK there",
                "Seconds an epoch",
            ),
            tuple(rows),
        ),
    )


def sizes(view: View) -> tuple[Part, ...]:
    """Figures against the number of training slides."""
    smaller = view.result.smaller
    if not smaller:
        return ("No arm was trained on fewer slides (sizes in the configuration).",)
    whole = float(np.mean([train for train, _ in view.result.fold_sizes]))
    figures = {"qwk": "QWK", "accuracy": "Accuracy"}
    sizes: dict[str, dict[float, dict[str, Interval]]] = {}
    for arm in (*smaller, *view.arms):
        size = whole if arm.n_slides is None else float(arm.n_slides)
        if arm.n_slides is not None or arm.arm in sizes:
            sizes.setdefault(arm.arm, {})[size] = {
                "qwk": arm.figures["qwk"],
                "accuracy": arm.figures["accuracy"],
            }
    looks = {name: view.looks.get(name) or looks_of([name])[name] for name in sizes}
    return (
        draw_sizes(view.folder, sizes, looks, figures),
        Table(
            "Figures by the number of training slides.",
            ("Arm", "Training slides", *figures.values()),
            tuple(
                (arm, f"{size:.0f}", *(spoken(by_size[size][key]) for key in figures))
                for arm, by_size in sizes.items()
                for size in sorted(by_size)
            ),
        ),
    )


def calibration(view: View) -> tuple[Part, ...]:
    """Whether the probabilities mean what they say."""
    rows = tuple(
        (
            arm.arm,
            NONE if arm.slope.slope is None else spoken(arm.slope.slope),
            spoken(arm.slope.intercept, signed=True),
            f"{arm.null.error:.3f}",
            f"{arm.null.null_mean:.3f} (up to {arm.null.null_high:.3f})",
            p_value(arm.null.p),
        )
        for arm in view.arms
    )
    source = (
        "Probabilities are calibrated by one temperature from the inner folds."
        if view.protocol.is_nested
        else "Probabilities are as the networks gave them: without inner folds there is no temperature."
    )
    return (
        source,
        draw_reliability(view.folder, {arm.arm: arm.bins for arm in view.serious}),
        Table(
            "Calibration per slide, first repeat. A slope of 1 is right, less is too sure; an intercept "
            "above 0 means graded too low. The expected calibration error (ECE) is above zero even of a "
            "perfect model on so few slides: beside it is what such a model would show.",
            (
                "Arm",
                "Slope",
                "Intercept (log odds)",
                "ECE",
                "ECE if calibrated: mean (95\N{NO-BREAK SPACE}%)",
                "p",
            ),
            rows,
        ),
    )


def referral(view: View) -> tuple[Part, ...]:
    """Sets of grades, and what is gained by leaving the least sure slides to a human."""
    shown = {arm.arm: arm.referral for arm in view.serious}
    sets = [arm for arm in view.arms if arm.sets is not None]
    parts: list[Part] = []
    if sets:
        parts.append(
            Table(
                f"Contiguous sets of grades that were asked to miss the truth of {percent(RISK)} of "
                "patients, made on other folds and checked on each fold in turn. Coverage is marginal, over "
                "all patients: it is promised for no single grade.",
                (
                    "Arm",
                    "Patients covered",
                    "Slides covered",
                    "Grades in a set, mean",
                    f"Slides with sets of 1 to {view.n_grades}",
                ),
                tuple(
                    (
                        arm.arm,
                        spoken(arm.sets.patients_covered),
                        spoken(arm.sets.slides_covered),
                        spoken(arm.sets.mean_size),
                        " / ".join(map(str, arm.sets.sizes)),
                    )
                    for arm in sets
                    if arm.sets is not None
                ),
            )
        )
    else:
        parts.append("With a single fold, sets of grades have no other fold to be checked on.")
    parts.append(
        draw_referral(view.folder, shown, view.looks, next(iter(shown)))  # the primary one, if complete
    )
    parts.append(
        Table(
            "Share of wrong grades, per slide, first repeat: of all slides, of the surer ones, and the area "
            "under the curve.",
            ("Arm", "of all", f"of the surer {percent(0.8)}", f"of the surer {percent(0.5)}", "Area"),
            tuple(
                (
                    name,
                    *(f"{risk_at(curve, coverage):.2f}" for coverage in (1.0, 0.8, 0.5)),
                    f"{curve.area:.3f}",
                )
                for name, curve in shown.items()
            ),
        )
    )
    return tuple(parts)


def repeatability(view: View) -> tuple[Part, ...]:
    """Spread of the score over draws of tiles."""
    known = [(arm.arm, arm.repeatability) for arm in view.arms if arm.repeatability is not None]
    if not known:
        return ("No arm grades a slide by a draw of its tiles, so its score repeats itself exactly.",)
    return (
        "Beside its grade a slide has a continuous score, the expected grade. A network that looks at a "
        "part of the tiles gives another score for another draw.",
        Table(
            "Spread of the score over draws of tiles. A change of one slide's score below the minimal "
            "detectable change is noise of the draw (95\N{NO-BREAK SPACE}%). ICC: share of a single draw's "
            "variance that is between slides.",
            (
                "Arm",
                "Slides",
                "Draws",
                "SD of a draw (grades)",
                "ICC",
                "Minimal detectable change (grades)",
            ),
            tuple(
                (
                    name,
                    str(found.n_slides),
                    str(found.n_draws),
                    three(found.within_sd),
                    three(found.icc),
                    three(found.minimal_detectable_change),
                )
                for name, found in known
            ),
        ),
    )


def layers(view: View) -> tuple[Part, ...]:
    """How far weights and representations moved in training."""
    parts: list[Part] = []
    drift = {arm.arm: found for arm in view.serious if (found := _by_layer(arm, "drift"))}
    if drift:
        parts += [
            draw_layers(
                view.folder,
                "drift",
                drift,
                view.looks,
                "||w − w0|| / ||w0||",
                "Distance of each layer's weights from the pretrained ones when training ended, relative to "
                f"their length. {_LAYERS}",
            ),
            _layer_table(drift, "Distance from the pretrained weights, means over layers and folds."),
        ]
    else:
        parts.append("No arm starts from pretrained weights, so there is nothing to drift away from.")
    similar = {arm.arm: found for arm in view.serious if (found := _by_layer(arm, "similarity"))}
    if similar:
        parts += [
            draw_layers(
                view.folder,
                "similarity",
                similar,
                view.looks,
                "linear CKA, before and after",
                "How alike what each block makes of test tiles is before and after training (linear CKA, "
                "unbiased: 1 for the same, about 0 for unrelated). A network from scratch is compared with "
                f"its random start, in evaluation mode. {_LAYERS}",
            ),
            _layer_table(similar, "Similarity before and after training, means over blocks and folds."),
        ]
    return tuple(parts)


def _curve(view: View, arm: ArmResult) -> LearningCurve | None:
    """Of the chosen trial in the inner folds where there are any, else of the test parts."""
    series: list[list[CurvePoint]] = []
    for _, found in arm.units:
        by_part: dict[str, list[CurvePoint]] = {}
        trial = _chosen_trial(view, arm.arm, found)
        for point in found.curves:
            if point.part == "test" or point.trial == trial:
                by_part.setdefault(point.part, []).append(point)
        inner = [points for part, points in by_part.items() if part != "test"]
        series += inner or list(by_part.values())
    if not series:
        return None
    epochs = sorted(set.intersection(*({point.epoch for point in points} for points in series)))
    if not epochs:
        return None
    kept = [[point for point in points if point.epoch in epochs] for points in series]
    return LearningCurve(
        np.array(epochs, np.int64),
        np.mean([[point.seconds for point in points] for points in kept], axis=0),
        {
            name: np.array([[getattr(point, name) for point in points] for points in kept])
            for name in ("qwk", "rps")
        },
    )


def _chosen_trial(view: View, arm: str, found: UnitResult) -> int:
    values = {key: value for key, value in (found.chosen or {}).items() if key != "epochs"}
    trials = view.comparison.trials(arm)
    return trials.index(values) if values in trials else 0


def _by_layer(arm: ArmResult, name: str) -> dict[str, list[float]]:
    layers: dict[str, list[float]] = {}
    for _, found in arm.units:
        for layer, value in getattr(found, name).items():
            layers.setdefault(layer, []).append(float(value))
    return layers


def _layer_table(layers: Mapping[str, Mapping[str, Sequence[float]]], caption: str) -> Table:
    """Means of an arm over all layers, and over each third of the depth; there may be a hundred layers."""
    rows = []
    for arm, found in layers.items():
        means = np.array([np.mean(values) for values in found.values()])
        thirds = [part.mean() for part in np.array_split(means, 3) if len(part)]
        cells = [f"{value:.3f}" for value in (means.mean(), *thirds)]
        rows.append((arm, str(len(means)), *cells, *[NONE] * (6 - 2 - len(cells))))
    return Table(
        caption, ("Arm", "Layers", "Mean", "Lowest third", "Middle third", "Highest third"), tuple(rows)
    )
