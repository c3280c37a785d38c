"""Folds of cases: groups stay whole, and each fold has about the same mix of classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def stratified_folds(
    classes: ArrayLike, groups: ArrayLike, n_folds: int, seed: int
) -> list[NDArray[np.intp]]:
    """Splits cases into folds of whole groups.

    The folds equal those of scikit-learn 1.8 and later (``StratifiedGroupKFold`` with ``shuffle=True``),
    whose import costs a training half a second of processor time. Groups in random order, those with the
    least even mix first, each go to the fold where they leave the classes spread most evenly over all folds.

    Args:
        classes: ``[N]``, e.g. grades.
        groups: ``[N]``, e.g. patients.
        n_folds: number of folds.
        seed: of the order of the groups, 0..2**32 - 1.

    Returns:
        The indices of each fold's cases, ascending. A fold may be empty if there are few groups.
    """
    kinds, of_case = np.unique(np.asarray(classes), return_inverse=True)
    names, groups_of_cases = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.zeros((len(names), len(kinds)))  # [G, K]
    np.add.at(counts, (groups_of_cases, of_case), 1)
    order = np.arange(len(names))
    np.random.RandomState(seed).shuffle(order)  # scikit-learn's generator
    order = order[np.argsort(-counts[order].std(axis=1), kind="stable")]
    total, filled = counts.sum(axis=0), np.zeros((n_folds, len(kinds)))  # [K], [F, K]
    fold_of = np.empty(len(names), np.intp)
    for group in order:
        fold_of[group] = fold = _evenest(filled, counts[group], total)
        filled[fold] += counts[group]
    return [np.flatnonzero(fold_of[groups_of_cases] == fold) for fold in range(n_folds)]


def _evenest(filled: NDArray[np.float64], added: NDArray[np.float64], total: NDArray[np.float64]) -> int:
    """Finds the fold for a group of ``[K]`` cases; of equally good ones the emptiest."""
    best, least, size = 0, np.inf, np.inf
    for fold in range(len(filled)):
        filled[fold] += added
        spread = np.std(filled / total, axis=0).mean()
        filled[fold] -= added
        held = filled[fold].sum()
        if spread < least or (np.isclose(spread, least) and held < size):
            best, least, size = fold, spread, held
    return best
