"""Rules that combine the updates of the sites into one network, and tolerate some malicious sites.

A rule works on *updates*, the changes from the network that was sent, in float64. Krum on the weights
themselves compares large almost equal numbers, in float32 mostly by their rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import FederationError, UsageError
from slidetl.federation.weights import SiteUpdate, Weights, find_fault, is_floating, is_statistic

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rule(ABC):
    """A rule to combine updates.

    Attributes:
        malicious: number of sites that may send anything, for which the rule must hold.

    Raises:
        UsageError: a value is out of range.
    """

    malicious: int = 0

    def __post_init__(self) -> None:
        if self.malicious < 0:
            raise UsageError(f"the number of malicious sites must be 0 or more, not {self.malicious}")

    @property
    @abstractmethod
    def sites_needed(self) -> int:
        """Fewest updates with which the rule holds."""

    def select(self, distances: Floats) -> list[int]:
        """Selects the updates to combine, here all, by their squared distances ``[n, n]``."""
        return list(range(len(distances)))

    @abstractmethod
    def reduce(self, changes: Floats, examples: Floats) -> Floats:
        """Combines the changes ``[n, ...]`` of one entry into one ``[...]``; ``examples [n]`` are above 0."""


@dataclass(frozen=True)
class WeightedMean(Rule):
    """The mean, weighted by examples: FedAvg (McMahan et al., AISTATS 2017, arXiv:1602.05629).

    A single malicious site moves it anywhere, so ``malicious`` must be 0.
    """

    def __post_init__(self) -> None:
        if self.malicious:
            raise UsageError(
                f"a mean tolerates 0 malicious sites, not {self.malicious}: use CoordinateMedian, "
                "TrimmedMean, Krum or MultiKrum"
            )

    @property
    def sites_needed(self) -> int:
        """A single update."""
        return 1

    def reduce(self, changes: Floats, examples: Floats) -> Floats:
        """Returns the weighted mean."""
        return np.asarray(np.tensordot(examples / examples.sum(), changes, axes=1), np.float64)


@dataclass(frozen=True)
class CoordinateMedian(Rule):
    """The median of each number (Yin et al., ICML 2018, arXiv:1803.01498); sites count alike."""

    @property
    def sites_needed(self) -> int:
        """``2 * malicious + 1``: the honest are the majority."""
        return 2 * self.malicious + 1

    def reduce(self, changes: Floats, examples: Floats) -> Floats:
        """Returns the median."""
        return np.asarray(np.median(changes, axis=0), np.float64)


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """The mean of each number without the ``malicious`` lowest and highest (Yin et al., ICML 2018)."""

    @property
    def sites_needed(self) -> int:
        """``2 * malicious + 1``: the honest are the majority."""
        return 2 * self.malicious + 1

    def reduce(self, changes: Floats, examples: Floats) -> Floats:
        """Returns the trimmed mean; sites count alike."""
        kept = np.sort(changes, axis=0)[self.malicious : len(changes) - self.malicious]
        return np.asarray(kept.mean(axis=0), np.float64)


@dataclass(frozen=True)
class Krum(Rule):
    """The one update closest to its ``n - malicious - 2`` nearest others (Blanchard et al., NeurIPS 2017)."""

    @property
    def sites_needed(self) -> int:
        """``2 * malicious + 3``, by the proof of Blanchard et al."""
        return 2 * self.malicious + 3

    def _kept(self, n: int) -> int:
        return 1

    def select(self, distances: Floats) -> list[int]:
        """Selects the updates with the lowest sums of squared distances; the first in a tie."""
        n = len(distances)
        nearest = np.sort(distances + np.diag(np.full(n, np.inf)), axis=1)[:, : n - self.malicious - 2]
        return sorted(np.argsort(nearest.sum(axis=1), kind="stable")[: self._kept(n)].tolist())

    def reduce(self, changes: Floats, examples: Floats) -> Floats:
        """Returns the mean of the selected; sites count alike."""
        return np.asarray(changes.mean(axis=0), np.float64)


@dataclass(frozen=True)
class MultiKrum(Krum):
    """The mean of the ``n - malicious - 2`` updates with the best scores of Krum.

    So many are safe by El Mhamdi et al. (ICML 2018, arXiv:1802.07927); Blanchard et al. leave the number
    open.
    """

    def _kept(self, n: int) -> int:
        return n - self.malicious - 2


@dataclass(frozen=True, eq=False)
class Combined:
    """The network after a round, and the account of the sites.

    Attributes:
        weights: names, shapes and types of the network that was sent.
        velocity: state of the server momentum, float64; empty without momentum.
        used: sites in it, sorted; of Krum the selected ones.
        left_out: reason for each site whose update is not in the round.
        notes: remarks on sites that are in it, such as a claim above the declared number of examples.
    """

    weights: dict[str, NDArray[Any]]
    velocity: dict[str, Floats]
    used: tuple[str, ...]
    left_out: dict[str, str]
    notes: dict[str, str]


def accept(
    reference: Weights, updates: Sequence[SiteUpdate], declared: Mapping[str, int]
) -> tuple[list[SiteUpdate], dict[str, str], dict[str, str]]:
    """Checks the updates of a round, and caps the examples that they claim.

    Args:
        reference: the network that the sites were sent.
        updates: in any order; of two of one site, neither is used.
        declared: examples of each site by the configuration: a claim above it counts as so many.

    Returns:
        The usable updates, sorted by site; the reason for each other one; remarks on usable ones.
    """
    names = [update.site for update in updates]
    usable, left_out, notes = [], {}, {}
    for update in sorted(updates, key=lambda update: update.site):
        if update.site not in declared:
            left_out[update.site] = "is not in the configuration"
        elif names.count(update.site) > 1:
            left_out[update.site] = f"sent {names.count(update.site)} updates in one round"
        elif fault := find_fault(update, reference):
            left_out[update.site] = fault
        else:
            cap = declared[update.site]
            if update.examples > cap:
                notes[update.site] = f"claims {update.examples} examples of {cap} declared: {cap} are counted"
                update = replace(update, examples=cap)
            usable.append(update)
    return usable, left_out, notes


def check_sites(rule: Rule, sites: int) -> None:
    """Refuses a rule that does not hold with so many sites.

    Raises:
        UsageError: too few sites.
    """
    if sites < rule.sites_needed:
        raise UsageError(
            f"{type(rule).__name__} with malicious={rule.malicious} needs at least {rule.sites_needed} "
            f"sites, not {sites}"
        )


def combine_round(
    reference: Weights,
    updates: Sequence[SiteUpdate],
    declared: Mapping[str, int],
    rule: Rule,
    *,
    fewest: int = 1,
    momentum: float = 0.0,
    velocity: Mapping[str, Floats] | None = None,
) -> Combined:
    """Combines the updates of a round into the next network; the order of arrival makes no difference.

    Floating entries change by the rule. Entries of integers and booleans keep their type: each takes the
    middle value of the sites used, the lower one of two, so that a minority cannot choose it.

    An update that is refused spends one of the ``malicious`` sites of the rule: of n sites with at most f bad
    ones, r of them refused, n - r are left with at most f - r bad ones. Otherwise two sites that send NaN
    would end a training for seven. A site that sends nothing spends none.

    Server momentum (FedAvgM, Hsu et al. 2019, arXiv:1909.06335): velocity = momentum * velocity + change, for
    parameters only: extrapolated running variances could fall below 0.

    Args:
        reference: the network that the sites were sent.
        updates: came from the sites, unchecked.
        declared: examples of each site by the configuration.
        rule: to combine by.
        fewest: usable updates with which the round counts.
        momentum: of the server, 0 (none) or more, below 1.
        velocity: of the last round; None in the first.

    Raises:
        FederationError: too few usable updates are left; the message tells why each other one is not.
        UsageError: momentum is out of range.
    """
    if not 0 <= momentum < 1:
        raise UsageError(f"server momentum must be at least 0 and below 1, not {momentum}")
    usable, left_out, notes = accept(reference, updates, declared)
    refused = sum(site in declared for site in left_out)
    rule = replace(rule, malicious=max(0, rule.malicious - refused))
    needed = max(fewest, rule.sites_needed)
    if len(usable) < needed:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(left_out.items()))
        raise FederationError(
            f"{type(rule).__name__} needs {needed} usable updates, and {len(usable)} of {len(declared)} "
            f"sites sent one{f' ({reasons})' if reasons else ''}: mend them and resume from the last round"
        )
    floating = [name for name, value in reference.items() if is_floating(value)]
    chosen = usable
    if isinstance(rule, Krum):
        chosen = [usable[number] for number in rule.select(_squared_distances(reference, usable, floating))]
    examples = np.array([update.examples for update in chosen], np.float64)
    weights: dict[str, NDArray[Any]] = {}
    moved: dict[str, Floats] = {}
    for name, sent in reference.items():
        if name not in floating:
            weights[name] = middle_value([update.weights[name] for update in chosen])
            continue
        change = rule.reduce(_changes(sent, chosen, name), examples)
        if momentum and not is_statistic(name):
            change = moved[name] = momentum * (velocity or {}).get(name, np.float64(0)) + change
        with np.errstate(over="ignore"):  # refused below
            weights[name] = (sent.astype(np.float64) + change).astype(sent.dtype)
        if not np.isfinite(weights[name]).all():
            raise FederationError(
                f"{name} has values that are not finite after the round: lower the learning rate or the "
                "server momentum"
            )
    return Combined(weights, moved, tuple(update.site for update in chosen), left_out, notes)


def middle_value(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Returns the middle value of each number over sites, the lower one of two, in its own type."""
    return np.asarray(np.sort(np.stack(values), axis=0)[(len(values) - 1) // 2])


def _changes(sent: NDArray[Any], updates: Sequence[SiteUpdate], name: str) -> Floats:
    """Returns the changes ``[n, ...]`` of an entry."""
    after = np.stack([update.weights[name].astype(np.float64) for update in updates])
    with np.errstate(over="ignore"):  # of float64 near its limit: far from all others, and refused if used
        return after - sent.astype(np.float64)


def _squared_distances(reference: Weights, updates: Sequence[SiteUpdate], names: Sequence[str]) -> Floats:
    """Returns the squared distances ``[n, n]`` of the updates, entry by entry to save memory."""
    total = np.zeros((len(updates), len(updates)))
    for name in names:
        changes = _changes(reference[name], updates, name).reshape(len(updates), -1)
        with np.errstate(over="ignore"):  # infinitely far
            for number, change in enumerate(changes):
                total[number] += np.square(changes - change).sum(axis=1)
    return total
