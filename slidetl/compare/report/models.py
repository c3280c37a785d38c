"""Sections of the page about the models: what they grade, how they learned, and how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from slidetl.compare.aggregate import RISK, ArmResult
from slidetl.compare.learning import (
    PLATEAU,
    CurveFigure,
    Learning,
    equal_epochs,
    learning_of,
)
from slidetl.compare.report.html import Part, Table
from slidetl.compare.report.plots import (
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
from slidetl.compare.report.view import NONE, View, p_value, three
from slidetl.evaluation.bootstrap import Interval
from slidetl.evaluation.conformal import REFERRAL_POINTS, ReferralRule, referral_rule

_OF_SCORES = {"worst": "the highest of its slides", "mean": "the mean of its slides"}
_LEARNED: dict[CurveFigure, str] = {"qwk": "QWK", "accuracy": "Accuracy"}
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
    found = [learning_of(view.comparison, arm) for arm in view.serious]
    curves = {curve.arm: curve for curve in found if curve is not None}
    if not curves:
        return ("No arm has epochs: there is no curve.",)
    nested = view.protocol.is_nested
    part = "the held-out parts of the inner folds" if nested else "the test parts, which chose nothing"
    shown = equal_epochs(list(curves.values()))
    primary = view.comparison.primary
    first: CurveFigure = "accuracy" if primary.figure == "accuracy" else "qwk"
    parts: list[Part] = [
        "The same arms at equal epochs, and each at its own plateau: part of a gap may be speed alone."
        + (
            " In the inner folds every training runs to its last epoch, so these curves are whole; they are "
            "of smaller training parts than the figures above."
            if nested
            else " The curves are of the test parts, to be looked at: nothing was chosen by them."
        )
    ]
    if {primary.arm, primary.against} <= set(curves) and shown:
        parts.append(_gap(curves[primary.arm], curves[primary.against], shown, first))
    parts += [
        draw_learning(
            view.folder,
            {
                name: LearningCurve(curve.epochs, curve.seconds, curve.values)
                for name, curve in curves.items()
            },
            view.looks,
            {first: _LEARNED[first], "rps": "RPS (lower is better)"},
            (primary.arm, primary.against),
            part,
        ),
        *(
            _at_equal_epochs(curves, shown, figure, part, view.unit)
            for figure in sorted(_LEARNED, key=lambda name: name != first)
        ),
        Table(
            f"Speed: epochs and time until the plateau of {_LEARNED[first]}. Means over trainings, on the "
            "machines that ran them. A plateau at the last epoch may be none, if the arm still rises.",
            (
                "Arm",
                "Epochs to plateau",
                "Seconds to plateau",
                "Seconds an epoch",
                "Last epoch",
                "Trainings",
                "Results",
            ),
            tuple(
                (
                    name,
                    str(curve.plateau(first)),
                    f"{curve.seconds_until(curve.plateau(first)):.0f}",
                    f"{curve.seconds[-1] / curve.epochs[-1]:.2g}",
                    str(curve.epochs[-1]),
                    str(curve.trainings),
                    str(curve.results),
                )
                for name, curve in curves.items()
            ),
        ),
    ]
    return tuple(parts)


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
        "Probabilities are calibrated by one temperature from the inner folds, except those of the trivial "
        "arms."
        if view.protocol.is_nested
        else "Probabilities are as the networks gave them: without inner folds there is no temperature."
    )
    return (
        source,
        draw_reliability(view.folder, {arm.arm: arm.bins for arm in view.serious}, view.unit),
        Table(
            f"Calibration per {view.unit}, first repeat. A slope of 1 is right, less is too sure; an "
            "intercept above 0 means graded too low. The expected calibration error (ECE) is above zero even "
            f"of a perfect model on so few {view.unit}s: beside it is what such a model would show.",
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
        *_temperatures(view),
    )


def _temperatures(view: View) -> tuple[Part, ...]:
    """What the temperatures of the inner folds did to what was held out."""
    rows = []
    for arm in view.arms:
        plain = arm.untempered
        if plain is None:
            continue
        found = [result.temperature for _, result in arm.units]
        rows.append(
            (
                arm.arm,
                f"{min(found):.2f} to {max(found):.2f}",
                f"{plain.log_loss:.3f}",
                f"{arm.figures['log_loss'].estimate:.3f}",
                f"{plain.rps:.3f}",
                f"{arm.figures['rps'].estimate:.3f}",
                NONE if plain.slope is None else f"{plain.slope:.2f}",
                NONE if arm.slope.slope is None else f"{arm.slope.slope.estimate:.2f}",
            )
        )
    if not rows:
        return ()
    return (
        Table(
            "Did the temperature help? Log loss and RPS (lower is better) and calibration slope (1 is right) "
            f"of held-out {view.unit}s, before and after. A temperature above 1 makes probabilities less "
            "sure.",
            (
                "Arm",
                "Temperature",
                "Log loss before",
                "after",
                "RPS before",
                "after",
                "Slope before",
                "after",
            ),
            tuple(rows),
        ),
    )


def referral(view: View) -> tuple[Part, ...]:
    """Sets of grades, and what is gained by leaving the least sure results to a human."""
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
                    "Grades in a set, mean",
                    f"{view.unit.capitalize()}s with sets of 1 to {view.n_grades}",
                ),
                tuple(
                    (
                        arm.arm,
                        spoken(arm.sets.patients_covered),
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
        # the bound is that of the primary one, if it is complete
        draw_referral(view.folder, shown, view.looks, next(iter(shown)), view.unit)
    )
    parts.append(
        Table(
            f"Share of wrong grades, per {view.unit}, first repeat: of all, of the surer ones, and the area "
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
    level = next(iter(shown.values())).level
    parts.append(
        Table(
            f"Left to a human at a chosen risk: the share of {view.unit}s that the model may grade itself, "
            f"and how sure it must be of each, so that with {percent(level)} confidence at most so many "
            f"patients, of those that it grades, have a wrong grade. None: then every {view.unit} goes to a "
            "human. "
            f"Even without an error, {view.n_patients} patients cannot show a risk below "
            f"{percent(_least_risk(view.n_patients, level))}.",
            (
                "Arm",
                *(f"at most {percent(risk)} of patients wrong" for risk in view.comparison.referral_risks),
            ),
            tuple(
                (name, *(_ruled(referral_rule(curve, risk)) for risk in view.comparison.referral_risks))
                for name, curve in shown.items()
            ),
        )
    )
    return tuple(parts)


def _ruled(rule: ReferralRule | None) -> str:
    return "none" if rule is None else f"{percent(rule.coverage)}, from {rule.confidence:.2f} up"


def _least_risk(n_patients: int, level: float) -> float:
    """That so many patients, all graded right, can show at one of the curve's points."""
    return float(1 - ((1 - level) / REFERRAL_POINTS) ** (1 / n_patients))


def score(view: View) -> tuple[Part, ...]:
    """Spread of the score over draws of tiles, and whether it tells two groups apart."""
    return (*_repeatability(view), *_groups(view))


def _repeatability(view: View) -> tuple[Part, ...]:
    known = [(arm.arm, arm.repeatability) for arm in view.arms if arm.repeatability is not None]
    if not known:
        return ("No arm grades slides of several tiles by a network, so there is nothing to draw from.",)
    return (
        "Beside its grade a slide has a continuous score, the expected grade. Other tiles of the same tissue "
        "would give another one: each draw takes as many tiles as the slide has, with replacement."
        + ("" if view.unit == "slide" else f" A patient's score is {_OF_SCORES[view.protocol.unit]}."),
        Table(
            f"Spread of the score over draws of tiles. A change of one {view.unit}'s score below the minimal "
            "detectable change is noise of the draw (95\N{NO-BREAK SPACE}%). ICC: share of a single draw's "
            f"variance that is between {view.unit}s.",
            (
                "Arm",
                f"{view.unit.capitalize()}s",
                "Draws",
                "SD of a draw (grades)",
                "ICC",
                "Minimal detectable change (grades)",
            ),
            tuple(
                (
                    name,
                    str(found.n),
                    str(found.n_draws),
                    three(found.within_sd),
                    three(found.icc),
                    three(found.minimal_detectable_change),
                )
                for name, found in known
            ),
        ),
    )


def _groups(view: View) -> tuple[Part, ...]:
    groups, labels = view.comparison.groups, view.result.group_shift
    if groups is None:
        return ("No two groups of slides were to be compared (groups in the configuration).",)
    of = f"{groups.second} minus {groups.first} (by {groups.column})"
    if labels is None:
        return (f"{of}: fewer than two patients in a group, so the scores were not compared.",)
    if labels.paired:
        how = "each patient with itself (Wilcoxon's test of signed ranks)"
    else:
        how = "different patients (test of Mann and Whitney)"
    arms = [(arm.arm, arm.group_shift) for arm in view.arms if arm.group_shift is not None]
    return (
        Table(
            f"Do the groups differ? Shift of the score, {of}: Hodges-Lehmann estimate over {how}. The first "
            "row is what the labels themselves say. Superiority: how often the second is above the first, "
            "0.5 without a shift. Groups that were not drawn by lot differ in more than their name; p is not "
            "corrected for the number of arms.",
            ("Score", "Patients", "Shift (grades)", "p", "Superiority"),
            tuple(
                (
                    name,
                    str(found.shift.n_first)
                    if found.paired
                    else f"{found.shift.n_first} and {found.shift.n_second}",
                    spoken(found.shift.shift, signed=True),
                    p_value(found.shift.p),
                    f"{found.shift.superiority:.2f}",
                )
                for name, found in (("grades in the manifest", labels), *arms)
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


def _gap(one: Learning, other: Learning, shown: Sequence[int], figure: CurveFigure) -> str:
    """How the difference of the declared arms goes with the epochs, in words."""
    gaps = [f"{_signed(one.mean(figure, n) - other.mean(figure, n))} after {n}" for n in shown]
    ends = (one.plateau(figure), other.plateau(figure))
    plateau = one.mean(figure, ends[0]) - other.mean(figure, ends[1])
    return (
        f"{one.arm} minus {other.arm} in {_LEARNED[figure]}: {', '.join(gaps)} epochs; each at its own "
        f"plateau, after {ends[0]} and {ends[1]} epochs, {_signed(plateau)}. Means over {one.trainings} "
        "trainings, without intervals: the declared comparison has them."
    )


def _at_equal_epochs(
    curves: Mapping[str, Learning], shown: Sequence[int], figure: CurveFigure, part: str, unit: str
) -> Table:
    title = _LEARNED[figure]
    return Table(
        f"{title} at equal epochs, and at the arm's own plateau: the earliest point within {PLATEAU:g} of "
        f"its best, which is found on the curve itself and so flatters. Per {unit} of {part}; means over "
        "trainings.",
        (
            "Arm",
            *(f"{title} after\N{NO-BREAK SPACE}{epoch}" for epoch in shown),
            "Plateau after",
            f"{title} there",
        ),
        tuple(
            (
                name,
                *(_plain(curve.mean(figure, epoch)) for epoch in shown),
                str(curve.plateau(figure)),
                _plain(curve.mean(figure, curve.plateau(figure))),
            )
            for name, curve in curves.items()
        ),
    )


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "\N{MINUS SIGN}")


def _plain(value: float) -> str:
    return _signed(value).removeprefix("+")


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
