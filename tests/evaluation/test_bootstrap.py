from __future__ import annotations

import numpy as np
import pytest

from slidetl.evaluation.bootstrap import patient_bootstrap


def test_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for study in range(200):
        values = rng.normal(size=60)
        interval = patient_bootstrap(
            lambda index, values=values: float(values[index].mean()),  # type: ignore[misc]
            [f"p{number}" for number in range(60)],
            level=0.9,
            n_draws=300,
            seed=study,
        )
        covered += interval.low <= 0 <= interval.high
    assert 0.82 <= covered / 200 <= 0.96


def test_slides_of_a_patient_are_no_new_evidence() -> None:
    values = np.random.default_rng(1).normal(size=20)
    patients = [f"p{number}" for number in range(20)]
    once = patient_bootstrap(lambda index: float(values[index].mean()), patients, n_draws=500)
    often = np.repeat(values, 10)
    tenfold = patient_bootstrap(
        lambda index: float(often[index].mean()),
        [patient for patient in patients for _ in range(10)],
        n_draws=500,
    )
    assert tenfold.high - tenfold.low == pytest.approx(once.high - once.low, rel=0.05)


def test_same_seed_same_interval_and_the_estimate_is_the_data_itself() -> None:
    values = np.arange(12.0)
    patients = list("aabbccddeeff")
    first, second = (
        patient_bootstrap(lambda index: float(values[index].max()), patients, seed=3) for _ in range(2)
    )
    assert first == second
    assert first.estimate == 11 and first.level == 0.95


def test_one_patient_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least 2, found 1"):
        patient_bootstrap(lambda index: 0.0, ["p", "p"])
