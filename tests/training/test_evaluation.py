from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slidetl.data.datasets import Chunk, ChunkDataset
from slidetl.data.manifest import read_manifest
from slidetl.data.study import CachedSlide
from slidetl.data.tasks import Task
from slidetl.errors import UsageError
from slidetl.tiles.store import SlideCache
from slidetl.training.evaluation import NOT_FINITE, ChunkedEvaluation, better_mode, evaluate
from slidetl.training.grader import SlideGrader
from slidetl.training.predictions import describe_metrics, read_predictions, write_predictions
from tests.conftest import Study
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


@pytest.mark.parametrize("pads", [False, True])
def test_one_shape_reaches_the_network_of_a_gpu(study: Study, pads: bool) -> None:
    rows = read_manifest(study.manifest).rows[:3]
    slides = [CachedSlide(row, SlideCache.open(study.cache / f"{row.slide_id}.zarr")) for row in rows]
    size = max(len(slide.cache) for slide in slides) - 1  # the last chunk of one slide is a single tile
    chunks = [dataset[number] for dataset in [ChunkDataset(slides, size)] for number in range(len(dataset))]
    grader = SlideGrader(small_spec()).eval()
    backbone, shapes = grader.network.backbone, []
    backbone.register_forward_pre_hook(lambda _, tiles: shapes.append((tiles[0].shape, tiles[0].stride())))
    grading = ChunkedEvaluation(grader.network, grader.tasks, pads)
    attention: dict[str, Any] = {}
    with torch.no_grad():
        for one in chunks:
            grading.take(one)
        seen = set(shapes)
        for one in chunks:
            attention |= grading.attention(one)
        whole = [
            backbone(torch.cat([one["tiles"] for one in chunks if one["slide_id"] == row.slide_id]))
            for row in rows
        ]
    assert (len(seen) == 1) == pads and all(shape[1:] == (3, 64, 64) for shape, _ in seen)
    assert not pads or (seen == set(shapes[: 2 * len(chunks)]) and {shape[0] for shape, _ in seen} == {size})
    for slide, graded, rest in zip(slides, grading.slides, whole, strict=True):
        logits, _ = grader.network.grade(rest[None], torch.ones(1, len(rest), dtype=torch.bool))
        expected = grader.network.head.probabilities(logits)[0]
        assert graded.prediction.probabilities == pytest.approx(expected.tolist(), abs=1e-5)
        assert graded.prediction.tiles == len(slide.cache) == len(attention[slide.row.slide_id])


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


def test_every_logged_metric_has_a_direction() -> None:
    tasks = [Task("second", "second", ("a", "b"), ordinal=True), Task("size", "size", numeric=True)]
    grader = SlideGrader(small_spec(), tasks=tasks).eval()
    grading = grader._evaluation
    with torch.no_grad():
        for grade in range(3):
            one = chunk(str(grade), torch.full((2, grader.network.backbone.num_features), 0.5))
            grading.take({**one, "grade": grade, "labels": {"second": grade % 2, "size": float(grade)}})
    logged = evaluate(grading.slides, tasks, 5).scalars(tasks)
    modes = {name: better_mode(f"val/{name}") for name in logged}
    assert {"auroc_above_1", "second/qwk", "size/rmse", "calibration_error_if_calibrated"} <= modes.keys()
    for name, mode in modes.items():
        is_error = name.rpartition("/")[2] in ("loss", "mae", "rmse", "rps") or "calibration" in name
        assert mode == ("min" if is_error else "max"), name
    assert better_mode("time/data_wait") is None


@pytest.mark.parametrize(
    ("values", "told"), [((0.5, 0.5, 0.5), False), ((0.5, 3.0, 0.5), True), ((0.5,), True)]
)
def test_slides_of_the_same_probabilities_are_not_told_apart(values: tuple[float, ...], told: bool) -> None:
    grader = SlideGrader(small_spec()).eval()
    width = grader.network.backbone.num_features
    grading = grader._evaluation
    with torch.no_grad():
        for number, value in enumerate(values):
            one = chunk(str(number), torch.full((3, width), value))
            grading.take({**one, "labels": {}})
    assert evaluate(grading.slides, [], 5).tells_apart == told
