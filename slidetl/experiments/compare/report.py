"""A comparison as a page: the declared comparison first, then what it rests on, then what limits it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import slidetl
from slidetl.evaluation.bootstrap import Interval
from slidetl.experiments.compare.config import FIGURES, Figure
from slidetl.experiments.compare.plan import Unit
from slidetl.experiments.compare.result import RISK, ArmResult, ComparisonResult, PairedDifference
from slidetl.experiments.compare.unit import CurvePoint, UnitResult
from slidetl.report.experiment import Drawing, Section, Table, write_experiment
from slidetl.report.experiment_figures import (
    ForestRow,
    LearningCurve,
    Look,
    draw_confusions,
    draw_forest,
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

PAGE, FIGURES_FOLDER = "report.html", "figures"
_NAMES: dict[Figure, str] = {
    "qwk": "QWK",
    "accuracy": "Accuracy",
    "mae": "Mean absolute error",
    "rps": "RPS",
    "log_loss": "Log loss",
}
_BASELINES = {
    "prior": "how common each grade is among the training slides",
    "site": "how common each grade is at the slide's site",
    "colour_area": "mean colour and tissue area; the best of three classifiers",
    "collagen": "area stained as collagen, by colour deconvolution; the best of three classifiers",
}
_RESULTS = {
    "worst": "patients, each by the worst of its slides",
    "mean": "patients, each by the mean of its slides",
    "slide": "slides",
}
_SOFTWARE = ("torch", "pytorch-lightning", "timm", "scikit-learn", "scipy", "numpy")
# As the choice of an epoch in the inner folds: a smaller difference in RPS says nothing on twenty slides.
_PLATEAU = 0.02
_NONE = "–"
_LAYERS = "Lines are means over folds, bands from the least to the greatest; the lowest layer is on the left."

_Part = str | Drawing | Table


def write_report(result: ComparisonResult, output: Path, failed: Mapping[str, str] | None = None) -> None:
    """Writes ``report.html`` and ``figures/*.svg`` and ``*.png`` into the folder of a comparison.

    The page needs no network and no other file. It says what is missing where arms are not complete; figures
    of an earlier report that this one has not are removed.

    Args:
        result: of :func:`~slidetl.experiments.compare.result.combine`.
        output: the folder.
        failed: why units failed, by their labels.

    Raises:
        OSError: something cannot be written.
    """
    _Report(result, output / FIGURES_FOLDER, failed or {}).write(output / PAGE)


class _Report:
    """What all sections share: arms in order, with a look each."""

    def __init__(self, result: ComparisonResult, folder: Path, failed: Mapping[str, str]) -> None:
        self._result, self._folder, self._failed = result, folder, failed
        self._comparison, self._protocol = result.comparison, result.comparison.protocol
        primary = result.comparison.primary
        order = {primary.arm: 0, primary.against: 1}
        configured = result.comparison.arms
        trivial = [name for name, arm in configured.items() if arm.baseline is not None]
        self._arms = sorted(result.arms, key=lambda arm: (order.get(arm.arm, 2), arm.arm in trivial))
        self._trivial = [arm.arm for arm in self._arms if arm.arm in trivial]
        self._serious = [arm for arm in self._arms if arm.arm not in trivial] or self._arms
        self._looks: dict[str, Look] = looks_of([arm.arm for arm in self._arms], self._trivial)
        self._name = _NAMES[primary.figure]
        self._n_patients = len(set(result.patients.tolist()))

    def write(self, page: Path) -> None:
        primary = self._comparison.primary
        sections = [
            Section("arms", "The arms", self._forest()),
            Section("protocol", "What was compared, and how", self._about()),
            Section("others", f"All others against {primary.against}", self._others()),
            Section("confusion", "Where the grades go", self._confusion()),
            Section("learning", "Speed of learning", self._learning()),
            Section("sizes", "Number of training slides", self._sizes()),
            Section("calibration", "Do the probabilities mean what they say?", self._calibration()),
            Section("referral", "Sets of grades, and slides left to a human", self._referral()),
            Section("readers", "The readers", self._readers()),
            Section("sites", "Sites and scanners", self._sites()),
            Section("repeatability", "Repeatability of the score", self._repeatability()),
            Section("power", "Variance and power", self._power()),
            Section("layers", "What training changed, layer by layer", self._layers()),
            Section("limits", "What this does not show", self._limits()),
            Section("provenance", "Seeds, versions and files", self._provenance()),
        ]
        title = f"{primary.arm} against {primary.against}: a comparison of {len(self._arms)} arms"
        write_experiment(page, title, self._notices(), self._summary(), sections)
        drawn = {
            part.path.stem for section in sections for part in section.parts if isinstance(part, Drawing)
        }
        for old in self._folder.glob("*.svg"):
            if old.stem not in drawn:
                old.unlink()
                old.with_suffix(".png").unlink(missing_ok=True)

    def _notices(self) -> list[str]:
        result = self._result
        notices = []
        if result.incomplete:
            left = "; ".join(
                f"{name} ({done} of {planned} units)" for name, (done, planned) in result.incomplete.items()
            )
            notices.append(
                f"This comparison is not finished. Not complete, and in no figure below: {left}. The same "
                "command goes on where it was ended."
            )
        known = {arm.arm for arm in result.arms}
        left_out = [
            name
            for name in self._comparison.arms
            if name not in known and not any(label.split(" (")[0] == name for label in result.incomplete)
        ]
        if left_out:
            notices.append(f"Arms of the configuration that were not asked for: {', '.join(left_out)}.")
        if self._failed:
            label, reason = next(iter(self._failed.items()))
            notices.append(f"{len(self._failed)} units failed, the first of them {label}: {reason}")
        if not self._protocol.is_nested:
            notices.append(
                "Not nested: hyper-parameters and the number of epochs were fixed before, by whoever wrote "
                "the configuration. If they were chosen on these slides, every figure here is too good."
            )
        return notices

    def _summary(self) -> list[str]:
        primary, declared = self._comparison.primary, self._result.primary
        if declared is None:
            return [
                f"The comparison declared beforehand, {primary.arm} against {primary.against} by "
                f"{self._name}, is not complete yet."
            ]
        of = {arm.arm: arm for arm in self._arms}
        one, other = of[declared.arm].figures[primary.figure], of[declared.against].figures[primary.figure]
        apart = _excludes_zero(declared.interval)
        lower = primary.figure in ("mae", "rps", "log_loss")
        verdict = (
            "The interval contains zero: these patients do not settle which is better."
            if not apart
            else f"The interval excludes zero, in favour of "
            f"{declared.arm if (declared.interval.estimate > 0) != lower else declared.against}."
        )
        tests = [f"sign-flip test over patients p = {_p(declared.sign_flip.p)}"]
        if declared.corrected_t is not None:
            tests.append(f"corrected resampled t over folds p = {_p(declared.corrected_t.p)}")
        return [
            f"Difference in {self._name}, {declared.arm} minus {declared.against}: "
            f"{spoken(declared.interval, signed=True)}, paired over {self._n_results}. {verdict}",
            f"{declared.arm} reaches {spoken(one)} and {declared.against} {spoken(other)}, with "
            f"{percent(one.level)} intervals. This comparison was declared before anything ran. Secondary "
            f"tests of the same difference: {'; '.join(tests)}.",
        ]

    @property
    def _n_results(self) -> str:
        n = len(self._arms[0].results.true)
        return f"{n} {'slides' if self._protocol.unit == 'slide' else 'patients'}"

    def _forest(self) -> tuple[_Part, ...]:
        result, primary = self._result, self._comparison.primary
        pairs = {pair.arm: pair.interval for pair in result.differences}
        if result.primary is not None:
            pairs[primary.arm] = result.primary.interval
        rows = [
            ForestRow(
                arm.arm,
                arm.figures[primary.figure],
                arm.by_repeat[primary.figure],
                pairs.get(arm.arm),
                arm.arm in self._trivial,
            )
            for arm in self._arms
        ]
        lower = f"{_NAMES['mae']} (in grades), RPS and log loss are better when lower."
        table = Table(
            f"All figures with {percent(rows[0].figure.level)} intervals, of out-of-fold predictions pooled "
            "within "
            f"a repeat, averaged over repeats. {lower}",
            ("Arm", *(_NAMES[name] for name in FIGURES)),
            tuple((arm.label, *(spoken(arm.figures[name]) for name in FIGURES)) for arm in self._arms),
            strong=tuple(
                number for number, arm in enumerate(self._arms) if arm.arm in (primary.arm, primary.against)
            ),
        )
        ceiling = self._ceiling()
        return (
            draw_forest(
                self._folder,
                rows,
                self._name,
                primary.against,
                None if ceiling is None else ceiling[0],
                result.primary is not None,
            ),
            table,
            "Intervals resample patients (bias-corrected and accelerated bootstrap, "
            f"{self._comparison.bootstrap_draws} draws). They are conditional on the fitted models: they say "
            "how the figures would vary with other patients to be graded, not with other patients, folds or "
            "seeds to be trained on. The section on variance says how much these add.",
        )

    def _ceiling(self) -> tuple[float, str] | None:
        """Of the primary figure: what labels of the kind that are used leave to be reached."""
        found, name = self._result.ceiling, self._comparison.primary.figure
        if found is None or name not in ("qwk", "accuracy"):
            return None
        one, other = self._result.readings[:, 0], self._result.readings[:, 1]
        both = (one >= 0) & (other >= 0)
        of_both = np.array_equal((one + other + 1)[both] // 2, self._result.true[both])
        if of_both and self._result.readings.shape[1] == 2:
            value = found.consensus_qwk if name == "qwk" else found.consensus_accuracy
            return value, "the consensus of both readers, which the labels are"
        return (found.qwk if name == "qwk" else found.accuracy), "one reader"

    def _about(self) -> tuple[_Part, ...]:
        result, protocol = self._result, self._protocol
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
        repeats = (
            f", {protocol.repeats} times over with other folds and seeds" if protocol.repeats > 1 else ""
        )
        if not protocol.is_nested:
            choice = (
                "Nothing was chosen by the data: hyper-parameters and epochs were fixed (not nested), and "
                "the "
                "probabilities are as the networks gave them."
            )
        else:
            inner = "the given val part" if protocol.given_split else f"{protocol.inner_folds} inner folds"
            choice = (
                f"Every choice (the number of epochs, the values listed as choices below, the temperature of "
                f"the probabilities) was made in {inner} of each training part, by the ranked probability "
                "score; then the arm was trained once on the whole training part. No test slide had a say."
            )
        grades = ", ".join(self._comparison.grades)
        return (
            f"{len(result.slides)} tested slides of {self._n_patients} patients{sites}, in "
            f"{len(self._comparison.grades)} grades ({grades}). Figures are of {self._n_results}"
            + ("" if protocol.unit == "slide" else f" ({_RESULTS[protocol.unit].split(', ')[1]})")
            + f". {splits}{repeats}: {_range(trained)} slides to train on, {_range(tested)} to test. "
            f"{choice}",
            "All arms saw the same splits and seeds. The splits (SHA-256 "
            f"{result.splits_sha256[:16]}…, splits.json) were audited before anything was fitted: a patient, "
            "a slide's content or a slide that looks like another on both sides would have stopped the run"
            + (
                "; slides that are the same or look alike counted as one patient's."
                if self._comparison.duplicates == "join"
                else "."
            ),
            Table(
                "The arms as configured. Trivial arms are what anything must beat.",
                ("Arm", "What it is", "Chosen in inner folds"),
                tuple((arm.arm, *self._what_it_is(arm.arm)) for arm in self._arms),
                words=(1, 2),
            ),
            Table(
                "Tested slides by grade.",
                ("", *self._comparison.grades, "all"),
                (
                    (
                        "slides",
                        *(str(int((result.true == grade).sum())) for grade in range(self._n_grades)),
                        str(len(result.true)),
                    ),
                ),
            ),
        )

    @property
    def _n_grades(self) -> int:
        return len(self._comparison.grades)

    def _what_it_is(self, name: str) -> tuple[str, str]:
        arm = self._comparison.arms[name]
        if arm.baseline is not None:
            return f"trivial: {_BASELINES[arm.baseline]}", _NONE
        if arm.classical is not None:
            pool = arm.classical.pool + (f" {arm.classical.k}" if arm.classical.pool == "top-k" else "")
            features = " and ".join(arm.classical.features)
            return f"{arm.classical.model} on stored features ({features}), {pool} pooling", "its penalty"
        config = self._comparison.fit_config(name)
        model, trainer = config["model"], config["trainer"]
        parts = [_named(model.get("transfer"), "as 'slidetl fit' by default")]
        backbone = model.get("backbone", {})
        parts.append(str(backbone.get("name", "default backbone")))
        if backbone.get("pretrained"):
            parts.append(f"pretrained: {Path(str(backbone['pretrained'])).name}")
        parts += [_named(model[key], "") for key in ("aggregator", "head") if key in model]
        parts += [f"lr {model['lr']:g}"] if isinstance(model.get("lr"), int | float) else []
        parts += [f"{trainer['max_epochs']} epochs at most"] if "max_epochs" in trainer else []
        chosen = [f"{key.split('.')[-1]} of {_list(values)}" for key, values in arm.choices.items()]
        chosen += ["epochs"] if self._protocol.is_nested else []
        return "; ".join(parts), ", ".join(chosen) or _NONE

    def _others(self) -> tuple[_Part, ...]:
        against, pairs = self._comparison.primary.against, self._result.differences
        if not pairs:
            return (f"There is no other arm to compare with {against}, or {against} is not complete.",)
        rows = ([self._result.primary] if self._result.primary else []) + sorted(
            pairs, key=lambda pair: [arm.arm for arm in self._arms].index(pair.arm)
        )
        return (
            "A family of secondary comparisons, whose p-values are corrected after Holm. The declared one "
            "stands outside of the family and is not corrected.",
            Table(
                f"Paired differences in {self._name}, arm minus {against}. Sign flips swap the arms' grades "
                "of "
                "whole patients, in the first repeat; the corrected t (Nadeau and Bengio) is over folds.",
                (
                    "Arm",
                    "Difference",
                    "p, sign flips",
                    "p, after Holm",
                    "Difference over folds",
                    "p, corrected t",
                ),
                tuple(_difference_row(pair) for pair in rows),
                strong=(0,) if self._result.primary else (),
            ),
            *self._against_chance(),
        )

    def _against_chance(self) -> tuple[_Part, ...]:
        tested = [arm for arm in self._arms if arm.chance_p is not None]
        if not tested:
            return ()
        n = self._comparison.permutations.n
        return (
            Table(
                f"Against chance: {self._name} against {n} whole cross-validations refitted on labels "
                f"permuted over patients. The least p that so many can give is {1 / (n + 1):.3f}.",
                ("Arm", self._name, "p"),
                tuple(
                    (
                        arm.arm,
                        spoken(arm.figures[self._comparison.primary.figure]),
                        _p(arm.chance_p) if arm.chance_p is not None else _NONE,
                    )
                    for arm in tested
                ),
            ),
        )

    def _confusion(self) -> tuple[_Part, ...]:
        shown = [arm for arm in self._arms if arm.arm not in self._trivial] + [
            arm for arm in self._arms if arm.arm in self._trivial
        ]
        counts = {arm.arm: arm.confusion for arm in shown}
        grades = self._comparison.grades
        return (
            draw_confusions(self._folder, counts, grades, self._protocol.repeats),
            Table(
                "How well each arm tells grades above a threshold from those up to it: area under the ROC "
                "curve, first repeat. 0.5 is chance.",
                ("Arm", *(f"above {grade}" for grade in grades[:-1])),
                tuple(
                    (arm.arm, *(_NONE if area is None else f"{area:.2f}" for area in arm.quality.auroc))
                    for arm in shown
                ),
            ),
        )

    def _learning(self) -> tuple[_Part, ...]:
        curves = {arm.arm: curve for arm in self._serious if (curve := self._curve(arm)) is not None}
        if not curves:
            return ("No arm has epochs: there is no curve.",)
        nested = self._protocol.is_nested
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
        primary = self._comparison.primary
        return (
            "The same arms at equal epochs, and at convergence: part of a gap may be speed alone."
            + (
                " In the inner folds every training runs to its last epoch, so these curves are whole; they "
                "are of smaller training parts than the figures above."
                if nested
                else ""
            ),
            draw_learning(
                self._folder,
                curves,
                self._looks,
                {"qwk": "QWK", "rps": "RPS (lower is better)"},
                (primary.arm, primary.against),
                part,
            ),
            Table(
                "QWK at equal epochs, and at the plateau: the earliest point whose RPS is within "
                f"{percent(_PLATEAU)} "
                f"of the arm's best. Per slide of {part}; means over trainings, on the machines that ran "
                "them.",
                (
                    "Arm",
                    *(f"QWK after {epoch}" for epoch in shown),
                    "Epochs to plateau",
                    "Seconds to plateau",
                    "QWK there",
                    "Seconds an epoch",
                ),
                tuple(rows),
            ),
        )

    def _curve(self, arm: ArmResult) -> LearningCurve | None:
        """Of the chosen trial in the inner folds where there are any, else of the test parts."""
        series: list[list[CurvePoint]] = []
        for _, found in arm.units:
            by_part: dict[str, list[CurvePoint]] = {}
            trial = self._chosen_trial(arm.arm, found)
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

    def _chosen_trial(self, arm: str, found: UnitResult) -> int:
        values = {key: value for key, value in (found.chosen or {}).items() if key != "epochs"}
        trials = self._comparison.trials(arm)
        return trials.index(values) if values in trials else 0

    def _sizes(self) -> tuple[_Part, ...]:
        smaller = self._result.smaller
        if not smaller:
            return ("No arm was trained on fewer slides (sizes in the configuration).",)
        whole = float(np.mean([train for train, _ in self._result.fold_sizes]))
        figures = {"qwk": "QWK", "accuracy": "Accuracy"}
        sizes: dict[str, dict[float, dict[str, Interval]]] = {}
        for arm in (*smaller, *self._arms):
            size = whole if arm.n_slides is None else float(arm.n_slides)
            if arm.n_slides is not None or arm.arm in sizes:
                sizes.setdefault(arm.arm, {})[size] = {
                    "qwk": arm.figures["qwk"],
                    "accuracy": arm.figures["accuracy"],
                }
        looks = {name: self._looks.get(name) or looks_of([name])[name] for name in sizes}
        return (
            draw_sizes(self._folder, sizes, looks, figures),
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

    def _calibration(self) -> tuple[_Part, ...]:
        rows = tuple(
            (
                arm.arm,
                _NONE if arm.slope.slope is None else spoken(arm.slope.slope),
                spoken(arm.slope.intercept, signed=True),
                f"{arm.null.error:.3f}",
                f"{arm.null.null_mean:.3f} (up to {arm.null.null_high:.3f})",
                _p(arm.null.p),
            )
            for arm in self._arms
        )
        source = (
            "Probabilities are calibrated by one temperature from the inner folds."
            if self._protocol.is_nested
            else "Probabilities are as the networks gave them: without inner folds there is no temperature."
        )
        return (
            source,
            draw_reliability(self._folder, {arm.arm: arm.bins for arm in self._serious}),
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

    def _referral(self) -> tuple[_Part, ...]:
        shown = {arm.arm: arm.referral for arm in self._serious}
        sets = [arm for arm in self._arms if arm.sets is not None]
        parts: list[_Part] = []
        if sets:
            parts.append(
                Table(
                    f"Contiguous sets of grades that were asked to miss the truth of {percent(RISK)} of "
                    "patients, "
                    "made on other folds and checked on each fold in turn. Coverage is marginal, over all "
                    "patients: it is promised for no single grade.",
                    (
                        "Arm",
                        "Patients covered",
                        "Slides covered",
                        "Grades in a set, mean",
                        f"Slides with sets of 1 to {self._n_grades}",
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
            draw_referral(self._folder, shown, self._looks, next(iter(shown)))  # the primary one, if complete
        )
        parts.append(
            Table(
                "Share of wrong grades, per slide, first repeat: of all slides, of the surer ones, and the "
                "area under the curve.",
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

    def _readers(self) -> tuple[_Part, ...]:
        result = self._result
        if not result.readings.shape[1]:
            return ("The manifest has no readers' grades, so nothing is known of the noise in the labels.",)
        parts: list[_Part] = []
        ceiling = result.ceiling
        if result.readers:
            parts.append(
                Table(
                    "Agreement between readers.",
                    ("Readers", "Slides", "QWK", "Kappa", "Equal grades"),
                    tuple(
                        (
                            f"{_reader(pair.first)} and {_reader(pair.second)}",
                            str(pair.n_slides),
                            *(spoken(value) for value in (pair.qwk, pair.kappa, pair.accuracy)),
                        )
                        for pair in result.readers
                    ),
                )
            )
        else:
            parts.append("One reader alone: agreement, and the ceiling that it sets, cannot be known.")
        if ceiling is not None:
            known = self._ceiling()
            by_other = (
                ""
                if ceiling.qwk_by_attenuation is None
                else f" (by the attenuation formula {ceiling.qwk_by_attenuation:.2f})"
            )
            parts.append(
                "The readers' noise sets a ceiling. A model that always told the true grade would, judged "
                "by "
                f"one reader, reach an accuracy of {ceiling.accuracy:.2f} [{ceiling.low:.2f}, "
                f"{ceiling.high:.2f}] and a QWK of {ceiling.qwk:.2f}{by_other}; judged by the consensus of "
                "two, "
                f"{ceiling.consensus_accuracy:.2f} and {ceiling.consensus_qwk:.2f}. A reader's error has a "
                f"standard deviation of {ceiling.reader_sd:.2f} grades. Errors that readers share are not in "
                "it, so the true ceiling may be lower."
                + ("" if known is None else f" The forest plot shows that for {known[1]}.")
            )
        declared = (self._comparison.primary.arm, self._comparison.primary.against)
        rows = [
            (
                arm.arm,
                "consensus" if one.reader is None else _reader(one.reader),
                str(one.model.n_slides),
                spoken(one.model.qwk),
                spoken(one.model.accuracy),
                _NONE if one.peer_qwk is None else spoken(one.peer_qwk),
                _NONE if one.qwk_less_peers is None else spoken(one.qwk_less_peers, signed=True),
            )
            for arm in self._serious
            for one in arm.readers
            if one.reader is None or arm.arm in declared
        ]
        if rows:
            parts.append(
                Table(
                    "The model in a reader's place: agreement with each reader, that of the other readers "
                    "with the same one, and the difference on the slides that all graded. Single readers "
                    "beside the "
                    "declared arms only; results.csv has them all.",
                    (
                        "Arm",
                        "Against",
                        "Slides",
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

    def _sites(self) -> tuple[_Part, ...]:
        result = self._result
        parts: list[_Part] = []
        pairs = set(zip(result.site_of, result.scanner_of, strict=True))
        same = len(pairs) == len(set(result.site_of)) == len(set(result.scanner_of))
        shown = [("site", result.sites)] + ([] if same else [("scanner", result.scanners)])
        for name, found in shown:
            if found is None:
                continue
            v, p = found.cramers_v, found.p
            linked = "" if v is None or p is None else f" Cramér's V {v:.2f}, permutation p = {_p(p)}."
            parts.append(
                Table(
                    f"Slides by {name} and grade.{linked} Where the two hang together, a model can grade by "
                    f"recognising the {name}.",
                    (name.capitalize(), *self._comparison.grades, "all"),
                    tuple(
                        (place or "(none given)", *map(str, counts), str(sum(counts)))
                        for place, counts in zip(found.sites, found.slides, strict=True)
                    ),
                )
            )
        if not parts:
            return ("All slides are of one site and one scanner, or the manifest does not say.",)
        if same:
            parts.append(
                "Every site has one scanner of its own, so nothing here tells a site from its scanner."
            )
        if result.site_in_features:
            parts.append(
                Table(
                    "How well stored features tell the site of patients that the classifier never saw.",
                    (
                        "Features",
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
                            _p(told.p),
                            str(told.n_patients),
                        )
                        for name, told in result.site_in_features.items()
                    ),
                )
            )
        for name, _ in shown:
            table = self._by_place(name)
            if table is not None:
                parts.append(table)
        return tuple(parts)

    def _by_place(self, name: str) -> Table | None:
        groups = {arm.arm: (arm.sites if name == "site" else arm.scanners) for arm in self._arms}
        first = next((found for found in groups.values() if found), None)
        if first is None:
            return None
        places = [f"{group.group or '(none given)'} ({group.n_slides})" for group in first["qwk"]]
        return Table(
            f"QWK per slide at each {name} (slides in brackets). Few patients each: wide intervals.",
            ("Arm", *places),
            tuple(
                (
                    arm,
                    *(_NONE if group.figure is None else spoken(group.figure) for group in found["qwk"]),
                )
                for arm, found in groups.items()
                if found
            ),
        )

    def _repeatability(self) -> tuple[_Part, ...]:
        known = [(arm.arm, arm.repeatability) for arm in self._arms if arm.repeatability is not None]
        if not known:
            return ("No arm grades a slide by a draw of its tiles, so its score repeats itself exactly.",)
        return (
            "Beside its grade a slide has a continuous score, the expected grade. A network that looks at a "
            "part of the tiles gives another score for another draw.",
            Table(
                "Spread of the score over draws of tiles. A change of one slide's score below the minimal "
                "detectable change is noise of the draw (95\N{NO-BREAK SPACE}%). ICC: share of a single "
                "draw's variance that is "
                "between slides.",
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
                        _three(found.within_sd),
                        _three(found.icc),
                        _three(found.minimal_detectable_change),
                    )
                    for name, found in known
                ),
            ),
        )

    def _power(self) -> tuple[_Part, ...]:
        parts: list[_Part] = []
        split = [(arm.arm, arm.variance) for arm in self._arms if arm.variance is not None]
        if split:
            parts.append(
                Table(
                    f"Where the variance of {self._name} comes from, as standard deviations: another split "
                    "and "
                    "initialisation (seed), another fold of the same patients beyond what its few patients "
                    "explain, other patients to grade. Seed is unknown with one repeat; a fold's share may "
                    "fall "
                    "below zero, where it is shown as 0.",
                    ("Arm", "Seed", "Fold", "Patient", "Standard error of the figure"),
                    tuple(
                        (
                            name,
                            _NONE if found.seed is None else f"{np.sqrt(max(found.seed, 0)):.3f}",
                            f"{np.sqrt(max(found.fold, 0)):.3f}",
                            f"{np.sqrt(max(found.patient, 0)):.3f}",
                            f"{found.standard_error:.3f}",
                        )
                        for name, found in split
                    ),
                )
            )
        if self._result.power:
            parts.append(
                Table(
                    f"Power, by simulation: how often a study of {self._n_patients} patients and "
                    f"{len(self._result.slides)} slides finds a true difference (its 95\N{NO-BREAK SPACE}% "
                    "interval excludes "
                    "zero). The first row has no difference: it is the rate of false alarms. It assumes arms "
                    "whose errors on one slide correlate by 0.7, before rounding.",
                    ("True accuracies", "True QWK", "Power by QWK", "Power by accuracy"),
                    tuple(
                        (
                            f"{row.accuracy_first:.2f} against {row.accuracy_second:.2f}",
                            f"{row.qwk_first:.2f} against {row.qwk_second:.2f}",
                            f"{row.power_qwk:.2f}",
                            f"{row.power_accuracy:.2f}",
                        )
                        for row in self._result.power
                    ),
                )
            )
        return tuple(parts) or ("A single fold splits no variance.",)

    def _layers(self) -> tuple[_Part, ...]:
        parts: list[_Part] = []
        drift = {arm.arm: found for arm in self._serious if (found := _by_layer(arm, "drift"))}
        if drift:
            parts += [
                draw_layers(
                    self._folder,
                    "drift",
                    drift,
                    self._looks,
                    "||w − w0|| / ||w0||",
                    "Distance of each layer's weights from the pretrained ones when training ended, relative "
                    f"to their length. {_LAYERS}",
                ),
                _layer_table(drift, "Distance from the pretrained weights, means over layers and folds."),
            ]
        else:
            parts.append("No arm starts from pretrained weights, so there is nothing to drift away from.")
        similar = {arm.arm: found for arm in self._serious if (found := _by_layer(arm, "similarity"))}
        if similar:
            parts += [
                draw_layers(
                    self._folder,
                    "similarity",
                    similar,
                    self._looks,
                    "linear CKA, before and after",
                    "How alike what each block makes of test tiles is before and after training (linear CKA, "
                    "unbiased: 1 for the same, about 0 for unrelated). A network from scratch is compared "
                    f"with its random start, in evaluation mode. {_LAYERS}",
                ),
                _layer_table(similar, "Similarity before and after training, means over blocks and folds."),
            ]
        return tuple(parts)

    def _limits(self) -> tuple[_Part, ...]:
        protocol = self._protocol
        said = [
            f"It does not show that one way is better in general. It is a comparison on {self._n_patients} "
            "patients of one study; another scanner, stain or population may turn it round.",
            "Intervals are conditional on the fitted models. Trainings on other patients would add variance "
            "that resampling the graded ones cannot show"
            + (
                "; with one repeat, nor is the seed's share known."
                if protocol.repeats == 1
                else f"; {protocol.repeats} repeats share the same patients and are no substitute for them."
            ),
            "A difference that was not found is not a proof that there is none: the power table says how "
            "large one would have to be.",
        ]
        if self._result.ceiling is None:
            said.append(
                "Without two readers' grades the noise of the labels is unknown, and with it how much of the "
                "error is the model's."
            )
        else:
            said.append(
                "Above the ceiling that the readers' noise sets, a higher figure means a model that has "
                "learned "
                "the readers' habits, not one that grades better."
            )
        if len(set(self._result.site_of)) > 1 and not protocol.leave_one_site_out:
            said.append(
                "Sites are on both sides of the splits. How well a model does at a site that it never saw, "
                "only leave_one_site_out tells."
            )
        said.append(
            "Where slides are synthetic it shows that the machinery is right and how arms behave where the "
            "truth is known; it cannot show that any of them helps on tissue."
        )
        return tuple(said)

    def _provenance(self) -> tuple[_Part, ...]:
        protocol, result = self._protocol, self._result
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
            ("Bootstrap draws", str(self._comparison.bootstrap_draws)),
            (
                "Near-duplicates",
                f"looked for from a correlation of {self._comparison.near_duplicates:g}"
                if self._comparison.near_duplicates
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
                tuple(_unit_row(arm) for arm in (*self._arms, *result.smaller)),
            ),
            "Beside this page: results.csv (figures, intervals and p-values to six digits), predictions.csv, "
            "curves.csv, "
            "drift.csv, similarity.csv, units.csv, splits.json, and figures/ as SVG and PNG.",
        )


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
        rows.append((arm, str(len(means)), *cells, *[_NONE] * (6 - 2 - len(cells))))
    return Table(
        caption, ("Arm", "Layers", "Mean", "Lowest third", "Middle third", "Highest third"), tuple(rows)
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
        _range(epochs) if epochs else _NONE,
        f"{min(temperatures):.2f} to {max(temperatures):.2f}" if temperatures else _NONE,
    )


def _difference_row(pair: PairedDifference) -> tuple[str, ...]:
    t = pair.corrected_t
    return (
        pair.arm,
        spoken(pair.interval, signed=True),
        _p(pair.sign_flip.p),
        "declared" if pair.p_holm is None else _p(pair.p_holm),
        _NONE if t is None else spoken(Interval(t.difference, t.low, t.high, t.level), signed=True),
        _NONE if t is None else _p(t.p),
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


def _range(values: Sequence[int] | NDArray[np.int64]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _reader(number: int | None) -> str:
    return "consensus" if number is None else f"reader {number + 1}"


def _excludes_zero(interval: Interval) -> bool:
    return interval.low > 0 or interval.high < 0


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else "< 0.001"


def _three(interval: Interval) -> str:
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
