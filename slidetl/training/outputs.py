"""Writes the files of ``test`` and ``predict``: tables of predictions, metrics.json and confusion.png."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info

from slidetl.data.study import listed
from slidetl.data.tasks import Task
from slidetl.evaluation.metrics import GradeMetrics
from slidetl.files import replaced, write_whole
from slidetl.text import plot_label
from slidetl.training.evaluation import Evaluation, GradedSlide
from slidetl.training.grader import SlideGrader
from slidetl.training.predictions import write_predictions


class ResultFiles(pl.Callback):
    """Writes into ``test`` and ``predict`` below ``trainer.default_root_dir``."""

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes and prints the results of a test."""
        assert isinstance(pl_module, SlideGrader) and pl_module.tested is not None
        if trainer.is_global_zero:
            folder, evaluation = Path(trainer.default_root_dir) / "test", pl_module.tested
            _write_tables(folder, evaluation.slides, pl_module.tasks.tasks)
            write_metrics(folder, evaluation, pl_module.grades)
            told = describe_metrics(evaluation.metrics, pl_module.grades, evaluation.not_graded)
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


def _write_tables(folder: Path, slides: Sequence[GradedSlide], tasks: Iterable[Task]) -> None:
    """Writes a table for the grade, and one for each further slide-level task."""
    write_predictions(folder / "predictions.csv", [slide.prediction for slide in slides])
    for task in tasks:
        if not task.of_tiles:
            rows = [slide.prediction_of(task) for slide in slides]
            write_predictions(folder / f"predictions-{task.name}.csv", rows)


def write_metrics(folder: Path, evaluation: Evaluation, grades: tuple[str, ...]) -> None:
    """Writes ``metrics.json`` and ``confusion.png``."""
    figures = {**evaluation.quality, **evaluation.metrics.to_json(), "grades": grades}
    figures["not_graded"] = evaluation.not_graded
    if evaluation.tasks:
        figures["tasks"] = {name: found.to_json() for name, found in evaluation.tasks.items()}
    write_whole(folder / "metrics.json", json.dumps(figures, indent=2) + "\n")
    draw_confusion(folder / "confusion.png", evaluation.metrics, grades)


def describe_metrics(metrics: GradeMetrics, grades: tuple[str, ...], not_graded: Sequence[str] = ()) -> str:
    """Formats accuracy, QWK, MAE and the confusion matrix as lines of text."""
    width = max(5, *(len(name) + 1 for name in grades))
    lost = f" ({len(not_graded)} more not graded: {listed(not_graded)})" if not_graded else ""
    lines = [
        f"{metrics.n} slides{lost}: accuracy {metrics.accuracy:.3f}, QWK {metrics.format_qwk(3)}, "
        f"mean absolute error {metrics.mae:.3f} grades",
        "true \\ predicted".ljust(18) + "".join(name.rjust(width) for name in grades),
    ]
    for name, counts in zip(grades, metrics.confusion, strict=True):
        lines.append(name.rjust(17) + " " + "".join(str(count).rjust(width) for count in counts))
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
