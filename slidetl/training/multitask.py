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
from slidetl.evaluation.metrics import GradeMetrics, grade_metrics
from slidetl.models.heads import CrossEntropy, CumulativeLink, Head


@dataclass(frozen=True, eq=False)
class TaskOutcome:
    """Predictions and labels of one task on one slide.

    Attributes:
        labels: ``[n]`` int64, of the slide (n = 1) or of its tiles; below 0 if unlabelled.
        probabilities: ``[n, K]``.
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]


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
            (CumulativeLink if task.ordinal else CrossEntropy)(
                tile_features if task.of_tiles else slide_features, len(task.grades)
            )
            for task in tasks
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

    def summed_losses(
        self, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns each task's unweighted sum of losses and number of labels, by task name.

        Without labels the gradient is 0, not missing: DDP waits for every head.

        Args:
            logits: as returned by :meth:`forward`.
            labels: ``[B]`` or ``[B, N]`` int64, below 0 if unlabelled.
        """
        return {
            task.name: head.summed_loss(logits[task.name].flatten(0, -2), labels[task.name].flatten())
            for task, head in self._each()
        }

    def outcomes(
        self, logits: Mapping[str, Tensor], chunks: Sequence[Mapping[str, int | Tensor]]
    ) -> dict[str, TaskOutcome]:
        """Returns the outcome of each task on one slide, from logits (B = 1) and the labels of its chunks."""
        found = {}
        for task, head in self._each():
            told = [torch.as_tensor(chunk[task.name]).reshape(-1).cpu().numpy() for chunk in chunks]
            found[task.name] = TaskOutcome(
                np.concatenate(told if task.of_tiles else told[:1]),
                head.probabilities(logits[task.name].flatten(0, -2)).cpu().numpy(),
            )
        return found

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Returns the optimiser's parameter groups; only kernels decay."""
        groups = []
        for decay, kernels in ((weight_decay, True), (0.0, False)):
            parameters = [weight for weight in self.parameters() if (weight.ndim > 1) == kernels]
            if parameters:
                groups.append({"params": parameters, "lr": lr, "weight_decay": decay})
        return groups

    def _each(self) -> Iterable[tuple[Task, Head]]:
        for task, head in zip(self.tasks, self.heads, strict=True):
            assert isinstance(head, Head)
            yield task, head


def task_metrics(task: Task, outcomes: Sequence[TaskOutcome]) -> GradeMetrics | None:
    """Computes metrics over all labels of a task, all tiles weighted equally; None without labels."""
    labels = np.concatenate([outcome.labels for outcome in outcomes])
    predicted = np.concatenate([outcome.probabilities for outcome in outcomes]).argmax(1)
    known = labels >= 0
    if not known.any():
        return None
    return grade_metrics(labels[known], predicted[known], len(task.grades))
