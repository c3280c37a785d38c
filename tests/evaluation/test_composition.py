from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Interval
from slidetl.evaluation.composition import grade_correlation, site_share


def test_share_of_a_site_is_of_means_and_its_interval_tells_chance_from_a_batch() -> None:
    rng = np.random.default_rng(0)
    sites = np.array(["a"] * 10 + ["b"] * 30)
    patients = np.arange(40)
    even = rng.uniform(0.2, 0.4, 40)
    own = np.where(sites == "a", 0.5, 0.02) * rng.uniform(0.8, 1.2, 40)
    found = site_share(own, sites, patients, n_draws=500)
    assert found is not None
    assert found.site == "a"
    assert isinstance(found.share, Interval)
    expected = own[:10].mean() / (own[:10].mean() + own[10:].mean())
    assert found.share.estimate == pytest.approx(expected)
    assert found.chance == 0.5 < found.share.low < expected < found.share.high
    alike = site_share(even, sites, patients, n_draws=500)
    assert alike is not None
    assert isinstance(alike.share, Interval)
    assert alike.share.low < 0.5
    assert found.p is not None and alike.p is not None
    assert found.p == 1 / 1000 < 0.05 < alike.p


def test_sites_that_are_alike_differ_in_one_of_twenty_studies_however_many_they_are() -> None:
    """The site is the greatest of eight; an interval of 95 % says so of a third of these studies."""
    rng = np.random.default_rng(1)
    sites, patients = np.repeat(np.arange(8), 6), np.arange(48)
    found = [site_share(rng.beta(2, 8, 48), sites, patients, n_draws=100) for _ in range(40)]
    assert sum(one is not None and one.p is not None and one.p < 0.05 for one in found) <= 4
    by_interval = [isinstance(o.share, Interval) and o.share.low > o.chance for o in found if o is not None]
    assert sum(by_interval) > 8


def test_sites_are_permuted_over_patients_and_not_over_slides() -> None:
    rng = np.random.default_rng(0)
    shares, sites = rng.beta(2, 8, 20), np.repeat(["a", "b"], 10)
    apart = site_share(shares, sites, np.arange(20), n_draws=200)
    together = site_share(np.repeat(shares, 9), np.repeat(sites, 9), np.repeat(np.arange(20), 9), n_draws=200)
    assert apart is not None and together is not None
    assert together.p == apart.p


def test_slides_of_a_patient_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    share, grade = rng.uniform(size=24), rng.integers(0, 4, 24)
    apart = grade_correlation(share, grade, np.arange(24), n_draws=500)
    together = grade_correlation(
        np.repeat(share, 4), np.repeat(grade, 4), np.repeat(np.arange(24), 4), n_draws=500
    )
    assert isinstance(apart, Interval)
    assert isinstance(together, Interval)
    assert together.high - together.low == pytest.approx(apart.high - apart.low, rel=0.2)


def test_correlation_with_the_grade_is_spearmans() -> None:
    rng = np.random.default_rng(1)
    grade = rng.integers(0, 5, 40)
    share = np.clip(grade / 10 + rng.uniform(0, 0.3, 40), 0, 1)
    found = grade_correlation(share, grade, np.arange(40), n_draws=500)
    assert isinstance(found, Interval)
    assert found.estimate == pytest.approx(spearmanr(share, grade).statistic)
    assert 0 < found.low < found.estimate < found.high <= 1


def test_a_few_patients_have_no_interval() -> None:
    """All resamples of three patients, or of two at each site, agree."""
    assert grade_correlation([0.1, 0.2, 0.3], [0, 1, 2], list("abc")) == pytest.approx(1)
    found = site_share([0.4, 0.3, 0, 0], list("AABB"), list("abcd"))
    assert found is not None and found.share == 1
    # Nine patients of grade 0, and four, or five, of grade 1.
    shares = np.arange(14) / 20
    assert isinstance(grade_correlation(shares[:13], [0] * 9 + [1] * 4, range(13)), float)
    assert isinstance(grade_correlation(shares, [0] * 9 + [1] * 5, range(14), n_draws=200), Interval)
    # Slides of a patient are no patients.
    assert isinstance(grade_correlation(shares, [0] * 9 + [1] * 5, [*range(9), 9, 9, 9, 9, 9]), float)
    found = site_share(shares, ["a"] * 9 + ["b"] * 5, range(14), n_draws=200)
    assert found is not None and isinstance(found.share, Interval)


def test_what_cannot_be_told_is_none() -> None:
    share, patients = np.array([0.1, 0.2, 0.3, 0.4]), np.arange(4)
    assert site_share(share, ["a"] * 4, patients) is None
    assert site_share(np.zeros(4), ["a", "b", "a", "b"], patients) is None
    lone = site_share(share, ["a", "a", "a", "b"], patients)
    assert lone is not None
    assert lone.share == pytest.approx(0.4 / (0.4 + 0.2))  # one patient at b: no interval
    assert lone.p is None
    assert grade_correlation(share, [1, 1, 1, 1], patients) is None
    assert grade_correlation(share, [0, 1, 1, 2], [1, 1, 1, 2]) is None
    assert site_share(share, ["a", "b", "a", "b"], [1, 1, 2, 2], n_draws=200) is not None  # patients at both
    with pytest.raises(UsageError, match="between 0 and 1"):
        site_share([2.0, 0.1], ["a", "b"], [1, 2])
