"""Writes the files of ``test`` and ``predict``: tables of predictions, metrics.json and confusion.png."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info

from slidetl.data.tasks import Task
from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import bca_interval_if_defined, proven
from slidetl.evaluation.metrics import weighted_mean
from slidetl.files import check_writable, write_csv
from slidetl.text import listed
from slidetl.training.evaluation import Evaluation, GradedSlide
from slidetl.training.grader import SlideGrader
from slidetl.training.predictions import (
    SlidePrediction,
    describe_metrics,
    read_predictions,
    write_metrics,
    write_predictions,
)

_NUMBER_COLUMNS = ("slide_id", "patient_id", "value", "predicted", "checkpoint", "fingerprint", "reason")

_COLUMNS_OF_ALL = {*_NUMBER_COLUMNS} - {"value", "predicted"}


class ResultFiles(pl.Callback):
    """Writes into ``test`` and ``predict`` below ``trainer.default_root_dir``."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses a folder that cannot be written before the work, in every process."""
        if stage in ("test", "predict"):
            check_writable(Path(trainer.default_root_dir) / TrainerFn(stage).value / "predictions.csv")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes and prints the results of a test."""
        assert isinstance(pl_module, SlideGrader) and pl_module.tested is not None
        _check_whole(trainer, "test", pl_module.tested.slides)
        if trainer.is_global_zero:
            folder, evaluation = Path(trainer.default_root_dir) / "test", pl_module.tested
            _keep_others(folder, evaluation.predictions)
            folder.joinpath("metrics.json").unlink(missing_ok=True)  # there only beside whole results
            _write_tables(folder, evaluation.slides, pl_module.tasks.tasks)
            of_tasks = _task_metrics(evaluation, pl_module.tasks.tasks)
            figures = write_metrics(
                folder,
                evaluation.predictions,
                evaluation.metrics,
                evaluation.quality,
                pl_module.grades,
                of_tasks,
                getattr(trainer.datamodule, "manifest", Path()),  # type: ignore[attr-defined] # set by test
            )
            told = describe_metrics(
                evaluation.metrics, pl_module.grades, evaluation.not_graded, figures["intervals"]
            )
            for name, of_task in of_tasks.items():
                if error := of_task.get("intervals", {}).get("mae"):
                    told += "\n{}: mean absolute error {:.3g} ({:.3g} to {:.3g})".format(name, *error)
            rank_zero_info(f"{told}\nwritten to {folder}")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the predictions."""
        assert isinstance(pl_module, SlideGrader)
        _check_whole(trainer, "predict", pl_module.predicted)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "predict"
            _keep_others(folder, [slide.prediction for slide in pl_module.predicted])
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


def _check_whole(trainer: pl.Trainer, part: str, slides: Sequence[GradedSlide]) -> None:
    """Refuses results without some slides of the part, which would look whole."""
    whole = {slide.row.slide_id for slide in trainer.datamodule.slides[part]}  # type: ignore[attr-defined] # set elsewhere
    lost = sorted(whole - {slide.prediction.slide_id for slide in slides})
    if lost and not trainer.fast_dev_run:  # type: ignore[attr-defined] # set elsewhere
        raise UsageError(
            f"{len(lost)} of {len(whole)} slides were left out ({listed(lost)}), so nothing is written; "
            f"leave out trainer.limit_{part}_batches"
        )


def _keep_others(folder: Path, predictions: Sequence[SlidePrediction]) -> None:
    """Renames the folder if its results are of other slides or another checkpoint."""
    table = folder / "predictions.csv"
    if not table.is_file():
        return
    with suppress(UsageError):  # no such table: of someone else
        then, now = (
            {(one.slide_id, one.fingerprint, one.checkpoint) for one in rows}
            for rows in (read_predictions(table), predictions)
        )
        if then == now:
            return
    names = (folder.with_name(f"{folder.name}.{number}") for number in count(1))
    kept = next(name for name in names if not name.exists())
    folder.rename(kept)
    rank_zero_info(f"earlier results, of other slides or another checkpoint, are in {kept} now")


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


def _task_metrics(evaluation: Evaluation, tasks: Iterable[Task]) -> dict[str, dict[str, Any]]:
    """Returns the metrics of the further tasks by name, of numbers with intervals over patients."""
    figures = {name: found.to_json() for name, found in evaluation.tasks.items()}
    for task in tasks:
        if task.numeric and task.name in figures:
            figures[task.name]["intervals"] = _number_intervals(task, evaluation.slides)
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
