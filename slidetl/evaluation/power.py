"""Simulates the power of a study of so many patients to show a difference between two arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError
from slidetl.evaluation.agreement import readings_given_truth
from slidetl.evaluation.metrics import qwk_of_table

_ALPHA = 0.05  # level of the tests


@dataclass(frozen=True)
class StudyDesign:
    """A study, and the model of its results.

    A patient has a true grade, each equally likely, shared by all its slides. An arm puts a slide at
    ``grade + sd * z`` and rounds to the scale; z is standard normal, with a share of its variance common to
    the two arms (hard slides are hard for both) and a share common to a patient's slides. The standard
    deviation follows from the arm's accuracy.

    Attributes:
        n_patients, n_slides: of the study; slides are dealt out as evenly as possible.
        n_grades: K.
        arm_correlation: of the two arms' errors on one slide, before rounding, 0..1.
        patient_correlation: of one arm's errors on two slides of a patient, before rounding, 0..1.
    """

    n_patients: int = 60
    n_slides: int = 100
    n_grades: int = 5
    arm_correlation: float = 0.7
    patient_correlation: float = 0.3

    def __post_init__(self) -> None:
        if not 2 <= self.n_patients <= self.n_slides or self.n_grades < 2:
            raise UsageError(
                "a study needs two patients, two grades and a slide of each patient at least, not "
                f"{self.n_patients} patients, {self.n_grades} grades and {self.n_slides} slides"
            )
        if not (0 <= self.arm_correlation <= 1 and 0 <= self.patient_correlation <= 1):
            raise UsageError("correlations must be from 0 to 1")


@dataclass(frozen=True)
class PowerRow:
    """Power to find one true difference.

    Attributes:
        accuracy_first, accuracy_second: true accuracies of the arms.
        qwk_first, qwk_second: their true quadratic-weighted kappas, under the model.
        power_accuracy, power_qwk: share of studies with a sign-flip test that finds a difference.
        error: standard error of these shares, at most.
    """

    accuracy_first: float
    accuracy_second: float
    qwk_first: float
    qwk_second: float
    power_accuracy: float
    power_qwk: float
    error: float


def power_table(
    accuracies: Sequence[tuple[float, float]],
    design: StudyDesign | None = None,
    *,
    n_studies: int = 1000,
    n_flips: int = 500,
    seed: int = 0,
) -> tuple[PowerRow, ...]:
    """Simulates studies, and counts how often a test of sign flips finds the difference.

    The test is :func:`~slidetl.evaluation.comparison.sign_flip_test`, which decides a comparison. For equal
    accuracies the power is the share of false findings. If the results of a study are of patients, give it as
    many slides as patients: 100 slides of 60 patients show more than 60 results.

    The power depends on how alike the arms err, known only afterwards: state the correlation with it, or
    give a range of designs.

    Args:
        accuracies: pairs of true accuracies, above chance and below 1.
        design: the study; 60 patients with 100 slides in five grades by default.
        n_studies: simulated for each pair; 1000 give a standard error of 0.016 at most.
        n_flips: random swaps for each study.
        seed: of everything.

    Raises:
        UsageError: an accuracy not between chance and 1.
    """
    design = design or StudyDesign()
    rng = np.random.default_rng(seed)
    n = design.n_patients
    member = np.sort(np.arange(design.n_slides) % n)
    # One set of swaps for all studies: it changes no study's law, only their dependence. The first is none.
    keeps = np.concatenate([np.ones((1, n)), rng.integers(2, size=(n_flips, n))])
    rows = []
    for pair in accuracies:
        deviations = [_deviation(accuracy, design.n_grades) for accuracy in pair]
        found = np.zeros(2)
        for _ in range(n_studies):
            first, second = _study(deviations, design, member, rng)
            both, kept = (first + second).sum(axis=0), np.tensordot(keeps, first - second, 1)
            one = kept + second.sum(axis=0)
            apart = abs(np.stack(_metrics(one)) - np.stack(_metrics(both - one)))  # [2, 1 + n_flips]
            found += (~(apart < apart[:, :1] - 1e-12)).mean(axis=1) <= _ALPHA  # the share counts itself
        own, other = (_true_qwk(deviation, design.n_grades) for deviation in deviations)
        by_accuracy, by_qwk = (found / n_studies).tolist()
        rows.append(PowerRow(*pair, own, other, by_accuracy, by_qwk, 0.5 / n_studies**0.5))
    return tuple(rows)


def _study(
    deviations: list[float], design: StudyDesign, member: NDArray[np.intp], rng: np.random.Generator
) -> list[NDArray[np.float64]]:
    """Draws a study: for each arm tables ``[P, K, K]``, true by graded, of the slides of each patient."""
    n_patients, n_slides = design.n_patients, len(member)
    true = rng.integers(design.n_grades, size=n_patients)[member]
    shared, between = design.arm_correlation, design.patient_correlation

    def errors() -> NDArray[np.float64]:
        return np.asarray(
            np.sqrt(between) * rng.standard_normal(n_patients)[member]
            + np.sqrt(1 - between) * rng.standard_normal(n_slides)
        )

    common = errors()
    arms = []
    for deviation in deviations:
        z = np.sqrt(shared) * common + np.sqrt(1 - shared) * errors()
        graded = np.clip(np.rint(true + deviation * z), 0, design.n_grades - 1)
        tables = np.zeros((n_patients, design.n_grades, design.n_grades))
        np.add.at(tables, (member, true, graded.astype(np.int64)), 1)
        arms.append(tables)
    return arms


def _metrics(tables: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Maps tables ``[B, K, K]`` to accuracy and QWK, ``[B]`` each."""
    return np.trace(tables, axis1=1, axis2=2) / tables.sum(axis=(1, 2)), qwk_of_table(tables)


def _deviation(accuracy: float, n_grades: int) -> float:
    """Finds the standard deviation of the error from the accuracy on equally likely grades."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    def reached(deviation: float) -> float:
        # Within half a grade; at the two ends of the scale, on one side only.
        inner = 2 * norm.cdf(0.5 / deviation) - 1
        return float(((n_grades - 2) * inner + 2 * norm.cdf(0.5 / deviation)) / n_grades)

    if not reached(1e3) < accuracy < 1:
        raise UsageError(
            f"an accuracy must be between {reached(1e3):.2f}, noise alone, and 1, not {accuracy}"
        )
    return float(brentq(lambda deviation: reached(deviation) - accuracy, 1e-2, 1e3))


def _true_qwk(deviation: float, n_grades: int) -> float:
    """Computes the QWK of equally likely grades, read with this error."""
    (table,) = readings_given_truth(np.array([deviation]), n_grades)
    return float(qwk_of_table(table / n_grades))
