"""Schemes of collaboration as loops over a function that trains one site, in one process.

They are the reference for the engine, and serve experiments. ``train(site, weights)`` trains a site from
the network that arrived and returns its update; a :class:`~slidetl.errors.SlidetlError` from it is a site
that drops out. ``train`` keeps the parts of the network that stay at a site (FedBN). :func:`cyclic` over
one site is the baseline of a site alone, or of all data in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from slidetl.errors import FederationError, SlidetlError
from slidetl.federation.combine import Floats, Rule, WeightedMean, accept, check_sites, combine_round
from slidetl.federation.mixing import check_matrix, full_graph, mix, without
from slidetl.federation.weights import SiteUpdate, Weights
from slidetl.text import one_line

Train: TypeAlias = Callable[[str, Weights], SiteUpdate]


@dataclass(frozen=True, eq=False)
class Round:
    """A round that is done.

    Attributes:
        number: from 1.
        weights: the network that all sites share; peer to peer the mean of theirs.
        networks: the network of each site.
        metrics: of each site with a usable update.
        left_out: reason for each other site.
        notes: remarks on usable updates.
    """

    number: int
    weights: Weights
    networks: Mapping[str, Weights]
    metrics: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, str]
    notes: Mapping[str, str]


def cyclic(train: Train, weights: Weights, declared: Mapping[str, int], rounds: int) -> Iterator[Round]:
    """Trains one network that travels from site to site (Chang et al., JAMIA 2018).

    A site that drops out, or whose update is refused, is skipped: the next one gets the last good network.

    Args:
        train: of one site.
        weights: of the start.
        declared: examples of each site, in the order of the journey.
        rounds: journeys.

    Raises:
        FederationError: no site of a round sent a usable update.
    """
    for number in range(1, rounds + 1):
        metrics: dict[str, Mapping[str, float]] = {}
        left_out: dict[str, str] = {}
        notes: dict[str, str] = {}
        for site in declared:
            came, dropped = _train_all(train, {site: weights})
            usable, refused, remarks = accept(weights, came, declared)
            left_out |= dropped | refused
            notes |= remarks
            if usable:
                weights, metrics[site] = usable[0].weights, usable[0].metrics
        if not metrics:
            raise FederationError(f"no site of round {number} sent a usable update: {_reasons(left_out)}")
        yield Round(number, weights, dict.fromkeys(declared, weights), metrics, left_out, notes)


def averaged(
    train: Train,
    weights: Weights,
    declared: Mapping[str, int],
    rounds: int,
    *,
    rule: Rule | None = None,
    fewest: int = 1,
    momentum: float = 0.0,
) -> Iterator[Round]:
    """Trains all sites from one network and combines their updates, round by round.

    By default this is FedAvg. FedProx (Li et al., MLSys 2020, arXiv:1812.06127) is FedAvg over sites that
    train with the penalty L2-SP towards the network that arrived.

    Args:
        train: of one site.
        weights: of the start.
        declared: examples of each site: the weights of the mean, and the cap of a claim.
        rounds: rounds.
        rule: of :mod:`slidetl.federation.combine`; None is the weighted mean.
        fewest: usable updates with which a round counts.
        momentum: of the server.

    Raises:
        UsageError: the rule does not hold with so many sites.
        FederationError: too few usable updates are left in a round.
    """
    rule = rule or WeightedMean()
    check_sites(rule, len(declared))
    velocity: Mapping[str, Floats] = {}
    for number in range(1, rounds + 1):
        came, dropped = _train_all(train, dict.fromkeys(declared, weights))
        try:
            combined = combine_round(
                weights, came, declared, rule, fewest=fewest, momentum=momentum, velocity=velocity
            )
        except FederationError as error:
            lost = f"; dropped out: {_reasons(dropped)}" if dropped else ""
            raise FederationError(f"round {number}: {error}{lost}") from error
        weights, velocity = combined.weights, combined.velocity
        metrics = {update.site: update.metrics for update in came if update.site not in combined.left_out}
        left_out = dropped | combined.left_out
        yield Round(number, weights, dict.fromkeys(declared, weights), metrics, left_out, combined.notes)


def peer_to_peer(
    train: Train, weights: Weights, declared: Mapping[str, int], rounds: int, matrix: Floats
) -> Iterator[Round]:
    """Trains each site from its own network, then mixes those of neighbours (Lian et al., NeurIPS 2017).

    A site that drops out, or whose update is refused, keeps its network of before the round, and its
    neighbours mix without it.

    Args:
        train: of one site.
        weights: of the start, the same for all.
        declared: examples of each site, in the order of the matrix; shares are those of the matrix alone.
        rounds: rounds.
        matrix: ``[n, n]`` doubly stochastic.

    Raises:
        UsageError: the matrix does not mix.
        FederationError: no site of a round sent a usable update.
    """
    sites = list(declared)
    matrix = check_matrix(matrix, len(sites))
    networks: dict[str, Weights] = dict.fromkeys(sites, weights)
    for number in range(1, rounds + 1):
        came, dropped = _train_all(train, networks)
        usable, refused, notes = accept(weights, came, declared)
        left_out = dropped | refused
        if not usable:
            raise FederationError(f"no site of round {number} sent a usable update: {_reasons(left_out)}")
        networks = networks | {update.site: update.weights for update in usable}
        absent = [place for place, site in enumerate(sites) if site in left_out]
        mixed = mix([networks[site] for site in sites], without(matrix, absent))
        networks = dict(zip(sites, mixed, strict=True))
        mean = mix(mixed, full_graph(len(sites)))[0]
        yield Round(
            number, mean, networks, {update.site: update.metrics for update in usable}, left_out, notes
        )


def _train_all(train: Train, networks: Mapping[str, Weights]) -> tuple[list[SiteUpdate], dict[str, str]]:
    """Trains sites; returns their updates, and the reason for each site that dropped out."""
    came, dropped = [], {}
    for site, weights in networks.items():
        sent = {name: np.array(value) for name, value in weights.items()}  # A site may write into its copy.
        try:
            came.append(train(site, sent))
        except SlidetlError as error:
            dropped[site] = f"dropped out: {one_line(str(error))[:200]}"
    return came, dropped


def _reasons(left_out: Mapping[str, str]) -> str:
    """Returns the reasons in one line."""
    return "; ".join(f"{site}: {reason}" for site, reason in sorted(left_out.items()))
