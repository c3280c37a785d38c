"""Values as text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slidetl.compare.table import Table, format_cell, format_p, format_percent, format_range
from slidetl.evaluation.bootstrap import Interval


@pytest.mark.parametrize(
    ("cell", "form", "text"),
    [
        (Interval(0.125, -0.004, 0.996, 0.95), ".2f", "0.12 [0.00, 1.00]"),
        (Interval(-0.126, -0.5, 0.014, 0.95), "+.2f", "−0.13 [−0.50, +0.01]"),
        (Interval(-0.004, -0.008, -0.0004, 0.95), "+.2f", "−0.0040 [−0.0080, −0.0004]"),
        (Interval(0.01, -1e-17, 0.02, 0.95), "+.2f", "+0.01 [+0.00, +0.02]"),
        (Interval(0.0, 0.0, 0.0, 0.95), ".2f", "0.00 (no interval)"),
        (-0.0004, "+.2f", "−0.0004"),
        (-0.0004, ".2f", "0.00"),
        (-1e-9, "+.2f", "+0.000000"),
        (-0.25, ".1f", "−0.2"),
        (np.int64(3), ".2f", "3"),
        (None, ".2f", "–"),
        ("declared", "p", "declared"),
        (0.0005, "p", "0.001"),
        (0.0004, "p", "< 0.001"),
    ],
)
def test_each_kind_of_value_has_its_form(cell: Any, form: str, text: str) -> None:
    assert format_cell(cell, form) == text


def test_values_within_a_sentence() -> None:
    assert format_percent(0.95) == "95\N{NO-BREAK SPACE}%"
    assert (format_p(0.023), format_p(0.0001)) == ("p = 0.023", "p < 0.001")
    assert (format_range([3, 1, 2]), format_range([2, 2]), format_range([1.0], ".2f")) == (
        *("1 to 3", "2", "1.00 to 1.00"),
    )


def test_a_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match=r"expected 2 cells for \('a', 'b'\), found \('1',\)"):
        Table(("a", ("b", "p")), [("1",)])


def test_a_table_is_spoken_with_rows_of_one_name_together() -> None:
    table = Table(("Arm", "n", "share"), [("one", 1, 0.5), ("one", 2, None), ("two", 3, 0.25)])
    assert table.as_line == "Arm: n, share. one: 1, 0.50 | 2, –; two: 3, 0.25."
