"""Compares how fast arms learn: metrics at equal epochs, and at each arm's own plateau."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slidetl.compare.aggregate import ArmResult
from slidetl.compare.config import LENGTH, PLATEAU, Comparison
from slidetl.compare.records import CurvePoint, JobResult

CurveMetric = Literal["qwk", "accuracy", "rps"]
CURVE_METRICS: tuple[CurveMetric, ...] = ("qwk", "accuracy", "rps")


@dataclass(frozen=True, eq=False)
class Learning:
    """Metrics in the course of the T trainings of an arm, at their E common points.

    Attributes:
        arm: its name.
        part: predicted slides: held-out parts of the ``inner`` folds, or ``test`` parts.
        epochs: ``[E]`` done, rising.
        seconds: ``[E]`` of training until then, averaged over the trainings.
        values: of each metric, ``[T, E]``; NaN if undefined.
        results: patients or slides, at each point, of all trainings together.
    """

    arm: str
    part: Literal["inner", "test"]
    epochs: NDArray[np.int64]
    seconds: NDArray[np.float64]
    values: Mapping[str, NDArray[np.float64]]
    results: int

    @property
    def trainings(self) -> int:
        """Number of trainings T."""
        return len(self.values["qwk"])

    def mean(self, metric: CurveMetric, epoch: int | None) -> float:
        """Averages a metric over the trainings at one point of the curve; NaN at None."""
        return float("nan" if epoch is None else self.values[metric][:, self._place(epoch)].mean())

    def plateau(self, metric: CurveMetric) -> int | None:
        """Counts epochs until the mean is within 0.02 (of RPS: 2 %) of the best on the curve.

        None if the metric is undefined at every point.
        """
        means = self.values[metric].mean(axis=0)
        if np.isnan(means).all():
            return None
        if metric == "rps":
            near = means <= means.min() * (1 + PLATEAU)
        else:  # an undefined QWK is no plateau
            near = means >= np.where(np.isnan(means), -np.inf, means).max() - PLATEAU
        return int(self.epochs[near.argmax()])

    def seconds_until(self, epoch: int | None) -> float:
        """Averages the seconds of training until one point of the curve; NaN at None."""
        return float("nan" if epoch is None else self.seconds[self._place(epoch)])

    def _place(self, epoch: int) -> int:
        return int(self.epochs.tolist().index(epoch))


def learning_of(comparison: Comparison, arm: ArmResult) -> Learning | None:
    """Joins the curves of an arm; None for an arm without epochs.

    With inner folds they are of the chosen trial, or of the longest one that differs from it in the number of
    epochs alone, on the held-out parts of the inner folds. Without, they are of the test parts, which chose
    nothing.
    """
    series: list[list[CurvePoint]] = []
    part: Literal["inner", "test"] = "test"
    for _, found in arm.jobs:
        trial = _shown_trial(comparison, arm.arm, found)
        by_part: dict[str, list[CurvePoint]] = {}
        for point in found.curves:
            if point.part == "test" or point.trial == trial:
                by_part.setdefault(point.part, []).append(point)
        if any(name != "test" for name in by_part):
            part = "inner"
            by_part.pop("test", None)
        series += by_part.values()
    epochs = sorted(set.intersection(*({point.epoch for point in points} for points in series or [[]])))
    if not epochs:
        return None
    kept = [[point for point in points if point.epoch in epochs] for points in series]
    values: dict[str, NDArray[np.float64]] = {
        name: np.array([[getattr(point, name) for point in points] for points in kept])
        for name in CURVE_METRICS
    }
    return Learning(
        arm=arm.arm,
        part=part,
        epochs=np.array(epochs, np.int64),
        seconds=np.mean([[point.seconds for point in points] for points in kept], axis=0),
        values=values,
        results=sum(points[0].n for points in series),
    )


def equal_epochs(curves: Sequence[Learning], most: int = 4) -> list[int]:
    """Picks at most so many epochs with a point in all curves, evenly from first to last."""
    if not curves:
        return []
    common = sorted(set.intersection(*(set(curve.epochs.tolist()) for curve in curves)))
    places = np.linspace(0, len(common) - 1, min(most, len(common))).round().astype(int)
    return [common[place] for place in places]


def _shown_trial(comparison: Comparison, arm: str, found: JobResult) -> int:
    chosen, trials = found.chosen or {}, comparison.trials(arm)
    alike = [
        number
        for number, trial in enumerate(trials)
        if all(chosen.get(name) == value for name, value in trial.items() if name != LENGTH)
    ]
    return max(alike, key=lambda number: trials[number].get(LENGTH, 0), default=0)
