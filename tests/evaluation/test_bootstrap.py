from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, bootstrap

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Interval, Metric, bca_interval, resampled_metric, share_interval
from slidetl.evaluation.metrics import accuracy, by_repeat, difference, mae, qwk, weighted_mean


def mean_of(values: NDArray[np.float64]) -> Metric:
    return partial(weighted_mean, values)


def test_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for study in range(200):
        values = rng.normal(size=60)
        interval = bca_interval(mean_of(values), range(60), level=0.9, n_draws=300, seed=study)
        covered += interval.low <= 0 <= interval.high
    assert 0.82 <= covered / 200 <= 0.96


def test_slides_of_a_patient_are_no_new_evidence() -> None:
    values = np.random.default_rng(1).normal(size=20)
    once = bca_interval(mean_of(values), range(20), n_draws=500)
    tenfold = bca_interval(mean_of(np.repeat(values, 10)), np.repeat(range(20), 10), n_draws=500)
    assert tenfold.high - tenfold.low == pytest.approx(once.high - once.low, rel=0.05)


def test_same_seed_same_interval_and_the_estimate_is_the_data_itself() -> None:
    values = np.arange(12.0)
    patients = list("aabbccddeeff")
    first, second = (bca_interval(mean_of(values), patients, seed=3) for _ in range(2))
    assert first == second
    assert first.estimate == 5.5 and first.level == 0.95


def test_one_patient_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least 2, found 1"):
        bca_interval(mean_of(np.zeros(2)), ["p", "p"])


@pytest.mark.parametrize("seed", range(3))
def test_bca_is_that_of_scipy_where_each_patient_has_one_slide(seed: int) -> None:
    values = np.random.default_rng(seed).exponential(size=25)
    theirs = bootstrap(
        (values,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(7)
    ).confidence_interval
    ours = bca_interval(mean_of(values), range(25), n_draws=2000, seed=7)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert ours.estimate == pytest.approx(values.mean())


@pytest.mark.parametrize("seed", range(3))
def test_draws_that_tie_with_the_estimate_count_half(seed: int) -> None:
    """Of a share of a dozen patients a tenth of the draws and more are the estimate itself."""
    values = np.arange(12) < 4 + seed
    theirs = bootstrap(
        (values,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(7)
    ).confidence_interval
    ours = bca_interval(mean_of(values.astype(float)), range(12), n_draws=2000, seed=7)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    drawn = resampled_metric(mean_of(values.astype(float)), range(12), seed=7)
    assert (drawn == values.mean()).mean() > 0.1


def test_bca_of_two_groups_is_that_of_scipy() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.exponential(size=15), rng.exponential(2, size=22)
    theirs = bootstrap(
        (first, second),
        lambda a, b, axis: b.mean(axis) - a.mean(axis),
        n_resamples=2000,
        method="BCa",
        rng=np.random.default_rng(7),
    ).confidence_interval
    values, group = np.concatenate([first, second]), np.repeat([0.0, 1.0], [15, 22])

    def metric(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        of_second, of_first = weights * group, weights * (1 - group)
        return np.asarray(of_second @ values / of_second.sum(1) - of_first @ values / of_first.sum(1))

    ours = bca_interval(metric, range(37), n_draws=2000, seed=7, strata=group)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_bca_resamples_patients_with_all_their_slides() -> None:
    """A mean over patients of one size is a mean of their means, whose interval scipy knows."""
    values = np.random.default_rng(4).exponential(size=(20, 3))
    theirs = bootstrap(
        (values.mean(1),), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(7)
    ).confidence_interval
    ours = bca_interval(mean_of(values.ravel()), np.repeat(range(20), 3), n_draws=2000, seed=7)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_bca_covers_the_kappa_of_the_population() -> None:
    """60 patients of one to three slides that hang together; the truth is the metric of 200,000 of them."""

    def study(rng: np.random.Generator, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
        patients = np.repeat(range(n), rng.integers(1, 4, n))
        grade = rng.integers(0, 5, n)[patients]
        habit = rng.normal(size=n)[patients]
        graded = np.clip(np.rint(grade + 0.6 * habit + 0.6 * rng.normal(size=len(grade))), 0, 4)
        return grade, graded.astype(np.int64), patients.tolist()

    rng = np.random.default_rng(0)
    true, graded, _ = study(rng, 200_000)
    truth = float(qwk(true, graded, 5))
    covered = 0
    for _ in range(300):
        true, graded, patients = study(rng, 60)
        interval = bca_interval(partial(qwk, true, graded, 5), patients, level=0.9, n_draws=500)
        covered += interval.low <= truth <= interval.high
    assert 0.84 <= covered / 300 <= 0.95


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(12)), st.integers(0, 3))
def test_neither_the_order_of_slides_nor_names_of_patients_matter(order: list[int], shift: int) -> None:
    rng = np.random.default_rng(0)
    true, graded, patients = rng.integers(0, 5, 12), rng.integers(0, 5, 12), np.arange(12) // 2
    first = bca_interval(partial(qwk, true, graded, 5), patients, n_draws=200)
    second = bca_interval(
        partial(qwk, true[order], graded[order], 5), patients[order] + 10**shift, n_draws=200
    )
    assert (first.estimate, first.low, first.high) == pytest.approx(
        (second.estimate, second.low, second.high)
    )


def means_of(values: NDArray[np.float64]) -> Metric:
    """The mean of each repeat, values [R, N]."""
    return lambda weights: np.stack([weighted_mean(row, weights) for row in values])


def test_repeats_are_resampled_along_with_patients() -> None:
    """Of a sum of patient and repeat the variance is that of both means, by hand."""
    rng = np.random.default_rng(0)
    of_patient, of_repeat = rng.normal(size=50), rng.normal(size=4)
    drawn = resampled_metric(means_of(of_patient + of_repeat[:, None]), range(50), n_draws=20_000)
    assert drawn.var() == pytest.approx(of_patient.var() / 50 + of_repeat.var(ddof=1) / 4, rel=0.03)
    patients_alone = resampled_metric(mean_of(of_patient), range(50), n_draws=20_000)
    assert patients_alone.var() == pytest.approx(of_patient.var() / 50, rel=0.03)
    # Repeats that agree add nothing.
    equal = means_of(np.tile(of_patient, (4, 1)))
    interval, alone = bca_interval(equal, range(50)), bca_interval(mean_of(of_patient), range(50))
    assert (interval.low, interval.high) == pytest.approx((alone.low, alone.high))


@pytest.mark.parametrize(("name", "low", "high"), [("qwk", -1, 1), ("mae", 0, 4)])
def test_an_interval_over_repeats_stays_within_the_range_of_the_metric(
    name: str, low: float, high: float
) -> None:
    """Of two repeats of 60 patients one is perfect, and one has 12 wrong grades."""
    true = np.arange(60) % 5
    wrong = np.where(np.arange(60) < 12, (true + 2) % 5, true)
    metric = mae if name == "mae" else lambda true, graded, weights: qwk(true, graded, 5, weights)
    found = bca_interval(by_repeat(metric, true, np.stack([true, wrong])), range(60))
    assert low <= found.low < found.estimate < found.high <= high


def test_differences_that_are_equal_but_for_rounding_tie() -> None:
    """Of 20 patients one arm is right in 16, the other in 12 of them: 22 % of draws are the estimate."""
    right = [(np.arange(20) < hits).astype(np.int64) for hits in (16, 12)]
    gap = difference(*(partial(accuracy, np.ones(20, np.int64), graded) for graded in right))
    theirs = bootstrap(
        ((right[0] - right[1]).astype(float),), np.mean, n_resamples=5000, rng=np.random.default_rng(0)
    ).confidence_interval
    ours = bca_interval(gap, range(20))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high)) == (0.05, 0.4)


def test_a_bound_of_zero_is_zero() -> None:
    """A sum of tenths is 5.6e-17, and would exclude 0; a loss of nothing is no -0.00."""
    found = bca_interval(lambda weights: np.where(weights[:, 0] > 0, 0.1 + 0.2 - 0.3, 0.5), range(10))
    assert (found.estimate, found.low) == (0, 0)
    assert f"{bca_interval(lambda weights: -0.0 * weights[:, 0], range(10)).low:+.2f}" == "+0.00"


def test_an_interval_over_repeats_covers_other_repeats() -> None:
    rng = np.random.default_rng(0)
    held = np.zeros(2)
    for study in range(200):
        values = rng.normal(size=40) / 40**0.5 * 3 + rng.normal(size=(5, 1))
        both = bca_interval(means_of(values), range(40), n_draws=300, seed=study)
        patients = bca_interval(mean_of(values.mean(0)), range(40), n_draws=300, seed=study)
        held += both.low <= 0 <= both.high, patients.low <= 0 <= patients.high
    assert held[0] / 200 >= 0.84 and held[1] / 200 < 0.75


def test_a_metric_of_repeats_is_that_of_each() -> None:
    rng = np.random.default_rng(0)
    true, rows = rng.integers(0, 5, 30), rng.integers(0, 5, (3, 30))
    weights = rng.integers(0, 3, (7, 30)).astype(float)
    found = by_repeat(accuracy, true, rows)(weights)
    assert found.shape == (3, 7)
    np.testing.assert_allclose(found.mean(axis=0), accuracy(true, rows, weights))


@pytest.mark.parametrize("hits", [0, 7, 19, 20])
def test_a_share_has_the_exact_interval(hits: int) -> None:
    held = np.arange(20) < hits
    theirs = binomtest(hits, 20).proportion_ci(0.95, method="exact")
    ours = share_interval(held, range(20))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert (ours.estimate, ours.level) == (hits / 20, 0.95)
    # Neither slides of a patient that all agree nor equal repeats are new evidence.
    for again in (share_interval(np.repeat(held, 10), np.repeat(range(20), 10)),
                  share_interval(np.tile(held, (5, 1)), range(20))):  # fmt: skip
        assert (again.low, again.high) == pytest.approx((theirs.low, theirs.high))


def test_a_share_near_one_is_covered() -> None:
    """20 patients, truth .97: all are right in most studies, and the bootstrap is then a point."""
    exact = boot = 0.0
    for hits in range(21):
        held = np.arange(20) < hits
        chance = binom.pmf(hits, 20, 0.97)
        if chance > 1e-6:
            one, other = (
                share_interval(held, range(20)),
                bca_interval(mean_of(held.astype(np.float64)), range(20), n_draws=500),
            )
            exact += chance * (one.low <= 0.97 <= one.high)
            boot += chance * (other.low <= 0.97 <= other.high)
    assert exact >= 0.95 and boot < 0.5


def test_a_share_of_slides_or_repeats_that_differ_is_covered() -> None:
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(400):
        easy = rng.beta(9.2, 0.8, 30)  # .92 on average, and alike within a patient
        slides = rng.random(60) < np.repeat(easy, 2)
        good = np.clip(rng.normal(0.9, 0.05, (5, 1)), 0, 1)  # another training is better, or worse
        repeats = rng.random((5, 40)) < good
        found = share_interval(slides, np.repeat(range(30), 2)), share_interval(repeats, range(40))
        covered += [one.low <= truth <= one.high for one, truth in zip(found, (0.92, 0.9), strict=True)]
    assert (covered / 400 >= 0.94).all()


def test_where_nothing_varies_the_interval_is_a_point() -> None:
    interval = bca_interval(mean_of(np.ones(10)), range(10), n_draws=100)
    assert (interval.low, interval.estimate, interval.high) == (1, 1, 1)
    assert f"{interval:.2f}" == "1.00 (no interval)"
    assert f"{Interval(0.1, -0.1, 0.2, 0.95):+.1f}" == "+0.1 [-0.1, +0.2]"


@pytest.mark.parametrize(("n_patients", "is_point"), [(2, True), (4, True), (5, False)])
def test_few_patients_have_no_interval(n_patients: int, is_point: bool) -> None:
    values = np.random.default_rng(0).normal(size=2 * n_patients)
    interval = bca_interval(mean_of(values), np.arange(2 * n_patients) % n_patients, n_draws=100)
    assert interval.estimate == pytest.approx(values.mean()) and interval.is_point == is_point


def test_many_slides_are_resampled_in_blocks_to_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    whole = bca_interval(mean_of(values), range(50), n_draws=300)
    monkeypatch.setattr("slidetl.evaluation.bootstrap._BLOCK", 1000)
    assert bca_interval(mean_of(values), range(50), n_draws=300) == whole


def test_resamples_without_the_metric_are_left_out_unless_they_are_most() -> None:
    values = np.arange(12.0)

    def of_first(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(weights[:, 0] > 0, weights @ values / weights.sum(1), np.nan)

    interval = bca_interval(of_first, range(12), n_draws=500)
    assert np.isfinite([interval.low, interval.high]).all()
    assert np.isnan(resampled_metric(of_first, range(12), n_draws=500)).mean() == pytest.approx(
        (11 / 12) ** 12, abs=0.08
    )

    def of_first_three(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where((weights[:, :3] > 0).all(1), weights @ values, np.nan)

    with pytest.raises(UsageError, match="on most resamples of their patients: too few"):
        bca_interval(of_first_three, range(12), n_draws=500)
    with pytest.raises(UsageError, match="undefined on these results"):
        bca_interval(lambda weights: np.full(len(weights), np.nan), range(12))


@pytest.mark.parametrize(
    ("patients", "strata", "message"),
    [
        ([0, 0], None, "at least 2, found 1"),
        ([0, 1, 2], [0, 0, 1], "at least 2, found 1"),
        ([0, 0, 1, 2], [0, 1, 0, 1], "patient 0 is in two strata"),
        ([0, 1], [0, 0, 0], "patients and values of one length"),
    ],
)
def test_patients_that_cannot_be_resampled(
    patients: list[int], strata: list[int] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        bca_interval(lambda weights: weights.sum(1), patients, strata=strata)


def test_a_level_that_cannot_be_meant() -> None:
    with pytest.raises(UsageError, match="level must be between 0 and 1"):
        bca_interval(lambda weights: weights.sum(1), [0, 1], level=95)
