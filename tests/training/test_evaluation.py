from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slidetl.data.datasets import Chunk
from slidetl.data.tasks import Task
from slidetl.errors import UsageError
from slidetl.training.evaluation import NOT_FINITE, evaluate
from slidetl.training.grader import SlideGrader
from slidetl.training.outputs import describe_metrics
from slidetl.training.predictions import read_predictions, write_predictions
from tests.small import small_spec


def chunk(name: str, features: torch.Tensor, *, last: bool = True) -> Chunk:
    return {
        "stored": features,
        "slide_id": name,
        "patient_id": name,
        "site": "",
        "fingerprint": f"content of {name}",
        "grade": 1,
        "labels": {"second": 1},
        "last": last,
    }


def test_a_slide_of_numbers_that_are_not_finite_is_not_graded(tmp_path: Path) -> None:
    """The largest of five NaN is the first: such a slide was grade 0, "no fibrosis"."""
    tasks = [Task("second", "second", ("a", "b"))]
    grader = SlideGrader(small_spec(), tasks=tasks).eval()
    width = grader.network.backbone.num_features
    grading = grader._evaluation
    grading.start("sha")
    with torch.no_grad():
        for name, value in (("good", 1.0), ("nan", float("nan")), ("inf", float("inf"))):
            grading.take(chunk(name, torch.full((3, width), 0.5), last=False))
            grading.take(chunk(name, torch.full((2, width), value)))
    evaluation = evaluate(grading.slides, tasks, 5)
    assert evaluation.not_graded == ("nan", "inf")
    assert evaluation.metrics.n == evaluation.tasks["second"].n == 1
    assert describe_metrics(evaluation.metrics, grader.grades, evaluation.not_graded).startswith(
        "1 slides (2 more not graded: nan, inf): accuracy"
    )
    write_predictions(tmp_path / "p.csv", evaluation.predictions)
    good, *others = sorted(read_predictions(tmp_path / "p.csv"), key=lambda row: row.reason)
    assert len(good.probabilities) == 5 and good.fingerprint == "content of good"
    assert [(row.probabilities, row.reason, row.tiles) for row in others] == [((), NOT_FINITE, 5)] * 2
    for slide in grading.slides[1:]:
        assert slide.prediction_of(tasks[0]).probabilities == ()
    with pytest.raises(UsageError, match="none of 2 slides is graded: the network gives numbers"):
        evaluate(grading.slides[1:], tasks, 5)
