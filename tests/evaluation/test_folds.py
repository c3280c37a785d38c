"""Folds of whole groups, compared with scikit-learn's."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from slidetl.evaluation.folds import stratified_folds


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 14)), min_size=4, max_size=60),
    st.integers(2, 6),
    st.integers(0, 2**32 - 1),
)
def test_equals_scikit_learn(cases: list[tuple[int, int]], n_folds: int, seed: int) -> None:
    grades, patients = np.array(cases).T
    n_folds = min(n_folds, len(np.unique(patients)), int(np.bincount(grades).max()))
    if n_folds < 2:
        return
    theirs = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of rare grades
        expected = [test.tolist() for _, test in theirs.split(grades, grades, patients)]
    assert [fold.tolist() for fold in stratified_folds(grades, patients, n_folds, seed)] == expected


@pytest.mark.parametrize("n_folds", [3, 10])
def test_groups_of_a_study_stay_whole_and_grades_mix(n_folds: int) -> None:
    rng = np.random.default_rng(0)
    patients = np.array([f"p{number}" for number in rng.integers(0, 120, 300)])
    grades = rng.integers(0, 5, 300)
    folds = stratified_folds(grades, patients, n_folds, 7)
    assert sorted(np.concatenate(folds).tolist()) == list(range(300))
    held = [set(patients[fold]) for fold in folds]
    assert sum(map(len, held)) == len(set(patients))
    for fold in folds:
        assert np.abs(np.bincount(grades[fold], minlength=5) - np.bincount(grades) / n_folds).max() < 6


def test_other_seeds_give_other_folds() -> None:
    grades, patients = np.arange(40) % 4, np.arange(40)
    first, again, other = (
        [fold.tolist() for fold in stratified_folds(grades, patients, 4, seed)] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_split_imports_no_scikit_learn() -> None:
    program = (
        "import sys\n"
        "from slidetl.evaluation.folds import stratified_folds\n"
        "stratified_folds([0, 1, 0, 1], [0, 1, 2, 3], 2, 0)\n"
        "assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
