"""Orders the results of a comparison for its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.compare.aggregate import ArmResult, ComparisonResult
from slidetl.compare.config import ALPHA, Comparison, MetricName
from slidetl.compare.external import External, external_results
from slidetl.compare.learning import CurveMetric, Learning, equal_epochs, learning_of
from slidetl.compare.table import format_number
from slidetl.evaluation.metrics import qwk
from slidetl.evaluation.protocol import Protocol

NAMES: dict[MetricName, str] = {
    "qwk": "QWK",
    "accuracy": "Accuracy",
    "mae": "Mean absolute error",
    "rps": "RPS",
    "log_loss": "Log loss",
}
_FINE: tuple[MetricName, ...] = ("rps", "log_loss")  # small numbers: a digit more
# Okabe and Ito, "Color universal design" (2008), without yellow, which is too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", (0, (5, 1.5)), (0, (1, 1)))
GREY = "#7A828B"
COLOURS = ("colour_area", "collagen")  # baselines that choose their classifier


def form_of(metric: MetricName) -> str:
    """Returns the format of the values of a metric, and with ``+`` before it of their differences."""
    return ".3f" if metric in _FINE else ".2f"


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of an arm, the same in every plot."""

    colour: str
    marker: str
    line: Any


def looks_of(arms: Sequence[str], trivial: Sequence[str] = ()) -> dict[str, Look]:
    """Assigns a look to each arm, the most important first; the trivial ones are grey."""
    looks = {}
    for number, arm in enumerate(arm for arm in arms if arm not in trivial):
        turn = number // len(_COLOURS)
        marker = _MARKERS[(number + turn) % len(_MARKERS)]
        looks[arm] = Look(_COLOURS[number % len(_COLOURS)], marker, _LINES[turn % len(_LINES)])
    for number, arm in enumerate(arm for arm in arms if arm in trivial):
        looks[arm] = Look(GREY, _MARKERS[number % len(_MARKERS)], _LINES[2])
    return looks


@dataclass(frozen=True, eq=False)
class View:
    """A comparison in the order of its report.

    Attributes:
        result: all results.
        failed: reasons of failed jobs, by their labels.
    """

    result: ComparisonResult
    failed: Mapping[str, str]

    @cached_property
    def external(self) -> tuple[External, ...]:
        """The arms on the external site."""
        return external_results(self.result)

    @property
    def comparison(self) -> Comparison:
        """The configuration."""
        return self.result.comparison

    @property
    def protocol(self) -> Protocol:
        """The splits."""
        return self.result.comparison.protocol

    @property
    def varied(self) -> str:
        """Word for what differs between repeats."""
        return "seeds" if self.protocol.repeats_folds else "folds and seeds"

    @cached_property
    def trivial(self) -> tuple[str, ...]:
        """Names of the trivial arms, to be beaten by all others."""
        return tuple(name for name, arm in self.comparison.arms.items() if arm.baseline is not None)

    @cached_property
    def arms(self) -> tuple[ArmResult, ...]:
        """Complete arms: those of the primary comparison first, the trivial ones last."""
        first = {self.comparison.primary.arm: 0, self.comparison.primary.against: 1}
        order = sorted(self.result.arms, key=lambda arm: (first.get(arm.arm, 2), arm.arm in self.trivial))
        return tuple(order)

    @cached_property
    def serious(self) -> tuple[ArmResult, ...]:
        """Arms that are not trivial, or all arms if there is no other."""
        return tuple(arm for arm in self.arms if arm.arm not in self.trivial) or self.arms

    @cached_property
    def absent(self) -> tuple[str, ...]:
        """Arms of the configuration without a planned job."""
        known = {arm.arm for arm in self.result.arms}
        known |= {label.split(" (")[0] for label in self.result.incomplete}
        return tuple(name for name in self.comparison.arms if name not in known)

    @cached_property
    def own_choices(self) -> tuple[str, ...]:
        """Choices that arms make by a cross-validation of their own, in words."""
        arms = [self.comparison.arms[arm.arm] for arm in self.arms]
        models = {arm.classical.model for arm in arms if arm.classical is not None}
        scores = {
            "ridge": "squared error",
            **dict.fromkeys(("ordinal", "logistic"), "ranked probability score"),
        }
        words = [f"the penalty of {name} by the {score}" for name, score in scores.items() if name in models]
        if any(arm.baseline in COLOURS for arm in arms):
            words.append("the classifier on colour by the log loss")
        return tuple(words)

    @cached_property
    def looks(self) -> dict[str, Look]:
        """Look of each arm, those on fewer slides included."""
        names = dict.fromkeys(arm.arm for arm in (*self.arms, *self.result.smaller))
        return looks_of(list(names), self.trivial)

    @cached_property
    def curves(self) -> dict[str, Learning]:
        """Learning curves of the arms with epochs."""
        found = {arm.arm: learning_of(self.comparison, arm) for arm in self.serious}
        return {name: curve for name, curve in found.items() if curve is not None}

    @cached_property
    def epochs(self) -> list[int]:
        """Epochs for the comparison of all learning curves."""
        return equal_epochs(list(self.curves.values()))

    @property
    def learned(self) -> tuple[CurveMetric, CurveMetric]:
        """Metrics of the learning curves, the primary one first if it is among them."""
        is_accuracy = self.comparison.primary.metric == "accuracy"
        return ("accuracy", "qwk") if is_accuracy else ("qwk", "accuracy")

    @property
    def gap(self) -> str:
        """Difference of the declared arms by epochs, in words; empty if an arm has none."""
        primary = self.comparison.primary
        if not {primary.arm, primary.against} <= set(self.curves):
            return ""
        metric, one, other = self.learned[0], self.curves[primary.arm], self.curves[primary.against]

        def gap(first: int | None, second: int | None) -> str:
            return format_number(one.mean(metric, first) - other.mean(metric, second), "+.2f")

        gaps = ", ".join(f"{gap(n, n)} after {n}" for n in self.epochs)
        first, second = one.plateau(metric), other.plateau(metric)
        return (
            f"{gaps} epochs; each at its own plateau, after {first or 'unknown'} and {second or 'unknown'} "
            f"epochs, {gap(first, second)}. Means over {one.trainings} trainings"
        )

    @property
    def metric(self) -> str:
        """Name of the metric of the primary comparison."""
        return NAMES[self.comparison.primary.metric]

    @property
    def form(self) -> str:
        """Format of the metric of the primary comparison."""
        return form_of(self.comparison.primary.metric)

    @property
    def swapped(self) -> str:
        """Predictions that the sign flips swap: those that the metric judges."""
        return "probabilities" if self.comparison.primary.metric in ("rps", "log_loss") else "grades"

    @property
    def better(self) -> str:
        """The arm favoured by the declared comparison; empty if its sign-flip test finds no difference."""
        declared = self.result.primary
        return declared.better if declared is not None else ""

    @property
    def is_constant(self) -> bool:
        """True if the declared difference has no interval: all resamples agree, or patients are few."""
        declared = self.result.primary
        return declared is not None and bool(
            np.isnan(declared.interval.low) and not np.isnan(declared.interval.estimate)
        )

    @property
    def dead(self) -> tuple[str, ...]:
        """Trained arms of which a training gave all the slides it tested the same probabilities."""
        trained = (
            arm for arm in (*self.arms, *self.result.smaller) if self.comparison.arms[arm.arm].fit is not None
        )
        return tuple(arm.label for arm in trained if arm.untold)

    @property
    def pointlike(self) -> tuple[str, ...]:
        """Arms with a metric that has no interval."""
        arms = (*self.arms, *self.result.smaller)
        return tuple(arm.label for arm in arms if any(found.is_point for found in arm.metrics.values()))

    @property
    def equivalent(self) -> bool:
        """True if the interval of the declared comparison lies within the declared margin."""
        declared, margin = self.result.primary, self.comparison.primary.margin
        return declared is not None and margin is not None and declared.is_within(margin)

    @property
    def against_verdict(self) -> tuple[str, ...]:
        """The secondary results of the declared comparison that disagree with its verdict, in words."""
        declared = self.result.primary
        if declared is None or np.isnan(declared.sign_flip.p):
            return ()
        found, others = self.better, []
        interval, t, margin = declared.interval, declared.corrected_t, self.comparison.primary.margin
        if not np.isnan(interval.low):
            excludes_zero = interval.low > 1e-12 or interval.high < -1e-12  # not a rounded sum of zero
            favoured = declared.favoured(interval.low + interval.high) if excludes_zero else ""
            if favoured != found:
                words = f"favours {favoured}" if found and favoured else "excludes zero" if favoured else ""
                others.append(f"the interval over patients {words or 'contains zero'}")
        if t is not None and not np.isnan(t.p):
            favoured = declared.favoured(t.interval.estimate) if t.p <= ALPHA else ""
            if favoured != found:
                words = (
                    f"{favoured} better" if found and favoured else f"{'a' if favoured else 'no'} difference"
                )
                others.append(f"the corrected t over folds finds {words}")
            is_within = margin is not None and -margin < t.interval.low and t.interval.high < margin
            if is_within != self.equivalent:
                where = "lies" if is_within else "does not lie"
                others.append(f"the interval of the corrected t {where} within the margin")
        return tuple(others)

    @cached_property
    def limit(self) -> float | None:
        """Limit of the primary metric by the readers' noise; None if unknown."""
        found, name = self.result.ceiling, self.comparison.primary.metric
        if found is None or name not in ("qwk", "accuracy"):
            return None
        kind = {"consensus": "consensus_", "together": "together_"}.get(self.labels, "")
        limit = float(getattr(found, kind + name))
        return None if math.isnan(limit) else limit

    @property
    def equal_readings(self) -> float:
        """Share of the slides read by the first two readers that both gave the same grade."""
        first, second = self._twice_read
        return float((first == second).mean())

    @property
    def contrary_readers(self) -> bool:
        """True if the first two readers hardly ever agree, or less than by chance, but more if one is turned.

        Readers who nearly always give the same grade may agree less than by chance without any mistake.
        """
        first, second = self._twice_read
        n_grades = len(self.comparison.grades)
        if (first == n_grades - 1 - second).mean() <= self.equal_readings:
            return False
        return self.equal_readings <= 0.1 or float(qwk(first, second, n_grades)) < -1e-12  # no rounded zero

    @property
    def _twice_read(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Grades of the first two readers, of the slides that both read."""
        readings = self.result.readings[:, :2]
        first, second = readings[(readings >= 0).all(axis=1)].T
        return first, second

    @cached_property
    def labels(self) -> str:
        """Kind of the labels: ``single`` reader's, ``consensus`` or ``together`` of two; or ``unknown``."""
        both = (self.result.readings[:, :2] >= 0).all(axis=1)
        readings, labels = self.result.readings[both, :2], self.result.true[both]
        if (readings == labels[:, None]).all(axis=0).any():
            return "single"
        if np.array_equal((readings.sum(axis=1) + 1) // 2, labels):
            return "consensus"
        between = (readings.min(axis=1) <= labels) & (labels <= readings.max(axis=1))
        return "together" if between.all() else "unknown"

    @property
    def one_scanner_each(self) -> bool:
        """True if every site has its own scanner."""
        pairs = {(row.site, row.scanner) for row in self.result.rows}
        return len(pairs) == len({site for site, _ in pairs}) == len({scanner for _, scanner in pairs})

    @property
    def n_patients(self) -> int:
        """Number of patients with tested slides."""
        return len({row.patient_id for row in self.result.rows})

    @property
    def n_sites(self) -> int:
        """Number of named sites with tested slides."""
        return len(self.result.parts["test"].sites)

    @property
    def unseen_sites(self) -> tuple[str, ...]:
        """Named sites that are tested, and that no fold has on both sides."""
        return tuple(site for site in self.result.parts["test"].sites if site not in self.result.shared_sites)

    @property
    def one_source(self) -> bool:
        """True if training and test slides are of the same sites, or assigned to their parts by lot.

        A given split of slides without sites may be of one source or of two: it is not known.
        """
        if self.protocol.leave_one_site_out or self.protocol.external_site:
            return False
        shared = self.result.shared_sites
        return not self.protocol.given_split or all(row.site in shared for row in self.result.rows)

    @property
    def unit(self) -> str:
        """The unit of one result."""
        return "slide" if self.protocol.unit == "slide" else "patient"

    @property
    def units(self) -> str:
        """The heading of a number of results."""
        return f"{self.unit.capitalize()}s"
