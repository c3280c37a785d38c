"""Predictions of slides, as a table on disk."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from slidetl.errors import UsageError
from slidetl.files import write_csv


@dataclass(frozen=True)
class SlidePrediction:
    """The prediction for one slide.

    Attributes:
        slide_id, patient_id: from the manifest.
        grade: the true one, 0..K-1, or None.
        probabilities: of the grades 0..K-1; they sum to one.
        tiles: how many tiles the slide has.
        site: from the manifest, empty where not given.
        fold: which fold of a cross-validation predicted it, empty outside of one.
        checkpoint: SHA-256 of the network's weights, hexadecimal; empty where there are none.
    """

    slide_id: str
    patient_id: str
    grade: int | None
    probabilities: tuple[float, ...]
    tiles: int
    site: str = ""
    fold: str = ""
    checkpoint: str = ""

    @property
    def predicted_grade(self) -> int:
        """The most probable grade, the lower one in a tie."""
        return self.probabilities.index(max(self.probabilities))

    @property
    def expected_grade(self) -> float:
        """The mean of the grades, weighted by their probabilities."""
        return sum(grade * probability for grade, probability in enumerate(self.probabilities))


def write_predictions(path: Path, predictions: Iterable[SlidePrediction]) -> None:
    """Writes one row per slide, in the order of the identifiers; probabilities read back exactly."""
    predictions = sorted(predictions, key=lambda prediction: prediction.slide_id)
    n_grades = len(predictions[0].probabilities) if predictions else 0
    columns = ["slide_id", "patient_id", "site", "grade", "predicted_grade"]
    columns += [*_probabilities((0.0,) * n_grades), "expected_grade", "tiles", "fold", "checkpoint"]
    write_csv(
        path,
        columns,
        (
            {name: getattr(row, name) for name in columns if hasattr(row, name)}
            | _probabilities(row.probabilities)
            | {"expected_grade": f"{row.expected_grade:.5f}"}
            for row in predictions
        ),
    )


def _probabilities(values: tuple[float, ...]) -> dict[str, float]:
    return {f"probability_{grade}": value for grade, value in enumerate(values)}


def read_predictions(path: Path) -> list[SlidePrediction]:
    """Reads what :func:`write_predictions` wrote.

    Raises:
        UsageError: not such a table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                SlidePrediction(
                    slide_id=row["slide_id"],
                    patient_id=row["patient_id"],
                    grade=int(row["grade"]) if row["grade"] else None,
                    probabilities=tuple(float(row[key]) for key in row if key.startswith("probability_")),
                    tiles=int(row["tiles"]),
                    # The first tables had no such columns.
                    site=row.get("site", ""),
                    fold=row.get("fold", ""),
                    checkpoint=row.get("checkpoint", ""),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UsageError(f"{path}: expected predictions as 'slidetl test' writes them: {error!r}") from error
