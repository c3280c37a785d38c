"""All that may leave a site, by an allow-list of names and types, where messages are built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import FederationError
from slidetl.federation.weights import SiteUpdate, Weights, find_fault
from slidetl.text import one_line

METRICS = frozenset({"slides", "rps", "accuracy", "mae", "loss", "train_loss", "epsilon"})
"""Metrics that may leave a site: the number of graded slides, means over slides, and the privacy spent."""


class Message(NamedTuple):
    """The whole content of a site's message; the engine adds the site's name and the job.

    Attributes:
        weights: plain arrays, of the names, shapes and types of the network that the site was sent.
        examples: number of training slides.
        metrics: of :data:`METRICS`.
    """

    weights: dict[str, NDArray[Any]]
    examples: int
    metrics: dict[str, float]


def outgoing(update: SiteUpdate, network: Weights) -> Message:
    """Builds the message of an update, and refuses all but weights, a count and chosen metrics.

    Args:
        update: of the site.
        network: the entries that the site was sent, which name all that may return.

    Raises:
        FederationError: an entry has a foreign name, shape or type, or a metric is not on the list.
    """
    if fault := find_fault(update, network):
        raise FederationError(f"this site sends nothing: {fault}")
    # New arrays: a view or a subclass could carry more than its values.
    weights = {str(name): np.array(value, copy=True, subok=False) for name, value in update.weights.items()}
    return Message(weights, int(update.examples), outgoing_metrics(update.metrics))


def outgoing_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns metrics as plain numbers, and refuses all that are not on the list.

    Raises:
        FederationError: a name is not in :data:`METRICS`, or a value is no finite number.
    """
    for name, value in metrics.items():
        if name not in METRICS:
            raise FederationError(
                f"this site sends nothing: the metric {one_line(str(name))[:80]!r} is not one of "
                f"{', '.join(sorted(METRICS))}"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise FederationError(f"this site sends nothing: the metric {name} is no finite number")
    return {str(name): float(value) for name, value in metrics.items()}
