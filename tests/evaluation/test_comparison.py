from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest, ttest_1samp

from slidetl.errors import UsageError
from slidetl.evaluation.comparison import (
    Unit,
    chance_p,
    corrected_t,
    holm,
    metric_per_fold,
    patient_results,
    sign_flip_test,
    variance_split,
)
from slidetl.evaluation.metrics import accuracy, qwk, rps


def qwk_of_five(
    true: NDArray[np.int64], predicted: NDArray[np.int64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    return qwk(true, predicted, 5, weights)


def sure(grades: list[int], n_grades: int = 5) -> NDArray[np.float64]:
    return np.asarray(np.eye(n_grades)[grades])


def test_several_slides_of_a_patient_become_one() -> None:
    true, patients = [1, 3, 0, 2], ["b", "b", "a", "b"]
    rows = np.array([[0.7, 0.3, 0, 0], [0, 0.4, 0.6, 0], [1, 0, 0, 0], [0, 0, 0.6, 0.4]])
    worst = patient_results(true, rows, patients, "worst")
    assert worst.patients.tolist() == ["a", "b"]
    assert worst.true.tolist() == [0, 3] and worst.predicted.tolist() == [[0, 2]]
    # Two slides of b are graded 2: the one with the higher expected grade speaks for b.
    np.testing.assert_allclose(worst.probabilities, [[[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.6, 0.4]]])
    # The grade decides, not the expected grade, which is 1.2 here against 1.9.
    split = np.array([[0.4, 0, 0.6, 0], [0, 0.5, 0.1, 0.4]])
    assert patient_results([0, 0], split, ["a", "a"], "worst").predicted.tolist() == [[2]]
    mean = patient_results(true, rows, patients, "mean")
    assert mean.true.tolist() == [0, 2] and mean.predicted.tolist() == [[0, 1]]  # (0 + 2 + 2) / 3
    np.testing.assert_allclose(mean.probabilities[0, 1], rows[[0, 1, 3]].mean(0))
    slides = patient_results(true, rows, patients, "slide")
    assert slides.true.tolist() == true and slides.patients.tolist() == patients
    assert slides.predicted.tolist() == [[0, 2, 0, 2]]


def test_halves_round_upwards_for_readers_and_models_alike() -> None:
    results = patient_results([0, 1, 2, 3], sure([2, 3, 0, 1]), [0, 0, 1, 1], "mean")
    assert results.true.tolist() == [1, 3] and results.predicted.tolist() == [[3, 1]]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=20))
def test_results_of_patients_do_not_depend_on_the_order_of_slides(slides: list[tuple[int, int, int]]) -> None:
    for unit in ("worst", "mean"):
        first, second = (
            patient_results([s[0] for s in rows], sure([s[1] for s in rows]), [s[2] for s in rows], unit)
            for rows in (slides, slides[::-1])
        )
        assert first.patients.tolist() == sorted({s[2] for s in slides})
        np.testing.assert_array_equal(first.true, second.true)
        np.testing.assert_array_equal(first.predicted, second.predicted)
        np.testing.assert_allclose(first.probabilities.sum(2), 1)
        if unit == "worst":
            by_patient = {p: max(s[1] for s in slides if s[2] == p) for p in first.patients.tolist()}
            assert dict(zip(first.patients.tolist(), first.predicted[0], strict=True)) == by_patient


def test_a_unit_that_is_none_and_shapes_that_do_not_fit() -> None:
    median: Unit = "median"  # type: ignore[assignment]
    with pytest.raises(UsageError, match="unit must be worst, mean or slide, not 'median'"):
        patient_results([0, 1], sure([0, 1]), [0, 0], median)
    with pytest.raises(UsageError, match="expected grades"):
        patient_results([0, 1, 2], sure([0, 1]), [0, 0], "worst")


def test_metrics_of_folds_are_those_of_their_slides() -> None:
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 5, 30), rng.integers(0, 5, (2, 30))
    folds = np.stack([rng.permutation(30) % 3 for _ in range(2)])
    got = metric_per_fold(qwk_of_five, true, predicted, folds)
    for repeat, fold in itertools.product(range(2), range(3)):
        held = folds[repeat] == fold
        assert got[repeat, fold] == pytest.approx(qwk(true[held], predicted[repeat, held], 5))
    with pytest.raises(UsageError, match="from 0 to 3 in each repeat"):
        metric_per_fold(qwk_of_five, true, predicted, np.where(folds == 2, 3, folds))
    with pytest.raises(UsageError, match="expected grades"):
        metric_per_fold(qwk_of_five, true, predicted[0], folds)


def test_corrected_t_is_students_with_a_wider_error() -> None:
    differences = np.random.default_rng(0).normal(0.1, 0.2, (3, 5))
    plain = ttest_1samp(differences.ravel(), 0)
    corrected = corrected_t(differences, 0.2)
    factor = np.sqrt((1 / 15 + 0.25) / (1 / 15))
    assert corrected.t == pytest.approx(plain.statistic / factor)
    assert corrected.degrees == 14 and corrected.p > plain.pvalue
    # Without an overlap to speak of it is Student's own.
    alone = corrected_t(differences, 1e-12)
    assert (alone.t, alone.p) == pytest.approx((plain.statistic, plain.pvalue))
    assert (alone.interval.low, alone.interval.high) == pytest.approx(tuple(plain.confidence_interval(0.95)))


def test_the_corrected_t_of_repeats_of_the_same_folds_has_its_size_by_their_means() -> None:
    """Two equal arms: the patients of three sites are the same in ten repeats, trainings differ."""
    rng = np.random.default_rng(0)
    of_site, of_training = rng.normal(0, 1, (2000, 1, 3)), rng.normal(0, 0.3, (2000, 10, 3))
    gaps = of_site + of_training
    means = np.mean([corrected_t(study.mean(axis=0), 1 / 3).p <= 0.05 for study in gaps])
    pooled = np.mean([corrected_t(study, 1 / 3).p <= 0.05 for study in gaps])
    assert means < 0.05 and pooled > 0.1


def test_corrected_t_of_equal_differences_is_undefined() -> None:
    for value in (0.0, 0.1):  # two folds that agree by chance prove nothing
        test = corrected_t([value, value], 0.5)
        assert test.interval.estimate == value
        assert np.isnan([test.p, test.t, test.standard_error, test.interval.low, test.interval.high]).all()
    with pytest.raises(UsageError, match="two differences"):
        corrected_t([0.1], 0.2)
    with pytest.raises(UsageError, match="between 0 and 1, not 1"):
        corrected_t([0.1, 0.2], 1)


def test_sign_flips_of_single_slides_are_mcnemars_exact_test() -> None:
    true = np.zeros(30, int)
    first, second = np.zeros(30, int), np.zeros(30, int)
    second[:9], first[9:11] = 1, 1  # the first arm alone is right on 9, the second alone on 2
    test = sign_flip_test(accuracy, true, first, second, range(30))
    assert test.exact and test.n_discordant == 11
    assert test.difference == pytest.approx(7 / 30)
    assert test.p == pytest.approx(binomtest(9, 11).pvalue)


def test_many_patients_are_sampled_near_the_exact_answer() -> None:
    true, first, second = np.zeros(60, int), np.zeros(60, int), np.zeros(60, int)
    second[:20], first[20:29] = 1, 1
    test = sign_flip_test(accuracy, true, first, second, range(60), n_flips=20_000)
    assert not test.exact
    assert test.p == pytest.approx(binomtest(20, 29).pvalue, abs=0.01)


def test_slides_of_a_patient_flip_together() -> None:
    true, first = np.zeros(40, int), np.zeros(40, int)
    second = np.ones(40, int)
    by_slide = sign_flip_test(accuracy, true, first, second, range(40))
    by_patient = sign_flip_test(accuracy, true, first, second, np.repeat(range(4), 10))
    assert by_slide.p < 0.001
    assert by_patient.p == 2 / 2**4


def test_sign_flips_of_kappa_enumerated_by_hand() -> None:
    rng = np.random.default_rng(1)
    patients = np.repeat(range(6), 2)
    true, first, second = (rng.integers(0, 5, 12) for _ in range(3))
    observed = qwk(true, first, 5) - qwk(true, second, 5)
    hits = 0
    for keeps in itertools.product([True, False], repeat=6):
        own = np.array(keeps)[patients]
        a, b = np.where(own, first, second), np.where(own, second, first)
        swapped = qwk(true, a, 5) - qwk(true, b, 5)
        hits += int(abs(swapped) >= abs(observed) - 1e-12)
    test = sign_flip_test(qwk_of_five, true, first, second, patients)
    assert test.difference == pytest.approx(observed)
    assert test.p == pytest.approx(hits / 64)


def test_sign_flips_take_probabilities_and_equal_arms() -> None:
    rows = np.random.default_rng(0).dirichlet(np.ones(5), 20)
    true = np.arange(20) % 5
    better = sign_flip_test(rps, true, (0.5 * rows + 0.5 * np.eye(5)[true])[None], rows[None], range(20))
    assert better.difference < 0 and better.p < 0.001
    same = sign_flip_test(rps, true, rows[None], rows[None], range(20))
    assert (same.difference, same.p, same.n_discordant) == (0, 1, 0)
    with pytest.raises(UsageError, match="of one shape"):
        sign_flip_test(rps, true, rows[None], rows[None, :10], range(20))
    with pytest.raises(UsageError, match="of one length"):
        sign_flip_test(rps, true, rows[None, :10], rows[None, :10], range(20))


def test_sign_flips_swap_all_repeats_of_a_patient() -> None:
    rng = np.random.default_rng(2)
    true = rng.integers(0, 5, 8)
    first, second = rng.integers(0, 5, (2, 3, 8))
    observed = qwk(true, first, 5) - qwk(true, second, 5)
    gaps = []
    for keeps in itertools.product([True, False], repeat=8):
        a, b = np.where(keeps, first, second), np.where(keeps, second, first)
        gaps.append(float(qwk(true, a, 5) - qwk(true, b, 5)))
    test = sign_flip_test(qwk_of_five, true, first, second, range(8))
    assert test.difference == pytest.approx(observed)
    assert test.p == pytest.approx(np.mean(np.abs(gaps) >= abs(observed) - 1e-12))
    # The other repeats count: one arm is better in the first alone, by as much as it is worse in the second.
    better, worse = np.stack([true, (true + 1) % 5]), np.stack([(true + 1) % 5, true])
    assert sign_flip_test(accuracy, true, better, worse, range(8)).p == 1
    assert sign_flip_test(accuracy, true, better[0], worse[0], range(8)).p < 0.01


def test_sign_flips_of_an_undefined_metric_are_undefined() -> None:
    same = np.ones((1, 20), int)
    test = sign_flip_test(qwk_of_five, same[0], same, same, range(20))
    assert np.isnan([test.difference, test.p]).all()
    # Some swaps are undefined: they count against a difference.
    few = sign_flip_test(qwk_of_five, np.array([0, 0, 1]), np.array([0, 0, 1]), np.array([1, 1, 1]), range(3))
    assert 0 < few.p <= 1


def test_sign_flips_find_nothing_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(range(12), 2)
    rejected = 0
    for _ in range(300):
        true, common = rng.integers(0, 5, 24), rng.normal(size=12)[patients]
        first, second = (
            np.clip(np.rint(true + common + rng.normal(size=12)[patients]), 0, 4).astype(int)
            for _ in range(2)
        )
        rejected += sign_flip_test(qwk_of_five, true, first, second, patients).p <= 0.05
    assert rejected / 300 <= 0.08


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1, 1])
    assert holm([]).shape == (0,)
    with pytest.raises(UsageError, match="from 0 to 1"):
        holm([0.5, 1.1])


@settings(max_examples=100)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 9))
def test_holm_is_no_less_strict_than_no_correction_and_no_stricter_than_bonferroni(
    values: list[float], seed: int
) -> None:
    adjusted = holm(values)
    assert (adjusted >= values).all()
    assert (adjusted <= np.minimum(np.multiply(values, len(values)), 1) + 1e-12).all()
    order = np.random.default_rng(seed).permutation(len(values))
    np.testing.assert_allclose(holm(np.array(values)[order]), adjusted[order])


def test_chance_counts_itself() -> None:
    assert chance_p(0.5, np.linspace(0, 0.4, 19)) == 1 / 20
    assert chance_p(0.4, [0.4, 0.0, 0.1]) == 2 / 4
    with pytest.raises(UsageError, match="at least one"):
        chance_p(0.5, [])


def test_variance_is_split_as_it_was_made() -> None:
    """Scores 0 or 1 a patient: known seed noise, known sampling, no difference between folds."""
    rng = np.random.default_rng(0)
    splits, expected_patient = [], 0.25 / 60
    for _ in range(60):
        patients = np.arange(60)
        # Each repeat grades each patient right with probability one half, apart from the others.
        predicted = rng.integers(0, 2, (8, 60))
        folds = np.stack([rng.permutation(60) % 3 for _ in range(8)])
        splits.append(variance_split(accuracy, np.zeros(60, int), predicted, folds, patients, n_draws=200))
    assert np.mean([split.seed for split in splits]) == pytest.approx(expected_patient, rel=0.2)
    # Repeats that err apart average out over patients: an eighth is left.
    assert np.mean([split.patient for split in splits]) == pytest.approx(expected_patient / 8, rel=0.2)
    assert abs(np.mean([split.fold for split in splits])) < 0.25 * 0.25 / 20
    one = splits[0]
    assert one.seed is not None
    assert one.standard_error == pytest.approx(np.sqrt(one.patient + one.seed / 8))


def test_variance_between_folds_is_found() -> None:
    folds = np.arange(90) % 3
    rng = np.random.default_rng(0)
    right = rng.random(90) < np.array([0.2, 0.5, 0.9])[folds]
    split = variance_split(accuracy, np.ones(90, int), right[None].astype(int), folds[None], np.arange(90))
    assert split.seed is None and split.n_repeats == 1
    assert split.fold == pytest.approx(np.var([0.2, 0.5, 0.9], ddof=1), rel=0.5)
    assert split.standard_error == pytest.approx(np.sqrt(0.25 / 90), rel=0.1)


def test_a_single_fold_still_tells_seeds_from_patients() -> None:
    rng = np.random.default_rng(0)
    right = rng.random((2, 200)) < np.array([[0.5], [0.7]])
    split = variance_split(accuracy, np.ones(200, int), right, np.zeros((2, 200), int), np.arange(200))
    assert split.fold is None
    assert split.seed == pytest.approx(np.var(right.mean(1), ddof=1))
    assert split.patient == pytest.approx(right.mean(0).var(ddof=1) / 200, rel=0.1)
