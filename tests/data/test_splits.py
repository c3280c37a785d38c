from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetl.data.manifest import ManifestRow
from slidetl.data.splits import split_patients
from slidetl.errors import UsageError


def cohort(n_patients: int, seed: int) -> list[ManifestRow]:
    """Patients with one to three slides of neighbouring grades."""
    rng = np.random.default_rng(seed)
    return [
        ManifestRow(0, f"s{patient}-{slide}", Path("x"), f"p{patient}", int((patient + slide) % 5))
        for patient in range(n_patients)
        for slide in range(rng.integers(1, 4))
    ]


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 60), st.integers(0, 1000), st.sampled_from([0.15, 0.2, 0.25, 0.34]))
def test_patients_are_on_one_side_and_grades_on_every(n_patients: int, seed: int, fraction: float) -> None:
    rows = cohort(n_patients, seed)
    split = split_patients(rows, val_fraction=0.2, test_fraction=fraction, seed=seed)
    assert split.keys() == {row.slide_id for row in rows}
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row.patient_id, set()).add(split[row.slide_id])
    assert all(len(side) == 1 for side in sides.values())
    shares = {part: count / len(rows) for part, count in Counter(split.values()).items()}
    assert abs(shares["test"] - fraction) < 0.12
    assert shares["val"] > 0
    for part in ("train", "test"):
        grades = [row.grade for row in rows if split[row.slide_id] == part]
        # Whole patients cannot always bring five grades into a handful of slides.
        assert len(set(grades)) == 5 or len(grades) < 15


def test_depends_on_the_seed_and_not_on_the_order() -> None:
    rows = cohort(40, 0)
    first = split_patients(rows, val_fraction=0.2, test_fraction=0.25, seed=1)
    assert first == split_patients(rows[::-1], val_fraction=0.2, test_fraction=0.25, seed=1)
    assert first != split_patients(rows, val_fraction=0.2, test_fraction=0.25, seed=2)


def test_no_fraction_no_part() -> None:
    split = split_patients(cohort(20, 0), val_fraction=0.2, test_fraction=0, seed=0)
    assert set(split.values()) == {"train", "val"}


@pytest.mark.parametrize("fraction", [0.2, 0.25, 0.3, 0.4, 0.5])
def test_fractions_are_met(fraction: float) -> None:
    rows = [ManifestRow(0, f"s{number}", Path("x"), f"p{number}", number % 5) for number in range(200)]
    split = Counter(split_patients(rows, val_fraction=0.2, test_fraction=fraction, seed=0).values())
    assert abs(split["test"] / 200 - fraction) <= 0.01
    assert abs(split["val"] / 200 - 0.2) <= 0.02


def test_too_few_patients_and_bad_fractions() -> None:
    rows = [ManifestRow(0, f"s{number}", Path("x"), f"p{number}", number) for number in range(4)]
    with pytest.raises(UsageError, match="4 slides of 4 patients are too few for a test part of 25%"):
        split_patients(rows, val_fraction=0.2, test_fraction=0.25, seed=0)
    with pytest.raises(UsageError, match=r"val_fraction must be from 0 to 0\.5, not 0\.6"):
        split_patients(cohort(30, 0), val_fraction=0.6, test_fraction=0.25, seed=0)
    with pytest.raises(UsageError, match="nothing is left to train on"):
        split_patients(cohort(30, 0), val_fraction=0.5, test_fraction=0.5, seed=0)


@pytest.mark.parametrize("seed", range(20))
def test_not_all_slides_of_a_rare_grade_leave_the_training_part(seed: int) -> None:
    """Two of them, and a test part of two folds: each fold alone would leave one of them."""
    rows = [ManifestRow(0, f"s{number}", Path("x"), f"p{number}", number % 3) for number in range(30)]
    rows += [ManifestRow(0, f"rare{number}", Path("x"), f"q{number}", 3) for number in range(2)]
    split = split_patients(rows, val_fraction=0, test_fraction=0.4, seed=seed)
    assert "train" in (split["rare0"], split["rare1"])


@pytest.mark.parametrize("seed", range(20))
def test_the_only_slide_of_a_grade_is_trained_on(seed: int) -> None:
    rows = [ManifestRow(0, f"s{number}", Path("x"), f"p{number}", number % 3) for number in range(30)]
    rows.append(ManifestRow(0, "rare", Path("x"), "p30", 3))
    split = split_patients(rows, val_fraction=0.2, test_fraction=0.25, seed=seed)
    assert split["rare"] == "train"
