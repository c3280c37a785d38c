"""A comparison as its page sees it: arms in order, with a look each, and how figures are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidetl.compare.aggregate import ArmResult, ComparisonResult
from slidetl.compare.config import Comparison, Figure
from slidetl.compare.report.plots import Look, looks_of
from slidetl.evaluation.bootstrap import Interval
from slidetl.evaluation.protocol import Protocol

NAMES: dict[Figure, str] = {
    "qwk": "QWK",
    "accuracy": "Accuracy",
    "mae": "Mean absolute error",
    "rps": "RPS",
    "log_loss": "Log loss",
}
NONE = "–"


@dataclass(frozen=True, eq=False)
class View:
    """What all sections of the page share.

    Attributes:
        result: all figures.
        folder: for drawings.
        failed: why units failed, by their labels.
    """

    result: ComparisonResult
    folder: Path
    failed: Mapping[str, str]

    @property
    def comparison(self) -> Comparison:
        """As configured."""
        return self.result.comparison

    @property
    def protocol(self) -> Protocol:
        """How it was split."""
        return self.result.comparison.protocol

    @cached_property
    def trivial(self) -> tuple[str, ...]:
        """Arms that anything must beat."""
        return tuple(name for name, arm in self.comparison.arms.items() if arm.baseline is not None)

    @cached_property
    def arms(self) -> tuple[ArmResult, ...]:
        """Complete ones: those of the primary comparison first, the trivial ones last."""
        primary = self.comparison.primary
        first = {primary.arm: 0, primary.against: 1}
        return tuple(
            sorted(self.result.arms, key=lambda arm: (first.get(arm.arm, 2), arm.arm in self.trivial))
        )

    @cached_property
    def serious(self) -> tuple[ArmResult, ...]:
        """Those that are not trivial; all of them where there is no other."""
        return tuple(arm for arm in self.arms if arm.arm not in self.trivial) or self.arms

    @cached_property
    def looks(self) -> dict[str, Look]:
        """How each arm is drawn."""
        return looks_of([arm.arm for arm in self.arms], self.trivial)

    @property
    def name(self) -> str:
        """Of the figure of the primary comparison."""
        return NAMES[self.comparison.primary.figure]

    @property
    def n_grades(self) -> int:
        """K."""
        return len(self.comparison.grades)

    @property
    def n_patients(self) -> int:
        """Whose slides were tested."""
        return len(set(self.result.patients.tolist()))

    @property
    def unit(self) -> str:
        """What one result is."""
        return "slide" if self.protocol.unit == "slide" else "patient"

    @property
    def n_results(self) -> str:
        """How many results the figures are of, in words."""
        return f"{len(self.arms[0].results.true)} {self.unit}s"


def p_value(value: float) -> str:
    """To three digits."""
    return f"{value:.3f}" if value >= 0.0005 else "< 0.001"


def p_is(value: float) -> str:
    """The same within a sentence: ``p = 0.023``, ``p < 0.001``."""
    return f"p = {value:.3f}" if value >= 0.0005 else "p < 0.001"


def three(interval: Interval) -> str:
    """An interval to three digits, for figures that are small."""
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def span(values: Sequence[int] | NDArray[np.int64]) -> str:
    """From the least to the greatest."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
