from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from slidetl.cli import main
from slidetl.evaluation.metrics import grade_metrics
from slidetl.tasks.checkpoint import load_grader, read_checkpoint
from slidetl.tasks.predictions import read_predictions
from tests.conftest import Study


def test_a_run_leaves_logs_checkpoints_and_results(trained: Path) -> None:
    log = trained / "logs" / "version_0"
    assert {"metrics.csv", "config.yaml", "checkpoints"} <= {path.name for path in log.iterdir()}
    assert list(log.glob("events.out.tfevents.*"))
    with (log / "metrics.csv").open() as file:
        logged = {key for row in csv.DictReader(file) for key, value in row.items() if value}
    assert {"train/loss", "val/qwk", "val/accuracy", "val/mae", "val/loss"} <= logged
    assert not (trained / "logs" / "version_1").exists()  # a test is no new training


def test_results_agree_with_the_predictions(trained: Path) -> None:
    predictions = read_predictions(trained / "test" / "predictions.csv")
    figures = json.loads((trained / "test" / "metrics.json").read_text())
    again = grade_metrics(
        np.array([row.grade for row in predictions]), [row.predicted_grade for row in predictions], 5
    )
    assert figures["n"] == len(predictions) == again.n
    for name in ("accuracy", "qwk", "mae"):
        assert figures[name] == pytest.approx(getattr(again, name))
    assert np.sum(figures["confusion"]) == len(predictions)
    assert (trained / "test" / "confusion.png").stat().st_size > 5_000


def test_same_seed_same_figures(study: Study, trained: Path, tmp_path: Path) -> None:
    assert main(["fit", *study.options(tmp_path), "--trainer.max_epochs=2"]) == 0
    assert main(["test", *study.options(tmp_path)]) == 0
    again = (tmp_path / "test" / "predictions.csv").read_bytes()
    assert again == (trained / "test" / "predictions.csv").read_bytes()
    other = tmp_path / "other"
    assert main(["fit", *study.options(other), "--trainer.max_epochs=1", "--seed_everything=1"]) == 0
    assert main(["test", *study.options(other)]) == 0
    assert again != (other / "test" / "predictions.csv").read_bytes()


def test_checkpoint_reloads_as_plain_values_and_grades_alike(study: Study, trained: Path) -> None:
    path = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    checkpoint = read_checkpoint(path)
    grader = load_grader(path)
    assert not grader.training
    for key, value in grader.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][key])
    assert grader.tile_spec is not None and grader.tile_spec.mpp == 4
    assert grader.transfer.start.__qualname__.startswith("WarmRestart")


def test_a_stopped_training_goes_on(study: Study, tmp_path: Path) -> None:
    assert main(["fit", *study.options(tmp_path), "--trainer.max_epochs=1"]) == 0
    last = tmp_path / "logs" / "version_0" / "checkpoints" / "last.ckpt"
    assert main(["fit", *study.options(tmp_path), "--trainer.max_epochs=2", f"--ckpt_path={last}"]) == 0
    assert read_checkpoint(tmp_path / "logs" / "version_1" / "checkpoints" / "last.ckpt")["epoch"] == 1


def test_predict_takes_slides_without_grades(study: Study, trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    options = [option for option in study.options(tmp_path) if not option.startswith("--data.manifest")]
    folder = study.manifest.parent / "slides"
    assert main(["predict", *options, f"--data.manifest={folder}", f"--ckpt_path={checkpoint}"]) == 0
    predictions = read_predictions(tmp_path / "predict" / "predictions.csv")
    assert len(predictions) == 20 and {row.grade for row in predictions} == {None}
    tested = {
        row.slide_id: row.probabilities for row in read_predictions(trained / "test" / "predictions.csv")
    }
    for row in predictions:
        if row.slide_id in tested:
            np.testing.assert_allclose(row.probabilities, tested[row.slide_id], atol=1e-6)


def test_other_tiles_than_those_of_training_are_refused(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    options = ["--cache", str(cache), "--mpp", "8", "--tile-size", "32", "--workers", "1"]
    assert main(["tile", str(study.manifest), *options]) == 0
    capsys.readouterr()
    code = main(["test", *study.options(trained), f"--data.cache={cache}"])
    assert code == 2
    err = capsys.readouterr().err
    assert "trained on other tiles (mpp 4.0 -> 8.0, tile_size_px 64 -> 32, stride_px 64 -> 32)" in err


def test_evaluation_in_chunks_is_evaluation_at_once(study: Study, trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    for size in (3, 500):
        root = tmp_path / str(size)
        assert (
            main(["test", *study.options(root), f"--data.chunk_size={size}", f"--ckpt_path={checkpoint}"])
            == 0
        )
    small, large = (read_predictions(tmp_path / size / "test" / "predictions.csv") for size in ("3", "500"))
    for here, there in zip(small, large, strict=True):
        np.testing.assert_allclose(here.probabilities, there.probabilities, atol=1e-5)
