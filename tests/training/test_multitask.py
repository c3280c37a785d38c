from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from slidetl.cli import main
from slidetl.data.datasets import Bag
from slidetl.data.tasks import Task
from slidetl.errors import UsageError
from slidetl.evaluation.metrics import NumberMetrics, grade_metrics
from slidetl.models.heads import CrossEntropy, CumulativeLink
from slidetl.publish.model_file import load_model
from slidetl.training.checkpoint import load_grader
from slidetl.training.evaluation import GradedSlide
from slidetl.training.grader import SlideGrader
from slidetl.training.multitask import TaskHeads, TaskOutcome, task_metrics
from slidetl.training.outputs import _number_intervals, _write_tables
from slidetl.training.predictions import SlidePrediction, read_predictions
from tests.conftest import Study
from tests.data.test_datamodule import rewrite
from tests.small import small_spec
from tests.training.ddp_tasks import TASKS, HalfLabelled

CLASSES = Task("classes", "classes", ("a", "b", "c"), ordinal=False)
SCALE = Task("scale", "scale", ("0", "1", "2"))
NESTS = Task("nests", "nests", ("no", "yes"), of_tiles=True, ordinal=False)


@pytest.mark.parametrize(
    ("errors", "names"), [((0,) * 5, []), ((0, 1, 3, 1, 2), ["mae"]), ((0, 1, 3, 1), [])]
)
def test_an_error_with_an_interval_of_a_point_has_none(errors: Sequence[float], names: list[str]) -> None:
    size = Task("size", "size_mm", numeric=True)
    slides: Any = [
        SimpleNamespace(
            outcomes={"size": SimpleNamespace(labels=np.array([5.0]), predicted=np.array([[5.0 + error]]))},
            prediction=SimpleNamespace(patient_id=f"p{n}"),
        )
        for n, error in enumerate(errors)
    ]
    assert list(_number_intervals(size, slides)) == names


def test_gradients_of_each_head_are_those_by_hand() -> None:
    torch.manual_seed(0)
    heads = TaskHeads([CLASSES, SCALE, NESTS], tile_features=4, slide_features=3).double()
    tiles, slides = torch.randn(2, 3, 4).double(), torch.randn(2, 3).double().requires_grad_()
    labels = {
        "classes": torch.tensor([2, 0]),
        "scale": torch.tensor([-1, 1]),
        "nests": torch.tensor([[0, 1, -1], [-1, -1, 1]]),
    }
    losses = heads.summed_losses(heads(tiles, slides), labels)
    assert {name: weight.item() for name, (_, weight) in losses.items()} == {
        "classes": 2,
        "scale": 1,
        "nests": 3,
    }
    torch.stack([summed for summed, _ in losses.values()]).sum().backward()
    x, gradient = slides.detach(), torch.zeros(2, 3).double()

    classes, link, nests = heads.heads
    assert isinstance(classes, CrossEntropy) and isinstance(nests, CrossEntropy)
    assert isinstance(link, CumulativeLink)
    linear = classes.classes  # cross-entropy: what is believed, less what is so
    excess = linear(x).softmax(1) - torch.eye(3).double()[labels["classes"]]
    torch.testing.assert_close(linear.weight.grad, excess.T @ x)
    gradient += excess @ linear.weight

    # Cumulative link: the label 1 lies between the two thresholds.
    score = (link.score.weight @ x[1]).squeeze()
    low, high = link.first, link.first + torch.nn.functional.softplus(link.gaps)
    above, below = torch.sigmoid(score - low), torch.sigmoid(score - high)
    slope = -(above * (1 - above) - below * (1 - below)) / (above - below)
    torch.testing.assert_close(link.score.weight.grad, slope * x[1:])
    gradient[1] += slope * link.score.weight[0]
    torch.testing.assert_close(slides.grad, gradient)

    linear, known = nests.classes, labels["nests"] >= 0
    excess = linear(tiles[known]).softmax(1) - torch.eye(2).double()[labels["nests"][known]]
    torch.testing.assert_close(linear.weight.grad, excess.T @ tiles[known])
    torch.testing.assert_close(linear.bias.grad, excess.sum(0))


def test_labels_on_half_of_the_slides_train_as_that_half_does() -> None:
    torch.manual_seed(0)
    grader = SlideGrader(small_spec(), tasks=TASKS).eval()  # in evaluation mode slides do not mix
    batch: Bag = default_collate(HalfLabelled().bags())
    grader.training_step(batch, 0).backward()
    mixed = [parameter.grad.clone() for parameter in grader.parameters() if parameter.grad is not None]
    grader.zero_grad()

    network = grader.network
    logits, _ = network(batch["tiles"], batch["mask"])
    loss = network.head.loss(logits, batch["grade"])
    half = {key: value[::2] for key, value in batch.items() if isinstance(value, torch.Tensor)}
    embeddings = network.embed(half["tiles"])
    pooled = network.aggregator(embeddings, half["mask"]).embedding
    second, nests = grader.tasks.heads
    assert isinstance(second, CumulativeLink) and isinstance(nests, CrossEntropy)
    loss = loss + 0.5 * second.loss(second(pooled), batch["labels"]["second"][::2])
    loss = loss + 2.0 * nests.loss(nests(embeddings[:, 0]), batch["labels"]["nests"][::2, 0])
    loss.backward()
    apart = [parameter.grad for parameter in grader.parameters() if parameter.grad is not None]
    assert len(mixed) == len(apart) == len(list(grader.parameters()))
    for here, there in zip(mixed, apart, strict=True):
        torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-3)


def test_without_any_label_nothing_is_learned_and_nothing_is_nan() -> None:
    grader = SlideGrader(small_spec(), tasks=TASKS).eval()
    batch: Bag = default_collate(HalfLabelled().bags()[1::2])
    loss = grader.training_step(batch, 0)
    loss.backward()
    logits, _ = grader.network(batch["tiles"], batch["mask"])
    torch.testing.assert_close(loss, grader.network.head.loss(logits, batch["grade"]))
    for parameter in grader.tasks.parameters():
        assert parameter.grad is not None and not parameter.grad.any()  # DDP waits for one


def test_readers_share_the_target_and_numbers_are_standardised() -> None:
    torch.manual_seed(0)
    votes = Task("votes", "votes", ("a", "b", "c"), ordinal=False, readers=True)
    size = Task("size", "size_mm", numeric=True)
    heads = TaskHeads([votes, size], tile_features=4, slide_features=3).double()
    heads.standardise([{"size": value} for value in (4.0, float("nan"), 8.0)])
    slides = torch.randn(3, 3).double()
    logits = heads(torch.zeros(3, 1, 4).double(), slides)
    labels = {"votes": torch.tensor([2, 0, -1]), "size": torch.tensor([7.0, float("nan"), 4.0]).double()}
    summed = heads.summed_losses(
        logits, labels, {"votes": torch.tensor([[2, 1, -1], [-1, -1, -1], [-1, -1, -1]])}
    )
    wanted = torch.tensor([[0, 0.5, 0.5], [1, 0, 0], [0, 0, 0]]).double()  # shares, the label, nothing
    expected = -(wanted * logits["votes"].log_softmax(1)).sum()
    torch.testing.assert_close(summed["votes"][0], expected)
    assert summed["votes"][1] == 2 and summed["size"][1] == 2
    errors = logits["size"][[0, 2], 0] - torch.tensor([0.5, -1.0]).double()  # mean 6 mm, deviation 2 mm
    torch.testing.assert_close(summed["size"][0], errors.square().sum() / 2)
    outcomes = [
        TaskOutcome(np.array([7.0]), np.array([[6.0]], np.float32)),
        TaskOutcome(np.array([np.nan]), np.array([[50.0]], np.float32)),
        TaskOutcome(np.array([4.0]), np.array([[7.0]], np.float32)),
    ]
    assert task_metrics(size, outcomes) == NumberMetrics(2, 2.0, 5**0.5)
    assert task_metrics(size, outcomes[1:2]) is None


def test_a_true_number_keeps_its_digits_and_tables_of_earlier_tasks_go(tmp_path: Path) -> None:
    size, gone = Task("size", "size_mm", numeric=True), Task("gone", "gone", ("a", "b"))
    heads = TaskHeads([size, gone], tile_features=2, slide_features=2)
    with torch.no_grad():
        logits = heads(torch.zeros(1, 1, 2), torch.zeros(1, 2))
    prediction = SlidePrediction("s", "p", 1, (0.25, 0.75), 1)
    slide = GradedSlide(prediction, heads.outcomes(logits, [{"size": 12.3, "gone": 1}]))
    own = tmp_path / "predictions-and-more.csv"
    own.write_text("slide_id,patient_id,note\ns,p,mine\n")
    _write_tables(tmp_path, [slide], [size, gone])
    with (tmp_path / "predictions-size.csv").open(newline="") as file:
        assert [row["value"] for row in csv.DictReader(file)] == ["12.3"]
    (row,) = read_predictions(tmp_path / "predictions-gone.csv")
    assert row.grade == 1
    _write_tables(tmp_path, [slide], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [own.name, "predictions.csv"]


@pytest.mark.slow
def test_two_processes_of_which_one_has_no_label_train_as_one_does(tmp_path: Path) -> None:
    saved = tmp_path / "states.pt"
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.ddp_tasks", str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    states = torch.load(saved, weights_only=True)
    assert any(name.startswith("tasks.heads.1.") for name in states["alone"])
    for name, value in states["alone"].items():
        torch.testing.assert_close(states["together"][name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_figures_count_every_label_once() -> None:
    sure = np.eye(3, dtype=np.float32)
    outcomes = [
        TaskOutcome(np.array([0, -1, 2]), sure[[0, 1, 1]]),
        TaskOutcome(np.array([1]), sure[[1]]),
    ]
    assert task_metrics(SCALE, outcomes) == grade_metrics([0, 2, 1], [0, 1, 1], 3)
    assert task_metrics(SCALE, [TaskOutcome(np.array([-1]), sure[[0]])]) is None


@pytest.mark.slow
def test_tasks_from_the_configuration_to_the_exported_file(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = [str(min(2, number % 5)) if number % 2 else "" for number in range(20)]
    manifest = rewrite(study, tmp_path / "m.csv", grade_reader2=half)
    options = [*study.options(tmp_path / "run"), f"--data.manifest={manifest}"]
    tasks = (
        "[{name: second, column: grade_reader2, grades: [a, b, c], weight: 0.5},"
        " {name: tiles, column: grade, of_tiles: true, grades: ['0', '1', '2', '3', '4']}]"
    )
    assert main(["fit", *options, f"--model.tasks={tasks}", "--trainer.max_epochs=1"]) == 0
    with (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").open() as file:
        logged = {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}
    assert {"val/second/qwk", "val/tiles/accuracy", "train/second/loss", "train/tiles/loss"} <= logged.keys()
    assert all(np.isfinite(list(logged.values())))

    # The tasks are those of the checkpoint: the test need not name them.
    assert main(["test", *options]) == 0
    results = tmp_path / "run" / "test"
    of_task = {row.slide_id: row for row in read_predictions(results / "predictions-second.csv")}
    of_grade = {row.slide_id: row for row in read_predictions(results / "predictions.csv")}
    assert of_task.keys() == of_grade.keys() and not (results / "predictions-tiles.csv").exists()
    truth = {f"slide-{number:02d}": int(label) for number, label in enumerate(half) if label}
    assert {row.slide_id: row.grade for row in of_task.values() if row.grade is not None} == {
        slide_id: label for slide_id, label in truth.items() if slide_id in of_task
    }
    assert {len(row.probabilities) for row in of_task.values()} == {3}
    figures = json.loads((results / "metrics.json").read_text())["tasks"]
    known = [row for row in of_task.values() if row.grade is not None]
    assert figures["second"]["n"] == len(known) > 0
    assert figures["second"]["accuracy"] == np.mean([row.grade == row.predicted_grade for row in known])
    assert figures["tiles"]["n"] == sum(row.tiles for row in of_grade.values())

    checkpoint = tmp_path / "run" / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    grader = load_grader(checkpoint)
    assert [task.name for task in grader.tasks.tasks] == ["second", "tiles"]
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "model.pt")]) == 0  # checks parity
    state = load_model(tmp_path / "model.pt").network.state_dict()
    assert not any("tasks" in key for key in state)  # the file grades, and nothing else

    capsys.readouterr()
    last = trained / "logs" / "version_0" / "checkpoints" / "last.ckpt"
    assert main(["fit", *options, f"--model.tasks={tasks}", f"--ckpt_path={last}"]) == 2
    assert "was trained with tasks []" in capsys.readouterr().err


def test_two_tasks_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="a name of its own"):
        SlideGrader(tasks=[SCALE, SCALE])
