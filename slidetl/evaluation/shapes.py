"""Checks that arrays describe the same results and the same patients."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError


def check_lengths(**arrays: NDArray[Any]) -> None:
    """Checks that arrays ``[N, ...]``, named by their content, have one length above 0.

    Raises:
        UsageError: they have not, or one has no dimension.
    """
    if len({array.shape[:1] for array in arrays.values()}) > 1 or not all(a.size for a in arrays.values()):
        *names, last = arrays
        shapes = ", ".join(f"{array.shape}" for array in arrays.values())
        raise UsageError(f"expected {', '.join(names)} and {last} of one length above 0, not {shapes}")


def value_of_patient(
    patients: ArrayLike, values: ArrayLike, problem: str
) -> tuple[NDArray[Any], NDArray[np.intp], NDArray[Any]]:
    """Reduces values ``[N]``, equal for all results of a patient, to one for each patient.

    Args:
        patients: ``[N]``.
        values: ``[N]``.
        problem: end of the message about a patient with two values, with the remedy.

    Returns:
        Patients ``[P]``, sorted; the patient of each result ``[N]``, 0..P-1; and values ``[P]``.

    Raises:
        UsageError: lengths that differ, or a patient with two values.
    """
    who, of_result = np.asarray(patients), np.asarray(values)
    check_lengths(patients=who, values=of_result)
    names, first, member = np.unique(who, return_index=True, return_inverse=True)
    of_patient = of_result[first]
    torn = of_patient[member] != of_result
    if torn.any():
        raise UsageError(f"patient {who[torn][0]} {problem}")
    return names, member, of_patient
