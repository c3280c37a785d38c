"""Intervals by resampling patients. Slides of one patient are not independent; patients are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Statistic = Callable[[NDArray[np.intp]], float]


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile interval.

    Attributes:
        estimate: the statistic on the data as they are.
        low, high: bounds of the interval.
        level: its nominal coverage, 0..1.
    """

    estimate: float
    low: float
    high: float
    level: float


def patient_bootstrap(
    statistic: Statistic, patients: Sequence[str], *, level: float = 0.95, n_draws: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap over patients (Davison and Hinkley 1997, section 5.3; clusters as units).

    The models that made the predictions are held fixed: the interval does not tell how another
    training would differ. For a paired comparison let the statistic be the difference.

    Args:
        statistic: maps indices ``[M]`` into the slides, with repetitions, to a figure.
        patients: ``[N]`` whose slide each is.
        level: nominal coverage, between 0 and 1.
        n_draws: number of resamples.
        seed: of the resampling.

    Raises:
        ValueError: fewer than two patients.
    """
    names, member = np.unique(np.asarray(patients), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"a bootstrap over patients needs at least 2, found {len(names)}")
    slides_of = [np.flatnonzero(member == patient) for patient in range(len(names))]
    rng = np.random.default_rng(seed)
    draws = [
        statistic(
            np.concatenate([slides_of[patient] for patient in rng.integers(len(names), size=len(names))])
        )
        for _ in range(n_draws)
    ]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(statistic(np.arange(len(member))), float(low), float(high), level)
