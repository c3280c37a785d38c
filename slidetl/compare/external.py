"""Grades an external cohort by the arms of a comparison: as it comes, and recalibrated on it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from slidetl.compare.aggregate import ArmResult, ComparisonResult, metric_interval
from slidetl.compare.config import METRICS, MetricName
from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Interval
from slidetl.evaluation.calibration import recalibrate, with_temperature
from slidetl.evaluation.comparison import PatientResults, patient_results


@dataclass(frozen=True, eq=False)
class External:
    """An arm on the slides of the external site.

    Attributes:
        arm: its name.
        n_slides: of a smaller training part in each fold; None for the whole one.
        results: of the models of all folds and repeats, ``[J, M]``, as they come.
        again: the same with probabilities by :func:`~slidetl.evaluation.calibration.recalibrate`, fitted to
            other external patients; None if these are too few.
        metrics: averaged over the J models, with intervals over patients and models (as over repeats);
            an undefined one is left out.
        recalibrated: the same of ``again``; empty without it.
    """

    arm: str
    n_slides: int | None
    results: PatientResults
    again: PatientResults | None
    metrics: Mapping[MetricName, Interval]
    recalibrated: Mapping[MetricName, Interval]


@lru_cache(maxsize=1)  # tables and page of one result; it takes seconds
def external_results(result: ComparisonResult) -> tuple[External, ...]:
    """Judges all arms on the external slides; empty without any."""
    if not result.comparison.protocol.external_site:
        return ()
    return tuple(_external(result, arm) for arm in (*result.arms, *result.smaller))


def _external(result: ComparisonResult, arm: ArmResult) -> External:
    tested = {row.slide_id for row in result.rows}
    grade: dict[str, tuple[int, str]] = {}
    models = []
    for _, found in arm.jobs:
        own = {row.slide_id: row for row in found.predictions if row.slide_id not in tested}
        grade |= {name: (row.grade, row.patient_id) for name, row in own.items() if row.grade is not None}
        models.append((own, found.temperature))
    names = sorted(grade)
    true, patients = (np.array([grade[name][place] for name in names]) for place in (0, 1))
    rows = np.stack(
        [
            with_temperature([own[name].probabilities for name in names], temperature)
            for own, temperature in models
        ]
    )
    draws, unit = result.comparison.bootstrap_draws, result.comparison.protocol.unit
    results, again = patient_results(true, rows, patients, unit), None
    with suppress(UsageError):  # too few patients to recalibrate on
        fitted = np.stack([recalibrate(true, of_model, patients) for of_model in rows])
        again = patient_results(true, fitted, patients, unit)
    recalibrated = {} if again is None else _metrics(again, draws)
    return External(arm.arm, arm.n_slides, results, again, _metrics(results, draws), recalibrated)


def _metrics(results: PatientResults, draws: int) -> dict[MetricName, Interval]:
    found = {name: metric_interval(name, results, n_draws=draws) for name in METRICS}
    return {name: interval for name, interval in found.items() if not np.isnan(interval.estimate)}
