from __future__ import annotations

import numpy as np
import pytest

from slidetl.errors import UsageError
from slidetl.evaluation.comparison import sign_flip_test
from slidetl.evaluation.metrics import grade_metrics, qwk
from slidetl.evaluation.power import StudyDesign, _deviation, power_table


@pytest.mark.parametrize(("slides", "power"), [(100, 0.48), (60, 0.29)])
def test_patients_show_less_than_their_slides(slides: int, power: float) -> None:
    """QWK was made primary by such figures: .56 against .64 is found more often by it than by accuracy."""
    (row,) = power_table([(0.56, 0.64)], StudyDesign(60, slides), n_studies=800)
    assert row.power_qwk == pytest.approx(power, abs=0.05)
    assert row.power_accuracy < row.power_qwk - 0.1
    assert row.error == pytest.approx(0.0177, abs=1e-4)


@pytest.mark.slow
def test_power_is_that_of_the_sign_flip_test() -> None:
    """Against studies drawn here, and the test as a comparison uses it."""
    (row,) = power_table([(0.5, 0.7)], StudyDesign(40, 40), n_studies=600)
    rng, found = np.random.default_rng(1), 0
    deviations = [_deviation(accuracy, 5) for accuracy in (0.5, 0.7)]
    for _ in range(200):
        true, common = rng.integers(0, 5, 40), rng.normal(size=40)
        arms = [
            np.clip(np.rint(true + sd * (0.7**0.5 * common + 0.3**0.5 * rng.normal(size=40))), 0, 4).astype(
                int
            )
            for sd in deviations
        ]
        test = sign_flip_test(lambda t, p, w: qwk(t, p, 5, w), true, arms[0], arms[1], range(40), n_flips=300)
        found += test.p <= 0.05
    assert row.power_qwk == pytest.approx(found / 200, abs=0.1)


def test_equal_arms_are_found_different_as_often_as_the_level_allows() -> None:
    (row,) = power_table([(0.6, 0.6)], n_studies=500)
    assert row.qwk_first == row.qwk_second
    assert 0.02 <= row.power_accuracy <= 0.08 and 0.02 <= row.power_qwk <= 0.09


def test_power_rises_with_patients_differences_and_likeness() -> None:
    small, large = (
        power_table([(0.5, 0.6), (0.5, 0.7)], StudyDesign(n_patients=n, n_slides=2 * n), n_studies=120)
        for n in (30, 120)
    )
    assert small[0].power_qwk < large[0].power_qwk
    assert small[0].power_qwk < small[1].power_qwk
    apart, alike = (
        power_table([(0.56, 0.64)], StudyDesign(arm_correlation=share), n_studies=120)[0]
        for share in (0.0, 0.9)
    )
    assert apart.power_qwk < alike.power_qwk and apart.power_accuracy < alike.power_accuracy


@pytest.mark.parametrize(("accuracy", "n_grades"), [(0.56, 5), (0.9, 5), (0.6, 9)])
def test_the_model_has_the_accuracy_and_kappa_that_it_says(accuracy: float, n_grades: int) -> None:
    """Against a plain simulation with the standard deviation found by bisection on it."""
    design = StudyDesign(n_grades=n_grades)
    (row,) = power_table([(accuracy, accuracy)], design, n_studies=1, n_flips=2)
    rng = np.random.default_rng(0)
    true, z = rng.integers(0, n_grades, 300_000), rng.normal(size=300_000)
    low, high = 0.01, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        graded = np.clip(np.rint(true + middle * z), 0, n_grades - 1)
        low, high = (middle, high) if (graded == true).mean() > accuracy else (low, middle)
    assert row.qwk_first == pytest.approx(grade_metrics(true, graded, n_grades).qwk, abs=0.004)
    assert (row.accuracy_first, row.accuracy_second) == (accuracy, accuracy)


def test_the_same_seed_gives_the_same_table() -> None:
    first, second = (power_table([(0.5, 0.7)], n_studies=10, seed=3) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("accuracy", [0.1, 1.0])
def test_an_accuracy_that_no_arm_has(accuracy: float) -> None:
    with pytest.raises(UsageError, match=r"between 0\.20, noise alone"):
        power_table([(0.6, accuracy)], n_studies=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_patients": 101}, "a slide of each patient"),
        ({"n_grades": 1}, "two grades"),
        ({"arm_correlation": 1.5}, "from 0 to 1"),
        ({"patient_correlation": -0.1}, "from 0 to 1"),
    ],
)
def test_studies_that_cannot_be(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StudyDesign(**arguments)  # type: ignore[arg-type]
