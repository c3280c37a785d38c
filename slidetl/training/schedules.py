"""Schedules of the learning rate, relative to its peak; stepped per batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slidetl.errors import UsageError


class Schedule:
    """Base of the schedules: pure functions of the progress of training."""

    def rate(self, epochs: float, planned_epochs: float) -> float:
        """Returns the rate relative to its peak, above 0 and up to 1.

        Args:
            epochs: epochs of training done, fractions included.
            planned_epochs: epochs of the whole training, above 0; infinite if no end is planned.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class OneCycle(Schedule):
    """A linear rise, then a half cosine down to a hundredth.

    Smith and Topin, "Super-convergence", 2018, without the cycle of the momentum. It depends only on the
    share of the training done, so a training can be prolonged; beyond its end the rate stays at its lowest.

    Attributes:
        warmup_fraction: share of the training with a rising rate, between 0 and 1.
    """

    warmup_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.warmup_fraction < 1:
            raise UsageError(f"warmup_fraction must be between 0 and 1, not {self.warmup_fraction}")

    def rate(self, epochs: float, planned_epochs: float) -> float:
        """Returns the rate relative to its peak; raises a UsageError if no end is planned."""
        if math.isinf(planned_epochs):
            raise UsageError(
                "one cycle needs to know how long the training is; set trainer.max_epochs or max_steps, "
                "or choose another model.schedule"
            )
        progress = epochs / planned_epochs
        if progress < self.warmup_fraction:
            return 0.04 + 0.96 * progress / self.warmup_fraction
        remaining = max(0.0, 1 - progress) / (1 - self.warmup_fraction)
        return 0.01 + 0.99 * (1 - math.cos(math.pi * remaining)) / 2


@dataclass(frozen=True)
class Triangular(Schedule):
    """A rate rising and falling linearly, in cycles.

    Smith, "Cyclical learning rates for training neural networks", WACV 2017, section 3.1.

    Attributes:
        half_cycle_epochs: epochs from the lowest to the highest rate; 2 to 10 in the paper.
        base: the lowest rate, relative to the peak, 0..1; a quarter to a third in the paper.
    """

    half_cycle_epochs: float = 4.0
    base: float = 0.25

    def __post_init__(self) -> None:
        if not (self.half_cycle_epochs > 0 and 0 <= self.base <= 1):
            raise UsageError(
                f"expected half_cycle_epochs above 0 and base from 0 to 1, not {self.half_cycle_epochs}, "
                f"{self.base}"
            )

    def rate(self, epochs: float, planned_epochs: float) -> float:
        """Returns the rate relative to its peak; ``planned_epochs`` is not used."""
        rise = 1 - abs(epochs % (2 * self.half_cycle_epochs) / self.half_cycle_epochs - 1)
        return self.base + (1 - self.base) * rise * self.height(epochs)

    def height(self, epochs: float) -> float:
        """Returns the height of the present cycle, relative to the first."""
        return 1.0


@dataclass(frozen=True)
class Triangular2(Triangular):
    """A :class:`Triangular` schedule; its range from base to peak halves with each cycle."""

    def height(self, epochs: float) -> float:
        """Returns the height of the present cycle, relative to the first."""
        return float(0.5 ** (epochs // (2 * self.half_cycle_epochs)))


@dataclass(frozen=True)
class Constant(Schedule):
    """A constant rate."""

    def rate(self, epochs: float, planned_epochs: float) -> float:
        """Returns 1, the peak."""
        return 1.0


def rate_for_batch(lr: float, reference: int, *, devices: int, accumulation: int, bags: int) -> float:
    """Scales a rate in proportion to the global batch.

    Goyal et al., "Accurate, large minibatch SGD", 2017, section 2.1. For Adam it is high at large batches.

    Args:
        lr: rate for a batch of ``reference`` bags.
        reference: bags in the reference batch.
        devices: processes in a step.
        accumulation: batches per step, with their gradients added.
        bags: bags in the batch of one process.

    Raises:
        UsageError: one of the counts is below 1.
    """
    if min(reference, devices, accumulation, bags) < 1:
        raise UsageError(
            "a batch has at least one bag on one device; found "
            f"reference {reference}, devices {devices}, accumulation {accumulation}, bags {bags}"
        )
    return lr * devices * accumulation * bags / reference
