"""Gather the predictions of all processes, and score them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from slidetl.data.tasks import Task
from slidetl.errors import UsageError
from slidetl.evaluation.calibration import judged_probabilities
from slidetl.evaluation.metrics import GradeMetrics, grade_metrics
from slidetl.training.multitask import TaskOutcome, task_metrics
from slidetl.training.predictions import SlidePrediction

_T = TypeVar("_T")

_OF_GRADES = ("accuracy", "balanced_accuracy", "qwk", "mae", "macro_f1")
_OF_PROBABILITIES = ("rps", "calibration_error", "calibration_error_if_calibrated")


@dataclass(frozen=True, eq=False)
class GradedSlide:
    """A slide after its last chunk.

    Attributes:
        prediction: of its grade.
        outcomes: of the further tasks, by their names.
    """

    prediction: SlidePrediction
    outcomes: Mapping[str, TaskOutcome] = field(default_factory=dict)

    def prediction_of(self, task: Task) -> SlidePrediction:
        """Returns the prediction of a further scale of slides."""
        outcome = self.outcomes[task.name]
        label, probabilities = int(outcome.labels[0]), tuple(outcome.probabilities[0].tolist())
        return replace(self.prediction, grade=None if label < 0 else label, probabilities=probabilities)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The predictions of one part, and their metrics.

    Attributes:
        slides: those of all processes, each once, by their identifiers.
        metrics: of the predicted grades.
        quality: metrics of the probabilities, as :func:`judged_probabilities` names them.
        tasks: metrics of each further task that has a label in this part.
    """

    slides: tuple[GradedSlide, ...]
    metrics: GradeMetrics
    quality: dict[str, Any]
    tasks: dict[str, GradeMetrics]

    @property
    def predictions(self) -> tuple[SlidePrediction, ...]:
        """The predictions of the grade."""
        return tuple(slide.prediction for slide in self.slides)

    def scalars(self, tasks: Iterable[Task]) -> dict[str, float]:
        """Returns the metrics to be logged, by their names."""
        found: dict[str, float] = {name: getattr(self.metrics, name) for name in _OF_GRADES}
        found["loss"] = self.quality["log_loss"]
        found |= {name: self.quality[name] for name in _OF_PROBABILITIES}
        for threshold, value in enumerate(self.quality["auroc"]):
            if value is not None:  # a part with no slide on one side of it has none
                found[f"auroc_above_{threshold}"] = value
        for task in tasks:
            names = ("accuracy", "balanced_accuracy", *(("qwk", "mae") if task.ordinal else ()))
            if task.name in self.tasks:
                found |= {f"{task.name}/{name}": getattr(self.tasks[task.name], name) for name in names}
        return found


def evaluate(slides: Sequence[GradedSlide], tasks: Iterable[Task], n_grades: int) -> Evaluation:
    """Scores graded slides.

    Args:
        slides: at least one; those without a grade do not count.
        tasks: the further tasks.
        n_grades: K.

    Raises:
        ValueError: no slide has a grade, or probabilities are no distributions.
    """
    graded = [slide.prediction for slide in slides if slide.prediction.grade is not None]
    true = [prediction.grade for prediction in graded if prediction.grade is not None]
    of_tasks = {
        task.name: task_metrics(task, [slide.outcomes[task.name] for slide in slides]) for task in tasks
    }
    return Evaluation(
        slides=tuple(slides),
        metrics=grade_metrics(true, [prediction.predicted_grade for prediction in graded], n_grades),
        quality=judged_probabilities(true, [prediction.probabilities for prediction in graded]),
        tasks={name: metrics for name, metrics in of_tasks.items() if metrics is not None},
    )


def gather_slides(mine: Sequence[GradedSlide], part: str) -> tuple[GradedSlide, ...]:
    """Gathers the slides of all processes, each once, by their identifiers; every process must call it.

    Raises:
        UsageError: no process has graded a slide.
    """
    by_slide = {slide.prediction.slide_id: slide for one in gather(mine) for slide in one}
    if not by_slide:
        raise UsageError(
            f"the {part} part ended before a slide was complete; raise trainer.limit_{part}_batches"
        )
    return tuple(by_slide[slide_id] for slide_id in sorted(by_slide))


def gather(mine: _T) -> list[_T]:
    """Gathers an object from each process; every process must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    everyone = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone
