from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    cohen_kappa_score,
    f1_score,
    mean_absolute_error,
    recall_score,
    roc_auc_score,
)
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import log_loss as sklearn_log_loss

from slidetl.errors import UsageError
from slidetl.evaluation.calibration import calibration_null, fit_temperature, with_temperature
from slidetl.evaluation.conformal import GradeSets
from slidetl.evaluation.metrics import (
    accuracy,
    auroc,
    auroc_metric,
    calibration_error,
    confusion_matrix,
    difference,
    grade_metrics,
    kappa,
    log_loss,
    mae,
    number_metrics,
    patient_intervals,
    probability_metrics,
    qwk,
    rps,
    told_apart,
    weighted_mean,
)

K = 5

grades = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(grades)
def test_agrees_with_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    true, predicted = np.array(pairs).T
    metrics = grade_metrics(true, predicted, 5)
    assert metrics.n == len(pairs)
    assert metrics.accuracy == pytest.approx(accuracy_score(true, predicted))
    assert metrics.mae == pytest.approx(mean_absolute_error(true, predicted))
    recalls = recall_score(true, predicted, labels=sorted(set(true)), average=None, zero_division=0)
    assert metrics.balanced_accuracy == pytest.approx(recalls.mean())
    assert metrics.macro_f1 == pytest.approx(f1_score(true, predicted, average="macro", zero_division=0))
    np.testing.assert_array_equal(metrics.confusion, sklearn_confusion(true, predicted, labels=range(5)))
    if len(set(true) | set(predicted)) > 1:
        expected = cohen_kappa_score(true, predicted, labels=range(5), weights="quadratic")
        assert metrics.qwk == pytest.approx(expected)
    else:
        assert np.isnan(metrics.qwk)


def test_kappa_of_a_single_grade_is_undefined_and_no_number() -> None:
    """0 would rank it with chance, 1 above every network that was measured."""
    for measure in (qwk, kappa):
        assert np.isnan(measure([2, 2], [2, 2], 5))
        assert np.isnan(measure([2, 2], [[2, 2], [2, 3]], 5))  # of one repeat, so of the mean
        assert measure([2, 2], [2, 3], 5) == 0  # chance disagrees as often: defined
        assert measure([0, 4], [0, 4], 5) == 1
        assert measure([0, 4], [4, 0], 5) == -1
    metrics = grade_metrics([2, 2], [2, 2], 5)
    assert (metrics.accuracy, metrics.mae) == (1, 0)
    assert metrics.format_qwk(3) == "undefined" and metrics.to_json()["qwk"] is None
    assert grade_metrics([0, 4], [0, 4], 5).format_qwk(2) == "1.00"


@pytest.mark.parametrize(
    ("true", "predicted"),
    [([], []), ([0, 1], [0]), ([5], [0]), ([-1], [0]), ([0.5], [0]), ([float("nan")], [0])],
)
def test_grades_off_the_scale_are_refused(true: list[float], predicted: list[float]) -> None:
    with pytest.raises(ValueError, match="grades"):
        confusion_matrix(true, predicted, 5)


def graded(n: int, seed: int = 0, decimals: int = 2) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Grades and probabilities with many ties."""
    rng = np.random.default_rng(seed)
    rows = np.round(rng.dirichlet(np.ones(5), n), decimals)
    rows[:, 0] += 1 - rows.sum(1)
    rows = abs(rows)
    return rng.integers(0, 5, n), rows / rows.sum(1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_probabilities_agree_with_scikit_learn(seed: int) -> None:
    true, rows = graded(40, seed, decimals=1 if seed % 2 else 3)
    metrics = probability_metrics(true, rows)
    assert metrics.n == 40
    above = np.stack([rows[:, k + 1 :].sum(1) for k in range(4)], 1)
    for k in range(4):
        assert metrics.auroc[k] == pytest.approx(roc_auc_score(true > k, np.round(above[:, k], 9)))
    floored = np.maximum(rows, 1e-7)
    expected = sklearn_log_loss(true, floored / floored.sum(1, keepdims=True), labels=range(5))
    assert metrics.log_loss == pytest.approx(expected, rel=1e-5)
    by_hand = np.mean(
        [sum((above[i, k] - (true[i] > k)) ** 2 for k in range(4)) / 4 for i in range(len(true))]
    )
    assert metrics.rps == pytest.approx(by_hand)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=30))
def test_auroc_agrees_with_scikit_learn(pairs: list[tuple[bool, int]]) -> None:
    positive, scores = map(np.array, zip(*pairs, strict=True))
    if positive.all() or not positive.any():
        assert np.isnan(auroc(positive, scores))
    else:
        assert auroc(positive, scores) == pytest.approx(roc_auc_score(positive, scores))


def test_probabilities_at_their_extremes() -> None:
    true = np.array([0, 1, 2, 2])
    sure = probability_metrics(true, np.eye(3)[true])
    assert (sure.auroc, sure.rps, sure.log_loss, sure.calibration_error) == ((1.0, 1.0), 0.0, 0.0, 0.0)
    wrong = probability_metrics([0, 2], np.eye(3)[[2, 0]])
    assert (wrong.auroc, wrong.rps, wrong.calibration_error) == ((0.0, 0.0), 1.0, 1.0)
    assert wrong.log_loss == pytest.approx(-np.log(1e-7))


def test_a_threshold_without_two_sides_has_no_auroc() -> None:
    metrics = probability_metrics([0, 1, 1], [[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.6, 0.3]])
    assert metrics.auroc == pytest.approx((1.0, float("nan")), nan_ok=True)


def test_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    rows = np.array([[0.9, 0.1], [0.85, 0.15], [0.4, 0.6], [0.45, 0.55]])
    # Bin (.8, .9]: confidence .875, accuracy .5. Bin (.5, .6]: confidence .575, accuracy 1.
    assert calibration_error([0, 1, 1, 1], rows) == pytest.approx((0.375 + 0.425) / 2)


def test_calibration_error_of_true_probabilities_goes_to_zero() -> None:
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(4), 100_000)
    true = (rng.random((len(rows), 1)) > rows.cumsum(1)).sum(1).clip(max=3)
    assert calibration_error(true, rows) < 0.01


@pytest.mark.parametrize(
    ("true", "rows", "message"),
    [
        ([], np.zeros((0, 3)), "expected grades"),
        ([0], [[1.0]], "expected grades"),
        ([3], [[0.2, 0.3, 0.5]], "whole numbers from 0 to 2"),
        ([0, 0], [[0.5, 0.5], [float("nan"), 0.5]], "row 1 is"),
        ([0], [[0.5, 0.6]], "sum to one"),
        ([0], [[-0.5, 1.5]], "sum to one"),
    ],
)
def test_what_is_no_distribution_is_refused(true: list[int], rows: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probability_metrics(true, rows)


def results(n: int = 40, repeats: int = 3, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, K, n)
    return true, rng.dirichlet(np.ones(K), (repeats, n)).round(2) * 0.9 + 0.1 * np.eye(K)[true]


def normal(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rows / rows.sum(-1, keepdims=True))


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_copies_of_slides_and_repeats_are_averaged(seed: int) -> None:
    """A metric under whole weights is that of the copied slides, each repeat by itself."""
    true, rows = results(seed=seed)
    rows = normal(rows)
    graded = rows.argmax(2)
    weights = np.random.default_rng(100 + seed).integers(0, 3, (4, len(true)))
    for of_draw in weights:
        copies = np.repeat(np.arange(len(true)), of_draw)
        each = of_draw.astype(float)
        for measure, repeats in ((accuracy, graded), (mae, graded), (rps, rows), (log_loss, rows)):
            expected = np.mean([measure(true[copies], repeat[copies]) for repeat in repeats])
            assert measure(true, repeats, each) == pytest.approx(expected)
        for kappa_like in (qwk, kappa):
            expected = np.mean([kappa_like(true[copies], repeat[copies], K) for repeat in graded])
            assert kappa_like(true, graded, K, each) == pytest.approx(expected)
    by_draw = qwk(true, graded, K, weights.astype(float))
    np.testing.assert_allclose(by_draw, [qwk(true, graded, K, row.astype(float)) for row in weights])


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=30))
def test_kappas_agree_with_scikit_learn_under_any_weights(slides: list[tuple[int, int, int]]) -> None:
    true, predicted, weights = np.array(slides).T
    kept = weights > 0
    for measure, penalty in ((qwk, "quadratic"), (kappa, None)):
        got = measure(true, predicted, K, weights.astype(float))
        if len(set(true[kept]) | set(predicted[kept])) > 1:
            expected = cohen_kappa_score(
                true, predicted, labels=range(K), weights=penalty, sample_weight=weights
            )
            assert got == pytest.approx(expected)
        else:
            assert np.isnan(got)


def test_without_any_weight_nothing_is_known() -> None:
    none = np.zeros((1, 3))
    assert np.isnan(accuracy([0, 1, 2], [0, 1, 1], none)).all()
    assert np.isnan(qwk([0, 1, 2], [0, 1, 1], 3, none)).all()


def test_a_difference_is_taken_on_the_same_weights() -> None:
    gap = difference(partial(weighted_mean, [1.0, 2.0]), partial(weighted_mean, [0.0, 0.0]))
    np.testing.assert_allclose(gap(np.array([[1.0, 1.0], [1.0, 3.0]])), [1.5, 1.75])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: accuracy([0, 1], [0]), "expected grades"),
        (lambda: mae([], []), "expected grades"),
        (lambda: accuracy([0, 1], [0, 0.5]), "whole numbers"),
        (lambda: qwk([0, 5], [0, 1], 5), "from 0 to 4"),
        (lambda: qwk([0, 1], [0, -1], 5), "from 0 to 4"),
        (lambda: rps([0], [0.5, 0.5]), "expected grades"),
        (lambda: rps([2], [[0.5, 0.5]]), "from 0 to 1"),
        (lambda: log_loss([0], [[0.5, 0.6]]), "sum to one"),
    ],
)
def test_predictions_that_cannot_be_meant_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    """Ranks and the largest of NaN are numbers like any other: grade 0, area .5."""
    rows = np.array([[0.5, 0.5], [bad, 0.5]])
    with pytest.raises(UsageError, match=r"expected finite numbers, found (nan|inf) at \(1,\)"):
        auroc([True, False], [0.5, bad])
    for use in (
        GradeSets(0.5, 0.1, 10).sets,
        lambda rows: with_temperature(rows, 2.0),
        lambda rows: with_temperature(rows, 1),
    ):
        with pytest.raises(UsageError, match="expected finite numbers"):
            use(rows)
    for metric in (rps, log_loss, calibration_error, probability_metrics, calibration_null):
        with pytest.raises(UsageError, match="row 1 is"):
            metric([0, 1], rows)
    with pytest.raises(UsageError, match="row 1 is"):
        fit_temperature([0, 1], rows, [0, 1])
    with pytest.raises(UsageError, match="whole numbers"):
        grade_metrics([0, 1], [0, bad], 2)
    with pytest.raises(UsageError, match="temperature"):
        with_temperature([[0.5, 0.5]], bad)


def test_intervals_over_patients_weigh_as_scikit_learn_does() -> None:
    rng = np.random.default_rng(0)
    true, who = rng.integers(0, 2, 40), np.arange(40) // 2
    score = np.clip(true * 0.3 + rng.random(40), 0.01, 0.99).round(1)  # with ties
    rows = np.column_stack([1 - score, score])
    found = patient_intervals(true, rows, who)
    assert list(found) == ["accuracy", "log_loss", "auroc_above_0"]
    metrics = probability_metrics(true, rows)
    assert found["log_loss"][0] == pytest.approx(metrics.log_loss)
    assert found["auroc_above_0"][0] == pytest.approx(metrics.auroc[0])
    for estimate, low, high in found.values():
        assert low < estimate < high
    # A patient twice counts as copies of its slides do.
    twice = np.concatenate([np.arange(40), [6, 7]])
    metric = auroc_metric(true == 1, score)
    copied = roc_auc_score(true[twice], score[twice])
    weights = np.bincount(twice).astype(float)
    assert metric(weights[None])[0] == pytest.approx(copied)
    assert np.isnan(metric((true == 1).astype(float)[None])[0])  # no negative is left
    assert patient_intervals(true, rows, np.zeros(40)) == {}
    rare = (np.arange(40) < 8).astype(int)  # of four patients
    assert list(patient_intervals(rare, rows, who)) == ["accuracy", "log_loss"]
    # Grades that are told apart completely: an AUROC of 1 in all resamples is no interval.
    assert list(patient_intervals(true, np.eye(2)[true] * 0.8 + 0.1, who)) == ["accuracy"]


def test_numbers_that_are_not_finite_have_no_metrics() -> None:
    assert number_metrics([1.0, 4.0], [2.0, 2.0]).mae == 1.5
    with pytest.raises(UsageError, match="expected finite numbers"):
        number_metrics([1.0], [np.nan])


def test_two_slides_of_one_certain_grade_are_told_apart() -> None:
    """Their probabilities differ by less than 1e-4."""
    odds = np.exp(-np.array([9.5, 10.5, 12.0]))
    certain = np.stack([1 / (1 + odds), odds / (1 + odds)], axis=1)
    assert told_apart(certain.tolist()) and not told_apart(certain[[0, 0]].tolist())
