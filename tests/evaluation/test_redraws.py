from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, t, ttest_1samp

from slidetl.errors import UsageError
from slidetl.evaluation.redraws import combine_redraws


def test_equal_errors_give_the_one_sample_t_interval() -> None:
    effects = np.array([0.10, 0.31, 0.22, -0.05, 0.18])
    found = combine_redraws(effects, np.full(5, 0.03))
    reference = ttest_1samp(effects, 0)
    interval = reference.confidence_interval(0.95)
    assert found.interval.estimate == pytest.approx(effects.mean())
    assert (found.interval.low, found.interval.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(reference.pvalue)
    assert found.between**2 == pytest.approx(effects.var(ddof=1) - 0.03**2)
    assert found.n == 5


def test_effects_closer_than_their_errors_keep_to_the_errors() -> None:
    errors = np.array([0.1, 0.2, 0.1])
    found = combine_redraws([0.20, 0.21, 0.20], errors)
    weights = 1 / errors**2
    half = t.ppf(0.975, 2) / np.sqrt(weights.sum())
    assert found.between == 0
    assert found.interval.estimate == pytest.approx((weights @ [0.20, 0.21, 0.20]) / weights.sum())
    assert found.interval.high - found.interval.low == pytest.approx(2 * half)


# Trials of the BCG vaccine (Colditz et al., JAMA 1994): cases and others, vaccinated and not.
BCG = np.array(
    [
        *((4, 119, 11, 128), (6, 300, 29, 274), (3, 228, 11, 209), (62, 13536, 248, 12619)),
        *((33, 5036, 47, 5761), (180, 1361, 372, 1079), (8, 2537, 10, 619), (505, 87886, 499, 87892)),
        *((29, 7470, 45, 7232), (17, 1699, 65, 1600), (186, 50448, 141, 27197), (5, 2493, 3, 2338)),
        (27, 16886, 29, 17825),
    ]
)


def test_trials_of_a_vaccine_are_combined_as_metafor_does() -> None:
    """R's metafor, rma(measure="RR", data=dat.bcg, method="PM"): tau^2 0.3181, log ratio -0.7150."""
    a, b, c, d = BCG.T
    found = combine_redraws(
        np.log(a / (a + b) * (c + d) / c), np.sqrt(1 / a - 1 / (a + b) + 1 / c - 1 / (c + d))
    )
    assert found.between**2 == pytest.approx(0.3181, abs=5e-5)
    assert found.interval.estimate == pytest.approx(-0.7150, abs=5e-5)


def test_it_covers_the_mean_of_few_redraws_where_a_normal_interval_does_not() -> None:
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    for _ in range(600):
        errors = rng.uniform(0.03, 0.06, 5)
        effects = 0.2 + rng.normal(0, 0.08, 5) + rng.normal(0, errors)
        interval = combine_redraws(effects, errors).interval
        half = norm.ppf(0.975) * effects.std(ddof=1) / np.sqrt(5)
        hits += [interval.low <= 0.2 <= interval.high, abs(effects.mean() - 0.2) <= half]
    assert 0.93 <= hits[0] / 600 <= 0.97
    assert hits[1] / 600 < 0.91


@pytest.mark.parametrize(
    ("effects", "errors", "message"),
    [
        ([0.1], [0.1], "two redraws or more"),
        ([0.1, 0.2], [0.1], "two redraws or more"),
        ([0.1, float("nan")], [0.1, 0.1], "finite"),
        ([0.1, 0.2], [0.1, 0.0], "above 0"),
    ],
)
def test_what_cannot_be_combined(effects: list[float], errors: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        combine_redraws(effects, errors)
