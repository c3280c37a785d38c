"""Matrices by which neighbours mix their networks, without a server that averages.

Entry (i, j) of a matrix is the share of site j in the next network of site i. Rows that sum to 1 make it a
mean; columns that sum to 1 keep the mean over sites, so that repeated mixing goes to it (Xiao and Boyd,
Systems and Control Letters 2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError
from slidetl.federation.combine import middle_value
from slidetl.federation.weights import Weights, is_floating

Floats = NDArray[np.float64]

# Shares are typed by hand, such as 0.3333.
_TOLERANCE = 1e-3


def check_matrix(matrix: ArrayLike, sites: int) -> Floats:
    """Checks a mixing matrix, and returns it with sums of exactly 1.

    Raises:
        UsageError: not ``[sites, sites]``, negative, not doubly stochastic, or parts stay apart.
    """
    shares = np.asarray(matrix, np.float64)
    if shares.shape != (sites, sites):
        raise UsageError(
            f"a mixing matrix of {sites} sites must be [{sites}, {sites}], not {list(shares.shape)}"
        )
    if not np.isfinite(shares).all() or (shares < 0).any():
        raise UsageError("the shares of a mixing matrix must be finite and at least 0")
    for axis, word in ((1, "rows"), (0, "columns")):
        sums = shares.sum(axis=axis)
        if np.abs(sums - 1).max() > _TOLERANCE:
            raise UsageError(
                f"the {word} of a mixing matrix must sum to 1, not {[round(float(s), 4) for s in sums]}"
            )
    for _ in range(200):  # Sinkhorn: removes the rounding of typed shares.
        shares = shares / shares.sum(axis=0)
        shares = shares / shares.sum(axis=1, keepdims=True)
    second = np.sort(np.abs(np.linalg.eigvals(shares)))[:-1]
    if sites > 1 and second[-1] > 1 - 1e-9:
        raise UsageError(
            "a mixing matrix must bring all sites together: here some never hear of others, or swap networks"
        )
    return np.asarray(shares, np.float64)


def metropolis_weights(adjacency: ArrayLike) -> Floats:
    """Returns the doubly stochastic matrix of a graph: 1 / (1 + the larger degree) for each edge.

    Args:
        adjacency: ``[n, n]`` symmetric, true for neighbours; the diagonal is ignored.

    Raises:
        UsageError: not square, not symmetric, or not connected.
    """
    edges = np.asarray(adjacency, bool)
    if edges.ndim != 2 or not np.array_equal(edges, edges.T):
        raise UsageError(f"a graph of neighbours must be square and symmetric, not {np.shape(adjacency)}")
    edges = edges & ~np.eye(len(edges), dtype=bool)
    degree = edges.sum(axis=1)
    shares = np.where(edges, 1 / (1 + np.maximum(degree[:, None], degree[None])), 0.0)
    return check_matrix(shares + np.diag(1 - shares.sum(axis=1)), len(edges))


def ring(sites: int) -> Floats:
    """Returns the matrix of a ring: a third each for a site and its two neighbours."""
    edges = np.roll(np.eye(sites, dtype=bool), 1, axis=1)
    return metropolis_weights(edges | edges.T)


def full_graph(sites: int) -> Floats:
    """Returns the matrix with equal shares of all sites."""
    return np.full((sites, sites), 1 / sites)


def without(matrix: Floats, absent: Sequence[int]) -> Floats:
    """Returns the matrix of a round without some sites: their shares go to the site that misses them.

    An absent site keeps its network. A matrix that is not symmetric is made so first (the mean with its
    transpose is doubly stochastic too); without that, columns no longer sum to 1.
    """
    if not len(absent):
        return matrix
    shares = (matrix + matrix.T) / 2
    shares[list(absent), :] = 0
    shares[:, list(absent)] = 0
    return np.asarray(shares + np.diag(1 - shares.sum(axis=1)), np.float64)


def mix(networks: Sequence[Weights], matrix: Floats) -> list[dict[str, NDArray[Any]]]:
    """Mixes the networks of sites, ``matrix [n, n]``, in float64, each entry in its type.

    Integers and booleans take the middle value over a site and its neighbours.
    """
    mixed: list[dict[str, NDArray[Any]]] = [{} for _ in networks]
    for name, first in networks[0].items():
        values = np.stack([network[name] for network in networks])
        if is_floating(first):
            for own, row in zip(mixed, np.tensordot(matrix, values.astype(np.float64), axes=1), strict=True):
                own[name] = row.astype(first.dtype)
        else:
            for own, shares in zip(mixed, matrix, strict=True):
                own[name] = middle_value(list(values[shares > 0]))
    return mixed
