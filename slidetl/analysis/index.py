"""Builds, keeps and searches an index of many embeddings: approximate, with its recall measured.

An inverted file of faiss: rows lie in ``sqrt(N)`` cells, 8 bits a number, and a search reads the nearest
sixteenth of the cells, at least 16. A million rows of 1,280 take 1.3 GB. faiss is loaded where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.analysis.neighbours import Rows, best_of, cosines, in_blocks
from slidetl.errors import CacheCorruptError, OutputError, UsageError, needs_extra
from slidetl.files import check_writable, file_sha256, replaced_path, write_whole

_CHECKED = 64  # rows searched exactly too; their cosines with a million rows take 256 MB
_MOST = 100  # ranks of which the recall is measured
_PER_CELL = 64  # rows to find a cell's centre by
_SAMPLE = 4096  # rows that quantiles are told from
_FETCHED = (16, 256)  # rows fetched for each row wanted, until no group has too many


@dataclass(frozen=True, eq=False)
class Index:
    """An index of rows of length 1, searched by the inner product.

    Attributes:
        recalls: share of the exact k nearest that it found, over ``checked`` rows, for k from 1.
        checked: number of rows drawn at random for it.
    """

    faiss_index: Any
    recalls: tuple[float, ...]
    checked: int

    def best(
        self,
        direction: NDArray[np.float32],
        group: NDArray[np.integer[Any]],
        is_allowed: NDArray[np.bool_],
        k: int,
        most_each: int | None = None,
    ) -> NDArray[np.int64]:
        """Finds k rows near a direction ``[D]``, as :func:`slidetl.analysis.neighbours.best_of` does.

        Returns:
            Their numbers, the nearest first; fewer than k if the cells searched have no more.
        """
        rows = np.zeros(0, np.int64)
        probes = max(16, self.faiss_index.nlist // 16)
        for factor in _FETCHED:
            fetched = min(k * factor, int(is_allowed.sum()))
            found, similarity = self._search(direction, is_allowed, fetched, probes)
            rows = found[best_of(similarity, group[found], np.ones(len(found), bool), k, most_each)]
            if len(rows) == k or len(found) < fetched:
                break
        return rows

    def sample(
        self, direction: NDArray[np.float32], is_allowed: NDArray[np.bool_], seed: int
    ) -> NDArray[np.float32]:
        """Computes the cosine with at most 4,096 allowed rows drawn at random, as 8 bits tell it."""
        rows = np.flatnonzero(is_allowed)
        drawn = np.zeros_like(is_allowed)
        drawn[np.random.default_rng(seed).permutation(rows)[:_SAMPLE]] = True
        return self._search(direction, drawn, int(drawn.sum()), self.faiss_index.nlist)[1]

    def _search(
        self, direction: NDArray[np.float32], is_allowed: NDArray[np.bool_], k: int, probes: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        faiss = _faiss()
        selector = faiss.IDSelectorBitmap(np.packbits(is_allowed, bitorder="little"))
        options = faiss.SearchParametersIVF(nprobe=probes, sel=selector)
        similarity, rows = self.faiss_index.search(direction[None], max(k, 1), params=options)
        is_found = rows[0] >= 0
        return rows[0][is_found], similarity[0][is_found]


def open_index(
    path: Path,
    identity: str,
    blocks: Iterable[Rows],
    group: NDArray[np.integer[Any]],
    owner: NDArray[np.integer[Any]],
    most_each: int,
    say: Callable[[str], None],
) -> Index:
    """Reads an index of some rows, or builds and keeps it if there is none or the rows are others.

    Args:
        path: file of the index; ``PATH.slidetl.json`` beside it has its SHA-256, ``identity`` and recall.
        identity: hash of the rows.
        blocks: the rows, arrays ``[n, D]``; can be run through several times.
        group: ``[N]``, the slide of each row.
        owner: ``[N]``, the patient of each row. The recall is measured on rows of other owners, at most
            ``most_each`` of a group.
        most_each: see ``owner``.
        say: told before the index is built.

    Raises:
        UsageError: faiss is not installed, or all rows are of one owner.
        CacheCorruptError: the file is damaged, or not written by this function; it is not read.
        OutputError: it cannot be written.
    """
    faiss = _faiss()
    about = path.with_name(f"{path.name}.slidetl.json")
    if path.exists():
        remedy = f"remove it and {about.name} to build it again, or name another file"
        try:
            record = json.loads(about.read_bytes())
            recalls, checked = tuple(map(float, record["recalls"])), int(record["checked"])
            is_known = record["sha256"] == file_sha256(path) and checked > 0 and len(recalls) > 0
            if not is_known or not all(0 <= recall <= 1 for recall in recalls):
                raise ValueError(f"it is not the file that {about.name} is about")
            if record["identity"] == identity:
                return Index(faiss.read_index(str(path)), recalls, checked)
        except (OSError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise CacheCorruptError(f"{path}: not a whole index of slidetl ({error}); {remedy}") from error
        say(f"{path} is an index of other slides or features")
    check_writable(path)
    say(f"building the index {path} of {len(group)} tiles: three passes over their features")
    index = build_index(blocks, group, owner, most_each)
    with replaced_path(path) as partial:
        try:
            faiss.write_index(index.faiss_index, str(partial))
        except RuntimeError as error:
            raise OutputError(f"{path}: the index cannot be written: {error}") from error
        record = {
            "identity": identity,
            "sha256": file_sha256(partial),
            "recalls": index.recalls,
            "checked": index.checked,
        }
        write_whole(about, json.dumps(record))
    return index


def build_index(
    blocks: Iterable[Rows], group: NDArray[np.integer[Any]], owner: NDArray[np.integer[Any]], most_each: int
) -> Index:
    """Builds an index in memory, and measures its recall; see :func:`open_index`.

    Raises:
        UsageError: faiss is not installed, all rows are of one owner, or some are not finite.
    """
    faiss = _faiss()
    if (owner == owner[0]).all():
        raise UsageError("an index needs tiles of at least two patients, to measure its recall on others")
    rng = np.random.default_rng(0)
    n = len(group)
    cells = max(1, int(n**0.5))
    drawn = np.zeros(n, bool)
    drawn[rng.choice(n, min(n, _PER_CELL * cells), replace=False)] = True
    checked = np.sort(rng.choice(n, min(n, _CHECKED), replace=False))
    training, directions, start = [], [], 0
    for rows in in_blocks(blocks):
        training.append(rows[drawn[start : start + len(rows)]])
        directions.append(rows[checked[(checked >= start) & (checked < start + len(rows))] - start])
        start += len(rows)
    if start != n:
        raise UsageError(f"expected {n} rows to index, found {start}")
    sample, queries = np.concatenate(training), np.concatenate(directions)
    del training
    index = faiss.index_factory(sample.shape[1], f"IVF{cells},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # few rows are no reason to warn: the recall is measured
    index.train(sample)
    del sample
    for rows in in_blocks(blocks):
        index.add(rows)
    built = Index(index, (), len(checked))
    right, possible = np.zeros(_MOST), np.zeros(_MOST)
    for row, query, similarity in zip(checked, queries, cosines(queries, blocks), strict=True):
        is_allowed = owner != owner[row]
        exact = best_of(similarity, group, is_allowed, _MOST, most_each)
        found = built.best(query, group, is_allowed, _MOST, most_each)
        for k in range(_MOST):
            right[k] += np.isin(found[: k + 1], exact[: k + 1]).sum()
            possible[k] += len(exact[: k + 1])
    return Index(index, tuple((right / possible).tolist()), len(checked))


def _faiss() -> Any:
    with needs_extra("an index needs faiss", "atlas"):
        import faiss
    return faiss
