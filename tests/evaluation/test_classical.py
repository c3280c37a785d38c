from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, Ridge

from slidetl.errors import ModelFileError, UsageError
from slidetl.evaluation import classical
from slidetl.evaluation.classical import (
    PENALTIES,
    POOLS,
    CumulativeLinkGrader,
    Grader,
    LogisticGrader,
    RidgeGrader,
    fit_cumulative_link,
    fit_logistic,
    fit_ridge,
    fit_tile_grader,
    fit_trees,
    load_grader,
    pool_tiles,
    save_grader,
    slide_score,
)
from slidetl.evaluation.metrics import qwk

FITS = [fit_ridge, fit_cumulative_link, fit_logistic, fit_trees]
Cohort = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]


def cohort(n: int = 100, d: int = 12, noise: float = 0.5, seed: int = 0) -> Cohort:
    """Features of which two speak of the grade, in units that differ; two slides of each patient."""
    rng = np.random.default_rng(seed)
    grades = np.arange(n) // 2 % 5
    x = rng.normal(size=(n, d)) * 10.0 ** rng.integers(-3, 3, d)
    scale = x.std(axis=0)
    x[:, 0] = (grades + noise * rng.normal(size=n)) * scale[0]
    x[:, 1] = (-grades + noise * rng.normal(size=n)) * scale[1] + 7 * scale[1]
    return x, grades, np.arange(n) // 2


def test_pools_by_hand() -> None:
    features = np.array([[1.0, 8.0], [3.0, 2.0], [5.0, 5.0]], np.float16)
    assert pool_tiles(features, "mean").tolist() == [3, 5]
    assert pool_tiles(features, "max").tolist() == [5, 8]
    assert pool_tiles(features, "both").tolist() == [3, 5, 5, 8]
    assert pool_tiles(features, "top-k", 2).tolist() == [4, 6.5]
    assert pool_tiles(features, "top-k", 99).tolist() == [3, 5]


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_pools_do_not_know_the_order_of_tiles(n: int, d: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d))
    for pool in POOLS:
        np.testing.assert_allclose(
            pool_tiles(features, pool, k), pool_tiles(rng.permutation(features), pool, k), atol=1e-12
        )
    np.testing.assert_allclose(pool_tiles(features, "top-k", 1), pool_tiles(features, "max"))
    np.testing.assert_allclose(
        pool_tiles(features, "top-k", k), np.sort(features, axis=0)[::-1][:k].mean(axis=0), atol=1e-12
    )


def test_half_precision_is_pooled_in_full() -> None:
    # In float16 the sum would stop growing at 2048.
    assert pool_tiles(np.ones((100_000, 1), np.float16))[0] == 1.0


@pytest.mark.parametrize(
    ("features", "pool", "k"), [([], "mean", 1), ([[1.0]], "median", 1), ([[1.0]], "top-k", 0)]
)
def test_what_cannot_be_pooled_is_refused(features: Any, pool: Any, k: int) -> None:
    with pytest.raises(UsageError):
        pool_tiles(np.array(features), pool, k)


@pytest.mark.parametrize("fit", FITS)
def test_every_model_finds_the_grade_and_gives_distributions(fit: Any) -> None:
    x, y, patients = cohort(140)
    grader = fit(x[:100], y[:100], patients[:100], 5)
    probabilities = grader.probabilities(x[100:])
    assert probabilities.shape == (40, 5) and (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-12)
    assert qwk(y[100:], probabilities.argmax(axis=1), 5) > 0.85
    # However far off the scale a slide lies.
    far = grader.probabilities(x[:2] + np.array([[1e6], [-1e6]]) * x.std(axis=0))
    np.testing.assert_allclose(far.sum(axis=1), 1, atol=1e-9)


@pytest.mark.parametrize("fit", FITS)
def test_more_features_than_slides_and_one_that_never_changes(fit: Any) -> None:
    x, y, patients = cohort(60, 300)
    x[:, 5] = 3.0
    grader: Grader = fit(x, y, patients, 5)
    assert np.isfinite(grader.probabilities(x)).all()
    assert qwk(y, grader.probabilities(x).argmax(axis=1), 5) > 0.8


@pytest.mark.parametrize("fit", FITS)
def test_units_of_the_features_do_not_matter(fit: Any) -> None:
    x, y, patients = cohort(80)
    units = 2.0 ** np.arange(-6, 6)
    np.testing.assert_allclose(
        fit(x, y, patients, 5).probabilities(x),
        fit(x * units, y, patients, 5).probabilities(x * units),
        atol=1e-4,
    )


@pytest.mark.parametrize("d", [10, 90])
def test_ridge_is_scikit_learns(d: int) -> None:
    x, y, patients = cohort(60, d)
    grader = fit_ridge(x, y, patients, 5)
    reference = Ridge(alpha=grader.penalty).fit((x - grader.centre) / grader.scale, y)
    np.testing.assert_allclose(grader.coefficients, reference.coef_, atol=1e-8)
    np.testing.assert_allclose(grader.regress(x), reference.predict((x - grader.centre) / grader.scale))


def test_ridge_predicts_the_nearest_grade() -> None:
    grader = RidgeGrader(np.zeros(1), np.ones(1), np.ones(1), 0.0, 0.8, 5, 1.0)
    y = np.array([-3.0, 0.4, 0.6, 2.49, 2.51, 3.4, 9.0])
    probabilities = grader.probabilities(y[:, None])
    assert probabilities.argmax(axis=1).tolist() == [0, 0, 1, 2, 3, 3, 4]
    # By the definition, at one of them.
    weights = np.exp(-((np.arange(5) - 0.6) ** 2) / (2 * 0.8**2))
    np.testing.assert_allclose(probabilities[2], weights / weights.sum())


def test_ridge_is_as_sure_as_it_has_reason_to_be() -> None:
    """On new slides the spread it gives agrees with its errors."""
    x, y, patients = cohort(400, 5, noise=0.8)
    grader = fit_ridge(x[:200], y[:200], patients[:200], 5)
    error = np.sqrt(np.mean((grader.regress(x[200:]) - y[200:]) ** 2))
    assert grader.sigma == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize("n_grades", [2, 3, 5])
@pytest.mark.parametrize("penalty", [0.1, 10.0])
def test_the_cumulative_link_is_at_the_maximum_of_its_likelihood(n_grades: int, penalty: float) -> None:
    """Against the textbook's formula, maximised without derivatives and without our parameters."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(80, 3))
    y = np.clip(np.rint(x @ [0.8, -0.5, 0.0] + rng.normal(size=80) + (n_grades - 1) / 2), 0, n_grades - 1)
    y = y.astype(np.int64)

    def sigmoid(z: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(1 / (1 + np.exp(-z)))

    def loss(parameters: NDArray[np.float64]) -> float:
        w, thresholds = parameters[:3], parameters[3:]
        if (np.diff(thresholds) <= 0).any():
            return 1e9
        below = np.column_stack([np.zeros(80), *(sigmoid(t - x @ w) for t in thresholds), np.ones(80)])
        return float(
            penalty / 2 * w @ w - np.log(below[np.arange(80), y + 1] - below[np.arange(80), y]).sum()
        )

    w, thresholds = classical._fit_proportional_odds(x, y, n_grades, penalty)
    ours = np.concatenate([w, thresholds])
    start = np.concatenate([np.zeros(3), np.linspace(-2, 2, n_grades - 1) if n_grades > 2 else [0.0]])
    found = minimize(loss, start, method="Powell", options={"xtol": 1e-8, "ftol": 1e-12, "maxiter": 50_000})
    assert loss(ours) <= found.fun + 1e-6
    np.testing.assert_allclose(ours, found.x, atol=5e-3)


def test_with_two_grades_the_cumulative_link_is_logistic_regression() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 4))
    y = (x[:, 0] + rng.normal(size=60) > 0).astype(np.int64)
    w, thresholds = classical._fit_proportional_odds(x, y, 2, 2.0)
    reference = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(w, reference.coef_[0], atol=1e-4)
    np.testing.assert_allclose(thresholds, -reference.intercept_, atol=1e-4)


def test_fewer_slides_than_features_are_solved_exactly() -> None:
    """In the span of the slides: there the gradient over all features is nought."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(30, 50))
    y = np.arange(30) % 5
    w, thresholds = classical._fit_proportional_odds(x, y, 5, 3.0)
    score = x @ w
    bounds = np.concatenate([[-np.inf], thresholds, [np.inf]])
    upper, lower = (1 / (1 + np.exp(score - bounds[y + side])) for side in (1, 0))
    # At the optimum the gradient of the likelihood equals that of the penalty.
    slope = (upper * (1 - upper) - lower * (1 - lower)) / (upper - lower)
    np.testing.assert_allclose(-x.T @ slope, 3.0 * w, atol=1e-3)


@pytest.mark.parametrize("n_grades", [2, 3, 5])
def test_logistic_is_scikit_learns(n_grades: int) -> None:
    x, _, patients = cohort(90, 6)
    y = np.arange(90) // 2 % n_grades
    grader = fit_logistic(x, y, patients, n_grades)
    z = (x - grader.centre) / grader.scale
    reference = LogisticRegression(C=1 / grader.penalty, tol=1e-8, max_iter=5000).fit(z, y)
    np.testing.assert_allclose(grader.probabilities(x), reference.predict_proba(z), atol=1e-3)


@pytest.mark.parametrize("fit", [fit_ridge, fit_cumulative_link, fit_logistic])
def test_noise_is_answered_by_a_strong_penalty(fit: Any) -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(80, 40)), np.arange(80) % 5
    grader = fit(x, y, np.arange(80), 5)
    assert grader.penalty >= 100
    told = fit(*cohort(80, 6, noise=0.2), 5)
    assert told.penalty < grader.penalty and told.penalty in PENALTIES


def test_the_penalty_is_chosen_on_other_patients() -> None:
    """Features that name the patient: only a choice on slides of the same patient would like them."""
    rng = np.random.default_rng(5)
    patients = np.arange(120) // 4
    y = rng.permutation(np.arange(30) % 5)[patients]
    x = np.eye(30)[patients] + 0.01 * rng.normal(size=(120, 30))
    for train, test in classical._inner_folds(y, patients, 0):
        assert not set(patients[train]) & set(patients[test])
    assert fit_ridge(x, y, patients, 5).penalty >= 100
    assert fit_ridge(x, y, np.arange(120), 5).penalty <= 1  # each slide a patient: the names help


def test_every_slide_is_tested_once_in_the_inner_folds() -> None:
    _, y, patients = cohort(50)
    tested = np.concatenate([test for _, test in classical._inner_folds(y, patients, 0)])
    assert sorted(tested.tolist()) == list(range(50))


@pytest.mark.parametrize("fit", FITS)
def test_a_rare_grade_is_fitted_though_inner_folds_lack_it(fit: Any) -> None:
    x, y, patients = cohort(60)
    keep = (y != 4) | (np.arange(60) == np.flatnonzero(y == 4)[0])
    grader = fit(x[keep], y[keep], patients[keep], 5)
    np.testing.assert_allclose(grader.probabilities(x).sum(axis=1), 1, atol=1e-9)


@pytest.mark.parametrize("fit", FITS)
def test_a_training_part_that_cannot_be_fitted_is_refused(fit: Any) -> None:
    x, y, patients = cohort(40)
    with pytest.raises(UsageError, match="no training slide has grade 4; add some"):
        fit(x[y < 4], y[y < 4], patients[y < 4], 5)
    with pytest.raises(UsageError, match="all of one patient"):
        fit(x, y, np.zeros(40), 5)
    with pytest.raises(UsageError, match="finite"):
        fit(np.where(np.arange(12) == 3, np.nan, x), y, patients, 5)
    with pytest.raises(UsageError, match="whole numbers from 0 to 3"):
        fit(x, y, patients, 4)
    with pytest.raises(UsageError, match=r"\[n, D\]"):
        fit(x[:-1], y, patients, 5)


@pytest.mark.parametrize("fit", [fit_ridge, fit_cumulative_link, fit_logistic])
def test_a_linear_model_is_saved_without_pickle(fit: Any, tmp_path: Path) -> None:
    x, y, patients = cohort(60)
    grader = fit(x, y, patients, 5)
    save_grader(tmp_path / "model.npz", grader)
    loaded = load_grader(tmp_path / "model.npz")
    assert type(loaded) is type(grader)
    assert isinstance(loaded, RidgeGrader | CumulativeLinkGrader | LogisticGrader)
    np.testing.assert_array_equal(loaded.probabilities(x), grader.probabilities(x))
    (tmp_path / "model.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ModelFileError, match="expected a model of 'slidetl fit-features'"):
        load_grader(tmp_path / "model.npz")
    np.savez(tmp_path / "other.npz", kind="Other")
    with pytest.raises(ModelFileError):
        load_grader(tmp_path / "other.npz")


def test_slide_score_by_hand() -> None:
    classes, ignore = [0.0, 2.0, 4.0, 0.0], [False, False, False, True]
    tiles = [
        [0.5, 0.5, 0.0, 0.0],  # 1
        [0.0, 0.2, 0.4, 0.4],  # a tie counts as the first; (0.2 * 2 + 0.4 * 4) / 0.6
        [0.1, 0.1, 0.1, 0.7],  # left out
    ]
    assert slide_score(tiles, classes, ignore) == pytest.approx((1 + 2.0 / 0.6) / 2)
    assert slide_score(tiles[:1], classes) == pytest.approx(1)
    with pytest.raises(UsageError, match="all 1 tiles"):
        slide_score(tiles[2:], classes, ignore)
    with pytest.raises(UsageError, match=r"\[N, C\]"):
        slide_score(tiles, classes[:3])


def test_a_tile_classifier_grades_slides_and_leaves_out_what_does_not_count() -> None:
    """Tiles of two features: how fibrotic, and whether it is a vessel; vessels look very fibrotic."""
    rng = np.random.default_rng(6)
    grades, patients = np.arange(60) % 5, np.arange(60)
    slides, labels = [], []
    for grade in grades:
        n_tiles = int(rng.integers(20, 40))
        classes = np.clip(grade + rng.integers(-1, 2, n_tiles), 0, 4)
        is_vessel = rng.random(n_tiles) < 0.7 * rng.random()
        x = np.column_stack([np.where(is_vessel, 6, classes) + 0.2 * rng.normal(size=n_tiles), is_vessel])
        slides.append(x)
        label = np.where(is_vessel, 5, classes)
        labels.append(np.where(rng.random(n_tiles) < 0.5, label, -1))
    values, ignore = [0, 1, 2, 3, 4, 0], [False] * 5 + [True]
    grader = fit_tile_grader(slides[:40], labels[:40], values, ignore, grades[:40], patients[:40], 5)
    probabilities = grader.probabilities(slides[40:])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert qwk(grades[40:], probabilities.argmax(axis=1), 5) > 0.9
    # Counted as the most fibrotic of all, vessels would drown the grade.
    counted = fit_tile_grader(
        slides[:40], labels[:40], [0, 1, 2, 3, 4, 6], [False] * 6, grades[:40], patients[:40], 5
    )
    assert counted.scale.sigma > 2 * grader.scale.sigma
    with pytest.raises(UsageError, match="of class 6"):
        fit_tile_grader(
            slides[:40], labels[:40], [*values, 1], [*ignore, False], grades[:40], patients[:40], 5
        )


@pytest.mark.parametrize("fit", FITS)
def test_one_slide_a_grade_is_enough_to_fit(fit: Any) -> None:
    """As an inner fold of a small study may have it."""
    x = np.random.default_rng(0).normal(size=(5, 3)) + np.arange(5)[:, None]
    probabilities = fit(x, np.arange(5), np.arange(5), 5).probabilities(x)
    np.testing.assert_allclose(probabilities.sum(1), 1)
