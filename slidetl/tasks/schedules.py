"""Learning rates over the course of a training."""

from __future__ import annotations

import math


def one_cycle(progress: float, warmup_fraction: float) -> float:
    """The rate relative to its peak: a linear rise, then a half cosine down to a hundredth.

    Smith and Topin, "Super-convergence", 2018, without the cycle of the momentum. It depends on the
    progress alone, so that a training may go on for longer than was planned when it began.

    Args:
        progress: share of all training steps that are done, 0..1; beyond 1 the rate stays at its lowest.
        warmup_fraction: share of the steps in which the rate rises, between 0 and 1.
    """
    if progress < warmup_fraction:
        return 0.04 + 0.96 * progress / warmup_fraction
    remaining = max(0.0, 1 - progress) / (1 - warmup_fraction)
    return 0.01 + 0.99 * (1 - math.cos(math.pi * remaining)) / 2
