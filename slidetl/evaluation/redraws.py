"""Combines one effect over redraws of a whole experiment, such as other slides and other trainings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Interval


@dataclass(frozen=True)
class RedrawnEffect:
    """The mean effect over redraws, each redraw being one of many that might have been drawn.

    Attributes:
        interval: of the mean.
        between: standard deviation of the true effects of redraws; 0 if the patients explain all of it.
        p: two-sided, of no effect on average, by t on ``n - 1`` degrees of freedom.
        n: redraws.
    """

    interval: Interval
    between: float
    p: float
    n: int


def combine_redraws(effects: ArrayLike, errors: ArrayLike, *, level: float = 0.95) -> RedrawnEffect:
    """Combines the effects of K redraws by a random-effects mean.

    An effect is that of its redraw plus the error of its patients. The variance between redraws is Paule and
    Mandel's (J. Res. Natl. Bur. Stand. 1982): the one with which the weighted squares are as large as
    expected. The interval is Hartung and Knapp's (Statistics in Medicine 2001), by t on K - 1 degrees of
    freedom: five redraws say little of their own variance, and a normal interval takes it for known. Where
    the effects differ less than their errors say, it keeps to these errors. Resampling the patients of all
    redraws would take the redraws for fixed; resampling five redraws gives intervals too short.

    Redraws of one pool of tiles share tiles, so this is about other draws from that pool, not other pools.

    Args:
        effects: ``[K]``, such as differences in QWK; K is 2 or more.
        errors: ``[K]`` standard errors of each, over its patients, above 0.
        level: of the interval.

    Raises:
        UsageError: fewer than two effects, a number that is not finite, or an error of 0.
    """
    from scipy.optimize import brentq
    from scipy.stats import t as student

    y, v = np.asarray(effects, np.float64), np.square(np.asarray(errors, np.float64))
    if y.ndim != 1 or y.shape != v.shape or len(y) < 2:
        raise UsageError(
            f"expected an effect and an error for each of two redraws or more, not {y.shape}, {v.shape}"
        )
    if not (np.isfinite(y).all() and np.isfinite(v).all() and (v > 0).all()):
        raise UsageError(
            f"expected finite effects and errors above 0, not {y.tolist()} and {np.sqrt(v).tolist()}"
        )
    degrees = len(y) - 1

    def excess(between: float) -> float:
        weights = 1 / (v + between)
        return float(weights @ (y - weights @ y / weights.sum()) ** 2) - degrees

    # With so large a variance the weighted squares are below the degrees of freedom.
    most = float(np.sum((y - y.mean()) ** 2)) + 1e-12
    between = float(brentq(excess, 0, most, xtol=1e-14)) if excess(0) > 0 else 0.0
    weights = 1 / (v + between)
    mean = float(weights @ y / weights.sum())
    scale = max(1.0, (excess(between) + degrees) / degrees)
    error = float(np.sqrt(scale / weights.sum()))
    half = float(student.ppf((1 + level) / 2, degrees)) * error
    p = float(2 * student.sf(abs(mean) / error, degrees))
    return RedrawnEffect(Interval(mean, mean - half, mean + half, level), float(np.sqrt(between)), p, len(y))
