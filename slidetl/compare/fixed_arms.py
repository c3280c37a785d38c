"""Arms without epochs: classical models on stored features, and baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from slidetl.compare.colour import collagen_features, colour_features
from slidetl.compare.records import Job, UnitResult, predictions_of
from slidetl.data.manifest import ManifestRow
from slidetl.evaluation.baselines import fit_best
from slidetl.evaluation.calibration import fit_temperature
from slidetl.evaluation.classical import fit_grader, pool_tiles
from slidetl.tiles.features import read_features
from slidetl.tiles.store import SlideCache

_SMOOTHING = 1.0  # a grade that a site's training slides lack is not impossible there


def grade_by_features(job: Job) -> UnitResult:
    """Fits a classical model on stored features; it chooses its own penalty over the training patients.

    Where there are inner folds, models of these give the temperature that calibrates the whole one.
    """
    recipe = job.unit.recipe["classical"]
    fold, n_grades = job.unit.fold, len(job.grades)

    def pooled(caches: Sequence[SlideCache]) -> NDArray[np.float64]:
        rows = []
        for cache in caches:
            joined = np.concatenate([read_features(cache, name) for name in recipe["features"]], axis=1)
            rows.append(pool_tiles(joined, recipe["pool"], recipe["k"]))
        return np.stack(rows)

    def graded(
        train: Sequence[str], other: Sequence[str]
    ) -> tuple[Sequence[SlideCache], NDArray[np.float64]]:
        caches, x = job.open(other), pooled(job.open(train))
        grader = fit_grader(recipe["model"], x, *_labels(job.part(train)), n_grades, fold.seed)
        return caches, grader.probabilities(pooled(caches))

    temperature = 1.0
    if fold.inner:
        held_out = [graded(inner.train, inner.validation)[1] for inner in fold.inner]
        truth = [grade for inner in fold.inner for grade in _labels(job.part(inner.validation))[0]]
        temperature = fit_temperature(truth, np.concatenate(held_out))
    result = _result(job, *graded(fold.train, fold.test))
    return replace(result, temperature=temperature, nested=bool(fold.inner))


def grade_by_baseline(job: Job) -> UnitResult:
    """Grades by how common each grade is, by site, or by colour."""
    fold, n_grades = job.unit.fold, len(job.grades)
    train, test = job.part(fold.train), job.part(fold.test)
    caches = job.open(fold.test)
    grades, patients = _labels(train)
    name = job.unit.recipe["baseline"]
    if name == "prior":
        shares = _shares(grades, n_grades)
        return _result(job, caches, np.tile(shares, (len(test), 1)))
    if name == "site":
        by_site = {
            site: _shares(
                [row.grade for row in train if row.site == site], n_grades, _shares(grades, n_grades)
            )
            for site in {row.site for row in (*train, *test)}
        }
        return _result(job, caches, np.stack([by_site[row.site] for row in test]))
    if name == "colour_area":
        x, x_test = colour_features(job.open(fold.train)), colour_features(caches)
    else:
        x = collagen_features(job.open(fold.train), [row.stain for row in train])
        x_test = collagen_features(caches, [row.stain for row in test])
    best = fit_best(x, grades, patients, n_grades, fold.seed)
    return _result(job, caches, best.grader.probabilities(x_test))


def _shares(
    grades: Sequence[int | None], n_grades: int, prior: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Returns the share of each grade; a prior counts as :data:`_SMOOTHING` slides."""
    counts = np.bincount([grade for grade in grades if grade is not None], minlength=n_grades)
    total = counts + (0 if prior is None else _SMOOTHING * prior)
    return np.asarray(total / total.sum())


def _labels(rows: Sequence[ManifestRow]) -> tuple[list[int], list[str]]:
    return [row.grade for row in rows if row.grade is not None], [row.patient_id for row in rows]


def _result(job: Job, caches: Sequence[SlideCache], probabilities: NDArray[np.float64]) -> UnitResult:
    rows = job.part(job.unit.fold.test)
    return UnitResult(tuple(predictions_of(rows, [len(cache) for cache in caches], probabilities)))
