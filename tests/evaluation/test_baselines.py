from __future__ import annotations

import numpy as np
import pytest

from slidetl.errors import UsageError
from slidetl.evaluation.baselines import colour_baseline


def cohort(n: int = 100) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 4)), np.arange(n) % 5, np.arange(n) // 2


def test_grades_written_in_the_colour_are_found() -> None:
    features, grades, patients = cohort()
    features[:, 1] = 200 - 10 * grades + features[:, 1]
    found = colour_baseline(features, grades, patients)
    assert found.accuracy > 0.9
    assert found.accuracy == np.mean(found.predictions == grades)
    assert found.name in {"ridge", "logistic", "boosting"}


def test_grades_out_of_order_in_the_colour_are_found_too() -> None:
    features, grades, patients = cohort(200)
    features[:, 0] = np.array([0, 30, 10, 40, 20])[grades] + features[:, 0]
    assert colour_baseline(features, grades, patients).accuracy > 0.9


def test_noise_stays_near_chance() -> None:
    assert colour_baseline(*cohort(200)).accuracy < 0.35


def test_a_patients_other_slides_do_not_help() -> None:
    rng = np.random.default_rng(1)
    patients = np.arange(120) // 4
    grades = rng.permutation(30).repeat(4) % 5
    features = rng.normal(size=(30, 4)).repeat(4, axis=0) + rng.normal(scale=0.01, size=(120, 4))
    # Split by slide, the nearly equal slides of a patient would give all of these away.
    assert colour_baseline(features, grades, patients).accuracy < 0.45


def test_same_seed_same_result() -> None:
    first, again = (colour_baseline(*cohort(60), seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.predictions, again.predictions)


def test_what_cannot_be_judged_is_refused() -> None:
    features, grades, patients = cohort(50)
    with pytest.raises(UsageError, match=r"features \[n, d\]"):
        colour_baseline(features[:, 0], grades, patients)
    with pytest.raises(UsageError, match="finite"):
        colour_baseline(np.where(features > 1, np.nan, features), grades, patients)
    with pytest.raises(UsageError, match="at least two grades"):
        colour_baseline(features, np.zeros(50, int), patients)
    with pytest.raises(UsageError, match="with 5 slides each"):
        colour_baseline(features[:12], grades[:12], patients[:12])
    with pytest.raises(UsageError, match="there are 2 patients"):
        colour_baseline(features, grades, np.arange(50) % 2)
