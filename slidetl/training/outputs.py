"""Writes the files of ``test`` and ``predict``: tables of predictions, metrics.json and confusion.png."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info

from slidetl.data.study import listed
from slidetl.data.tasks import Task
from slidetl.evaluation.bootstrap import bca_interval_if_defined, proven
from slidetl.evaluation.metrics import GradeMetrics, patient_intervals, weighted_mean
from slidetl.files import replaced, write_csv, write_whole
from slidetl.text import plot_label
from slidetl.training.evaluation import Evaluation, GradedSlide
from slidetl.training.grader import SlideGrader
from slidetl.training.predictions import write_predictions

_NUMBER_COLUMNS = ("slide_id", "patient_id", "value", "predicted", "checkpoint", "fingerprint", "reason")

_COLUMNS_OF_ALL = {*_NUMBER_COLUMNS} - {"value", "predicted"}


class ResultFiles(pl.Callback):
    """Writes into ``test`` and ``predict`` below ``trainer.default_root_dir``."""

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes and prints the results of a test."""
        assert isinstance(pl_module, SlideGrader) and pl_module.tested is not None
        if trainer.is_global_zero:
            folder, evaluation = Path(trainer.default_root_dir) / "test", pl_module.tested
            folder.joinpath("metrics.json").unlink(missing_ok=True)  # there only beside whole results
            _write_tables(folder, evaluation.slides, pl_module.tasks.tasks)
            figures = write_metrics(folder, evaluation, pl_module.grades, pl_module.tasks.tasks)
            told = describe_metrics(
                evaluation.metrics, pl_module.grades, evaluation.not_graded, figures["intervals"]
            )
            for name, of_task in figures.get("tasks", {}).items():
                if error := of_task.get("intervals", {}).get("mae"):
                    told += "\n{}: mean absolute error {:.3g} ({:.3g} to {:.3g})".format(name, *error)
            rank_zero_info(f"{told}\nwritten to {folder}")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the predictions."""
        assert isinstance(pl_module, SlideGrader)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "predict"
            _write_tables(folder, pl_module.predicted, pl_module.tasks.tasks)
            lost = [slide.prediction for slide in pl_module.predicted if slide.prediction.reason]
            count = f"{len(pl_module.predicted) - len(lost)} slides predicted"
            if lost:
                names = listed([prediction.slide_id for prediction in lost])
                count += f", {len(lost)} not graded ({names}: {lost[0].reason})"
            rank_zero_info(f"{count}, written to {folder / 'predictions.csv'}")


class SplitTable(pl.Callback):
    """Writes the part of each slide of a training as ``split.csv`` into the log folder."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the table, of a resumed training too."""
        assert isinstance(pl_module, SlideGrader) and pl_module.record is not None
        folder = trainer.log_dir  # every process must read it: they synchronise on it
        if trainer.is_global_zero and folder:
            slides = trainer.datamodule.slides["predict"]  # type: ignore[attr-defined] # set by fit
            grades = {slide.row.slide_id: slide.row.grade for slide in slides}
            rows = (
                (slide.slide_id, slide.patient_id, grades[slide.slide_id], slide.part)
                for slide in pl_module.record.slides
            )
            columns = ("slide_id", "patient_id", "grade", "part")
            table = (dict(zip(columns, row, strict=True)) for row in rows)
            write_csv(Path(folder) / "split.csv", columns, table)


def _write_tables(folder: Path, slides: Sequence[GradedSlide], tasks: Iterable[Task]) -> None:
    """Writes a table for the grade, and one for each further slide-level task; removes earlier ones."""
    for path in folder.glob("predictions-*.csv"):  # of tasks that may be no more
        with path.open(encoding="utf-8", errors="replace") as file:
            if set(file.readline().rstrip("\n").split(",")) >= _COLUMNS_OF_ALL:
                path.unlink()
    write_predictions(folder / "predictions.csv", [slide.prediction for slide in slides])
    for task in tasks:
        if task.numeric:
            rows_of_task = map(partial(_numbers, task), slides)
            write_csv(folder / f"predictions-{task.name}.csv", _NUMBER_COLUMNS, rows_of_task)
        elif not task.of_tiles:
            rows = [slide.prediction_of(task) for slide in slides]
            write_predictions(folder / f"predictions-{task.name}.csv", rows)


def _numbers(task: Task, slide: GradedSlide) -> dict[str, Any]:
    """Returns the row of a number in its table."""
    row = {name: value for name, value in vars(slide.prediction).items() if name in _NUMBER_COLUMNS}
    if not slide.outcomes:
        return {**row, "value": None, "predicted": None}
    outcome = slide.outcomes[task.name]
    value = float(outcome.labels[0])
    return {
        **row,
        "value": value if math.isfinite(value) else None,
        "predicted": float(outcome.predicted[0, 0]),
    }


def write_metrics(
    folder: Path, evaluation: Evaluation, grades: tuple[str, ...], tasks: Sequence[Task] = ()
) -> dict[str, Any]:
    """Writes ``metrics.json``, with intervals over patients, and ``confusion.png``; returns the former."""
    figures = {**evaluation.quality, **evaluation.metrics.to_json(), "grades": grades}
    figures["not_graded"] = evaluation.not_graded
    graded = [one for one in evaluation.predictions if one.grade is not None and not one.reason]
    figures["intervals"] = patient_intervals(
        np.array([one.grade for one in graded]),
        [one.probabilities for one in graded],
        [one.patient_id for one in graded],
    )
    if evaluation.tasks:
        figures["tasks"] = {name: found.to_json() for name, found in evaluation.tasks.items()}
    for task in tasks:
        if task.numeric and task.name in evaluation.tasks:
            figures["tasks"][task.name]["intervals"] = _number_intervals(task, evaluation.slides)
    draw_confusion(folder / "confusion.png", evaluation.metrics, grades)
    write_whole(folder / "metrics.json", json.dumps(figures, indent=2) + "\n")
    return figures


def _number_intervals(task: Task, slides: Sequence[GradedSlide]) -> dict[str, tuple[float, float, float]]:
    """Computes the interval of the mean absolute error over patients; empty with one patient, or a point."""
    known = [one for one in slides if one.outcomes and task.is_label(one.outcomes[task.name].labels).all()]
    patients = [one.prediction.patient_id for one in known]
    if len(set(patients)) < 2:
        return {}
    of_task = [one.outcomes[task.name] for one in known]
    errors = [abs(float(one.predicted[0, 0]) - float(one.labels[0])) for one in of_task]
    return proven({"mae": bca_interval_if_defined(partial(weighted_mean, errors), patients)})


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
