"""Compares the score of two groups of slides, as before and after a treatment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.compare.config import Comparison
from slidetl.data.manifest import ManifestRow
from slidetl.errors import UsageError
from slidetl.evaluation.comparison import Unit, per_patient
from slidetl.evaluation.repeatability import ScoreShift, compare_groups, compare_paired
from slidetl.text import distinct, listed, spelled_twice


def members_of(comparison: Comparison, rows: Sequence[ManifestRow]) -> NDArray[np.int64]:
    """Finds the group of each slide.

    Returns:
        ``[N]``: 0 for the first, 1 for the second, -1 for neither, and without configured groups.

    Raises:
        UsageError: no slide is in one of the groups, or one is left out by the spelling of its group.
    """
    groups = comparison.groups
    if groups is None:
        return np.full(len(rows), -1)
    values = [getattr(row, groups.column) for row in rows]
    for name in (groups.first, groups.second):
        if name not in values:
            found = listed(sorted(set(values)))
            raise UsageError(f"groups: no slide has {name!r} as its {groups.column}; there are {found}")
    for pair in spelled_twice([groups.first, groups.second, *values]):
        if pair[0] in (groups.first, groups.second) and pair[1] not in (groups.first, groups.second):
            named, other = distinct(*pair)
            raise UsageError(
                f"groups: {other}, the {groups.column} of some slides, may be {named}, spelled twice, and is "
                f"in neither group; give it one name in the manifest's {groups.column!r}"
            )
    return np.array([(value == groups.first) * 1 + (value == groups.second) * 2 - 1 for value in values])


def shift_between(
    scores: NDArray[np.float64], members: NDArray[np.int64], patients: NDArray[Any], unit: Unit
) -> ScoreShift | None:
    """Estimates the shift of the score from the first group to the second.

    If two patients or more have slides in both groups, each is compared with itself, and patients with
    slides in one group alone are left out; otherwise different patients are compared.

    Args:
        scores: ``[N]`` expected grades of slides.
        members: ``[N]`` of :func:`members_of`.
        patients: ``[N]``.
        unit: ``worst`` takes the worst slide of a patient in a group, any other the mean.

    Returns:
        None with fewer than two patients in a group.
    """
    in_first, in_second = (set(patients[members == number].tolist()) for number in (0, 1))
    both = in_first & in_second
    combination: Unit = "worst" if unit == "worst" else "mean"

    def of_group(number: int, kept: set[Any]) -> tuple[NDArray[np.float64], NDArray[Any]]:
        mine = (members == number) & np.isin(patients, sorted(kept))
        return per_patient(scores[mine], patients[mine], combination), np.unique(patients[mine])

    if len(both) >= 2:
        before, after = (of_group(number, both)[0] for number in (0, 1))
        return compare_paired(before, after, n_draws=2000)
    if min(len(in_first), len(in_second)) - len(both) < 2:
        return None
    (first, of_first), (second, of_second) = of_group(0, in_first - both), of_group(1, in_second - both)
    is_second = np.repeat([False, True], [len(first), len(second)])
    scores, patients = np.concatenate([first, second]), np.concatenate([of_first, of_second])
    return compare_groups(scores, is_second, patients, n_draws=2000)
