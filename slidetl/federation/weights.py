"""Weights of a network as arrays, the entries that travel, and the checks of a site's update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError
from slidetl.text import one_line

Weights: TypeAlias = Mapping[str, NDArray[Any]]
"""Parameters and buffers of a network by their names in its state dict."""

Travel = Literal["all", "all-but-normalisation"]
"""Entries that leave a site. ``all-but-normalisation`` is FedBN (Li et al., ICLR 2021, arXiv:2102.07623):
each site keeps scale, shift and running statistics of its batch normalisation."""

_MOST = 3.5e38  # above all of float32; sums over sites stay finite
METRIC_BOUNDS = {
    "slides": (0.0, _MOST),
    "rps": (0.0, 1.0),
    "accuracy": (0.0, 1.0),
    "mae": (0.0, _MOST),
    "loss": (-_MOST, _MOST),
    "train_loss": (-_MOST, _MOST),
    "epsilon": (0.0, _MOST),
}
"""Metrics that may leave a site, with lowest and highest value: graded slides, means over slides, and
the privacy spent."""

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, eq=False)
class SiteUpdate:
    """The network of a site after its local training: all that leaves the site in a round.

    Attributes:
        site: name in the configuration.
        weights: the whole travelling entries after training, not their change.
        examples: slides (or bags) that the site claims to have trained with.
        metrics: numbers of :data:`METRIC_BOUNDS`; a metric without a value is left out.
    """

    site: str
    weights: Weights
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def is_statistic(name: str) -> bool:
    """Tells if an entry is a running statistic of a normalisation, not a parameter."""
    return name.rsplit(".", 1)[-1] in _STATISTICS


def normalisation_entries(names: Iterable[str]) -> set[str]:
    """Returns the entries of the layers that keep running statistics: batch normalisation.

    Layer and group normalisation keep none, and are the same layer at every site: they travel.
    """
    names = list(names)
    layers = {name.rpartition(".")[0] for name in names if is_statistic(name)}
    return {name for name in names if name.rpartition(".")[0] in layers}


def is_floating(value: NDArray[Any]) -> bool:
    """Tells if an entry has floating-point numbers, not integers or booleans."""
    return bool(np.issubdtype(value.dtype, np.floating))


def counters(weights: Weights) -> dict[str, NDArray[Any]]:
    """Returns the entries of integers and booleans, such as ``num_batches_tracked``."""
    return {name: value for name, value in weights.items() if not is_floating(value)}


def travelling(weights: Weights, travel: Travel) -> dict[str, NDArray[Any]]:
    """Returns the entries that leave a site.

    Raises:
        UsageError: normalisation stays, and the network has no batch normalisation.
    """
    if travel == "all":
        return dict(weights)
    stays = normalisation_entries(weights)
    if not stays:
        raise UsageError(
            "travel: all-but-normalisation needs a network with batch normalisation, and this one has none: "
            "use travel: all"
        )
    return {name: value for name, value in weights.items() if name not in stays}


def find_fault(update: SiteUpdate, reference: Weights) -> str | None:
    """Returns the reason to leave an update out of its round, or None.

    An update must have the names, shapes and types of the network that was sent, finite values, running
    variances of 0 or more, a whole number of examples above 0, and metrics of
    :data:`METRIC_BOUNDS`.

    Args:
        update: came from a site; nothing in it is trusted.
        reference: the network that the site was sent.
    """
    missing, foreign = reference.keys() - update.weights.keys(), update.weights.keys() - reference.keys()
    if missing or foreign:
        return "; ".join(
            f"{len(names)} {word} entries, such as {shown(min(names, key=shown))}"
            for word, names in (("missing", missing), ("foreign", foreign))
            if names
        )
    for name, sent in reference.items():
        came: Any = update.weights[name]
        if not isinstance(came, np.ndarray):
            return f"{name} is no array"
        if came.shape != sent.shape or came.dtype != sent.dtype:
            return f"{name} is {came.dtype} {list(came.shape)}, expected {sent.dtype} {list(sent.shape)}"
        if not np.isfinite(came).all():
            return f"{name} has values that are not finite"
        if name.endswith("running_var") and (came < 0).any():
            return f"{name} has negative variances"
    claimed: Any = update.examples
    if isinstance(claimed, bool) or not isinstance(claimed, int) or not 1 <= claimed <= 2**53:
        return f"claims {shown(claimed)} examples, expected a whole number above 0"
    return find_metric_fault(update.metrics)


def find_metric_fault(metrics: object) -> str | None:
    """Returns the reason why metrics are not numbers within :data:`METRIC_BOUNDS`, or None.

    Args:
        metrics: came from a site; nothing in them is trusted.
    """
    if not isinstance(metrics, Mapping):
        return "metrics has another form"
    for name, value in metrics.items():
        if not isinstance(name, str) or name not in METRIC_BOUNDS:
            return f"the metric {shown(name)!r} is not one of {', '.join(sorted(METRIC_BOUNDS))}"
        low, high = METRIC_BOUNDS[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            return f"the metric {name} is no finite number from {low:g} to {high:g}: {shown(value)}"
    return None


def shown(value: object) -> str:
    """Shows a value of an untrusted answer in a short line; its type if it is no text and no usual number."""
    if isinstance(value, (int, float)) and not abs(value) > 2**53:
        return str(value)
    return one_line(value[:80]) if isinstance(value, str) else type(value).__name__
