"""Learning rates over the course of a training, relative to their peak; stepped per batch."""

from __future__ import annotations

import math

from slidetl.errors import UsageError


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


def triangular(step: int, half_cycle_steps: int, base: float = 0.25) -> float:
    """The rate relative to its peak: up and down in straight lines, again and again.

    Smith, "Cyclical learning rates for training neural networks", WACV 2017, section 3.1.

    Args:
        step: training steps done, from 0.
        half_cycle_steps: steps from the lowest to the highest rate (2 to 10 epochs in the paper).
        base: the lowest rate, relative to the peak, 0..1 (a quarter to a third in the paper).
    """
    return base + (1 - base) * _rise(step, half_cycle_steps, base)


def triangular2(step: int, half_cycle_steps: int, base: float = 0.25) -> float:
    """As :func:`triangular`, the range from base to peak halved with each cycle."""
    rise = _rise(step, half_cycle_steps, base)
    return base + (1 - base) * rise * 0.5 ** (step // (2 * half_cycle_steps))


def rate_for_batch(lr: float, reference: int, *, devices: int, accumulation: int, bags: int) -> float:
    """The rate scaled in proportion to the global batch.

    Goyal et al., "Accurate, large minibatch SGD", 2017, section 2.1. It is meant for SGD; with Adam it is
    on the high side for large batches.

    Args:
        lr: rate that suits a batch of ``reference`` bags.
        reference: bags in that batch.
        devices: processes that compute a step together.
        accumulation: batches whose gradients are added up for a step.
        bags: bags in the batch of one process.
    """
    if min(reference, devices, accumulation, bags) < 1:
        raise UsageError(
            "a batch has at least one bag on one device; found "
            f"reference {reference}, devices {devices}, accumulation {accumulation}, bags {bags}"
        )
    return lr * devices * accumulation * bags / reference


def _rise(step: int, half_cycle_steps: int, base: float) -> float:
    """How far the rate is above its base, 0 (lowest) to 1 (highest)."""
    if half_cycle_steps < 1 or not 0 <= base <= 1:
        raise UsageError(
            f"expected half_cycle_steps of at least 1 and base from 0 to 1, not {half_cycle_steps}, {base}"
        )
    return 1 - abs(step % (2 * half_cycle_steps) / half_cycle_steps - 1)
