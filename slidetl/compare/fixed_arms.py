"""Computes arms without epochs: classical models on stored features, and baselines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from slidetl.compare.colour import collagen_features, colour_features
from slidetl.compare.plan import Job
from slidetl.compare.records import JobResult
from slidetl.data.manifest import ManifestRow
from slidetl.data.study import CachedSlide
from slidetl.evaluation.baselines import fit_best
from slidetl.evaluation.calibration import fit_temperature
from slidetl.evaluation.classical import fit_grader, pool_tiles
from slidetl.tiles.features import read_features
from slidetl.training.predictions import SlidePrediction

_SMOOTHING = 1.0  # a grade missing at a site's training slides is not impossible there


def grade_by_features(job: Job) -> JobResult:
    """Fits a classical model on stored features; it chooses its own penalty over the training patients.

    With inner folds, their models give the temperature that calibrates the final one.
    """
    recipe, fold = job.recipe["classical"], job.fold

    def pooled(slides: Iterable[CachedSlide]) -> NDArray[np.float64]:
        rows = []
        for slide in slides:
            joined = [read_features(slide.cache, name) for name in recipe["features"]]
            rows.append(pool_tiles(np.concatenate(joined, axis=1), recipe["pool"], recipe["k"]))
        return np.stack(rows)

    def graded(train: Sequence[str], other: Sequence[CachedSlide]) -> NDArray[np.float64]:
        x, labels = pooled(job.open(train)), _labels(job.part(train))
        grader = fit_grader(recipe["model"], x, *labels, len(job.grades), fold.seed)
        return grader.probabilities(pooled(other))

    temperature = 1.0
    if fold.inner:
        held_out = [graded(inner.train, job.open(inner.validation)) for inner in fold.inner]
        grades, patients = _labels([row for inner in fold.inner for row in job.part(inner.validation)])
        temperature = fit_temperature(grades, np.concatenate(held_out), patients)
    test = job.open((*fold.test, *fold.external))
    result = _result(test, graded(fold.train, test))
    return replace(result, temperature=temperature, nested=bool(fold.inner))


def grade_by_baseline(job: Job) -> JobResult:
    """Grades by the share of each grade, by site, or by colour."""
    fold, n_grades, name = job.fold, len(job.grades), job.recipe["baseline"]
    train, test = job.part(fold.train), job.open((*fold.test, *fold.external))
    grades, patients = _labels(train)
    prior = _shares(grades, n_grades)
    if name == "prior":
        return _result(test, np.tile(prior, (len(test), 1)))
    if name == "site":
        by_site = {
            site: _shares([row.grade for row in train if row.site == site], n_grades, prior)
            for site in {slide.row.site for slide in test}
        }
        return _result(test, np.stack([by_site[slide.row.site] for slide in test]))

    def features(slides: Sequence[CachedSlide]) -> NDArray[np.float64]:
        caches = [slide.cache for slide in slides]
        if name == "colour_area":
            return colour_features(caches)
        return collagen_features(caches, [slide.row.stain for slide in slides])

    best = fit_best(features(job.open(fold.train)), grades, patients, n_grades, fold.seed)
    return _result(test, best.grader.probabilities(features(test)))


def _shares(
    grades: Sequence[int | None], n_grades: int, prior: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Returns the share of each grade; a prior counts as :data:`_SMOOTHING` slides."""
    counts = np.bincount([grade for grade in grades if grade is not None], minlength=n_grades)
    total = counts + (0 if prior is None else _SMOOTHING * prior)
    return np.asarray(total / total.sum())


def _labels(rows: Sequence[ManifestRow]) -> tuple[list[int], list[str]]:
    return [row.grade for row in rows if row.grade is not None], [row.patient_id for row in rows]


def _result(slides: Sequence[CachedSlide], probabilities: NDArray[np.float64]) -> JobResult:
    predictions = []
    for slide, values in zip(slides, probabilities, strict=True):
        about = (slide.row.slide_id, slide.row.patient_id, slide.row.grade)
        given = tuple(values.astype(np.float64).tolist())
        predictions.append(SlidePrediction(*about, given, tiles=len(slide.cache), site=slide.row.site))
    return JobResult(tuple(predictions))
