"""Heads and metrics of the tasks learned beside the grade."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slidetl.data.tasks import Task, check_tasks
from slidetl.evaluation.metrics import GradeMetrics, NumberMetrics, grade_metrics, number_metrics
from slidetl.models.heads import CrossEntropy, CumulativeLink, Head, NumberHead
from slidetl.models.targets import Targets


@dataclass(frozen=True, eq=False)
class TaskOutcome:
    """Predictions and labels of one task on one slide.

    Attributes:
        labels: ``[n]`` int64, of the slide (n = 1) or of its tiles; below 0 if unlabelled. Of a number
            ``[1]`` float, NaN if unlabelled.
        predicted: probabilities ``[n, K]``; of a number ``[1, 1]``, in its unit.
    """

    labels: NDArray[Any]
    predicted: NDArray[np.float32]


class TaskHeads(nn.Module):
    """One head for each task, on the slide's embedding or on its tiles' embeddings.

    The exported file does not contain them.

    Args:
        tasks: label scales to learn; may be empty.
        tile_features: length D of a tile's embedding.
        slide_features: length D' of a slide's embedding.
    """

    def __init__(self, tasks: Sequence[Task], tile_features: int, slide_features: int) -> None:
        super().__init__()
        check_tasks(tasks)
        self.tasks = tuple(tasks)
        self.heads = nn.ModuleList(
            _head(task, tile_features if task.of_tiles else slide_features) for task in tasks
        )

    def forward(self, tiles: Tensor, slides: Tensor) -> dict[str, Tensor]:
        """Maps embeddings ``[B, N, D]`` and ``[B, D']`` to logits ``[B, N, L]`` and ``[B, L]`` by task."""
        logits = {}
        for task, head in self._each():
            if task.of_tiles:
                logits[task.name] = head(tiles.flatten(0, 1)).view(*tiles.shape[:2], -1)
            else:
                logits[task.name] = head(slides)
        return logits

    def standardise(self, labels: Sequence[Mapping[str, Any]]) -> None:
        """Standardises numbers by the labels of the training slides."""
        for task, head in self._each():
            if isinstance(head, NumberHead):
                values = torch.tensor([of_slide[task.name] for of_slide in labels])
                head.standardise(values[values.isfinite()])

    def summed_losses(
        self,
        logits: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        votes: Mapping[str, Tensor] | None = None,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns each task's unweighted sum of losses and number of labels, by task name.

        Without labels the gradient is 0, not missing: DDP waits for every head.

        Args:
            logits: as returned by :meth:`forward`.
            labels: ``[B]`` or ``[B, N]`` int64, below 0 if unlabelled; numbers ``[B]``, NaN if unlabelled.
            votes: ``[B, R]`` int64, readers' labels, below 0 for none.
        """
        summed = {}
        for task, head in self._each():
            found, target = logits[task.name].flatten(0, -2), labels[task.name].flatten()
            if isinstance(head, Head) and votes and task.name in votes:
                probabilities = head.probabilities(found.detach())
                target = Targets(readers=True)(target, votes[task.name], probabilities, 0.0)
            summed[task.name] = head.summed_loss(found, target)
        return summed

    def outcomes(
        self, logits: Mapping[str, Tensor], chunks: Sequence[Mapping[str, int | float | Tensor]]
    ) -> dict[str, TaskOutcome]:
        """Returns the outcome of each task on one slide, from logits (B = 1) and the labels of its chunks."""
        found = {}
        for task, head in self._each():
            kind = torch.float64 if task.numeric else torch.int64  # in float32, 12.3 would be another number
            told = [np.atleast_1d(torch.as_tensor(chunk[task.name], dtype=kind).cpu()) for chunk in chunks]
            rows = logits[task.name].flatten(0, -2)
            predicted = head.probabilities(rows) if isinstance(head, Head) else head.values(rows)
            labels = np.concatenate(told if task.of_tiles else told[:1])
            found[task.name] = TaskOutcome(labels, predicted.cpu().numpy())
        return found

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Returns the optimiser's parameter groups; only kernels decay."""
        groups = []
        for decay, kernels in ((weight_decay, True), (0.0, False)):
            parameters = [weight for weight in self.parameters() if (weight.ndim > 1) == kernels]
            if parameters:
                groups.append({"params": parameters, "lr": lr, "weight_decay": decay})
        return groups

    def _each(self) -> Iterable[tuple[Task, Head | NumberHead]]:
        for task, head in zip(self.tasks, self.heads, strict=True):
            assert isinstance(head, Head | NumberHead)
            yield task, head


def _head(task: Task, features: int) -> Head | NumberHead:
    if task.numeric:
        return NumberHead(features)
    return (CumulativeLink if task.ordinal else CrossEntropy)(features, len(task.grades))


def task_metrics(task: Task, outcomes: Sequence[TaskOutcome]) -> GradeMetrics | NumberMetrics | None:
    """Computes metrics over all labels of a task, all tiles weighted equally; None without labels."""
    labels = np.concatenate([outcome.labels for outcome in outcomes])
    predicted = np.concatenate([outcome.predicted for outcome in outcomes])
    known = task.is_label(labels)
    if not known.any():
        return None
    if task.numeric:
        return number_metrics(labels[known], predicted[known, 0])
    return grade_metrics(labels[known], predicted[known].argmax(1), len(task.grades))
