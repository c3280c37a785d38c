"""Grades slides chunk by chunk, gathers the predictions of all processes, and scores them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slidetl.data.datasets import Chunk
from slidetl.data.tasks import Task
from slidetl.errors import UsageError
from slidetl.evaluation.calibration import judged_probabilities
from slidetl.evaluation.metrics import GradeMetrics, NumberMetrics, grade_metrics, told_apart
from slidetl.models.network import GradingNetwork
from slidetl.models.precision import exact_float32
from slidetl.training.multitask import TaskHeads, TaskOutcome, task_metrics
from slidetl.training.predictions import SlidePrediction

_T = TypeVar("_T")

NOT_FINITE = (
    "the network gives numbers that are not finite; its training has diverged, or its precision overflows"
)

SAME_FOR_ALL = (
    "get the same probabilities: the network no longer tells slides apart, as when all its features have "
    "become zero. Lower model.lr or model.transfer.backbone_lr_scale, or set "
    "model.transfer.batch_statistics, where the strategy has it"
)
_OF_GRADES = ("accuracy", "balanced_accuracy", "qwk", "mae", "macro_f1")
_OF_PROBABILITIES = ("rps", "calibration_error", "calibration_error_if_calibrated")
_BETTER = {
    "max": ("accuracy", "balanced_accuracy", "qwk", "macro_f1", "auroc_above"),
    "min": ("mae", "rmse", "loss", *_OF_PROBABILITIES),
}


def better_mode(metric: str) -> str | None:
    """Returns ``max`` if a logged metric is better when higher, ``min`` if lower.

    None for a name that is not of :meth:`Evaluation.scalars`, with or without a part before it (``val/``).
    """
    name = re.sub(r"_\d+$", "", metric.rpartition("/")[2])
    return next((mode for mode, names in _BETTER.items() if name in names), None)


def scalar_names(tasks: Iterable[Task], n_grades: int) -> list[str]:
    """Lists the names of all metrics that :meth:`Evaluation.scalars` may return."""
    above = (f"auroc_above_{threshold}" for threshold in range(n_grades - 1))
    of_tasks = (f"{task.name}/{name}" for task in tasks for name in _names_of(task))
    return [*_OF_GRADES, "loss", *_OF_PROBABILITIES, *above, *of_tasks]


def _names_of(task: Task) -> tuple[str, ...]:
    if task.numeric:
        return ("mae", "rmse")
    return ("accuracy", "balanced_accuracy", *(("qwk", "mae") if task.ordinal else ()))


@dataclass(frozen=True, eq=False)
class GradedSlide:
    """A slide after its last chunk.

    Attributes:
        prediction: the prediction of its grade.
        outcomes: outcomes of the further tasks, by name.
    """

    prediction: SlidePrediction
    outcomes: Mapping[str, TaskOutcome] = field(default_factory=dict)

    def prediction_of(self, task: Task) -> SlidePrediction:
        """Returns the prediction of a further slide-level task."""
        if not self.prediction.probabilities:
            return replace(self.prediction, grade=None)
        outcome = self.outcomes[task.name]
        label, probabilities = int(outcome.labels[0]), tuple(outcome.predicted[0].tolist())
        return replace(self.prediction, grade=None if label < 0 else label, probabilities=probabilities)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The predictions of one part, and their metrics.

    Attributes:
        slides: the slides of all processes, each once, ordered by identifier.
        metrics: metrics of the predicted grades.
        quality: metrics of the probabilities, named as by :func:`judged_probabilities`.
        tasks: metrics of each further task with a label in this part.
        not_graded: slides with a true grade but no prediction; no metric counts them.
    """

    slides: tuple[GradedSlide, ...]
    metrics: GradeMetrics
    quality: dict[str, Any]
    tasks: dict[str, GradeMetrics | NumberMetrics]
    not_graded: tuple[str, ...] = ()

    @property
    def predictions(self) -> tuple[SlidePrediction, ...]:
        """The predictions of the grade, one per slide."""
        return tuple(slide.prediction for slide in self.slides)

    @property
    def tells_apart(self) -> bool:
        """False if all slides have the same probabilities, as of a network whose features have died."""
        return told_apart([slide.probabilities for slide in self.predictions if slide.probabilities])

    def scalars(self, tasks: Iterable[Task]) -> dict[str, float]:
        """Returns the metrics to log, by name."""
        found: dict[str, float] = {name: getattr(self.metrics, name) for name in _OF_GRADES}
        found["loss"] = self.quality["log_loss"]
        found |= {name: self.quality[name] for name in _OF_PROBABILITIES}
        for threshold, value in enumerate(self.quality["auroc"]):
            if value is not None:  # undefined if all slides lie on one side of the threshold
                found[f"auroc_above_{threshold}"] = value
        for task in tasks:
            if task.name in self.tasks:
                of_task = self.tasks[task.name]
                found |= {f"{task.name}/{name}": getattr(of_task, name) for name in _names_of(task)}
        return found


class ChunkedEvaluation:
    """Grades the slides of this process, chunk after chunk.

    Args:
        network: embeds and grades.
        tasks: heads of the further tasks.
        pads: fill up the last chunk of a slide with zeros, for the backbone to see one shape: a GPU takes
            seconds to plan for each new one. By default on a GPU.

    Attributes:
        slides: complete slides.
    """

    def __init__(self, network: GradingNetwork, tasks: TaskHeads, pads: bool | None = None) -> None:
        self._network, self._tasks, self._pads = network, tasks, pads
        self.start()

    def start(self, checkpoint: str = "") -> None:
        """Discards all slides; ``checkpoint`` is the SHA-256 of the weights."""
        self._checkpoint = checkpoint
        self._embeddings: list[Tensor] = []  # of the slide in progress
        self._labels: list[dict[str, int | float | Tensor]] = []  # of its tasks, chunk by chunk
        self.slides: list[GradedSlide] = []

    def take(self, chunk: Chunk, fold: str = "") -> None:
        """Adds one chunk; its last chunk grades a slide."""
        self._labels.append(chunk["labels"])
        embeddings = self._join(chunk)
        if embeddings is None:
            return
        labels, self._labels = self._labels, []
        logits, of_tasks = self.grade(embeddings, _everything(embeddings))
        # In float64 on the CPU (some devices lack it): metrics expect the rows to sum to one.
        probabilities = self._network.head.probabilities(logits.cpu().double())[0].tolist()
        outcomes = self._tasks.outcomes(of_tasks, labels)
        computed = np.concatenate([probabilities, *(one.predicted.ravel() for one in outcomes.values())])
        is_finite = bool(np.isfinite(computed).all())  # argmax of NaN would give grade 0
        prediction = SlidePrediction(
            slide_id=chunk["slide_id"],
            patient_id=chunk["patient_id"],
            grade=None if chunk["grade"] < 0 else chunk["grade"],
            probabilities=tuple(probabilities) if is_finite else (),
            tiles=embeddings.shape[1],
            site=chunk["site"],
            fold=fold,
            checkpoint=self._checkpoint,
            fingerprint=chunk["fingerprint"],
            reason="" if is_finite else NOT_FINITE,
        )
        self.slides.append(GradedSlide(prediction, outcomes if is_finite else {}))

    def attention(self, chunk: Chunk) -> dict[str, NDArray[np.float32]]:
        """Adds one chunk; returns the attention ``[N]`` by slide identifier if it ends a slide."""
        embeddings = self._join(chunk)
        if embeddings is None:
            return {}
        with torch.autocast(embeddings.device.type, enabled=False):
            attention = self._network.aggregator(embeddings, _everything(embeddings)).attention  # [1, H, N]
        return {chunk["slide_id"]: attention[0].mean(0).cpu().numpy()}

    def grade(self, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes float32 logits from embeddings ``[B, N, D]`` and a mask ``[B, N]``, False for padding."""
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.float()
            pooled = self._network.aggregator(embeddings, mask).embedding
            return self._network.head(pooled), self._tasks(embeddings, pooled)

    def _join(self, chunk: Chunk) -> Tensor | None:
        """Returns the embeddings ``[1, N, D]`` of a slide if the chunk ends it, else None."""
        if "stored" in chunk:
            self._embeddings.append(chunk["stored"].float())
        else:
            self._embeddings.append(self.embed(chunk["tiles"], chunk["full"]))
        if not chunk["last"]:
            return None
        embeddings, self._embeddings = torch.cat(self._embeddings).unsqueeze(0), []
        return embeddings

    def embed(self, tiles: Tensor, full: int) -> Tensor:
        """Embeds the tiles of a chunk, of ``full`` tiles unless it is a slide's last: ``[n, D]``."""
        on_gpu, count = tiles.device.type == "cuda", len(tiles)
        if (on_gpu if self._pads is None else self._pads) and count < full:
            # With the strides of a full chunk: a GPU plans by them, too.
            shape, strides = tiles[0].shape, tiles[0].stride()
            filled = tiles.new_empty_strided((full, *shape), (shape.numel(), *strides)).zero_()
            filled[:count] = tiles
            tiles = filled
        with exact_float32(tiles.device):
            rows: Tensor = self._network.backbone(tiles)
        return rows[:count].float()


def _everything(embeddings: Tensor) -> Tensor:
    """Returns a mask without padding."""
    return torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)


def evaluate(slides: Sequence[GradedSlide], tasks: Iterable[Task], n_grades: int) -> Evaluation:
    """Scores graded slides.

    Args:
        slides: at least one; slides without a true grade are skipped, slides not graded are listed.
        tasks: the further tasks.
        n_grades: K.

    Raises:
        UsageError: no slide has a grade, the network grades none, or probabilities do not sum to one.
    """
    known = [slide.prediction for slide in slides if slide.prediction.grade is not None]
    graded = [prediction for prediction in known if not prediction.reason]
    if known and not graded:
        raise UsageError(f"none of {len(known)} slides is graded: {known[0].reason}")
    true = [prediction.grade for prediction in graded if prediction.grade is not None]
    of_tasks = {
        task.name: task_metrics(task, [slide.outcomes[task.name] for slide in slides if slide.outcomes])
        for task in tasks
    }
    return Evaluation(
        slides=tuple(slides),
        metrics=grade_metrics(true, [prediction.predicted_grade for prediction in graded], n_grades),
        quality=judged_probabilities(true, [prediction.probabilities for prediction in graded]),
        tasks={name: metrics for name, metrics in of_tasks.items() if metrics is not None},
        not_graded=tuple(prediction.slide_id for prediction in known if prediction.reason),
    )


def gather_slides(mine: Sequence[GradedSlide], part: str) -> tuple[GradedSlide, ...]:
    """Gathers the slides of all processes, each once, by identifier; every process must call it.

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
