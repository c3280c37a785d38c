from __future__ import annotations

import numpy as np
import pytest

from slidetl.errors import UsageError
from slidetl.evaluation.baselines import CANDIDATES, fit_best
from slidetl.evaluation.classical import fit_grader


def cohort(n: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 4)), np.arange(n) % 5, np.arange(n) // 2


@pytest.mark.slow
def test_grades_written_in_the_colour_are_found() -> None:
    features, grades, patients = cohort()
    features[:, 1] = 200 - 10 * grades + features[:, 1]
    best = fit_best(features, grades, patients, 5)
    assert np.mean(best.predictions == grades) > 0.9
    assert best.grader.model in CANDIDATES
    whole = fit_grader(best.grader.model, features, grades, patients, 5)
    np.testing.assert_array_equal(best.grader.probabilities(features), whole.probabilities(features))


@pytest.mark.slow
def test_grades_out_of_order_in_the_colour_are_found_too() -> None:
    features, grades, patients = cohort()
    features[:, 0] = np.array([0, 30, 10, 40, 20])[grades] + features[:, 0]
    best = fit_best(features, grades, patients, 5)
    assert best.grader.model != "ridge"
    assert np.mean(best.predictions == grades) > 0.9


@pytest.mark.slow
def test_noise_stays_near_chance() -> None:
    features, grades, patients = cohort()
    best, again = (fit_best(features, grades, patients, 5, seed=3) for _ in range(2))
    assert np.mean(best.predictions == grades) < 0.4
    np.testing.assert_array_equal(best.out_of_fold, again.out_of_fold)


@pytest.mark.slow
def test_a_patients_other_slides_do_not_help() -> None:
    rng = np.random.default_rng(1)
    patients = np.arange(60) // 2
    grades = rng.permutation(30).repeat(2) % 5
    features = rng.normal(size=(30, 4)).repeat(2, axis=0) + rng.normal(scale=0.01, size=(60, 4))
    # Split by slide, the nearly equal slides of a patient would give all of these away.
    assert np.mean(fit_best(features, grades, patients, 5).predictions == grades) < 0.45


def test_what_cannot_be_judged_is_refused() -> None:
    features, grades, patients = cohort(50)
    with pytest.raises(UsageError, match=r"features \[n, D\]"):
        fit_best(features[:, 0], grades, patients, 5)
    with pytest.raises(UsageError, match="finite"):
        fit_best(np.where(features > 1, np.nan, features), grades, patients, 5)
    with pytest.raises(UsageError, match="at least 3 patients, not 2"):
        fit_best(features, grades, np.arange(50) % 2, 5)
