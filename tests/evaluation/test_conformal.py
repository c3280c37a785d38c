from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import beta, binom

from slidetl.errors import UsageError
from slidetl.evaluation.conformal import (
    GradeSets,
    check_coverage,
    fit_grade_sets,
    referral_rule,
    risk_coverage,
)

Cohort = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.intp]]


def cohort(rng: np.random.Generator, n_patients: int) -> Cohort:
    """One to three slides a patient, too sure on purpose, their errors shared by the patient."""
    patients = np.repeat(range(n_patients), rng.integers(1, 4, n_patients))
    true = rng.integers(0, 5, len(patients))
    seen = true + 0.5 * rng.normal(size=n_patients)[patients] + 0.5 * rng.normal(size=len(true))
    rows = np.exp(-2 * (seen[:, None] - np.arange(5)) ** 2)
    return true, rows / rows.sum(1, keepdims=True), patients


def test_grades_are_taken_by_probability_and_in_one_run() -> None:
    rows = np.array([[0.3, 0.1, 0.5, 0.06, 0.04]])
    # 2 first; then 1 (.1 against .06), then 0, then 3, then 4.
    for quantile, ends in (
        (0, [2, 2]),
        (0.49, [2, 2]),
        (0.5, [1, 2]),
        (0.6, [0, 2]),
        (0.9, [0, 3]),
        (1, [0, 4]),
    ):
        assert GradeSets(quantile, 0.1, 9).sets(rows).tolist() == [ends]


@settings(max_examples=100)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_sets_are_nested_and_hold_the_most_probable_grade(seed: int, first: float, second: float) -> None:
    rows = np.random.default_rng(seed).dirichlet(np.ones(5), 20).round(2)
    narrow, wide = (GradeSets(quantile, 0.1, 9).sets(rows) for quantile in sorted((first, second)))
    assert (wide[:, 0] <= narrow[:, 0]).all() and (narrow[:, 1] <= wide[:, 1]).all()
    assert (narrow[:, 0] <= rows.argmax(1)).all() and (rows.argmax(1) <= narrow[:, 1]).all()


def test_the_quantile_is_that_of_patients_by_their_worst_slide() -> None:
    # Two slides a patient: one graded right, whose score is 0, one with that much before its grade.
    before = np.array([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9])
    wrong = np.stack([before, 1 - before], 1)
    rows = np.concatenate([wrong, np.tile([0.9, 0.1], (9, 1))])
    true, patients = np.repeat([1, 0], 9), np.tile(range(9), 2)
    assert fit_grade_sets(true, rows, patients, risk=0.2).quantile == pytest.approx(0.85)  # the 8th of 9
    assert fit_grade_sets(true, rows, patients, risk=0.1).quantile == pytest.approx(0.9)  # the 9th
    assert fit_grade_sets(true, rows, patients, risk=0.05).quantile == 1  # too few patients for it
    assert fit_grade_sets(true, rows, patients).n_patients == 9


def test_new_patients_are_covered_as_often_as_promised() -> None:
    """Split conformal: one fixed model, 60 patients to calibrate, the next 60 new."""
    rng = np.random.default_rng(0)
    shares, sizes = [], []
    for _ in range(150):
        true, rows, patients = cohort(rng, 120)
        old = patients < 60
        rule = fit_grade_sets(true[old], rows[old], patients[old], risk=0.2)
        ends = rule.sets(rows[~old])
        missed = (true[~old] < ends[:, 0]) | (true[~old] > ends[:, 1])
        shares.append(1 - len(np.unique(patients[~old][missed])) / 60)
        sizes.append((ends[:, 1] - ends[:, 0] + 1).mean())
    # At least 0.8, and not by far more: between 1 - risk and that plus 1 / 61.
    assert 0.79 <= np.mean(shares) <= 0.84
    assert np.mean(sizes) < 3


def test_the_check_finds_sets_that_cover_and_sets_that_do_not() -> None:
    rng = np.random.default_rng(1)
    true, rows, patients = cohort(rng, 300)
    check = check_coverage(true, rows, patients, patients % 5, risk=0.1)
    assert check.patients_covered.low <= 0.9 <= check.patients_covered.high + 0.02
    assert sum(check.sizes) == len(true) and check.risk == 0.1
    assert check.mean_size.estimate == pytest.approx(np.dot(check.sizes, range(1, 6)) / len(true))
    # A fold that is another population: its grades are shifted, and the sets of the others miss them.
    shifted = np.where(patients % 2 == 0, np.minimum(true + 2, 4), true)
    worse = check_coverage(shifted, rows, patients, patients % 2, risk=0.3)
    assert worse.patients_covered.high < check.patients_covered.low


def test_the_quantile_of_a_fold_comes_from_the_other_folds() -> None:
    """One fold is graded right, the other wrong: each is checked with what the other asks for."""
    folds = np.repeat([0, 1], 10)
    check = check_coverage(folds, np.tile([0.9, 0.1], (20, 1)), range(20), folds, risk=0.1, n_draws=100)
    # Both grades for the ten that need one, one grade for the ten that need two. By its own quantile, or that
    # of all, each fold would be covered.
    assert check.patients_covered.estimate == 0.5
    assert check.sizes == (10, 10)


def test_what_cannot_be_promised_is_refused() -> None:
    rows = np.full((4, 2), 0.5)
    with pytest.raises(UsageError, match="between 0 and 1, not 0"):
        fit_grade_sets([0, 1, 0, 1], rows, range(4), risk=0)
    with pytest.raises(UsageError, match="grades and patients of one length"):
        fit_grade_sets([0, 1, 0, 1], rows, range(3))
    with pytest.raises(UsageError, match="two folds at least"):
        check_coverage([0, 1, 0, 1], rows, range(4), [0, 0, 0, 0])
    with pytest.raises(UsageError, match="patient 1 is in two folds"):
        check_coverage([0, 1, 0, 1], rows, [0, 1, 1, 2], [0, 0, 1, 1])
    with pytest.raises(UsageError, match="a quantile of 0 to 1"):
        GradeSets(1.5, 0.1, 9)
    with pytest.raises(UsageError, match="expected probabilities"):
        GradeSets(0.5, 0.1, 9).sets([0.5, 0.5])


def test_the_curve_by_hand() -> None:
    wrong = [False, False, True, False, True]
    confidence = [0.9, 0.8, 0.7, 0.6, 0.5]
    curve = risk_coverage(wrong, confidence, range(5), n_points=5)
    sure, coverage, risk, upper = np.array([astuple(point) for point in curve.points]).T
    assert sure == pytest.approx(confidence)
    assert coverage == pytest.approx((0.2, 0.4, 0.6, 0.8, 1.0))
    assert risk == pytest.approx((0, 0, 1 / 3, 1 / 4, 2 / 5))
    assert curve.area == pytest.approx(np.mean([0, 0, 1 / 3, 1 / 4, 2 / 5]))
    # Clopper and Pearson: k or fewer errors have probability 0.05 / 5 there.
    for n, k, bound in zip(range(1, 6), (0, 0, 1, 1, 2), upper, strict=True):
        assert binom.cdf(k, n, bound) == pytest.approx(0.01)


def test_ties_are_one_point_and_patients_are_the_units() -> None:
    curve = risk_coverage([True, False, False, True], [0.5, 0.5, 0.9, 0.9], [0, 0, 1, 1], n_points=4)
    points = [astuple(point) for point in curve.points]
    assert points == [(0.9, 0.5, 0.5, 1), (0.5, 1, 0.5, 1)]  # each patient graded has a wrong slide
    assert curve.area == 0.5


def test_the_rule_keeps_the_risk_that_was_chosen() -> None:
    """Wrong with probability 1 - confidence: the true risk above any threshold is known."""
    rng = np.random.default_rng(2)
    kept = found = 0
    for _ in range(200):
        confidence = rng.uniform(0.5, 1, 200)
        curve = risk_coverage(rng.random(200) > confidence, confidence, range(200))
        rule = referral_rule(curve, 0.2)
        if rule is not None:
            found += 1
            kept += (1 - rule.confidence) / 2 <= 0.2
            assert rule.upper <= 0.2 and rule.coverage < 1
    assert found > 100 and kept / found >= 0.95


def test_no_rule_where_nothing_is_sure_enough_and_the_patients_it_takes() -> None:
    none = risk_coverage(np.zeros(20, bool), np.linspace(0, 1, 20), range(20))
    assert referral_rule(none, 0.1) is None
    enough = risk_coverage(np.zeros(60, bool), np.linspace(0, 1, 60), range(60))
    rule = referral_rule(enough, 0.1)
    assert rule is not None
    assert (rule.coverage, rule.risk, enough.level) == (1, 0, 0.95)
    assert rule.upper == pytest.approx(beta.ppf(0.995, 1, 60))
    with pytest.raises(UsageError, match="between 0 and 1, not 1"):
        referral_rule(none, 1)
    with pytest.raises(UsageError, match="of one length"):
        risk_coverage([True], [0.5, 0.4], [0])
    with pytest.raises(UsageError, match="finite confidence"):
        risk_coverage([True], [np.nan], [0])
