from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.base import clone

from slidetl.errors import UsageError
from slidetl.evaluation.classical import (
    MODELS,
    PENALTIES,
    POOLS,
    ClassicalModel,
    Grader,
    fit_grader,
    fit_tile_grader,
    inner_folds,
    pool_tiles,
    save_grader,
    slide_score,
)
from slidetl.evaluation.metrics import qwk

LINEAR: tuple[ClassicalModel, ...] = ("ridge", "ordinal", "logistic")
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


@pytest.mark.parametrize("model", MODELS)
def test_every_model_finds_the_grade_and_gives_distributions(model: ClassicalModel) -> None:
    x, y, patients = cohort(140)
    grader = fit_grader(model, x[:100], y[:100], patients[:100], 5)
    probabilities = grader.probabilities(x[100:])
    assert probabilities.shape == (40, 5) and (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-12)
    assert qwk(y[100:], probabilities.argmax(axis=1), 5) > 0.85
    # However far off the scale a slide lies.
    far = grader.probabilities(x[:2] + np.array([[1e6], [-1e6]]) * x.std(axis=0))
    np.testing.assert_allclose(far.sum(axis=1), 1, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_more_features_than_slides_and_one_that_never_changes(model: ClassicalModel) -> None:
    x, y, patients = cohort(60, 300)
    x[:, 5] = 3.0
    grader: Grader = fit_grader(model, x, y, patients, 5)
    assert np.isfinite(grader.probabilities(x)).all()
    assert qwk(y, grader.probabilities(x).argmax(axis=1), 5) > 0.8


@pytest.mark.parametrize("model", MODELS)
def test_units_of_the_features_do_not_matter(model: ClassicalModel) -> None:
    x, y, patients = cohort(80)
    units = 2.0 ** np.arange(-6, 6)
    np.testing.assert_allclose(
        fit_grader(model, x, y, patients, 5).probabilities(x),
        fit_grader(model, x * units, y, patients, 5).probabilities(x * units),
        atol=1e-4,
    )


@pytest.mark.parametrize("d", [10, 90])
def test_ridge_has_the_least_error_out_of_fold(d: int) -> None:
    """Against the normal equations, with every slide of the same weight whatever the size of its fold."""
    x, y, patients = cohort(58, d, noise=1.0)
    errors = {penalty: np.empty(58) for penalty in PENALTIES}
    for train, test in inner_folds(y, patients, 3):
        centre, scale = x[train].mean(axis=0), x[train].std(axis=0)
        z, mean = (x[train] - centre) / scale, y[train].mean()
        for penalty in PENALTIES:
            w = np.linalg.solve(z.T @ z + penalty * np.eye(d), z.T @ (y[train] - mean))
            errors[penalty][test] = (x[test] - centre) / scale @ w + mean - y[test]
    mse = {penalty: np.mean(errors[penalty] ** 2) for penalty in PENALTIES}
    grader = fit_grader("ridge", x, y, patients, 5, seed=3)
    assert grader.penalty == min(mse, key=mse.__getitem__)
    assert grader.sigma == pytest.approx(np.sqrt(mse[grader.penalty]), rel=1e-9)


@pytest.mark.parametrize(("model", "strength"), [("ordinal", "penalty"), ("logistic", "C")])
def test_classifiers_have_the_least_ranked_probability_score_out_of_fold(
    model: ClassicalModel, strength: str
) -> None:
    x, y, patients = cohort(58, noise=1.5)
    tried = (0.1, 10.0, 1000.0)
    grader = fit_grader(model, x, y, patients, 5, seed=3, penalties=tried)
    scores = np.zeros(3)
    for train, test in inner_folds(y, patients, 3):
        for row, penalty in enumerate(tried):
            value = 1 / penalty if strength == "C" else penalty
            fitted = clone(grader.estimator).set_params(**{f"model__{strength}": value})
            below = fitted.fit(x[train], y[train]).predict_proba(x[test]).cumsum(axis=1)
            scores[row] += ((below - (y[test][:, None] <= np.arange(5))) ** 2).sum()
    assert grader.penalty == tried[scores.argmin()]


def test_ridge_predicts_the_nearest_grade() -> None:
    x, y, patients = cohort(60, noise=1.0)
    grader = fit_grader("ridge", x, y, patients, 5)
    regression = grader.estimator.predict(x)
    probabilities = grader.probabilities(x)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), np.clip(np.rint(regression), 0, 4))
    # By the definition, at one of them.
    weights = np.exp(-((np.arange(5) - regression[7]) ** 2) / (2 * float(grader.sigma or 0) ** 2))
    np.testing.assert_allclose(probabilities[7], weights / weights.sum())


def test_ridge_is_as_sure_as_it_has_reason_to_be() -> None:
    """On new slides the spread it gives agrees with its errors."""
    x, y, patients = cohort(400, 5, noise=0.8)
    grader = fit_grader("ridge", x[:200], y[:200], patients[:200], 5)
    error = np.sqrt(np.mean((grader.estimator.predict(x[200:]) - y[200:]) ** 2))
    assert grader.sigma == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize("model", LINEAR)
def test_noise_is_answered_by_a_strong_penalty(model: ClassicalModel) -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(80, 40)), np.arange(80) % 5
    grader = fit_grader(model, x, y, np.arange(80), 5)
    told = fit_grader(model, *cohort(80, 6, noise=0.2), 5)
    assert grader.penalty is not None and told.penalty is not None
    assert grader.penalty >= 100 > told.penalty


def test_the_penalty_is_chosen_on_other_patients() -> None:
    """Features that name the patient: only a choice on slides of the same patient would like them."""
    rng = np.random.default_rng(5)
    patients = np.arange(120) // 4
    y = rng.permutation(np.arange(30) % 5)[patients]
    x = np.eye(30)[patients] + 0.01 * rng.normal(size=(120, 30))
    chosen = [fit_grader("ridge", x, y, groups, 5).penalty or 0 for groups in (patients, np.arange(120))]
    assert chosen[0] >= 100
    assert chosen[1] <= 1  # each slide a patient: the names help


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=2, max_size=30).filter(
        lambda slides: len({patient for _, patient in slides}) > 1
    ),
    st.integers(0, 99),
)
def test_inner_folds_test_each_slide_once_on_other_patients(slides: list[tuple[int, int]], seed: int) -> None:
    grades, patients = np.array(slides).T
    folds = inner_folds(grades, patients, seed)
    assert sorted(np.concatenate([test for _, test in folds]).tolist()) == list(range(len(slides)))
    for train, test in folds:
        assert len(train) and len(test) and not set(patients[train]) & set(patients[test])
    again = inner_folds(grades, patients, seed)
    assert [test.tolist() for _, test in again] == [test.tolist() for _, test in folds]


@pytest.mark.parametrize("model", MODELS)
def test_a_rare_grade_is_fitted_though_inner_folds_lack_it(model: ClassicalModel) -> None:
    x, y, patients = cohort(60)
    keep = (y != 4) | (np.arange(60) == np.flatnonzero(y == 4)[0])
    grader = fit_grader(model, x[keep], y[keep], patients[keep], 5)
    np.testing.assert_allclose(grader.probabilities(x).sum(axis=1), 1, atol=1e-9)
    # Of two grades the one of a single patient: its fold leaves one grade to train on.
    few = (y == 1) | (patients == 2)
    grader = fit_grader(model, x[few], y[few], patients[few], 5)
    np.testing.assert_allclose(grader.probabilities(x)[:, [1, 2]].sum(axis=1), 1, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_a_grade_without_slides_is_never_predicted(model: ClassicalModel) -> None:
    x, y, patients = cohort(60)
    for absent in ([0, 2], [0, 1, 2, 4]):
        keep = ~np.isin(y, absent)
        probabilities = fit_grader(model, x[keep], y[keep], patients[keep], 5).probabilities(x)
        assert not probabilities[:, absent].any()
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_a_training_part_that_cannot_be_fitted_is_refused(model: ClassicalModel) -> None:
    x, y, patients = cohort(40)
    with pytest.raises(UsageError, match="all of one patient"):
        fit_grader(model, x, y, np.zeros(40), 5)
    with pytest.raises(UsageError, match="finite"):
        fit_grader(model, np.where(np.arange(12) == 3, np.nan, x), y, patients, 5)
    with pytest.raises(UsageError, match="whole numbers from 0 to 3"):
        fit_grader(model, x, y, patients, 4)
    with pytest.raises(UsageError, match=r"\[n, D\]"):
        fit_grader(model, x[:-1], y, patients, 5)


@pytest.mark.parametrize("model", ["ordinal", "logistic"])
def test_a_penalty_cannot_be_chosen_on_one_grade(model: ClassicalModel) -> None:
    with pytest.raises(UsageError, match="no inner fold has two grades"):
        fit_grader(model, np.arange(4.0)[:, None], np.arange(4) // 2, np.arange(4) // 2, 2)


@pytest.mark.parametrize("model", LINEAR)
def test_a_linear_model_is_saved_without_pickle(model: ClassicalModel, tmp_path: Path) -> None:
    x, y, patients = cohort(60)
    grader = fit_grader(model, x, y, patients, 5)
    save_grader(tmp_path / "model.npz", grader)
    scaler, linear = grader.estimator["scale"], grader.estimator["model"]
    expected = [model, grader.grades, 5, grader.penalty, np.nan if grader.sigma is None else grader.sigma]
    expected += [scaler.mean_, scaler.scale_, linear.coef_, linear.intercept_]
    with np.load(tmp_path / "model.npz", allow_pickle=False) as saved:
        for found, value in zip(saved.values(), expected, strict=True):
            np.testing.assert_array_equal(found, value)


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
    for row in ([0.0, 0.0, 0.0, 0.0], [np.nan, 0.5, 0.5, 0.0], [-0.5, 1.5, 0.0, 0.0]):
        with pytest.raises(UsageError, match="not all of them 0"):
            slide_score([*tiles, row], classes, ignore)


@pytest.mark.slow
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
    grader = fit_tile_grader(slides.__getitem__, labels[:40], values, ignore, grades[:40], patients[:40], 5)
    probabilities = grader.probabilities(slides[40:])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert qwk(grades[40:], probabilities.argmax(axis=1), 5) > 0.9
    # Counted as the most fibrotic of all, vessels would drown the grade.
    counted = fit_tile_grader(
        slides.__getitem__, labels[:40], [0, 1, 2, 3, 4, 6], [False] * 6, grades[:40], patients[:40], 5
    )
    assert counted.scale.sigma is not None and grader.scale.sigma is not None
    assert counted.scale.sigma > 2 * grader.scale.sigma
    with pytest.raises(UsageError, match="of class 6"):
        fit_tile_grader(
            slides.__getitem__, labels[:40], [*values, 1], [*ignore, False], grades[:40], patients[:40], 5
        )


@pytest.mark.parametrize("model", MODELS)
def test_one_slide_a_grade_is_enough_to_fit(model: ClassicalModel) -> None:
    """As an inner fold of a small study may have it."""
    x = np.random.default_rng(0).normal(size=(5, 3)) + np.arange(5)[:, None]
    probabilities = fit_grader(model, x, np.arange(5), np.arange(5), 5).probabilities(x)
    np.testing.assert_allclose(probabilities.sum(1), 1)
