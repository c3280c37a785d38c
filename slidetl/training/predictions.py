"""Tables of predictions of slides."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidetl.errors import UsageError
from slidetl.files import write_csv


@dataclass(frozen=True)
class SlidePrediction:
    """The prediction for one slide.

    Attributes:
        slide_id, patient_id: from the manifest.
        grade: the true grade, 0..K-1, or None.
        probabilities: of the grades 0..K-1, with sum 1; empty for a slide not graded.
        tiles: number of tiles.
        site: from the manifest, or empty.
        fold: fold of the cross-validation, or empty.
        checkpoint: SHA-256 of the network's weights, hexadecimal; empty if there are none.
        fingerprint: SHA-256 of the slide's content; empty if unknown.
        reason: why the slide is not graded; empty if it is.
    """

    slide_id: str
    patient_id: str
    grade: int | None
    probabilities: tuple[float, ...]
    tiles: int
    site: str = ""
    fold: str = ""
    checkpoint: str = ""
    fingerprint: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.probabilities)):
            raise UsageError(f"{self.slide_id}: expected finite probabilities, not {self.probabilities}")

    @property
    def predicted_grade(self) -> int:
        """The most probable grade, the lower one in a tie."""
        return self.probabilities.index(max(self.probabilities))

    @property
    def expected_grade(self) -> float:
        """The mean grade under the probabilities."""
        return sum(grade * probability for grade, probability in enumerate(self.probabilities))


def write_predictions(path: Path, predictions: Iterable[SlidePrediction]) -> None:
    """Writes one row per slide, ordered by identifier; probabilities read back exactly."""
    predictions = sorted(predictions, key=lambda prediction: prediction.slide_id)
    n_grades = max((len(prediction.probabilities) for prediction in predictions), default=0)
    columns = ["slide_id", "patient_id", "site", "grade", "predicted_grade"]
    columns += [f"probability_{grade}" for grade in range(n_grades)]
    columns += ["expected_grade", "tiles", "fold", "checkpoint", "fingerprint", "reason"]
    write_csv(path, columns, (_cells(row) for row in predictions))


def _cells(row: SlidePrediction) -> dict[str, Any]:
    cells = {name: value for name, value in vars(row).items() if name != "probabilities"}
    if row.probabilities:
        cells |= {"predicted_grade": row.predicted_grade, "expected_grade": f"{row.expected_grade:.5f}"}
    return cells | {f"probability_{grade}": value for grade, value in enumerate(row.probabilities)}


def read_predictions(path: Path) -> list[SlidePrediction]:
    """Reads a table of :func:`write_predictions`.

    Raises:
        UsageError: the file is no such table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                SlidePrediction(
                    slide_id=row["slide_id"],
                    patient_id=row["patient_id"],
                    grade=int(row["grade"]) if row["grade"] else None,
                    probabilities=tuple(
                        float(row[key]) for key in row if key.startswith("probability_") and row[key]
                    ),
                    tiles=int(row["tiles"]),
                    # Tables of the first versions lack these columns.
                    site=row.get("site", ""),
                    fold=row.get("fold", ""),
                    checkpoint=row.get("checkpoint", ""),
                    fingerprint=row.get("fingerprint", ""),
                    reason=row.get("reason", ""),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UsageError(f"{path}: expected predictions as 'slidetl test' writes them: {error!r}") from error
