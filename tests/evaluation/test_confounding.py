from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2_contingency

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Interval, bca_interval, bca_interval_if_defined
from slidetl.evaluation.confounding import (
    EmbeddedFold,
    estimate_by_group,
    site_by_grade,
    site_decodability,
    site_decodability_by_fold,
)
from slidetl.evaluation.metrics import MetricOfPredictions, accuracy, qwk


def test_the_table_counts_slides_and_the_test_patients() -> None:
    rng = np.random.default_rng(0)
    sites, grades = rng.integers(0, 3, 80), rng.integers(0, 5, 80)
    table = site_by_grade(np.array(["A", "B", "C"])[sites], grades, range(80), 5)
    assert table.sites == ("A", "B", "C") and table.n_units == 80
    counts = np.zeros((3, 5), int)
    np.add.at(counts, (sites, grades), 1)
    np.testing.assert_array_equal(table.slides, counts)
    theirs = chi2_contingency(counts)
    # Bergsma's corrected V, from scipy's chi-square.
    phi = max(0.0, theirs.statistic / 80 - 8 / 79)
    assert table.cramers_v == pytest.approx(np.sqrt(phi / (min(3 - 4 / 79, 5 - 16 / 79) - 1)))
    assert table.p == pytest.approx(theirs.pvalue, abs=0.03)


def test_slides_of_a_patient_are_one_unit_with_the_worst_grade() -> None:
    once = site_by_grade(["A", "A", "B", "B"], [0, 1, 3, 4], range(4), 5, n_permutations=200)
    often = site_by_grade(
        ["A"] * 6 + ["B"] * 4,
        [0, 0, 0, 1, 1, 0, 3, 3, 4, 2],
        [0, 0, 0, 1, 1, 1, 2, 2, 3, 3],
        5,
        n_permutations=200,
    )
    assert (often.n_units, often.cramers_v, often.p) == (4, once.cramers_v, once.p)
    assert np.sum(often.slides) == 10


def test_an_association_is_found_and_none_where_there_is_nothing_to_associate() -> None:
    sites = np.repeat(["A", "B"], 30)
    strong = site_by_grade(sites, np.repeat([0, 4], 30), range(60), 5)
    assert strong.cramers_v == pytest.approx(1) and strong.p == pytest.approx(1 / 5001)
    lone = site_by_grade(["A"] * 5, range(5), range(5), 5)
    assert lone.cramers_v is None and lone.p is None
    assert lone.slides == ((1, 1, 1, 1, 1),)


def test_no_association_is_found_as_often_as_it_should() -> None:
    rng = np.random.default_rng(0)
    rejected = sum(
        (
            site_by_grade(rng.integers(0, 3, 40), rng.integers(0, 5, 40), range(40), 5, n_permutations=99).p
            or 0
        )
        <= 0.05
        for _ in range(100)
    )
    assert rejected <= 11


def test_a_patient_at_two_sites_counts_at_each() -> None:
    assert site_by_grade(["A", "B", "B"], [0, 1, 2], ["p", "p", "q"], 3, n_permutations=9).n_units == 3


@pytest.mark.parametrize(
    ("sites", "grades", "patients", "message"),
    [
        (["A"], [0, 1], [0, 1], "sites, grades and patients of one length"),
        (["A", "B"], [0, 5], [0, 1], "from 0 to 4"),
    ],
)
def test_tables_that_cannot_be_made(
    sites: list[str], grades: list[int], patients: list[int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        site_by_grade(sites, grades, patients, 5)


def test_embeddings_that_hold_the_site_tell_it() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(range(30), 2)
    sites = patients % 3
    embeddings = rng.normal(size=(60, 200))
    embeddings[:, :3] += 4 * np.eye(3)[sites]
    told = site_decodability(embeddings, sites, patients, n_permutations=99)
    assert told.balanced_accuracy > 0.9 and told.p == 0.01
    assert told.n_patients == 30
    assert told.null_mean == pytest.approx(1 / 3, abs=0.06) and told.null_high < 0.6


def test_a_patients_own_look_is_not_the_site() -> None:
    """Each patient's slides are alike, and tell the patient; not one patient is on both sides."""
    rng = np.random.default_rng(1)
    patients = np.repeat(range(30), 4)
    embeddings = rng.normal(size=(30, 50))[patients] + 0.01 * rng.normal(size=(120, 50))
    told = site_decodability(embeddings, patients % 2, patients, n_permutations=199)
    assert told.balanced_accuracy < 0.75 and told.p > 0.02


def test_sites_count_alike_and_scale_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    sites = np.repeat([0, 1], [40, 6])
    embeddings = rng.normal(size=(46, 5))
    embeddings[sites == 1, 0] += 6
    told = site_decodability(embeddings, sites, range(46), n_permutations=49)
    assert told.balanced_accuracy > 0.9
    scaled = site_decodability(1000 * embeddings + 7, sites, range(46), n_permutations=49)
    assert scaled.balanced_accuracy == told.balanced_accuracy
    constant = site_decodability(np.ones((46, 3)), sites, range(46), n_permutations=19)
    assert constant.p == 1 and constant.balanced_accuracy == 0.5


@pytest.mark.parametrize(
    ("sites", "patients", "message"),
    [
        ([0, 0, 0, 0], [0, 1, 2, 3], "at least two of them"),
        ([0, 0, 0, 1], [0, 1, 2, 3], "two patients each"),
        ([0, 1, 0, 1], [0, 0, 1, 2], "patient 0 is at two sites"),
        ([0, 1], [0, 1], "expected embeddings"),
    ],
)
def test_sites_that_cannot_be_told(sites: list[int], patients: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        site_decodability(np.eye(4), sites, patients)


def test_each_fold_may_have_a_network_of_its_own() -> None:
    """Turned and moved in every fold, what tells the site within a fold still does."""
    rng = np.random.default_rng(3)
    patients = np.repeat(range(30), 2)
    sites = np.array(["A", "B", "C"])[patients % 3]
    plain = rng.normal(size=(60, 8))
    plain[:, :3] += 4 * np.eye(3)[patients % 3]
    folds = []
    for number in range(3):
        test, train = (np.flatnonzero((patients // 10 == number) == side) for side in (True, False))
        turn, move = np.linalg.qr(rng.normal(size=(8, 8)))[0], 100 * rng.normal(size=8)
        folds.append(EmbeddedFold(train, test, plain[train] @ turn + move, plain[test] @ turn + move))
    told = site_decodability_by_fold(folds, sites, patients, n_permutations=99)
    assert told.balanced_accuracy > 0.9 and told.p == 0.01 and told.n_patients == 30
    # By hand in one fold: the nearest centre, whitened by the training part.
    alone = site_decodability_by_fold(folds[:1], sites, patients, n_permutations=9)
    fold = folds[0]
    covariance = np.cov(fold.train_embeddings.T, bias=True)
    inverse = np.linalg.inv(covariance + np.eye(8) * np.linalg.eigvalsh(covariance).mean())
    centres = [fold.train_embeddings[sites[fold.train] == site].mean(0) for site in "ABC"]
    apart = [
        ((fold.test_embeddings - centre) @ inverse * (fold.test_embeddings - centre)).sum(1)
        for centre in centres
    ]
    right = np.array(["A", "B", "C"])[np.argmin(apart, axis=0)] == sites[fold.test]
    by_hand = np.mean([right[sites[fold.test] == site].mean() for site in "ABC"])
    assert alone.n_patients == 10 and alone.balanced_accuracy == pytest.approx(by_hand)
    # Sites that the patients of a test part do not share with its embeddings are not told.
    lost = [
        EmbeddedFold(f.train, f.test, f.train_embeddings, rng.permutation(f.test_embeddings)) for f in folds
    ]
    assert site_decodability_by_fold(lost, sites, patients, n_permutations=99).balanced_accuracy < 0.6


def test_a_site_without_tested_slides_does_not_count() -> None:
    """Three sites that are told apart completely; the third is not tested."""
    sites, embeddings = np.repeat(list("ABC"), 4), np.repeat(5 * np.eye(3), 4, axis=0)
    test = np.array([2, 3, 6, 7])
    train = np.setdiff1d(np.arange(12), test)
    fold = EmbeddedFold(train, test, embeddings[train], embeddings[test])
    assert site_decodability_by_fold([fold], sites, range(12), n_permutations=99).balanced_accuracy == 1
    with pytest.raises(UsageError, match="folds with tested slides, found none"):
        site_decodability_by_fold([], sites, range(12), n_permutations=9)


def test_embeddings_must_be_finite() -> None:
    with pytest.raises(UsageError, match="finite"):
        site_decodability(np.full((4, 2), np.nan), [0, 0, 1, 1], range(4))


def test_each_site_has_its_own_estimate() -> None:
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 5, 50), rng.integers(0, 5, (2, 50))
    sites, patients = np.repeat(["B", "A", "C"], [30, 18, 2]), np.arange(50) // 2

    def of(
        metric: MetricOfPredictions, true: NDArray[np.int64]
    ) -> Callable[[NDArray[np.intp]], Interval | None]:
        return lambda members: bca_interval_if_defined(
            partial(metric, true[members], predicted[:, members]), patients[members]
        )

    a, b, c = estimate_by_group(of(accuracy, true), sites, patients)
    assert [(row.group, row.n, row.n_patients) for row in (a, b, c)] == [
        ("A", 18, 9),
        ("B", 30, 15),
        ("C", 2, 1),
    ]
    alone = bca_interval(partial(accuracy, true[:30], predicted[:, :30]), patients[:30])
    assert b.estimate == alone
    assert c.estimate is None

    def kappa(true: Any, predicted: Any, weights: Any) -> NDArray[np.float64]:
        return qwk(true, predicted, 5, weights)

    kappas = estimate_by_group(of(kappa, true), sites, patients)
    assert kappas[0].estimate is not None
    assert kappas[0].estimate.estimate == pytest.approx(float(qwk(true[30:48], predicted[:, 30:48], 5)))
    # At site B every slide has one grade, and all are graded right.
    of_one = np.where(sites == "B", 3, true)
    predicted = of_one[None]
    undefined = estimate_by_group(of(kappa, of_one), sites, patients)
    assert undefined[0].estimate is not None and undefined[1].estimate is None
    with pytest.raises(UsageError, match="groups and patients of one length"):
        estimate_by_group(of(accuracy, true), sites[:3], patients)
