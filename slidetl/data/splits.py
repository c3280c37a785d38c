"""Splits of slides, each patient in one part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from slidetl.data.manifest import ManifestRow
from slidetl.errors import UsageError
from slidetl.evaluation.folds import stratified_folds


def split_patients(
    rows: Sequence[ManifestRow], *, val_fraction: float, test_fraction: float, seed: int
) -> dict[str, str]:
    """Splits slides into train, val and test by patient, each with about the same mix of grades.

    The test part is some folds of :func:`~slidetl.evaluation.folds.stratified_folds`, the validation part
    some folds of the rest, so the fractions hold as closely as ten folds and whole patients allow. The only
    slide of a grade stays in training if possible.

    Args:
        rows: graded slides.
        val_fraction: share of all slides for validation, 0..0.5.
        test_fraction: share of all slides for the test, 0..0.5.
        seed: seed of the folds; the order of the rows does not matter.

    Returns:
        ``slide_id`` -> ``train``, ``val`` or ``test``.

    Raises:
        UsageError: a fraction is out of range, or there are too few patients.
    """
    if val_fraction + test_fraction >= 1:
        raise UsageError(
            f"nothing is left to train on with {val_fraction} for validation, {test_fraction} for test"
        )
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction <= 0.5:
            raise UsageError(f"{name} must be from 0 to 0.5, not {fraction}")
    rows = sorted(rows, key=lambda row: row.slide_id)
    split = {row.slide_id: "train" for row in rows}
    for row in _fold(rows, test_fraction, seed, "test"):
        split[row.slide_id] = "test"
    rest = [row for row in rows if split[row.slide_id] == "train"]
    for row in _fold(rest, val_fraction / (1 - test_fraction), seed, "val"):
        split[row.slide_id] = "val"
    return split


def _fold(rows: list[ManifestRow], fraction: float, seed: int, part: str) -> list[ManifestRow]:
    if fraction == 0:
        return []
    grades = np.array([row.grade for row in rows])
    patients = np.array([row.patient_id for row in rows])
    n_patients = len(set(patients))
    # If no grade has a slide for each fold, the part becomes larger than requested.
    commonest = max(Counter(grades.tolist()).values(), default=0)
    share = Fraction(fraction).limit_denominator(max(2, min(10, commonest)))
    share = max(share, Fraction(1, max(2, min(10, commonest))))
    if min(n_patients, commonest) < share.denominator:
        raise UsageError(
            f"{len(rows)} slides of {n_patients} patients are too few for a {part} part of {fraction:.0%}; "
            "add slides, or give the manifest a 'split' column"
        )
    # A grade with fewer slides than folds cannot be in each; the report of the split shows it.
    parts = [fold for fold in stratified_folds(grades, patients, share.denominator, seed) if len(fold)]
    # Rare grades stay in training: folds with the last slides of a grade come last.
    left = Counter(grades.tolist())
    chosen: list[NDArray[np.intp]] = []
    others: list[NDArray[np.intp]] = []
    for members in parts:
        held = Counter(grades[members].tolist())
        spares = len(chosen) < share.numerator and all(left[grade] > held[grade] for grade in held)
        (chosen if spares else others).append(members)
        left -= held if spares else Counter()
    return [rows[index] for members in (chosen + others)[: share.numerator] for index in members]
