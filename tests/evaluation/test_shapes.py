from __future__ import annotations

import numpy as np
import pytest

from slidetl.errors import UsageError
from slidetl.evaluation.shapes import check_lengths, value_of_patient


def test_lengths_that_differ_are_named_with_their_shapes() -> None:
    check_lengths(grades=np.zeros(2), probabilities=np.zeros((2, 5)), patients=np.array(["a", "b"]))
    with pytest.raises(UsageError, match=r"grades and patients of one length above 0, not \(2,\), \(3,\)"):
        check_lengths(grades=np.zeros(2), patients=np.zeros(3))
    with pytest.raises(UsageError, match="above 0"):
        check_lengths(grades=np.zeros(0), patients=np.zeros(0))
    with pytest.raises(UsageError, match="of one length"):
        check_lengths(grades=np.array(1), patients=np.zeros(1))


def test_a_patient_has_one_value() -> None:
    names, member, of_patient = value_of_patient(["b", "a", "b"], [1, 0, 1], "is torn")
    assert (names.tolist(), member.tolist(), of_patient.tolist()) == (["a", "b"], [1, 0, 1], [0, 1])
    with pytest.raises(UsageError, match="patient b is torn"):
        value_of_patient(["b", "a", "b"], [1, 0, 0], "is torn")
    with pytest.raises(UsageError, match="patients and values of one length"):
        value_of_patient(["a", "b"], [1], "is torn")
