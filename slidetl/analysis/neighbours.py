"""Finds the nearest of many embeddings by their cosine, block by block, exactly.

A search reads every row once, so memory holds one block and one number for each row: arrays may be mapped
into memory (``numpy.memmap``), or come one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError

_ROWS = 8192  # of a block: 40 MB of 1,280 float32

Rows = NDArray[np.floating[Any]]


def concept(examples: Rows, minus: Rows | None = None) -> NDArray[np.float32]:
    """Averages the directions of examples ``[n, D]``, less the average direction of ``minus`` ``[m, D]``.

    Returns:
        A direction of length 1, ``[D] float32``.

    Raises:
        UsageError: no example, numbers that are not finite, or nothing is left of the difference.
    """
    if not len(examples):
        raise UsageError("expected at least one example to search by")
    mean = _unit(examples).mean(0)
    if minus is not None and len(minus):
        mean = mean - _unit(minus).mean(0)
    length = np.linalg.norm(mean)
    if length < 1e-3:
        raise UsageError("the examples and those to subtract cancel each other; choose others")
    return np.asarray(mean / length, np.float32)


def cosines(queries: Rows, blocks: Iterable[Rows]) -> NDArray[np.float32]:
    """Computes the cosine between queries ``[Q, D]`` and all rows of some arrays ``[n, D]``.

    Returns:
        ``[Q, N] float32``; 0 for a row of zeros, which has no direction.

    Raises:
        UsageError: numbers that are not finite, or another number of columns.
    """
    directions = _unit(queries)
    found = [directions @ rows.T for rows in in_blocks(blocks, directions.shape[1])]
    return np.concatenate(found, axis=1) if found else np.zeros((len(directions), 0), np.float32)


def in_blocks(blocks: Iterable[Rows], columns: int | None = None) -> Iterator[NDArray[np.float32]]:
    """Yields the rows of some arrays ``[n, D]``, scaled to length 1, at most 8,192 at once.

    Raises:
        UsageError: numbers that are not finite, or another number of columns than the first array or
            ``columns`` has.
    """
    for rows in blocks:
        columns = columns or rows.shape[-1]
        if rows.ndim != 2 or rows.shape[1] != columns:
            raise UsageError(f"expected rows of {columns} columns, found {rows.shape}")
        for start in range(0, len(rows), _ROWS):
            yield _unit(rows[start : start + _ROWS])


def best_of(
    similarity: NDArray[np.float32],
    group: NDArray[np.integer[Any]],
    is_allowed: NDArray[np.bool_],
    k: int,
    most_each: int | None = None,
) -> NDArray[np.int64]:
    """Finds the k rows of the highest similarity, at most ``most_each`` of a group.

    Args:
        similarity: ``[N]``.
        group: ``[N]``, the slide of each row.
        is_allowed: ``[N]``, False for rows to leave out.
        k: number of rows; fewer are found if fewer are allowed.
        most_each: None for no limit.

    Returns:
        Their numbers, the most similar first; equal ones in their own order.
    """
    rows = np.flatnonzero(is_allowed)
    rows = rows[np.argsort(-similarity[rows], kind="stable")]
    if most_each is not None:
        by_group = np.argsort(group[rows], kind="stable")
        ordered = group[rows][by_group]
        place = np.arange(len(rows)) - np.searchsorted(ordered, ordered)
        rows = rows[np.sort(by_group[place < most_each])]
    return np.asarray(rows[:k], np.int64)


def _unit(rows: Rows) -> NDArray[np.float32]:
    """Scales rows to length 1."""
    values = np.asarray(rows, np.float32)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise UsageError(f"row {int(np.flatnonzero(~np.isfinite(lengths))[0])} is not finite")
    return np.asarray(values / np.where(lengths > 0, lengths, 1))
