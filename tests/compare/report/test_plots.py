"""Drawings: that every arm is told from the others, that names are taken as they are, and what is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slidetl.compare.report.plots import (
    ForestRow,
    draw_confusions,
    draw_forest,
    looks_of,
    percent,
    risk_at,
    spoken,
)
from slidetl.evaluation.bootstrap import Interval
from slidetl.evaluation.conformal import RiskCoverage


def test_no_two_serious_arms_look_alike() -> None:
    names = [f"arm-{number}" for number in range(20)]
    looks = looks_of(names)
    assert list(looks) == names
    assert len({(look.colour, look.line) for look in looks.values()}) == 20
    assert len({(look.colour, look.marker) for look in looks.values()}) == 20


def test_trivial_arms_are_grey_and_take_no_colour_from_the_others() -> None:
    looks = looks_of(["prior", "scratch", "site"], ["prior", "site"])
    assert looks["scratch"] == looks_of(["scratch"])["scratch"]
    assert looks["prior"].colour == looks["site"].colour != looks["scratch"].colour
    assert looks["prior"].marker != looks["site"].marker


@pytest.mark.parametrize(
    ("interval", "signed", "said"),
    [
        (Interval(0.125, -0.004, 0.996, 0.95), False, "0.12 [0.00, 1.00]"),
        (Interval(-0.126, -0.5, 0.004, 0.95), True, "−0.13 [−0.50, +0.00]"),
    ],
)
def test_intervals_are_said_with_two_digits_and_no_negative_zero(
    interval: Interval, signed: bool, said: str
) -> None:
    assert spoken(interval, signed) == said


def test_a_percentage_keeps_its_sign_beside_it() -> None:
    assert percent(0.95) == "95\N{NO-BREAK SPACE}%"


def test_the_risk_is_that_of_the_least_coverage_which_suffices() -> None:
    curve = RiskCoverage((0.9, 0.8, 0.7), (0.2, 0.5, 1.0), (0.0, 0.1, 0.3), (0.5, 0.6, 0.7), 0.1, 0.95)
    assert [risk_at(curve, coverage) for coverage in (0.1, 0.5, 0.51, 1.0)] == [0.0, 0.1, 0.3, 0.3]


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """A dollar begins no formula, and a letter that the font lacks ends nothing."""
    counts = {"$x_1$ \u8085": np.eye(2, dtype=np.int64)}
    drawing = draw_confusions(tmp_path, counts, ["$\\frac", "一"], 1)
    assert "$x_1$ \u8085: 1 0, 0 1" in drawing.alt
    assert drawing.path.stat().st_size > 1000


def test_equal_results_give_equal_files(tmp_path: Path) -> None:
    rows = [ForestRow("one", Interval(0.5, 0.4, 0.6, 0.95), (0.5,), None, False)]
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        drawing = draw_forest(folder, rows, "QWK", "one", None, False)
        files.append((drawing.path.read_bytes(), drawing.path.with_suffix(".png").read_bytes()))
    assert files[0] == files[1]
