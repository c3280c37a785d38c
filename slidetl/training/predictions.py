"""Tables and metrics of predictions of slides."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from slidetl.errors import UsageError
from slidetl.evaluation.metrics import GradeMetrics, patient_intervals
from slidetl.files import csv_rows, replaced, write_csv, write_whole
from slidetl.text import listed, plot_label


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
                for row in csv_rows(file)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UsageError(f"{path}: expected predictions as 'slidetl test' writes them: {error!r}") from error


def write_metrics(
    folder: Path,
    predictions: Sequence[SlidePrediction],
    metrics: GradeMetrics,
    quality: Mapping[str, Any],
    grades: tuple[str, ...],
    tasks: Mapping[str, Any] = MappingProxyType({}),
    manifest: Path = Path(),
) -> dict[str, Any]:
    """Writes ``confusion.png`` and ``metrics.json``, the latter with intervals over patients; returns it.

    Args:
        folder: where they go.
        predictions: of all slides.
        metrics: of the predicted grades.
        quality: of the probabilities, :func:`~slidetl.evaluation.calibration.judged_probabilities`.
        grades: names, lowest first.
        tasks: metrics of the further tasks, by name.
        manifest: of the slides, for an export to see if it has changed; empty for none.
    """
    known = [one for one in predictions if one.grade is not None]
    graded = [one for one in known if not one.reason]
    figures = {
        **quality,
        **metrics.to_json(),
        "grades": grades,
        "not_graded": [one.slide_id for one in known if one.reason],
        "intervals": patient_intervals(
            np.array([one.grade for one in graded]),
            [one.probabilities for one in graded],
            [one.patient_id for one in graded],
        ),
        **({"tasks": tasks} if tasks else {}),
        **({"manifest": str(manifest.absolute())} if manifest != Path() else {}),
    }
    draw_confusion(folder / "confusion.png", metrics, grades)
    write_whole(folder / "metrics.json", json.dumps(figures, indent=2) + "\n")  # last: only of whole results
    return figures


def describe_metrics(
    metrics: GradeMetrics,
    grades: tuple[str, ...],
    not_graded: Sequence[str] = (),
    intervals: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> str:
    """Formats accuracy, QWK, MAE, the confusion matrix and any intervals as lines of text."""
    width = max(5, *(len(name) + 1 for name in grades))
    lost = f" ({len(not_graded)} more not graded: {listed(not_graded)})" if not_graded else ""
    lines = [
        f"{metrics.n} slides{lost}: accuracy {metrics.accuracy:.3f}, QWK {metrics.format_qwk(3)}, "
        f"mean absolute error {metrics.mae:.3f} grades",
        "true \\ predicted".ljust(18) + "".join(name.rjust(width) for name in grades),
    ]
    for name, counts in zip(grades, metrics.confusion, strict=True):
        lines.append(name.rjust(17) + " " + "".join(str(count).rjust(width) for count in counts))
    if intervals:
        told = (f"{name} {a:.3f} ({low:.3f} to {high:.3f})" for name, (a, low, high) in intervals.items())
        lines.append(f"95 % intervals over patients: {', '.join(told)}")
    return "\n".join(lines)


def draw_confusion(path: Path, metrics: GradeMetrics, grades: tuple[str, ...]) -> None:
    """Draws the confusion matrix as a PNG."""
    from matplotlib.figure import Figure

    names = list(map(plot_label, grades))
    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.add_subplot(
        title=f"{metrics.n} slides: accuracy {metrics.accuracy:.2f}, QWK {metrics.format_qwk(2)}",
        xlabel="predicted grade",
        ylabel="true grade",
        xticks=range(len(grades)),
        yticks=range(len(grades)),
        xticklabels=names,
        yticklabels=names,
    )
    highest = max(max(row) for row in metrics.confusion)
    axes.imshow(metrics.confusion, cmap="Blues", vmin=0)
    for row, counts in enumerate(metrics.confusion):
        for column, count in enumerate(counts):
            axes.text(
                column, row, str(count), ha="center", va="center", color="w" if count > highest / 2 else "k"
            )
    with replaced(path) as file:
        figure.savefig(file, dpi=120, format="png")
