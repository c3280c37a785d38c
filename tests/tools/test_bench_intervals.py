from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from slidetl.evaluation.calibration import calibration_null

tool: Any = importlib.import_module("tools.bench_intervals")


@pytest.mark.parametrize("accuracy", [0.58, 0.8])
def test_an_arm_has_the_accuracy_that_was_asked_for(accuracy: float) -> None:
    one = tool.study(np.random.default_rng(0), 60_000, [tool.deviation_of(accuracy)])
    assert len(one.true) == 100_000
    assert (one.graded[0] == one.true).mean() == pytest.approx(accuracy, abs=0.006)


def test_errors_are_shared_as_the_page_says() -> None:
    one = tool.study(np.random.default_rng(0), 60_000, [1.0, 1.0])
    errors = one.scores - one.true
    assert np.corrcoef(errors)[0, 1] == pytest.approx(0.7, abs=0.01)
    first = np.flatnonzero(np.diff(one.patients) == 0)  # the first of two slides of a patient
    assert np.corrcoef(errors[0, first], errors[0, first + 1])[0, 1] == pytest.approx(0.3, abs=0.02)
    assert (one.true[first] == one.true[first + 1]).all()


def test_the_promising_arm_is_calibrated() -> None:
    deviation = tool.deviation_of(0.8)
    one = tool.study(np.random.default_rng(0), 60_000, [deviation])
    found = calibration_null(one.true, tool.probabilities_of(one.scores[0], deviation), n_draws=100)
    assert found.error < 0.01


@pytest.mark.slow
def test_the_page_has_its_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench_intervals.py", "--studies", "3", "--draws", "100"])
    monkeypatch.setattr(tool, "NEW_PATIENTS", 200)
    monkeypatch.setattr(tool, "TRAININGS", 5)
    tool.main()
    page = capsys.readouterr().out
    assert "`python tools/bench_intervals.py --studies 3 --draws 100`" in page
    rows = [line for line in page.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [
        *("20", "60"),
        *("2", "3", "4", "5", "10"),
        *("1", "2", "3", "5"),
        *["20"] * 3,
        *["60"] * 3,
        *("20", "60"),
        *("20", "20", "60", "60"),
        *("2", "3", "5"),
        *["0.56 and 0.56", "0.56 and 0.64"] * 6,
        *("20", "60"),
    ]


def test_a_ridge_on_what_it_is_told_grades_better_than_on_noise() -> None:
    cases = [tool.Case(f"{number:03}", f"{number:03}", number % 5) for number in range(60)]
    grades = {case.slide_id: case.grade for case in cases}
    folds = tool.plan_folds(cases, tool.Protocol(inner_folds=0), 5)
    told = np.c_[np.arange(60) % 5, np.ones(60)].astype(float)
    noise = np.random.default_rng(0).standard_normal((60, 8))
    assert tool.qwk_by_ridge(told, grades, folds) > 0.9
    assert abs(tool.qwk_by_ridge(noise, grades, folds)) < 0.4
    assert all(0 <= share <= 1 for share in tool.permuted_labels(1, 0))
