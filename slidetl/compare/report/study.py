"""Sections of the page about the study: its arms, splits, readers, sites, and what limits it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import slidetl
from slidetl.compare.aggregate import ArmResult, PairedDifference
from slidetl.compare.config import FIGURES, Figure
from slidetl.compare.plan import Unit
from slidetl.compare.report.html import Part, Table
from slidetl.compare.report.plots import (
    ForestRow,
    draw_forest,
    percent,
    spoken,
)
from slidetl.compare.report.view import NAMES, NONE, View, p_is, p_value, span, three
from slidetl.evaluation.bootstrap import Interval

_BASELINES = {
    "prior": "how common each grade is among the training slides",
    "site": "how common each grade is at the slide's site",
    "colour_area": "mean colour and tissue area; the best of three classifiers",
    "collagen": "area stained as collagen, by colour deconvolution; the best of three classifiers",
}
_PATIENT_BY = {"worst": "each by the worst of its slides", "mean": "each by the mean of its slides"}
_DIFFERENCE = ("Difference", "p, sign flips", "p, after Holm", "Difference over folds", "p, corrected t")
_SOFTWARE = ("torch", "pytorch-lightning", "timm", "scikit-learn", "scipy", "numpy")


def arms(view: View) -> tuple[Part, ...]:
    """Every arm with its intervals, as a forest plot and a table."""
    result, primary = view.result, view.comparison.primary
    pairs = {pair.arm: pair.interval for pair in result.differences}
    if result.primary is not None:
        pairs[primary.arm] = result.primary.interval
    rows = [
        ForestRow(
            arm.arm,
            arm.figures[primary.figure],
            arm.by_repeat[primary.figure],
            pairs.get(arm.arm),
            arm.arm in view.trivial,
        )
        for arm in view.arms
    ]
    lower = f"{NAMES['mae']} (in grades), RPS and log loss are better when lower."
    table = Table(
        f"All figures with {percent(rows[0].figure.level)} intervals, of out-of-fold predictions pooled "
        f"within a repeat, averaged over repeats. {lower}",
        ("Arm", *(NAMES[name] for name in FIGURES)),
        tuple((arm.arm, *(_to_digits(name, arm.figures[name]) for name in FIGURES)) for arm in view.arms),
        strong=tuple(
            number for number, arm in enumerate(view.arms) if arm.arm in (primary.arm, primary.against)
        ),
    )
    ceiling = _ceiling(view)
    return (
        draw_forest(
            view.folder,
            rows,
            view.name,
            primary.against,
            None if ceiling is None else ceiling[0],
            result.primary is not None,
        ),
        table,
        "Intervals resample patients (bias-corrected and accelerated bootstrap, "
        f"{view.comparison.bootstrap_draws} draws). They are conditional on the fitted models: they say how "
        "the figures would vary with other patients to be graded, not with other patients, folds or seeds "
        "to be trained on. The section on variance says how much these add.",
    )


def protocol(view: View) -> tuple[Part, ...]:
    """What was compared, and how it was split."""
    result, protocol = view.result, view.protocol
    sizes = result.fold_sizes
    trained = [train for train, _ in sizes]
    tested = [test for _, test in sizes]
    n_sites = len(set(result.site_of) - {""})
    sites = f" from {n_sites} sites" if n_sites > 1 else ""
    if protocol.given_split:
        splits = (
            "The split given in the manifest was used: trained on its train and val parts, tested on test"
        )
    elif protocol.leave_one_site_out:
        splits = "Each site in turn was the test part, its slides unseen in training"
    else:
        splits = (
            f"{len(sizes) // protocol.repeats} folds, disjoint in patients and stratified by grade; each "
            "fold in turn was the test part"
        )
    repeats = f", {protocol.repeats} times over with other folds and seeds" if protocol.repeats > 1 else ""
    if not view.protocol.is_nested:
        choice = (
            "Nothing was chosen by the data: hyper-parameters and epochs were fixed (not nested), and the "
            "probabilities are as the networks gave them."
        )
    else:
        n_inner = len(view.arms[0].units[0][0].fold.inner)
        inner = "the given val part" if n_inner == 1 else f"{n_inner} inner folds"
        choice = (
            "Every choice (the number of epochs, the values listed as choices below, the temperature of the "
            f"probabilities) was made in {inner} of each training part, by the ranked probability score; "
            "then the arm was trained once on the whole training part. No test slide had a say."
        )
    grades = ", ".join(view.comparison.grades)
    return (
        f"{len(result.slides)} tested slides of {view.n_patients} patients{sites}, in "
        f"{len(view.comparison.grades)} grades ({grades}). Figures are of {view.n_results}"
        + ("" if protocol.unit == "slide" else f" ({_PATIENT_BY[protocol.unit]})")
        + f". {splits}{repeats}: {span(trained)} slides to train on, {span(tested)} to test. "
        f"{choice}",
        f"All arms saw the same splits and seeds. The splits (SHA-256 {result.splits_sha256[:16]}…, "
        f"splits.json) were audited before anything was fitted: {_audit(view)}",
        Table(
            "The arms as configured. Trivial arms are what anything must beat.",
            ("Arm", "What it is", "Chosen in inner folds"),
            tuple((arm.arm, *_what_it_is(view, arm.arm)) for arm in view.arms),
            words=(1, 2),
        ),
        Table(
            "Tested slides by grade.",
            ("", *view.comparison.grades, "all"),
            (
                (
                    "slides",
                    *(str(int((result.true == grade).sum())) for grade in range(view.n_grades)),
                    str(len(result.true)),
                ),
            ),
        ),
    )


def others(view: View) -> tuple[Part, ...]:
    """The family of secondary comparisons, and the tests against chance."""
    against, declared = view.comparison.primary.against, view.result.primary
    order = [arm.arm for arm in view.arms]
    family = sorted(view.result.differences, key=lambda pair: order.index(pair.arm))
    rows = [*([declared] if declared else []), *family]
    if not rows:
        why = f"{against} is not complete, or there is no other arm: nothing can be compared with it."
        return (why, *_against_chance(view))
    return (
        "A family of secondary comparisons, whose p-values are corrected after Holm. The declared one "
        "stands outside of the family and is not corrected.",
        Table(
            f"Paired differences in {view.name}, arm minus {against}. Sign flips swap the arms' grades of "
            "whole patients, in the first repeat; the corrected t (Nadeau and Bengio) is over folds.",
            ("Arm", *_DIFFERENCE),
            tuple(_difference_row(pair) for pair in rows),
            strong=(0,) if declared else (),
        ),
        *_on_fewer_slides(view),
        *_against_chance(view),
    )


def _on_fewer_slides(view: View) -> tuple[Part, ...]:
    pairs = view.result.smaller_differences
    if not pairs:
        return ()
    return (
        Table(
            "The same differences where both arms were trained on fewer slides, at fixed hyper-parameters: "
            "a family of its own, corrected after Holm, the declared pair among it.",
            ("Arm", "Training slides", *_DIFFERENCE),
            tuple((pair.arm, str(pair.n_slides), *_difference_row(pair)[1:]) for pair in pairs),
        ),
    )


def readers(view: View) -> tuple[Part, ...]:
    """How far readers agree, with each other and with the arms, and the ceiling that this sets."""
    result = view.result
    if not result.readings.shape[1]:
        return ("The manifest has no readers' grades, so nothing is known of the noise in the labels.",)
    parts: list[Part] = []
    ceiling = result.ceiling
    if result.readers:
        parts.append(
            Table(
                f"Agreement between readers, per {view.unit}.",
                ("Readers", f"{view.unit.capitalize()}s", "QWK", "Kappa", "Equal grades"),
                tuple(
                    (
                        f"{_reader(pair.first)} and {_reader(pair.second)}",
                        str(pair.n),
                        *(spoken(value) for value in (pair.qwk, pair.kappa, pair.accuracy)),
                    )
                    for pair in result.readers
                ),
            )
        )
    else:
        several = result.readings.shape[1] > 1
        who = "No two readers graded slides of two patients" if several else "One reader alone"
        parts.append(f"{who}: agreement, and the ceiling that it sets, cannot be known.")
    if ceiling is not None:
        known = _ceiling(view)
        by_other = (
            ""
            if ceiling.qwk_by_attenuation is None
            else f" (by the attenuation formula {ceiling.qwk_by_attenuation:.2f})"
        )
        parts.append(
            "The readers' noise sets a ceiling. A model that always told the true grade would, judged by one "
            f"reader, reach an accuracy of {ceiling.accuracy:.2f} [{ceiling.low:.2f}, {ceiling.high:.2f}] "
            f"and a QWK of {ceiling.qwk:.2f}{by_other}; judged by the rounded mean of two readers' grades, "
            f"{ceiling.consensus_accuracy:.2f} and {ceiling.consensus_qwk:.2f}; by what two settle on when "
            f"they look together, {ceiling.together_accuracy:.2f} and {ceiling.together_qwk:.2f}. A reader's "
            f"error has a standard deviation of {ceiling.reader_sd:.2f} grades. Errors that readers share "
            "are not in it, so the true ceiling may be lower."
            + ("" if known is None else f" The forest plot shows that for {known[1]}.")
        )
    declared = (view.comparison.primary.arm, view.comparison.primary.against)
    rows = [
        (
            arm.arm,
            "consensus" if one.reader is None else _reader(one.reader),
            str(one.model.n),
            spoken(one.model.qwk),
            spoken(one.model.accuracy),
            NONE if one.peer_qwk is None else spoken(one.peer_qwk),
            NONE if one.qwk_less_peers is None else spoken(one.qwk_less_peers, signed=True),
        )
        for arm in view.serious
        for one in arm.readers
        if one.reader is None or arm.arm in declared
    ]
    if rows:
        parts.append(
            Table(
                "The model in a reader's place: agreement with each reader, that of the other readers with "
                "the same one, and the difference on those that all graded. Single readers beside the "
                "declared arms only; results.csv has them all.",
                (
                    "Arm",
                    "Against",
                    f"{view.unit.capitalize()}s",
                    "QWK",
                    "Equal grades",
                    "QWK of other readers",
                    "Model minus readers",
                ),
                tuple(rows),
                words=(1,),
            )
        )
    return tuple(parts)


def sites(view: View) -> tuple[Part, ...]:
    """Sites and scanners against grades, and the figures at each."""
    result = view.result
    parts: list[Part] = []
    pairs = set(zip(result.site_of, result.scanner_of, strict=True))
    same = len(pairs) == len(set(result.site_of)) == len(set(result.scanner_of))
    shown = [("site", result.sites)] + ([] if same else [("scanner", result.scanners)])
    for name, found in shown:
        if found is None:
            continue
        v, p = found.cramers_v, found.p
        linked = "" if v is None or p is None else f" Cramér's V {v:.2f}, permutation {p_is(p)}."
        parts.append(
            Table(
                f"Slides by {name} and grade.{linked} Where the two hang together, a model can grade by "
                f"recognising the {name}.",
                (name.capitalize(), *view.comparison.grades, "all"),
                tuple(
                    (place or "(none given)", *map(str, counts), str(sum(counts)))
                    for place, counts in zip(found.sites, found.slides, strict=True)
                ),
            )
        )
    if not parts:
        return ("All slides are of one site and one scanner, or the manifest does not say.",)
    if same:
        parts.append("Every site has one scanner of its own, so nothing here tells a site from its scanner.")
    if result.site_in_embeddings:
        parts.append(
            Table(
                "How well the embeddings of slides tell the site of patients that neither the network nor "
                "the classifier of sites ever saw; stored features are of the pretrained network.",
                (
                    "Embeddings of",
                    "Balanced accuracy",
                    "Permuted sites: mean (95\N{NO-BREAK SPACE}%)",
                    "p",
                    "Patients",
                ),
                tuple(
                    (
                        name,
                        f"{told.balanced_accuracy:.2f}",
                        f"{told.null_mean:.2f} (up to {told.null_high:.2f})",
                        p_value(told.p),
                        str(told.n_patients),
                    )
                    for name, told in result.site_in_embeddings.items()
                ),
            )
        )
    elif len(set(result.site_of)) > 1:
        parts.append(
            "How well embeddings tell the site is not known: that takes a trained arm or one on stored "
            "features, sites of two patients or more that are in every training part, and patients of one "
            "site each."
        )
    for name, _ in shown:
        table = _by_place(view, name)
        if table is not None:
            parts.append(table)
    return tuple(parts)


def power(view: View) -> tuple[Part, ...]:
    """Where the variance comes from, and what differences so many patients can show."""
    parts: list[Part] = []
    split = [(arm.arm, arm.variance) for arm in view.arms if arm.variance is not None]
    if split:
        parts.append(
            Table(
                f"Where the variance of {view.name} comes from, as standard deviations: another split and "
                "initialisation (seed), another fold of the same patients beyond what its few patients "
                "explain, other patients to grade. Seed is unknown with one repeat, fold with one fold; a "
                "fold's share may fall below zero, where it is shown as 0.",
                ("Arm", "Seed", "Fold", "Patient", "Standard error of the figure"),
                tuple(
                    (
                        name,
                        NONE if found.seed is None else f"{np.sqrt(max(found.seed, 0)):.3f}",
                        NONE if found.fold is None else f"{np.sqrt(max(found.fold, 0)):.3f}",
                        f"{np.sqrt(max(found.patient, 0)):.3f}",
                        f"{found.standard_error:.3f}",
                    )
                    for name, found in split
                ),
            )
        )
    if view.result.power:
        parts.append(
            Table(
                f"Power, by simulation: how often a study of {view.n_patients} patients and "
                f"{len(view.result.slides)} slides finds a true difference (its 95\N{NO-BREAK SPACE}% "
                "interval excludes zero). The first row has no difference: it is the rate of false alarms. "
                "It assumes arms whose errors on one slide correlate by 0.7, and those of an arm on two "
                "slides of a patient by 0.3, before rounding.",
                ("True accuracies", "True QWK", "Power by QWK", "Power by accuracy"),
                tuple(
                    (
                        f"{row.accuracy_first:.2f} against {row.accuracy_second:.2f}",
                        f"{row.qwk_first:.2f} against {row.qwk_second:.2f}",
                        f"{row.power_qwk:.2f}",
                        f"{row.power_accuracy:.2f}",
                    )
                    for row in view.result.power
                ),
            )
        )
    return tuple(parts) or ("A fold has a single patient: no variance can be split.",)


def limits(view: View) -> tuple[Part, ...]:
    """What the comparison does not show."""
    protocol = view.protocol
    said = [
        f"It does not show that one way is better in general. It is a comparison on {view.n_patients} "
        "patients of one study; another scanner, stain or population may turn it round.",
        "Intervals are conditional on the fitted models. Trainings on other patients would add variance that "
        "resampling the graded ones cannot show"
        + (
            "; with one repeat, nor is the seed's share known."
            if protocol.repeats == 1
            else f"; {protocol.repeats} repeats share the same patients and are no substitute for them."
        ),
        "A difference that was not found is not a proof that there is none: the power table says how large "
        "one would have to be.",
    ]
    if view.result.ceiling is None:
        said.append(
            "Without two readers' grades the noise of the labels is unknown, and with it how much of the "
            "error is the model's."
        )
    else:
        said.append(
            "Above the ceiling that the readers' noise sets, a higher figure means chance, or a model that "
            "has learned the readers' habits, not one that grades better."
        )
    if len(set(view.result.site_of)) > 1 and not protocol.leave_one_site_out:
        said.append(
            "Sites are on both sides of the splits. How well a model does at a site that it never saw, only "
            "leave_one_site_out tells."
        )
    said.append(
        "Where slides are synthetic it shows that the machinery is right and how arms behave where the truth "
        "is known; it cannot show that any of them helps on tissue."
    )
    return tuple(said)


def provenance(view: View) -> tuple[Part, ...]:
    """Seeds, versions, and what was computed."""
    protocol, result = view.protocol, view.result
    folds: dict[tuple[int, str], Unit] = {}
    for arm in result.arms:
        folds |= {(unit.fold.repeat, unit.fold.name): unit for unit, _ in arm.units}
    seeds = ", ".join(
        f"{name} of repeat {repeat}: {unit.fold.seed}" for (repeat, name), unit in folds.items()
    )
    about = [
        ("slidetl", slidetl.__version__),
        ("Python", platform.python_version()),
        *((name, importlib.metadata.version(name)) for name in _SOFTWARE),
        ("Splits, SHA-256", result.splits_sha256),
        ("Seed of the splits", str(protocol.seed)),
        ("Seeds of the folds", seeds),
        ("Repeats", str(protocol.repeats)),
        ("Bootstrap draws", str(view.comparison.bootstrap_draws)),
        (
            "Near-duplicates",
            f"looked for from a correlation of {view.comparison.near_duplicates:g}"
            if view.comparison.near_duplicates
            else "not looked for",
        ),
    ]
    return (
        Table(
            "Of the machine that wrote this page. Units were computed by the version in their unit.json.",
            ("What", "Value"),
            tuple(about),
            words=(1,),
        ),
        Table(
            "Units (one arm on one fold) and what they took.",
            ("Arm", "Units", "Seconds a unit, mean", "Minutes in all", "Epochs", "Temperature"),
            tuple(_unit_row(arm) for arm in (*view.arms, *result.smaller)),
        ),
        "Beside this page: results.csv (figures, intervals and p-values to six digits), predictions.csv, "
        "curves.csv, drift.csv, similarity.csv, units.csv, splits.json, and figures/ as SVG and PNG.",
    )


def _ceiling(view: View) -> tuple[float, str] | None:
    """Of the primary figure: what labels of the kind that are used leave to be reached."""
    found, name = view.result.ceiling, view.comparison.primary.figure
    if found is None or name not in ("qwk", "accuracy"):
        return None
    one, other = view.result.readings[:, 0], view.result.readings[:, 1]
    both = (one >= 0) & (other >= 0)
    one, other, labels = one[both], other[both], view.result.true[both]
    if np.array_equal(labels, one) or np.array_equal(labels, other):
        return (found.qwk if name == "qwk" else found.accuracy), "one reader, whose grades the labels are"
    if np.array_equal((one + other + 1) // 2, labels):
        value = found.consensus_qwk if name == "qwk" else found.consensus_accuracy
        return value, "the rounded mean of both readers' grades, which the labels are"
    if ((np.minimum(one, other) <= labels) & (labels <= np.maximum(one, other))).all():
        value = found.together_qwk if name == "qwk" else found.together_accuracy
        return value, "what both readers settle on, between their grades, as the labels lie"
    return (found.qwk if name == "qwk" else found.accuracy), "one reader"


def _audit(view: View) -> str:
    """What the splits were audited for."""
    alike = ", or slides that look alike," if view.comparison.near_duplicates else ""
    joined = (
        f" Slides that are the same{alike.removesuffix(',')} counted as one patient's."
        if view.comparison.duplicates == "join"
        else ""
    )
    return f"a patient or a slide's content on both sides{alike} would have stopped the run.{joined}"


def _what_it_is(view: View, name: str) -> tuple[str, str]:
    arm = view.comparison.arms[name]
    if arm.baseline is not None:
        return f"trivial: {_BASELINES[arm.baseline]}", NONE
    if arm.classical is not None:
        pool = arm.classical.pool + (f" {arm.classical.k}" if arm.classical.pool == "top-k" else "")
        features = " and ".join(arm.classical.features)
        return f"{arm.classical.model} on stored features ({features}), {pool} pooling", (
            NONE if arm.classical.model == "trees" else "its penalty"
        )
    config = view.comparison.fit_config(name)
    model, trainer = config["model"], config["trainer"]
    parts = [_named(model.get("transfer"), "as 'slidetl fit' by default")]
    backbone = model.get("backbone", {})
    parts.append(str(backbone.get("name", "default backbone")))
    result = next(arm for arm in view.arms if arm.arm == name)
    if backbone.get("pretrained") and any(found.drift for _, found in result.units):
        parts.append(f"pretrained: {Path(str(backbone['pretrained'])).name}")
    parts += [_named(model[key], "") for key in ("aggregator", "head") if key in model]
    parts += [f"lr {model['lr']:g}"] if isinstance(model.get("lr"), int | float) else []
    parts += [f"{trainer['max_epochs']} epochs at most"] if "max_epochs" in trainer else []
    chosen = [f"{key.split('.')[-1]} of {_list(values)}" for key, values in arm.choices.items()]
    chosen += ["epochs"] if view.protocol.is_nested else []
    return "; ".join(parts), ", ".join(chosen) or NONE


def _against_chance(view: View) -> tuple[Part, ...]:
    tested = [arm for arm in view.arms if arm.chance_p is not None]
    if not tested:
        return ()
    return (
        Table(
            f"Against chance: {view.name} against whole cross-validations refitted on labels permuted over "
            "patients. The least p that n of them can give is 1 / (n + 1).",
            ("Arm", view.name, "Refits", "p"),
            tuple(
                (
                    arm.arm,
                    spoken(arm.figures[view.comparison.primary.figure]),
                    str(arm.n_permuted),
                    p_value(arm.chance_p) if arm.chance_p is not None else NONE,
                )
                for arm in tested
            ),
        ),
    )


def _by_place(view: View, name: str) -> Table | None:
    groups = {arm.arm: (arm.sites if name == "site" else arm.scanners) for arm in view.arms}
    first = next((found for found in groups.values() if found), None)
    if first is None:
        return None
    places = [f"{group.group or '(none given)'} ({group.n})" for group in first["qwk"]]
    return Table(
        f"QWK per {view.unit} at each {name} ({view.unit}s in brackets). Few patients each: wide intervals.",
        ("Arm", *places),
        tuple(
            (
                arm,
                *(NONE if group.figure is None else spoken(group.figure) for group in found["qwk"]),
            )
            for arm, found in groups.items()
            if found
        ),
    )


def _unit_row(arm: ArmResult) -> tuple[str, ...]:
    seconds = [found.seconds for _, found in arm.units]
    epochs = [int(found.chosen["epochs"]) for _, found in arm.units if found.chosen]
    temperatures = [found.temperature for _, found in arm.units if found.nested]
    return (
        arm.label,
        str(len(arm.units)),
        f"{np.mean(seconds):.1f}",
        f"{sum(seconds) / 60:.1f}",
        span(epochs) if epochs else NONE,
        f"{min(temperatures):.2f} to {max(temperatures):.2f}" if temperatures else NONE,
    )


def _to_digits(name: Figure, interval: Interval) -> str:
    return three(interval) if name == "rps" else spoken(interval)


def _difference_row(pair: PairedDifference) -> tuple[str, ...]:
    t = pair.corrected_t
    return (
        pair.arm,
        spoken(pair.interval, signed=True),
        p_value(pair.sign_flip.p),
        "declared" if pair.p_holm is None else p_value(pair.p_holm),
        NONE if t is None else spoken(Interval(t.difference, t.low, t.high, t.level), signed=True),
        NONE if t is None else p_value(t.p),
    )


def _named(value: Any, default: str) -> str:
    """A class of a configuration, with its arguments."""
    if not isinstance(value, Mapping) or "class_path" not in value:
        return default
    arguments = ", ".join(
        f"{key} {_list(v) if isinstance(v, list) else v}" for key, v in value.get("init_args", {}).items()
    )
    name = str(value["class_path"]).rsplit(".", 1)[-1]
    return f"{name} ({arguments})" if arguments else name


def _list(values: Iterable[object]) -> str:
    return " / ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _reader(number: int | None) -> str:
    return "consensus" if number is None else f"reader {number + 1}"
