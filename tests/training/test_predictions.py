from __future__ import annotations

from pathlib import Path

import pytest

from slidetl.errors import UsageError
from slidetl.training.predictions import SlidePrediction, read_predictions, write_predictions


def test_round_trip_in_the_order_of_identifiers(tmp_path: Path) -> None:
    rows = [
        SlidePrediction("b", "P2", 3, (0.1, 0.2, 0.3, 0.15, 0.25), 12, "north", "3", "0f" * 32),
        SlidePrediction("a", "P1", None, (0.25, 0.25, 0.2, 0.2, 0.1), 1),
        SlidePrediction("0", "P0", 2, (), 4, fingerprint="aa", reason="not finite"),
    ]
    write_predictions(tmp_path / "new" / "p.csv", rows)
    assert read_predictions(tmp_path / "new" / "p.csv") == rows[::-1]
    header, lost, first, _ = (tmp_path / "new" / "p.csv").read_text().splitlines()
    assert header.startswith("slide_id,patient_id,site,grade,predicted_grade,probability_0,")
    assert header.endswith(",expected_grade,tiles,fold,checkpoint,fingerprint,reason")
    assert first.startswith("a,P1,,,0,")
    assert lost == "0,P0,,2,,,,,,,,4,,,aa,not finite"
    with pytest.raises(UsageError, match="expected finite probabilities"):
        SlidePrediction("a", "P1", None, (float("nan"), 1.0), 1)


def test_a_table_without_site_and_fold_is_read(tmp_path: Path) -> None:
    table = "slide_id,patient_id,grade,predicted_grade,probability_0,probability_1,expected_grade,tiles\n"
    (tmp_path / "p.csv").write_text(table + "a,P1,1,0,0.75,0.25,0.25,7\n")
    assert read_predictions(tmp_path / "p.csv") == [SlidePrediction("a", "P1", 1, (0.75, 0.25), 7)]


def test_grade_and_expectation() -> None:
    row = SlidePrediction("a", "P", 0, (0.4, 0.4, 0.2), 1)
    assert row.predicted_grade == 0
    assert row.expected_grade == pytest.approx(0.8)


def test_a_patient_or_a_site_is_no_formula(tmp_path: Path) -> None:
    for patient, site in (('=HYPERLINK("x")', "s"), ("p", '=HYPERLINK("x")')):
        rows = [SlidePrediction("a", patient, 0, (1.0,), 1, site)]
        write_predictions(tmp_path / "p.csv", rows)
        assert "\"'=HYPERLINK" in (tmp_path / "p.csv").read_text()
        assert read_predictions(tmp_path / "p.csv") == rows


def test_something_else_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("slide,grade\na,1\n")
    with pytest.raises(UsageError, match="expected predictions as 'slidetl test' writes them"):
        read_predictions(tmp_path / "p.csv")
