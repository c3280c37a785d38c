from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from slidetl.cli import main
from slidetl.training.predictions import read_predictions
from tests.conftest import Study


def test_results_of_other_slides_are_kept(
    study: Study, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, a test of another hospital replaced that of the training's own patients without a word."""
    shutil.copytree(trained / "test", tmp_path / "test")
    before = {path.name: path.read_bytes() for path in (tmp_path / "test").iterdir()}
    one = read_predictions(tmp_path / "test" / "predictions.csv")[0].slide_id
    with study.manifest.open(newline="") as file:
        rows = [{**row, "path": str(study.manifest.parent / row["path"])} for row in csv.DictReader(file)]
    with (tmp_path / "m.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row for row in rows if row["slide_id"] == one)
    fewer = Study(tmp_path / "m.csv", study.cache)
    checkpoint = f"--ckpt_path={trained / 'logs' / 'version_0' / 'checkpoints' / 'best.ckpt'}"
    words = [*fewer.options(tmp_path), checkpoint, "--data.split_from=manifest"]
    for _ in range(2):  # the same slides again replace their results
        assert main(["test", *words]) == 0
        assert [row.slide_id for row in read_predictions(tmp_path / "test" / "predictions.csv")] == [one]
    kept = tmp_path / "test.1"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert not (tmp_path / "test.2").exists()
    assert f"earlier results, of other slides or another checkpoint, are in {kept} now" in caplog.text


@pytest.mark.parametrize("command", ["test", "predict"])
def test_results_of_a_share_of_the_slides_are_refused(
    command: str, study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, most slides were missing in metrics that looked whole."""
    checkpoint = f"--ckpt_path={trained / 'logs' / 'version_0' / 'checkpoints' / 'best.ckpt'}"
    words = [*study.options(tmp_path), checkpoint]
    assert main([command, *words, f"--trainer.limit_{command}_batches=0.5"]) == 2
    said = capsys.readouterr().err
    assert "slides were left out (slide-" in said and f"leave out trainer.limit_{command}_batches" in said
    assert not (tmp_path / command / "predictions.csv").exists()
    assert main([command, *words, "--trainer.fast_dev_run=true"]) == 0
    assert len(read_predictions(tmp_path / command / "predictions.csv")) == 1
