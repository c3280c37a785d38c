from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from slidetl.errors import UsageError
from slidetl.evaluation.calibration import (
    calibration_null,
    calibration_slope,
    fit_temperature,
    is_at_bound,
    recalibrate,
    reliability,
    with_temperature,
)
from slidetl.evaluation.comparison import patient_results
from slidetl.evaluation.folds import stratified_folds
from slidetl.evaluation.metrics import calibration_error, log_loss
from slidetl.evaluation.ordinal import ProportionalOdds

Rows = NDArray[np.float64]


def drawn(rows: Rows, rng: np.random.Generator) -> NDArray[np.int64]:
    """Grades that the rows are the true probabilities of."""
    return np.asarray((rng.random((len(rows), 1)) > rows.cumsum(1)).sum(1).clip(max=rows.shape[1] - 1))


def cumulative(rng: np.random.Generator, n: int) -> Rows:
    """Rows of a cumulative link model, K of 5."""
    above = expit(rng.normal(0, 2, (n, 1)) - np.array([-2.0, -0.7, 0.7, 2.0]))
    return np.asarray(-np.diff(above, axis=1, prepend=1, append=0))


def test_a_temperature_divides_the_logits_of_a_softmax() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (20, 5))
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    cooled = np.exp(logits / 2.5) / np.exp(logits / 2.5).sum(1, keepdims=True)
    np.testing.assert_allclose(with_temperature(softmax, 2.5), cooled, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(with_temperature(softmax, 1), softmax)
    np.testing.assert_allclose(with_temperature([[1.0, 0.0], [0.5, 0.5]], 1e3).sum(1), 1)
    with pytest.raises(UsageError, match="above 0, not 0"):
        with_temperature(softmax, 0)


@settings(max_examples=50)
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_a_temperature_never_changes_the_grade(seed: int, temperature: float) -> None:
    rows = np.random.default_rng(seed).dirichlet(np.ones(4), 10)
    changed = with_temperature(rows, temperature)
    np.testing.assert_allclose(changed.sum(1), 1)
    np.testing.assert_array_equal(changed.argmax(1), rows.argmax(1))
    np.testing.assert_allclose(with_temperature(changed, 1 / temperature).argmax(1), rows.argmax(1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(temperature: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(5), 20_000)
    told = with_temperature(rows, 1 / temperature)
    assert fit_temperature(drawn(rows, rng), told, range(20_000)) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_the_temperature_has_the_least_log_loss_of_slides_and_of_two_drawn_from_the_model(seed: int) -> None:
    """Each slide once with its grade, and once with every grade, at its share of two slides."""
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.ones(5), 60)
    true = drawn(with_temperature(rows, 2), rng)
    every = np.concatenate([true, np.tile(np.arange(5), 60)])
    weights = np.concatenate([np.ones(60), 2 / 60 * rows.ravel()])

    def loss(temperature: float) -> float:
        calibrated = with_temperature(np.concatenate([rows, np.repeat(rows, 5, axis=0)]), temperature)
        return float(log_loss(every, calibrated, weights))

    found = fit_temperature(true, rows, range(60))
    assert loss(found) <= min(loss(temperature) for temperature in np.geomspace(0.05, 20, 500))


@pytest.mark.parametrize("flipped", [0, 3])
def test_of_two_grades_the_temperature_is_the_slope_of_a_logistic_regression(flipped: int) -> None:
    rng = np.random.default_rng(2)
    odds = rng.normal(0, 1, 30)
    rows, true = np.stack([1 - expit(odds), expit(odds)], axis=1), (odds > 0).astype(int)
    true[:flipped] = 1 - true[:flipped]
    fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(
        np.tile(odds, 3)[:, None],
        np.concatenate([true, np.zeros(30), np.ones(30)]),
        np.concatenate([np.ones(30), 2 / 30 * rows.T.ravel()]),
    )
    assert fit_temperature(true, rows, range(30)) == pytest.approx(1 / fit.coef_[0, 0], rel=1e-4)


def test_slides_that_are_all_graded_right_make_no_model_certain() -> None:
    """Platt's (N + 1) / (N + 2) where the model shares its probability alike; never a bound."""
    for n in (2, 12, 100):
        rows = np.tile([0.6, 0.4], (n, 1))
        calibrated = with_temperature(rows, fit_temperature(np.zeros(n, int), rows, range(n)))
        assert calibrated[0, 0] == pytest.approx((n + 2 * 0.6) / (n + 2))
    rows = np.tile([0.1, 0.6, 0.1, 0.1, 0.1], (12, 1))
    new = with_temperature([0.05, 0.2, 0.5, 0.2, 0.05], fit_temperature(np.ones(12, int), rows, range(12)))
    assert 0.7 < new[2] < 0.9
    certain = np.eye(2)[[0, 1] * 6]
    assert 0.8 < fit_temperature([0, 1] * 6, certain, range(12)) < 1  # zeros are floored


def test_many_slides_of_a_patient_tell_a_temperature_no_more_than_one() -> None:
    rows, true = np.tile([0.1, 0.8, 0.1], (12, 1)), np.ones(12, int)
    one = fit_temperature(true, rows, range(12))
    many = fit_temperature(true.repeat(20), rows.repeat(20, axis=0), np.arange(12).repeat(20))
    assert many == pytest.approx(one)
    assert with_temperature(rows, many)[0, 1] == pytest.approx((12 + 2 * 0.8) / 14)


def test_a_temperature_hardly_depends_on_the_model_itself_on_many_slides() -> None:
    rng = np.random.default_rng(3)
    rows = rng.dirichlet(np.ones(4), 5000)
    true = drawn(with_temperature(rows, 3), rng)
    losses = {t: float(log_loss(true, with_temperature(rows, t))) for t in np.geomspace(2, 4, 150)}
    assert fit_temperature(true, rows, range(5000)) == pytest.approx(
        min(losses, key=losses.__getitem__), rel=0.005
    )


def test_few_slides_calibrate_better_than_the_plain_log_loss_does() -> None:
    """Ten slides by a calibrated model of two grades; log loss on new slides."""
    rng = np.random.default_rng(4)
    odds = rng.normal(0, 3, 1000)
    new = np.stack([1 - expit(odds), expit(odds)], axis=1)
    outcome, of_model, plain = drawn(new, rng), [], []
    for _ in range(50):
        rows = new[rng.integers(1000, size=10)]
        true = drawn(rows, rng)
        of_model.append(
            float(log_loss(outcome, with_temperature(new, fit_temperature(true, rows, range(10)))))
        )
        grid = [(log_loss(true, with_temperature(rows, t)), t) for t in np.geomspace(0.05, 20, 30)]
        plain.append(float(log_loss(outcome, with_temperature(new, min(grid)[1]))))
    least = float(log_loss(outcome, new))
    assert np.mean(of_model) - least < 0.3 * (np.mean(plain) - least)


def test_a_temperature_ends_at_a_bound() -> None:
    rows = np.array([[0.6, 0.4], [0.4, 0.6]] * 6)
    assert fit_temperature([1, 0] * 6, rows, range(12)) == 20
    assert fit_temperature([1, 0], np.full((2, 2), 0.5), range(2)) == 20
    assert fit_temperature([0, 1] * 6, 0.5 + 0.01 * (rows - 0.5), range(12)) == 0.05
    assert is_at_bound(20) and is_at_bound(0.0511) and not is_at_bound(0.06) and not is_at_bound(18)
    with pytest.raises(ValueError, match="sum to one"):
        fit_temperature([0, 1], [[0.6, 0.6], [0.4, 0.6]], range(2))
    with pytest.raises(UsageError, match="patients"):
        fit_temperature([0, 1], [[0.6, 0.4], [0.4, 0.6]], range(3))


def test_slope_and_intercept_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    rows = cumulative(rng, 150)
    true = drawn(rows, rng)
    found = calibration_slope(true, rows, np.arange(150) // 2, n_draws=500)
    odds = logit(rows[:, ::-1].cumsum(1)[:, -2::-1]).ravel()
    happened = (true[:, None] > np.arange(4)).ravel()
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(odds[:, None], happened)
    assert found.slope is not None
    assert found.slope.estimate == pytest.approx(theirs.coef_[0, 0], abs=1e-4)
    # At a slope of 1 the intercept makes the mean of the probabilities that of the outcomes.
    assert found.intercept is not None
    assert expit(odds + found.intercept.estimate).mean() == pytest.approx(happened.mean())
    assert found.slope.low < found.slope.estimate < found.slope.high


def test_probabilities_that_are_right_have_slope_one_and_sure_ones_less() -> None:
    rng = np.random.default_rng(1)
    rows = cumulative(rng, 600)
    true = drawn(rows, rng)
    right = calibration_slope(true, rows, np.arange(600) // 6, n_draws=300)
    assert right.slope is not None and right.slope.low < 1 < right.slope.high
    assert right.intercept is not None
    assert right.intercept.low < 0 < right.intercept.high
    above = expit(2 * logit(rows[:, ::-1].cumsum(1)[:, -2::-1]) - 1)
    surer = -np.diff(above, axis=1, prepend=1, append=0)
    found = calibration_slope(true, surer, np.arange(600) // 6, n_draws=300)
    assert found.slope is not None and found.slope.estimate == pytest.approx(0.5, abs=0.05)
    assert found.intercept is not None
    assert found.intercept.estimate > 0.3  # it grades too low


def test_grades_that_are_told_apart_completely_have_no_slope() -> None:
    true = np.arange(20) % 5
    found = calibration_slope(true, 0.6 * np.eye(5)[true] + 0.08, range(20))
    assert found.slope is None and found.intercept is not None and np.isfinite(found.intercept.estimate)
    # One pair of slides keeps the grades from being parted; three resamples of five lack one of the two.
    above = np.linspace(0.1, 0.9, 12)
    barely = calibration_slope([0] * 5 + [1, 0] + [1] * 5, np.stack([1 - above, above], 1), range(12))
    assert barely.slope is None
    for grade in (0, 4):  # without two sides
        none = calibration_slope([grade] * 2, np.full((2, 5), 0.2), [0, 1])
        assert none.slope is None and none.intercept is None


def test_the_null_is_the_error_of_calibrated_probabilities() -> None:
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(5), 100)
    true = drawn(rows, rng)
    null = calibration_null(true, rows, n_draws=2000)
    assert null.error == calibration_error(true, rows)
    again = [calibration_error(drawn(rows, rng), rows) for _ in range(500)]
    assert null.null_mean == pytest.approx(np.mean(again), abs=0.005)
    assert null.null_high == pytest.approx(np.quantile(again, 0.95), abs=0.01)
    assert null.null_mean > 0.04  # zero is not what a calibrated model has


def test_the_null_is_rejected_as_often_as_it_should_and_for_sure_models() -> None:
    rng = np.random.default_rng(1)
    rejected = 0
    for _ in range(200):
        rows = rng.dirichlet(np.ones(5), 60)
        rejected += calibration_null(drawn(rows, rng), rows, n_draws=99).p <= 0.05
    assert 1 <= rejected <= 20
    rows = rng.dirichlet(np.ones(5), 100)
    sure = calibration_null(drawn(rows, rng), with_temperature(rows, 0.2), n_draws=999)
    assert sure.p == 0.001 and sure.error > sure.null_high


def test_the_diagram_holds_every_slide_and_gives_the_calibration_error() -> None:
    rng = np.random.default_rng(2)
    rows = rng.dirichlet(np.ones(5), 100)
    true = drawn(rows, rng)
    points = reliability(true, rows)
    assert sum(point.n for point in points) == 100
    assert sum(point.n * abs(point.accuracy - point.confidence) for point in points) / 100 == pytest.approx(
        calibration_error(true, rows)
    )
    confidences = [point.confidence for point in points]
    assert confidences == sorted(confidences)
    assert all(0 <= point.low <= point.confidence <= point.high <= 1 for point in points)


def test_calibration_judges_the_reported_grade_of_a_patient_not_the_peak_of_the_mean() -> None:
    """Two slides of grades 0 and 2: the patient has grade 1, of a mean probability of .1."""
    found = patient_results([0, 2], [[0.9, 0.1, 0], [0, 0.1, 0.9]], ["a", "a"], "mean")
    rows, predicted = found.probabilities[0], found.predicted[0]
    assert (found.true.tolist(), predicted.tolist()) == ([1], [1])
    (point,) = reliability(found.true, rows, predicted)
    assert point.confidence == pytest.approx(0.1) and point.accuracy == 1
    null = calibration_null(found.true, rows, predicted, n_draws=99)
    assert null.error == calibration_error(found.true, rows, predicted=predicted) == pytest.approx(0.9)
    assert null.p < 0.3


def test_bars_of_one_bin_are_those_of_the_binomial() -> None:
    rows = np.tile([0.6, 0.4], (50, 1))
    (point,) = reliability([0] * 30 + [1] * 20, rows, n_draws=20_000)
    assert (point.n, point.accuracy) == (50, 0.6) and point.confidence == pytest.approx(0.6)
    # 2.5 and 97.5 % of Binomial(50, 0.6) are 23 and 37.
    assert [50 * point.low, 50 * point.high] == pytest.approx([23, 37])


def test_recalibration_grades_a_shifted_cohort_by_other_patients() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 5, 200)
    score = 0.4 * true + 0.2 * rng.normal(size=200)  # an expected grade that is far too low
    shifted = np.exp(-((np.arange(5) - score[:, None]) ** 2))
    shifted /= shifted.sum(axis=1, keepdims=True)
    patients = np.arange(200) // 2
    found = recalibrate(true, shifted, patients)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert (shifted.argmax(axis=1) == true).mean() < 0.4 < 0.7 < (found.argmax(axis=1) == true).mean()
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    expected = shifted @ np.arange(5)
    reference = cross_val_predict(
        ProportionalOdds(1e-3), expected[:, None], true, groups=patients, cv=folds, method="predict_proba"
    )
    np.testing.assert_allclose(found, reference)
    constant = recalibrate(np.arange(200) % 5, np.full((200, 5), 0.2), np.arange(200))
    np.testing.assert_allclose(constant, 0.2, atol=1e-3)  # not the reverse of the fold


def test_recalibration_needs_enough_patients() -> None:
    for true in ([0, 1, 2], [0, 1, 2, 0, 1, 2]):
        with pytest.raises(UsageError, match=r"at least 5 patients .* as many slides of the commonest grade"):
            recalibrate(true, np.full((len(true), 3), 1 / 3), np.arange(len(true)))
    assert recalibrate([0] * 5 + [1, 2], np.full((7, 3), 1 / 3), np.arange(7)).shape == (7, 3)
    patients = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 4, 4, 4]  # of whom one fold gets none
    true = [0, 2, 0, 2, 0, 0, 2, 1, 2, 2, 1, 0, 1, 1, 1, 1]
    assert 0 in map(len, stratified_folds(true, patients, 5, 0))
    np.testing.assert_allclose(recalibrate(true, np.full((16, 3), 1 / 3), patients).sum(axis=1), 1)
