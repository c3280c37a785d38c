import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from slidetl.errors import UsageError
from slidetl.evaluation.metrics import auroc
from slidetl.federation.audit import (
    audit_count,
    audit_membership,
    centre_by_grade,
    likelihood_ratios,
    logit_confidence,
)

Floats = NDArray[np.float64]


def shadows(gap: float, n: int = 40, patients: int = 60, seed: int = 0) -> tuple[Floats, NDArray[np.bool_]]:
    """Confidences that rise by ``gap`` deviations in training, about a level of each patient's own."""
    rng = np.random.default_rng(seed)
    member = rng.random((n, patients)) < 0.5
    return rng.normal(0, 5, patients) + rng.normal(size=(n, patients)) + gap * member, member


def test_membership_is_found_as_well_as_the_distributions_allow() -> None:
    for gap in (1.0, 2.0):
        found = audit_membership(*shadows(gap, n=200), n_draws=100)
        # Two normal distributions of one variance, at a distance of ``gap``.
        assert found.auroc.estimate == pytest.approx(norm.cdf(gap / np.sqrt(2)), abs=0.03)
        assert found.balanced_accuracy.estimate == pytest.approx(norm.cdf(gap / 2), abs=0.03)
        assert found.tpr.estimate == pytest.approx(norm.sf(norm.isf(0.05) - gap), abs=0.05)
        assert found.auroc.low < found.auroc.estimate < found.auroc.high


def test_no_membership_is_found_where_there_is_none() -> None:
    found = audit_membership(*shadows(0.0), n_draws=200)
    assert found.auroc.low < 0.5 < found.auroc.high
    assert found.balanced_accuracy.estimate == pytest.approx(0.5, abs=0.03)
    assert found.tpr.estimate == pytest.approx(0.05, abs=0.02) and found.fpr == 0.05


def test_a_target_is_not_among_its_own_shadows() -> None:
    """A ratio equals that of the other trainings alone, but for the variances."""
    values, member = shadows(1.0, n=12, patients=4)
    changed = values.copy()
    changed[0, 0] += 3.0
    here, there = likelihood_ratios(values, member), likelihood_ratios(changed, member)
    others = np.delete(values[:, 0], 0), np.delete(member[:, 0], 0)
    inside, outside = others[0][others[1]].mean(), others[0][~others[1]].mean()
    for ratios, value in ((here, values[0, 0]), (there, changed[0, 0])):
        assert (ratios[0, 0] > 0) == (abs(value - inside) < abs(value - outside))


def test_the_curve_agrees_with_that_of_others() -> None:
    values, member = shadows(1.0)
    values = np.round(values, 1)  # with ties
    ratios = likelihood_ratios(values, member)
    found = audit_membership(values, member, n_draws=2)
    assert found.auroc.estimate == pytest.approx(auroc(member.ravel(), ratios.ravel()))
    threshold = np.quantile(ratios[~member], 0.95, method="inverted_cdf")
    assert found.tpr.estimate == pytest.approx((ratios[member] > threshold).mean(), abs=0.002)


def test_an_attack_that_never_fails_has_the_exact_interval_of_its_patients() -> None:
    found = audit_membership(*shadows(100.0, n=20, patients=20), n_draws=2)
    share = binomtest(20, 20).proportion_ci(0.95, method="exact")
    assert found.tpr.low == pytest.approx(share.low) and found.tpr.estimate == found.tpr.high == 1
    wider = binomtest(20, 20).proportion_ci(0.975, method="exact")
    assert found.balanced_accuracy.low == pytest.approx(wider.low) and found.balanced_accuracy.high == 1


def test_trainings_that_draw_their_members_count() -> None:
    """Of patients alike, 200 trainings tell more than the 60 patients, and the interval covers what is so."""
    found = audit_membership(*shadows(1.0, n=200), n_draws=2).balanced_accuracy
    assert found.low < norm.cdf(0.5) < found.high and found.high - found.low < 0.04


def test_a_count_in_the_update_is_inferred_from_sites_of_other_patients() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(2, 20, 60)
    updates = rng.normal(size=(60, 30))
    updates[:, 3] += counts / 2
    found = audit_count(updates, counts, np.arange(60) % 2, n_draws=200)
    assert found.auroc.low > 0.7 and found.error < 0.8 * found.error_of_mean
    hidden = audit_count(rng.normal(size=(60, 30)), counts, np.arange(60) % 2, n_draws=200)
    assert hidden.auroc.low < 0.5 < hidden.auroc.high and hidden.error > 0.9 * hidden.error_of_mean
    # What only one population shows teaches nothing about the other.
    secret = rng.normal(size=(60, 30))
    secret[::2, 5] += 3 * counts[::2]
    secret[1::2, 5] -= 3 * counts[1::2]
    assert audit_count(secret, counts, np.arange(60) % 2, n_draws=200).auroc.estimate < 0.5


@pytest.mark.parametrize(("n_above", "is_point"), [(4, True), (5, False)])
def test_few_sites_above_the_median_leave_no_interval(n_above: int, is_point: bool) -> None:
    counts = np.where(np.arange(20) < n_above, 9, 2)
    messages = counts[:, None] + np.random.default_rng(1).normal(0, 5, (20, 1))
    assert audit_count(messages, counts, np.arange(20) % 2, n_draws=50).auroc.is_point == is_point


def test_confidence_is_the_logit_of_the_true_grade() -> None:
    found = logit_confidence([1, 0], [[0.2, 0.8], [0.0, 1.0]])
    assert found[0] == pytest.approx(np.log(4)) and np.isfinite(found).all() and found[1] < -20


def test_a_property_of_the_site_is_no_membership() -> None:
    """Sites with more patients of a grade are surer of all of them, and hold more of them."""
    rng = np.random.default_rng(0)
    grades = np.repeat([0, 1], 40)
    share = rng.uniform(0.2, 0.8, (80, 1))
    member = rng.random((80, 80)) < np.where(grades == 1, share, 0.5)
    confidence = rng.normal(size=(80, 80)) + np.where(grades == 1, 8 * share, 0)
    assert audit_membership(confidence, member, n_draws=100).auroc.low > 0.52
    centred = audit_membership(centre_by_grade(confidence, grades), member, n_draws=100).auroc
    assert centred.low < 0.5 < centred.high


def test_too_few_shadows_are_refused() -> None:
    values, member = shadows(1.0, n=4, patients=5)
    with pytest.raises(UsageError, match="at least three shadow trainings"):
        likelihood_ratios(values, member)
    with pytest.raises(UsageError, match="finite confidences"):
        likelihood_ratios(values, member[:2])
    with pytest.raises(UsageError, match="two populations"):
        audit_count(np.zeros((4, 2)), [1, 2, 3, 4], [0, 0, 0, 0])
