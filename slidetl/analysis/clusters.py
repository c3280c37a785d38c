"""Groups embeddings without labels: mean shift in blocks on a CPU or GPU, k-means, HDBSCAN.

Mean shift with the flat kernel gives the clusters of scikit-learn's ``MeanShift`` from the same seeds. Seeds
move together: distances and means of a block of seeds are two matrix products, on a processor only with the
points in reach. Computation is in float64 if the points are, else in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slidetl.errors import UsageError

Points = NDArray[np.float32] | NDArray[np.float64]
Kernel = Literal["flat", "gaussian"]

_CPU = torch.device("cpu")
_QUERIES = 1000  # points with distances that tell the bandwidth
_STOP = 1e-3  # of the bandwidth, as scikit-learn
_SEEDS = 512  # moved together
_DISTANCES = 2**22  # of a block: 16 MB; fewer seeds are compared with more points at once
_CANDIDATES = 4  # times k: points searched for the k nearest
_LLOYD = 4  # iterations that place the cells of that search
_SAMPLE = 20_000  # points that fit principal components and cells
_SHELLS = 32  # cells of the exact search on a processor
_SPREAD = 2000  # points from which they are chosen
_FEW = 16  # places below which a product takes as long as with so many


@dataclass(frozen=True, eq=False)
class Clusters:
    """Groups of points.

    Attributes:
        labels: ``[N] int64``, 0..K-1, the largest first; -1 for none.
        centres: ``[K, D]``: modes, or means of the groups.
        bandwidth: of mean shift; None for other methods.
        cut: share of the seeds for which a given number of neighbours left out points within the bandwidth
            where they stopped; None if all points counted.
    """

    labels: NDArray[np.int64]
    centres: Points
    bandwidth: float | None = None
    cut: float | None = None

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of points ``[K]`` of each group."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.centres))


@dataclass(frozen=True, eq=False)
class Projection:
    """The leading principal components of some points.

    Attributes:
        mean: ``[D]``.
        directions: ``[R, D]``, orthonormal.
        kept: share of the variance along them, 0..1.
    """

    mean: Points
    directions: Points
    kept: float

    def __call__(self, points: Points) -> Points:
        """Projects ``[n, D]`` to ``[n, R]``."""
        return (points - self.mean) @ self.directions.T


def principal_components(points: Points, n: int, seed: int = 0) -> Projection:
    """Fits at most ``n`` principal components to at most 20,000 of the points ``[N, D]``.

    Raises:
        UsageError: fewer than two points, numbers that are not finite, or ``n`` below 1.
    """
    _check(points)
    if n < 1 or len(points) < 2:
        raise UsageError(f"expected at least 1 component of at least 2 points, not {n} of {len(points)}")
    drawn = points[_draw(len(points), _SAMPLE, seed)].astype(np.float64)
    mean = drawn.mean(0)
    variances, directions = np.linalg.eigh(np.cov(drawn.T).reshape(points.shape[1], -1))
    total = variances.clip(0).sum()
    leading = directions[:, ::-1][:, : min(n, len(drawn) - 1)].T
    kept = variances[::-1][: len(leading)].clip(0).sum() / total if total > 0 else 1.0
    kind: Any = points.dtype.type
    return Projection(kind(mean), kind(leading), float(kept))


def bandwidth_of(
    points: Points,
    k: int,
    quantile: float = 0.5,
    *,
    seed: int = 0,
    device: torch.device = _CPU,
) -> float:
    """Computes a quantile of the distances from points ``[N, D]`` to their k-th nearest neighbour.

    ``k`` is about the size of the smallest group worth finding: a ball of this radius around half of the
    points (``quantile`` 0.5) holds at least as many. Distances of 1000 points are taken, to all.

    Raises:
        UsageError: k is not between 1 and N - 1, a quantile outside 0..1, or all these distances are zero.
    """
    _check(points)
    if not 1 <= k < len(points) or not 0 <= quantile <= 1:
        raise UsageError(
            f"the bandwidth needs a k between 1 and {len(points) - 1} and a quantile 0..1, "
            f"not {k} and {quantile}"
        )
    field = _Field.of(points, 1.0, "flat", device)
    queries = field.points[torch.from_numpy(_draw(len(points), _QUERIES, seed)).to(field.points.device)]
    found = []
    for block in torch.split(queries, max(1, 2**24 // len(points))):
        squared = torch.cat([part for _, part in field.distances(block)], 1)
        found.append(squared.kthvalue(k + 1, dim=1).values)  # the nearest is the point itself
    bandwidth = float(np.quantile(torch.cat(found).clamp(min=0).sqrt().cpu().numpy(), quantile))
    if bandwidth <= 0:
        raise UsageError(f"the {k} nearest neighbours of most points are equal to them; give the bandwidth")
    return bandwidth


def mean_shift(
    points: Points,
    bandwidth: float,
    *,
    kernel: Kernel = "flat",
    seeds: Points | int | None = None,
    neighbours: int | None = None,
    min_points: int = 1,
    max_iterations: int = 300,
    cluster_all: bool = True,
    seed: int = 0,
    device: torch.device = _CPU,
) -> Clusters:
    """Moves seeds uphill to the modes of the density, and gives each point to the nearest mode.

    Comaniciu and Meer, IEEE TPAMI 2002. Every step moves a seed to the mean of the points within the
    bandwidth (flat), or to their mean weighted by ``exp(-d^2 / (2 bandwidth^2))`` (Gaussian), until it moves
    less than a thousandth of the bandwidth. Of modes within a bandwidth of each other the one with the most
    points stays, as in scikit-learn, so the flat kernel gives its result.

    With ``neighbours`` the mean is over these nearest points alone, and they are sought in the nearest of
    about ``sqrt(N)`` cells, until four times as many points were compared. This costs
    ``neighbours`` rather than N distances a step. If a group is larger than ``neighbours``, its seeds stop
    early and the group is split: see :attr:`Clusters.cut`, and compare with the exact result.

    Args:
        points: ``[N, D]``, finite.
        bandwidth: radius of the kernel.
        kernel: ``flat`` or ``gaussian``.
        seeds: ``[S, D]``; a number of points drawn as seeds; None for all points.
        neighbours: number of nearest points for the approximate variant; None for all.
        min_points: modes with fewer points within the bandwidth (Gaussian: less weight) are dropped.
        max_iterations: of each seed.
        cluster_all: False leaves points farther than the bandwidth from every mode without a group.
        seed: of the draws.
        device: where distances are computed.

    Raises:
        UsageError: arrays or numbers out of range; or no seed has ``min_points`` points around it.
    """
    _check(points)
    if not (math.isfinite(bandwidth) and bandwidth > 0):
        raise UsageError(f"the bandwidth must be a positive number, not {bandwidth}")
    if neighbours is not None and not 1 <= neighbours <= len(points):
        raise UsageError(f"neighbours must be between 1 and the {len(points)} points, not {neighbours}")
    if seeds is None or isinstance(seeds, int):
        if seeds is not None and seeds < 1:
            raise UsageError(f"expected at least 1 seed, not {seeds}")
        seeds = points if seeds is None else points[_draw(len(points), seeds, seed)]
    _check(seeds)
    if seeds.shape[1] != points.shape[1]:
        raise UsageError(f"seeds have {seeds.shape[1]} columns, points {points.shape[1]}")
    kind = _Field if neighbours is None or neighbours == len(points) else _NearField
    if (
        kind is _Field
        and (kernel, device.type) == ("flat", "cpu")
        and len(seeds) > _SHELLS
        and len(points) > _SPREAD
    ):
        kind = _ShellField
    field = kind.of(points, bandwidth, kernel, device)
    if isinstance(field, _NearField):
        field.build(neighbours or 1, seed)
    elif isinstance(field, _ShellField):
        field.build(seed)
    with torch.inference_mode():
        modes, weights, cut = _climb(field, field.place(seeds), max_iterations)
        kept = weights >= max(min_points, 1e-12)
        if not bool(kept.any()):
            raise UsageError(
                f"no seed has {min_points} points within the bandwidth {bandwidth:g}; widen it, or add seeds"
            )
        centres = _merge(modes[kept], weights[kept], bandwidth)
        labels, nearest = field.assign(centres)
        if not cluster_all:
            labels[nearest > bandwidth**2] = -1
    return _by_size(
        labels.cpu().numpy(),
        (centres + field.mean).cpu().numpy(),
        bandwidth,
        float(cut.double().mean()) if neighbours is not None else None,
    )


def k_means(points: Points, k: int, seed: int = 0) -> Clusters:
    """Groups points ``[N, D]`` by scikit-learn's k-means, the best of four starts.

    Raises:
        UsageError: fewer points than groups.
    """
    from sklearn.cluster import KMeans

    _check(points)
    if not 1 <= k <= len(points):
        raise UsageError(f"expected 1 to {len(points)} clusters for so many points, not {k}")
    fitted = KMeans(k, n_init=4, random_state=seed).fit(points)
    return _by_size(fitted.labels_.astype(np.int64), fitted.cluster_centers_)


def hdbscan(points: Points, least: int) -> Clusters:
    """Groups points ``[N, D]`` by scikit-learn's HDBSCAN; points outside of dense regions have no group.

    ``least`` is the number of points of the smallest group.

    Raises:
        UsageError: fewer points than ``least``, ``least`` below 2, or no group found.
    """
    from sklearn.cluster import HDBSCAN

    _check(points)
    if not 2 <= least <= len(points):
        raise UsageError(f"expected a smallest cluster of 2 to {len(points)} points, not {least}")
    labels = HDBSCAN(min_cluster_size=least, copy=True).fit(points).labels_.astype(np.int64)
    n = labels.max() + 1
    if n == 0:
        raise UsageError(f"HDBSCAN finds no group of {least} points; ask for smaller ones, or mean shift")
    return _by_size(labels, np.stack([points[labels == group].mean(0) for group in range(n)]))


class _Field:
    """Points on a device, and the mean of those around a place."""

    def __init__(self, points: Tensor, mean: Tensor, bandwidth: float, kernel: Kernel) -> None:
        self.points, self.mean = points, mean
        self.squares = points.square().sum(1)
        self.bandwidth, self.kernel = bandwidth, kernel
        # A column of ones counts the points, or sums their weights, in the same product.
        self.counted = torch.cat([points, torch.ones_like(points[:, :1])], 1)

    @classmethod
    def of(cls, points: Points, bandwidth: float, kernel: Kernel, device: torch.device) -> Self:
        if kernel not in ("flat", "gaussian"):
            raise UsageError(f"the kernel must be flat or gaussian, not {kernel!r}")
        rows = torch.from_numpy(np.ascontiguousarray(points)).to(device)
        mean = rows.mean(0)
        # Distances are differences of squares: they are exact only around the origin.
        return cls(rows - mean, mean, bandwidth, kernel)

    def place(self, seeds: Points) -> Tensor:
        """Moves places ``[S, D]`` to the device and the frame of the points."""
        return torch.from_numpy(np.ascontiguousarray(seeds)).to(self.points) - self.mean

    def distances(self, places: Tensor) -> list[tuple[int, Tensor]]:
        """Computes squared distances ``[S, n]`` to blocks of points, each with its first point."""
        own = places.square().sum(1, keepdim=True)
        return [
            (start, torch.addmm(self.squares[start:end], places, self.points[start:end].T, alpha=-2) + own)
            for start, end in self.blocks(len(places))
        ]

    def blocks(self, places: int) -> list[tuple[int, int]]:
        """Divides the points for so many places: first and end of each block."""
        n, step = len(self.points), max(1, _DISTANCES // max(1, places))
        return [(start, min(start + step, n)) for start in range(0, n, step)]

    def means(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes means ``[S, D]``, their points or weights ``[S]``, and whether points were left out."""
        sums = self.points.new_zeros(len(places), self.counted.shape[1])
        own = places.square().sum(1, keepdim=True)
        for start, end in self.blocks(len(places)):
            rest = torch.addmm(self.squares[start:end], places, self.points[start:end].T, alpha=-2)
            sums += self.weigh(rest, own, self.bandwidth**2 - own) @ self.counted[start:end]
        return self.divided(sums)

    @staticmethod
    def divided(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Divides weighted sums ``[S, D + 1]`` by their last column; no point was left out."""
        weights = sums[:, -1]
        means = sums[:, :-1] / weights.clamp(min=1e-30)[:, None]
        return means, weights, torch.zeros_like(weights, dtype=torch.bool)

    def weigh(self, rest: Tensor, own: Tensor, limit: Tensor) -> Tensor:
        """Turns squared distances less ``own`` into weights, in place; the flat kernel ends at ``limit``."""
        if self.kernel == "flat":
            return torch.le(rest, limit, out=rest)
        return rest.add_(own).clamp_(min=0).mul_(-0.5 / self.bandwidth**2).exp_()

    def assign(self, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Finds the nearest of some places for each point: numbers and squared distances ``[N]``."""
        found = [nearest_of(self.points[start:end], centres) for start, end in self.blocks(len(centres))]
        return torch.cat([labels for labels, _ in found]), torch.cat([squared for _, squared in found])


class _ShellField(_Field):
    """Points sorted by cell and distance to its centre: for the flat kernel those around a place are slices.

    By the triangle inequality a point p of the cell around c is within r of a place x only if its distance to
    c is within r of x's. Nothing is left out, so the result is that of :class:`_Field`.
    """

    def build(self, seed: int) -> None:
        """Chooses centres far from each other, and sorts the points."""
        drawn = self.points[torch.from_numpy(_draw(len(self.points), _SPREAD, seed)).to(self.points.device)]
        centres = [drawn[0]]
        gaps = (drawn - centres[0]).square().sum(1)
        while len(centres) < _SHELLS:
            centres.append(drawn[int(gaps.argmax())])
            gaps = torch.minimum(gaps, (drawn - centres[-1]).square().sum(1))
        self.cells = torch.stack(centres)
        cell, squared = super().assign(self.cells)
        radius = squared.clamp(min=0).sqrt().double()
        self.longest = 2 * float(radius.max()) + 1
        self.keys, self.order = torch.sort(2 * self.longest * cell + radius)
        self.counted, self.squares = self.counted[self.order], self.squares[self.order]
        self.points = self.counted[:, :-1]
        # Distances are roots of differences of squares: what rounding may add to them.
        slack = math.sqrt(64 * torch.finfo(self.points.dtype).eps * float(self.squares.max()))
        self.reach = self.bandwidth + slack

    def assign(self, centres: Tensor) -> tuple[Tensor, Tensor]:
        found = super().assign(centres)
        labels, squared = torch.empty_like(found[0]), torch.empty_like(found[1])
        labels[self.order], squared[self.order] = found
        return labels, squared

    def means(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes what :class:`_Field` does, from the slices within reach of places of the same cell."""
        gaps = torch.cdist(places, self.cells).double()
        group = gaps.argmin(1)
        members = [torch.nonzero(group == number).flatten() for number in torch.unique(group).tolist()]
        low = torch.stack([gaps[rows].amin(0) for rows in members]) - self.reach
        high = torch.stack([gaps[rows].amax(0) for rows in members]) + self.reach
        first = 2 * self.longest * torch.arange(len(self.cells))
        starts = torch.searchsorted(self.keys, first + low.clamp(0, self.longest))
        ends = torch.searchsorted(self.keys, first + high.clamp(0, self.longest), right=True)
        sizes = torch.tensor([max(len(rows), _FEW) for rows in members])
        if ((ends - starts).sum(1) * sizes).sum() > len(places) * len(self.points):
            return super().means(places)
        sums = self.points.new_zeros(len(places), self.counted.shape[1])
        own = places.square().sum(1, keepdim=True)
        limit = self.bandwidth**2 - own
        for rows, begin, end in zip(members, starts.tolist(), ends.tolist(), strict=True):
            mine, found = places[rows], sums.new_zeros(len(rows), sums.shape[1])
            for start, stop in zip(begin, end, strict=True):
                if start < stop:
                    rest = torch.addmm(self.squares[start:stop], mine, self.points[start:stop].T, alpha=-2)
                    found += self.weigh(rest, own[rows], limit[rows]) @ self.counted[start:stop]
            sums[rows] = found
        return self.divided(sums)


class _NearField(_Field):
    """Points sorted into cells, and the mean of the k nearest points around a place."""

    def build(self, k: int, seed: int) -> None:
        """Places the cells, and lists for each the points to compare: the nearest cells of enough points."""
        n = len(self.points)
        self.k = k
        drawn = self.points[torch.from_numpy(_draw(n, _SAMPLE, seed)).to(self.points.device)]
        self.cells = drawn[: max(1, round(math.sqrt(n)))].clone()
        for _ in range(_LLOYD):
            cell, _ = nearest_of(drawn, self.cells)
            counts = torch.bincount(cell, minlength=len(self.cells))
            sums = torch.zeros_like(self.cells).index_add_(0, cell, drawn)
            filled = counts > 0
            self.cells[filled] = sums[filled] / counts[filled, None]
        cell, _ = self.assign(self.cells)
        order = torch.argsort(cell, stable=True)
        sizes = torch.bincount(cell, minlength=len(self.cells))
        self.members = torch.split(order, sizes.tolist())
        ranked = torch.cdist(self.cells, self.cells).argsort(1)
        enough = (sizes[ranked].cumsum(1) < _CANDIDATES * k).sum(1) + 1
        self.near = [row[:count].tolist() for row, count in zip(ranked, enough.tolist(), strict=True)]

    def means(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes means over at most k points; a point of the bandwidth is left out if k are nearer."""
        result = torch.empty_like(places)
        weights = places.new_empty(len(places))
        is_cut = torch.zeros(len(places), dtype=torch.bool, device=places.device)
        cell, _ = nearest_of(places, self.cells)
        for number in torch.unique(cell).tolist():
            rows = torch.nonzero(cell == number).flatten()
            of_cell = torch.cat([self.members[near] for near in self.near[number]])
            counted = self.counted[of_cell]
            own = places[rows].square().sum(1, keepdim=True)
            rest = torch.addmm(self.squares[of_cell], places[rows], counted[:, :-1].T, alpha=-2)
            limit = self.bandwidth**2 - own
            if self.k < len(of_cell):
                last = rest.topk(self.k + 1, dim=1, largest=False).values[:, -2:]
                is_cut[rows] = (last[:, 1:] <= limit).flatten()
                rest = rest.masked_fill(rest > last[:, :1], torch.inf)
            sums = self.weigh(rest, own, limit) @ counted
            weights[rows] = sums[:, -1]
            result[rows] = sums[:, :-1] / sums[:, -1:].clamp(min=1e-30)
        return result, weights, is_cut


def nearest_of(places: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the nearest centre of each place: numbers and squared distances ``[n]``."""
    squared = torch.addmm(centres.square().sum(1), places, centres.T, alpha=-2)
    nearest = squared.min(1)
    return nearest.indices, nearest.values + places.square().sum(1)


def _climb(field: _Field, seeds: Tensor, max_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Moves seeds to modes: places, points or weights around them, and whether points were left out."""
    places = seeds.clone()
    weights = seeds.new_zeros(len(seeds))
    is_cut = torch.zeros(len(seeds), dtype=torch.bool, device=seeds.device)
    moving = torch.arange(len(seeds), device=seeds.device)
    for iteration in range(max_iterations + 1):
        still = []
        for rows in torch.split(moving, _SEEDS):
            means, weight, cut = field.means(places[rows])
            weights[rows], is_cut[rows] = weight, cut
            means = torch.where(weight[:, None] > 0, means, places[rows])
            far = (means - places[rows]).square().sum(1) > (_STOP * field.bandwidth) ** 2
            places[rows] = means
            still.append(rows[far])
        moving = torch.cat(still)
        if not len(moving) or iteration == max_iterations:
            break
    return places, weights, is_cut


def _merge(modes: Tensor, weights: Tensor, bandwidth: float) -> Tensor:
    """Keeps the mode of most points of those within a bandwidth; equal counts go by coordinates."""
    rows, counts = modes.cpu().numpy(), weights.cpu().numpy()
    order = np.lexsort((*rows.T[::-1], counts))[::-1]
    ordered = modes[torch.from_numpy(order.copy()).to(modes.device)]
    kept = []
    while len(ordered):
        kept.append(ordered[0])
        ordered = ordered[(ordered - ordered[0]).square().sum(1) > bandwidth**2]
    return torch.stack(kept)


def _by_size(
    labels: NDArray[np.int64], centres: Any, bandwidth: float | None = None, cut: float | None = None
) -> Clusters:
    """Numbers groups by size, the largest first; groups without a point are dropped."""
    sizes = np.bincount(labels[labels >= 0], minlength=len(centres))
    order = np.argsort(-sizes, kind="stable")[: int((sizes > 0).sum())]
    number = np.full(len(centres) + 1, -1, np.int64)  # the last stands for no group
    number[order] = np.arange(len(order))
    return Clusters(number[labels], np.asarray(centres)[order], bandwidth, cut)


def _draw(n: int, sample: int, seed: int) -> NDArray[np.int64]:
    """Draws at most ``sample`` of n numbers, without replacement."""
    return np.random.default_rng(seed).permutation(n)[:sample]


def _check(points: Points) -> None:
    if points.ndim != 2 or not points.size or points.dtype not in (np.float32, np.float64):
        raise UsageError(f"expected points [N, D] of float32 or float64, not {points.shape} {points.dtype}")
    if not np.isfinite(points).all():
        raise UsageError("points must be finite numbers")
