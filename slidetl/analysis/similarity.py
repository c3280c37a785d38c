"""Compares two representations of the same tiles by SVCCA, PWCCA and CKA, each with its noise floor.

A representation is an array ``[n, D]``: row i embeds tile i, the same tile in both arrays; the numbers of
columns may differ. Sums run over blocks of rows in float64, at any precision of the arrays; arrays may be
memory-mapped. Memory holds a few matrices ``[D, D]`` and blocks of rows. Only the entries of Gaussian
kernels are computed in single precision, if the arrays have no more.

The permutation noise floor is the same measure after shuffling the rows of the second array: the value if
nothing is shared. It is far from zero with few rows, and is part of every result. A representation equal for
every tile is like nothing else: the value is then nan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError

Features = NDArray[np.floating[Any]]
_Matrix = NDArray[np.float64]
_Block = NDArray[np.float32] | NDArray[np.float64]
_Order = NDArray[np.int64]

BLOCK_ROWS = 2048
# Up to here a whole kernel matrix stays in memory, 64 or 128 MiB, and a permutation costs next to nothing.
_ROWS_KEPT = 4096


def merge_layers(orders: Iterable[Iterable[str]]) -> list[str]:
    """Merges layers of several networks into one order, in which those of each network keep their own.

    A layer that earlier networks lack follows its predecessor in its own network; without one it comes before
    its successor.
    """
    merged: list[str] = []
    for order in dict.fromkeys(map(tuple, orders)):
        place = next((merged.index(layer) for layer in order if layer in merged), len(merged))
        for layer in order:
            if layer in merged:
                place = merged.index(layer)
            else:
                merged.insert(place, layer)
            place += 1
    return merged


@dataclass(frozen=True)
class Similarity:
    """A measure of likeness, and its value by chance alone.

    Attributes:
        value: 1 for the same representation, near ``noise_floor`` for unrelated ones.
        noise_floor: mean over permutations of the rows of the second array.
        noise_floor_highest: the greatest of them.
        permutations: their number.
    """

    value: float
    noise_floor: float
    noise_floor_highest: float
    permutations: int


def svcca(
    x: Features, y: Features, variance_kept: float = 0.99, permutations: int = 10, seed: int = 0
) -> Similarity:
    """Computes SVCCA: the mean canonical correlation of the main directions of both arrays.

    Raghu et al., "SVCCA", NeurIPS 2017, section 2: centre, keep the singular directions with 99 % of the
    variance, take the mean of their canonical correlations. Unchanged by rotation and uniform
    scaling of either array, and with ``variance_kept=1`` by every invertible linear map. Singular directions
    come from a QR decomposition by blocks of rows (Bjorck and Golub, Mathematics of Computation 1973, for
    CCA), not from a covariance, which squares the condition number. Directions with a singular value below
    ``max(n, D)`` float64 roundings of the greatest are dropped.

    Args:
        x: ``[n, D]``.
        y: ``[n, D']``.
        variance_kept: share of each array's variance, above 0 and up to 1.
        permutations: of the rows of ``y``, for the noise floor.
        seed: of the permutations.

    Raises:
        UsageError: the arrays are not two-dimensional with equally many rows, at least four; they hold
            numbers that are not finite; or an option is out of range.
    """
    if not 0 < variance_kept <= 1:
        raise UsageError(f"variance_kept must be above 0 and up to 1, not {variance_kept}")
    pair = _Pair.of(x, y, permutations, seed)
    main_x, main_y = (_main_directions(rows, variance_kept) for rows in (pair.x, pair.y))
    return pair.similarity(lambda order: float(np.mean(_canonical(pair, main_x, main_y, order)[1])))


def pwcca(x: Features, y: Features, permutations: int = 10, seed: int = 0) -> Similarity:
    """Computes projection weighted CCA: directions count by how much of ``x`` they account for.

    Morcos et al., "Insights on representational similarity in neural networks with canonical correlation",
    NeurIPS 2018, section 2: the weight of a canonical direction ``h_i`` of ``x`` is ``sum_j |<h_i, x_j>|``
    over the columns ``x_j``. Unchanged by every invertible linear map of ``y``; of ``x`` only by uniform
    scaling, signs and order of its columns. So ``pwcca(x, y)`` is not ``pwcca(y, x)``. If some but not all
    correlations are equal, the directions, hence the value, are not unique. Arguments and errors are as for
    :func:`svcca`.
    """
    pair = _Pair.of(x, y, permutations, seed)
    main_x, main_y = (_main_directions(rows, 1.0) for rows in (pair.x, pair.y))

    def weighted(order: _Order | None) -> float:
        left, correlations = _canonical(pair, main_x, main_y, order)
        # With X = U s E' and h = U left, the products <h_i, x_j> are E s left: no rows needed.
        weights = np.abs((main_x.vectors * main_x.values) @ left).sum(0)
        return float(weights @ correlations / weights.sum())

    return pair.similarity(weighted)


def linear_cka(
    x: Features, y: Features, unbiased: bool = True, permutations: int = 10, seed: int = 0
) -> Similarity:
    """Computes centred kernel alignment with the linear kernel.

    Kornblith et al., "Similarity of neural network representations revisited", ICML 2019, section 3: the
    normalised Hilbert-Schmidt independence criterion. Unchanged by rotation and uniform scaling of either
    array; not by other linear maps. ``unbiased`` takes each of its three terms from the estimator of Song et
    al., "Feature selection via dependence maximization", JMLR 2012, theorem 2, as Nguyen et al., "Do wide and
    deep networks learn the same things?", ICLR 2021, do: its noise floor is 0, and single values may lie
    slightly below; that of the biased estimator grows with ``D / n``. Both come from ``X'Y`` and the lengths
    of the rows; no ``[n, n]`` matrix is made. Other arguments and errors are as for :func:`svcca`.
    """
    pair = _Pair.of(x, y, permutations, seed)
    rows_x, rows_y = pair.x.squared_lengths, pair.y.squared_lengths

    def criterion(a: _Centred, b: _Centred, rows_a: _Matrix, rows_b: _Matrix, order: _Order | None) -> float:
        total = float(np.square(a.products(b, order)).sum())
        if not unbiased:
            return total  # with centred rows, a linear kernel is centred too
        rows_b = rows_b if order is None else rows_b[order]
        # Each row of a centred kernel sums to zero: without the diagonal, to minus its diagonal entry.
        return _unbiased_hsic(total - float(rows_a @ rows_b), -rows_a, -rows_b)

    norm = _root(
        criterion(pair.x, pair.x, rows_x, rows_x, None) * criterion(pair.y, pair.y, rows_y, rows_y, None)
    )
    return pair.similarity(lambda order: criterion(pair.x, pair.y, rows_x, rows_y, order) / norm)


def rbf_cka(
    x: Features,
    y: Features,
    bandwidth: float = 0.8,
    unbiased: bool = True,
    permutations: int = 10,
    seed: int = 0,
) -> Similarity:
    """Computes centred kernel alignment with Gaussian kernels, which see relations that are not linear.

    Sources as for :func:`linear_cka`; the kernel is ``exp(-|a - b|^2 / (2 s^2))``, with ``s`` for each array
    ``bandwidth`` times its median distance between rows (the paper finds 0.2 to 0.8 much alike). Unchanged by
    rotation and uniform scaling. The kernel matrices are made block by block: memory does not grow with
    ``n^2``, time does, and beyond 4,096 rows again for each permutation. Their entries have the precision of
    the arrays, at least single: products of rows are nearly all of the time, and in double precision take
    twice as long. The median is that of 2,048 rows drawn by ``seed`` if there are more; if it is zero, more
    than half of the tiles being alike, the value is nan. Other arguments and errors are as for
    :func:`linear_cka`.
    """
    if not bandwidth > 0:
        raise UsageError(f"bandwidth must be above 0 median distances, not {bandwidth}")
    pair = _Pair.of(x, y, permutations, seed)
    n = pair.n
    some = np.sort(np.random.default_rng(seed).permutation(n)[:BLOCK_ROWS])
    kernel_x, kernel_y = (_Gaussian.of(rows, bandwidth, some) for rows in (pair.x, pair.y))
    if kernel_x is None or kernel_y is None:
        return pair.similarity(lambda order: float("nan"))
    orders = [None, *pair.orders]
    totals, own_x, own_y = np.zeros(len(orders)), 0.0, 0.0
    sums_x, sums_y = np.zeros(n), np.zeros(n)
    for rows in _blocks(n):
        for columns in _blocks(n, rows.start):  # both matrices are symmetric
            times = 1 if rows == columns else 2
            block_x, block_y = kernel_x(rows, columns), kernel_y(rows, columns)
            own_x += times * _total(block_x, block_x)
            own_y += times * _total(block_y, block_y)
            for block, sums in ((block_x, sums_x), (block_y, sums_y)):
                sums[rows] += block.sum(1)
                if times == 2:
                    sums[columns] += block.sum(0)
            for number, order in enumerate(orders):
                shuffled = block_y if order is None else kernel_y(rows, columns, order)
                totals[number] += times * _total(block_x, shuffled)

    def criterion(total: float, sums_a: _Matrix, sums_b: _Matrix) -> float:
        if unbiased:
            return _unbiased_hsic(total, sums_a, sums_b)
        return _biased_hsic(total + n, sums_a + 1, sums_b + 1)  # the diagonal, all ones, was left out

    norm = _root(criterion(own_x, sums_x, sums_x) * criterion(own_y, sums_y, sums_y))
    values = [
        criterion(total, sums_x, sums_y if order is None else sums_y[order]) / norm
        for total, order in zip(totals, orders, strict=True)
    ]
    return _similarity(values)


def _total(a: _Block, b: _Block) -> float:
    """Sums the products of their entries; each row in the blocks' precision, the rows in float64."""
    return float(np.vecdot(a, b).sum(dtype=np.float64))


def _unbiased_hsic(total: float, sums_a: _Matrix, sums_b: _Matrix) -> float:
    """Computes theorem 2 of Song et al. 2012, times ``n (n - 3)``, which cancels in every ratio.

    From ``tr(AB)`` of two kernels with zero diagonals, and the sums of their rows.
    """
    n = len(sums_a)
    return float(total + sums_a.sum() * sums_b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums_a @ sums_b))


def _biased_hsic(total: float, sums_a: _Matrix, sums_b: _Matrix) -> float:
    """Computes ``tr(AHBH)`` with the centring matrix ``H``, from ``tr(AB)`` and the row sums."""
    n = len(sums_a)
    return float(total - 2 / n * (sums_a @ sums_b) + sums_a.sum() * sums_b.sum() / n**2)


def _root(product: float) -> float:
    """Returns the square root; nan if an array does not vary, so that the ratio is nan as well."""
    return float(np.sqrt(product)) if product > 0 else float("nan")


def _similarity(values: list[float]) -> Similarity:
    """Takes the first as the value, the others as those of the permutations."""
    floor = values[1:]
    return Similarity(values[0], float(np.mean(floor)), float(np.max(floor)), len(floor))


def _blocks(n: int, start: int = 0) -> Iterator[slice]:
    return (slice(first, min(first + BLOCK_ROWS, n)) for first in range(start, n, BLOCK_ROWS))


@dataclass(frozen=True, eq=False)
class _Centred:
    """An array, and the mean of its rows, to be subtracted on reading."""

    array: Features
    mean: _Matrix
    squared_lengths: _Matrix

    @classmethod
    def of(cls, array: Features, name: str) -> _Centred:
        # Relative to the first row, so that a constant column has no variance by rounding.
        first = array[0].astype(np.float64)
        total = np.zeros(array.shape[1])
        for rows in _blocks(len(array)):
            total += (array[rows].astype(np.float64) - first).sum(0)
        mean = first + total / len(array)
        if not np.isfinite(mean).all():
            raise UsageError(f"{name} holds numbers that are not finite; a network that diverged gives such")
        centred = cls(array, mean, np.empty(len(array)))
        for rows in _blocks(len(array)):
            centred.squared_lengths[rows] = np.square(centred.read(rows)).sum(1)
        return centred

    def read(self, rows: slice | _Order) -> _Matrix:
        return np.asarray(self.array[rows].astype(np.float64) - self.mean)

    def triangle(self) -> _Matrix:
        """Computes R ``[min(n, D), D]`` of ``X = QR``: each block of rows below the R of those before."""
        triangle = np.empty((0, self.array.shape[1]))
        for rows in _blocks(len(self.array)):
            triangle = np.asarray(np.linalg.qr(np.vstack([triangle, self.read(rows)]), mode="r"))
        return triangle

    def products(self, other: _Centred, order: _Order | None = None) -> _Matrix:
        """Computes ``X'Y`` ``[D, D']``, the rows of ``Y`` in that order."""
        total = np.zeros((self.array.shape[1], other.array.shape[1]))
        for rows in _blocks(len(self.array)):
            total += self.read(rows).T @ other.read(rows if order is None else order[rows])
        return total


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two arrays of the same tiles, and the orders for shuffling the second."""

    x: _Centred
    y: _Centred
    orders: list[_Order]

    @classmethod
    def of(cls, x: Features, y: Features, permutations: int, seed: int) -> _Pair:
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 4 or not x.shape[1] or not y.shape[1]:
            raise UsageError(
                f"expected two arrays [n, D] of the same tiles, at least 4, "
                f"found the shapes {x.shape} and {y.shape}"
            )
        if permutations < 1:
            raise UsageError(f"permutations must be at least 1, not {permutations}")
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(len(x)) for _ in range(permutations)]
        return cls(_Centred.of(x, "the first array"), _Centred.of(y, "the second array"), orders)

    @property
    def n(self) -> int:
        return len(self.x.array)

    def similarity(self, measure: Callable[[_Order | None], float]) -> Similarity:
        return _similarity([measure(order) for order in (None, *self.orders)])


class _Directions(NamedTuple):
    """Right singular vectors ``[D, k]`` of centred rows and their singular values ``[k]``, greatest first."""

    vectors: _Matrix
    values: _Matrix


def _main_directions(rows: _Centred, variance_kept: float) -> _Directions:
    _, values, axes = np.linalg.svd(rows.triangle(), full_matrices=False)
    real = values > values[0] * max(rows.array.shape) * np.finfo(np.float64).eps
    shares = np.cumsum(values**2 * real)
    # The last direction is the one to reach the share.
    needed = np.concatenate(([True], shares[:-1] < variance_kept * shares[-1])) if variance_kept < 1 else real
    return _Directions(axes[real & needed].T, values[real & needed])


def _canonical(
    pair: _Pair, main_x: _Directions, main_y: _Directions, order: _Order | None
) -> tuple[_Matrix, _Matrix]:
    """Returns canonical directions of ``x`` among its main ones ``[k, m]``, and correlations ``[m]``."""
    if not len(main_x.values) or not len(main_y.values):
        return np.full((len(main_x.values), 1), np.nan), np.array([np.nan])
    white_x, white_y = (main.vectors / main.values for main in (main_x, main_y))
    # Rows are whitened before they are multiplied: X'Y has already lost the directions of small variance.
    total = np.zeros((len(main_x.values), len(main_y.values)))
    for rows in _blocks(pair.n):
        right = pair.y.read(rows if order is None else order[rows]) @ white_y
        total += (pair.x.read(rows) @ white_x).T @ right
    left, correlations, _ = np.linalg.svd(total, full_matrices=False)
    return left, np.minimum(correlations, 1.0)  # above 1 by rounding


@dataclass(frozen=True, eq=False)
class _Gaussian:
    """Blocks of a Gaussian kernel matrix, with zeros on the diagonal."""

    rows: _Centred
    precision: float  # 1 / (2 s^2)
    whole: _Block | None

    @classmethod
    def of(cls, rows: _Centred, bandwidth: float, some: _Order) -> _Gaussian | None:
        """Takes ``s`` from the distances between some rows; None if their median is zero."""
        squares = cls(rows, 1.0, None)._squared_distances(some, some)
        median = float(np.median(np.sqrt(squares[np.triu_indices(len(some), 1)])))
        if not median > 0:
            return None
        kernel = cls(rows, 1 / (2 * (bandwidth * median) ** 2), None)
        n = len(rows.array)
        if n > _ROWS_KEPT:
            return kernel
        everything = np.arange(n)
        return cls(rows, kernel.precision, kernel._block(everything, everything))

    def __call__(self, rows: slice, columns: slice, order: _Order | None = None) -> _Block:
        everything = np.arange(len(self.rows.array)) if order is None else order
        if self.whole is None:
            return self._block(everything[rows], everything[columns])
        if order is None:
            return self.whole[rows, columns]
        return self.whole[np.ix_(order[rows], order[columns])]

    def _block(self, rows: _Order, columns: _Order) -> _Block:
        block = self._squared_distances(rows, columns)
        block *= -self.precision
        np.exp(block, out=block)
        block[rows[:, None] == columns] = 0.0
        return block

    def _squared_distances(self, rows: _Order, columns: _Order) -> _Block:
        """Computes squared distances ``[len(rows), len(columns)]``, never below 0."""
        lengths = self.rows.squared_lengths
        dtype = np.result_type(self.rows.array.dtype, np.float32)
        # The mean goes in double precision: far from the origin a row's last digits are its differences.
        left, right = (self.rows.read(some).astype(dtype, copy=False) for some in (rows, columns))
        block: _Block = left @ right.T
        block *= -2.0
        block += lengths[rows, None].astype(dtype)
        block += lengths[columns].astype(dtype)
        return np.maximum(block, 0.0, out=block)
