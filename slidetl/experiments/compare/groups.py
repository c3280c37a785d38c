"""Two groups of slides, as before and after a treatment: how far the score tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.data.manifest import ManifestRow
from slidetl.errors import UsageError
from slidetl.evaluation.repeatability import ScoreShift, compare_groups, compare_paired
from slidetl.experiments.compare.config import Comparison


@dataclass(frozen=True)
class GroupShift:
    """How far the scores of the second group lie from those of the first.

    Attributes:
        paired: whether the same patients are in both groups; those in one alone are then left out.
        shift: over patients, in grades.
    """

    paired: bool
    shift: ScoreShift


def members_of(comparison: Comparison, rows: Sequence[ManifestRow]) -> NDArray[np.int64]:
    """Which group each slide is in.

    Returns:
        ``[N]``: 0 for the first, 1 for the second, -1 for neither, and where no groups were configured.

    Raises:
        UsageError: no slide is in one of the groups.
    """
    groups = comparison.groups
    if groups is None:
        return np.full(len(rows), -1)
    values = [getattr(row, groups.column) for row in rows]
    for name in (groups.first, groups.second):
        if name not in values:
            found = ", ".join(sorted(set(values))[:10])
            raise UsageError(f"groups: no slide has {name!r} as its {groups.column}; there are {found}")
    return np.array([(value == groups.first) * 1 + (value == groups.second) * 2 - 1 for value in values])


def shift_between(
    scores: NDArray[np.float64], members: NDArray[np.int64], patients: NDArray[Any]
) -> GroupShift | None:
    """The shift of the score from the first group to the second.

    Where two patients or more have slides in both groups, each is compared with itself, and those with
    slides in one group alone are left out; otherwise different patients are compared.

    Args:
        scores: ``[N]`` expected grades of slides.
        members: ``[N]`` of :func:`members_of`.
        patients: ``[N]``.

    Returns:
        None where there are fewer than two patients in a group.
    """
    in_first, in_second = (set(patients[members == number].tolist()) for number in (0, 1))
    both = sorted(in_first & in_second)
    if len(both) >= 2:
        before, after = (
            [scores[(members == number) & (patients == patient)].mean() for patient in both]
            for number in (0, 1)
        )
        return GroupShift(True, compare_paired(before, after))
    kept = (members >= 0) & ~np.isin(patients, both)
    if min(len(in_first), len(in_second)) - len(both) < 2:
        return None
    return GroupShift(False, compare_groups(scores[kept], members[kept] == 1, patients[kept]))
