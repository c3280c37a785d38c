from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, wilcoxon

from slidetl.errors import UsageError
from slidetl.evaluation.repeatability import (
    _median_of,
    compare_groups,
    compare_paired,
    repeatability,
)


def test_icc_of_shrout_and_fleiss() -> None:
    """Table 2 of Psychological Bulletin 1979: six targets, four judges; ICC(1,1) is 0.17."""
    scores = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    result = repeatability(scores, range(6))
    assert result.icc.estimate == pytest.approx(0.17, abs=0.005)
    # Within-target mean square 6.26 in their table 3.
    assert result.within_sd.estimate**2 == pytest.approx(6.26, abs=0.01)
    assert (result.n, result.n_draws) == (6, 4)


def test_known_variances_are_found_and_covered() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for study in range(60):
        level = rng.normal(0, 2, (60, 1))
        result = repeatability(level + 0.5 * rng.normal(size=(60, 4)), range(60), level=0.9, seed=study)
        change = 1.96 * np.sqrt(2) * 0.5
        covered.append(
            [
                result.within_sd.low <= 0.5 <= result.within_sd.high,
                result.icc.low <= 4 / 4.25 <= result.icc.high,
                result.minimal_detectable_change.low <= change <= result.minimal_detectable_change.high,
            ]
        )
    assert (np.mean(covered, 0) >= 0.8).all()


def test_the_change_is_what_two_draws_differ_by() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(2000, 1)) + 0.3 * rng.normal(size=(2000, 2))
    result = repeatability(scores, np.arange(2000) // 40)
    beyond = abs(scores[:, 0] - scores[:, 1]) > result.minimal_detectable_change.estimate
    assert beyond.mean() == pytest.approx(0.05, abs=0.015)


@settings(max_examples=25, deadline=None)
@given(st.floats(-100, 100), st.floats(0.1, 10))
def test_icc_has_no_unit_and_the_change_has(shift: float, scale: float) -> None:
    scores = np.random.default_rng(0).normal(size=(12, 3)) + np.arange(12)[:, None]
    first, second = repeatability(scores, range(12)), repeatability(shift + scale * scores, range(12))
    assert second.icc.estimate == pytest.approx(first.icc.estimate)
    assert second.within_sd.estimate == pytest.approx(scale * first.within_sd.estimate)


def test_scores_that_cannot_repeat() -> None:
    with pytest.raises(UsageError, match="two slides and draws"):
        repeatability([[1.0], [2.0]], [0, 1])
    with pytest.raises(UsageError, match="finite"):
        repeatability([[1.0, np.nan], [2.0, 1.0]], [0, 1])
    with pytest.raises(UsageError, match="undefined on these results"):
        repeatability([[1.0, 1.0], [1.0, 1.0]], [0, 1])


def test_groups_by_hand_and_by_scipy() -> None:
    rng = np.random.default_rng(3)
    scores, group = rng.normal(size=30), np.arange(30) % 3 == 0
    scores[group] -= 2
    shift = compare_groups(scores, group, range(30))
    gaps = scores[group][:, None] - scores[~group]
    assert (shift.n_first, shift.n_second) == (20, 10)
    assert shift.shift.estimate == pytest.approx(np.median(gaps))
    assert shift.superiority == pytest.approx((gaps > 0).mean())
    assert shift.p == pytest.approx(mannwhitneyu(scores[group], scores[~group]).pvalue)
    assert shift.shift.low < shift.shift.estimate < shift.shift.high < 0


def test_a_group_is_made_of_patients() -> None:
    """Slides of a patient are averaged: ten times as many are no new evidence."""
    scores, group = np.array([1.0, 2, 3, 4, 2.5, 3.5, 4.5, 6]), np.arange(8) >= 4
    once = compare_groups(scores, group, range(8))
    tenfold = compare_groups(np.repeat(scores, 10), np.repeat(group, 10), np.repeat(range(8), 10))
    assert tenfold == once
    with pytest.raises(UsageError, match="patient 0 is in both groups"):
        compare_groups(scores, group, np.arange(8) % 4)
    with pytest.raises(UsageError, match="two patients in each"):
        compare_groups(scores, np.arange(8) > 6, range(8))
    with pytest.raises(UsageError, match="of one length"):
        compare_groups(scores, group[:3], range(8))
    with pytest.raises(UsageError, match="finite"):
        compare_groups(scores * np.nan, group, range(8))


@pytest.mark.parametrize(("sizes", "is_point"), [((4, 20), True), ((20, 4), True), ((5, 20), False)])
def test_a_group_of_few_patients_has_no_interval(sizes: tuple[int, int], is_point: bool) -> None:
    scores, group = np.random.default_rng(3).normal(size=sum(sizes)), np.repeat([False, True], sizes)
    found = compare_groups(scores, group, range(sum(sizes)), n_draws=50).shift
    assert found.estimate == pytest.approx(np.median(scores[group][:, None] - scores[~group]))
    assert found.is_point == is_point


def test_a_shift_is_the_median_over_copies_of_the_patients() -> None:
    """Weights of patients against the copies themselves, with many ties."""
    rng = np.random.default_rng(4)
    scores, group = rng.integers(0, 6, 14).astype(float), np.arange(14) % 2 == 0
    for _ in range(20):
        weights = rng.integers(0, 3, 14)
        weights[:4] += 1
        copies = np.repeat(np.arange(14), weights)
        whole = compare_groups(scores[copies], group[copies], np.arange(len(copies)), n_draws=50)
        a, b = scores[copies[~group[copies]]], scores[copies[group[copies]]]
        assert whole.shift.estimate == pytest.approx(np.median(b[:, None] - a))
        metric = _median_of(
            (scores[group] - scores[~group][:, None]).ravel(),
            lambda row: np.outer(row[~group], row[group]).ravel(),
        )
        assert metric(weights[None].astype(float))[0] == pytest.approx(whole.shift.estimate)


def test_the_interval_of_a_shift_covers_it() -> None:
    rng = np.random.default_rng(5)
    covered = [0, 0]
    for study in range(40):
        first, second = rng.exponential(size=20), rng.exponential(size=25) + 0.7
        shift = compare_groups(
            np.concatenate([first, second]),
            np.repeat([False, True], [20, 25]),
            range(45),
            level=0.9,
            n_draws=300,
            seed=study,
        ).shift
        covered[0] += shift.low <= 0.7 <= shift.high
        change = compare_paired(
            np.zeros(30), rng.normal(0.7, 1, 30), level=0.9, n_draws=300, seed=study
        ).shift
        covered[1] += change.low <= 0.7 <= change.high
    assert min(covered) >= 31


def test_pairs_by_hand_and_by_scipy() -> None:
    rng = np.random.default_rng(6)
    before, after = rng.normal(3, 1, 20), rng.normal(2.4, 1, 20)
    shift = compare_paired(before, after)
    change = after - before
    walsh = [(change[i] + change[j]) / 2 for i in range(20) for j in range(i, 20)]
    assert shift.shift.estimate == pytest.approx(np.median(walsh))
    assert shift.p == pytest.approx(wilcoxon(change).pvalue)
    assert shift.superiority == pytest.approx((change > 0).mean())
    assert (shift.n_first, shift.n_second) == (20, 20)
    same = compare_paired(before, before)
    assert (same.p, same.shift.low, same.shift.high, same.superiority) == (1, 0, 0, 0.5)
    with pytest.raises(UsageError, match="two scores"):
        compare_paired([1.0], [2.0])
    with pytest.raises(UsageError, match="finite"):
        compare_paired([1.0, np.nan], [2.0, 1.0])
