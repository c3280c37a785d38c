"""The recipe on volumes by the real commands: local labels first, then patients."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from slidetl.cli import main
from slidetl.models.backbones import Backbone, weights_sha256
from slidetl.models.heads import NumberHead
from slidetl.models.spec import BackboneSpec
from slidetl.tiles.features import read_features, read_source
from slidetl.tiles.store import SlideCache
from slidetl.training.checkpoint import load_grader
from slidetl.training.predictions import read_predictions
from tests.volumes.studies import VolumeStudy

CONFIGS = Path(__file__).parents[2] / "configs" / "volumes"
EPOCHS = "--trainer.max_epochs=12"


@pytest.fixture(scope="module")
def source(nodules: VolumeStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the source task, fitted and tested."""
    root = tmp_path_factory.mktemp("source")
    options = ["--config", str(CONFIGS / "patches.yaml"), *nodules.options(root), "--data.batch_size=4"]
    assert main(["fit", *options, EPOCHS]) == 0
    assert main(["test", *options]) == 0
    return root


def best(root: Path) -> Path:
    return root / "logs" / "version_0" / "checkpoints" / "best.ckpt"


@pytest.mark.slow
def test_the_source_task_learns_grade_readers_and_millimetres(source: Path, nodules: VolumeStudy) -> None:
    metrics = json.loads((source / "test" / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.7
    assert list(metrics["intervals"]) == ["accuracy"]  # of fewer than five patients there is no other
    estimate, low, high = metrics["intervals"]["accuracy"]
    assert low <= estimate == pytest.approx(metrics["accuracy"]) and estimate <= high
    diameter = metrics["tasks"]["diameter"]
    assert diameter["n"] == metrics["n"] // 2 and 0 < diameter["mae"] < 5
    assert not diameter["intervals"]
    with (source / "test" / "predictions-diameter.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == metrics["n"]
    errors = [abs(float(row["predicted"]) - float(row["value"])) for row in rows if row["value"]]
    assert np.mean(errors) == pytest.approx(diameter["mae"])
    assert len(read_predictions(source / "test" / "predictions-malignancy.csv")) == metrics["n"]
    grader = load_grader(best(source))
    head, record = grader.tasks.heads[1], grader.record
    assert isinstance(head, NumberHead) and record is not None
    training = {slide.slide_id for slide in record.slides if slide.part == "train"}
    with nodules.manifest.open(newline="") as file:
        training_rows = [row for row in csv.DictReader(file) if row["slide_id"] in training]
    values = [float(row["diameter_mm"]) for row in training_rows if row["diameter_mm"]]
    assert float(head.mean) == pytest.approx(np.mean(values))
    assert float(head.std) == pytest.approx(np.std(values))


@pytest.mark.slow
def test_its_vectors_grade_patients_by_maximum_and_trees(
    source: Path, scans: VolumeStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--backbone",
        "conv3d_8",
        "--pretrained",
        str(best(source)),
        "--name",
        "source",
        "--device",
        "cpu",
    ]
    assert main(["embed", str(scans.cache), *words]) == 0
    cache = SlideCache.open(scans.cache / "s01.zarr")
    backbone = Backbone(BackboneSpec("conv3d_8", str(best(source))))
    backbone.load_pretrained()
    assert read_source(cache, "source").weights_sha256 == weights_sha256(backbone)
    assert weights_sha256(load_grader(best(source)).network.backbone) == weights_sha256(backbone)
    assert read_features(cache, "source").shape == (8, 64)
    output = tmp_path / "trees"
    words = ["--cache", str(scans.cache), "--features", "source", "--grades", "benign", "malignant"]
    words += ["--pool", "max", "--model", "trees", "--output", str(output)]
    capsys.readouterr()
    of_source = "slides take the part that their patient had in the training of the initial weights"
    with pytest.warns(UserWarning, match=of_source):
        assert main(["fit-features", str(scans.manifest), *words]) == 0
    assert "95 % intervals over patients: accuracy" in capsys.readouterr().out
    metrics = json.loads((output / "metrics.json").read_text())
    estimate, low, high = metrics["intervals"]["accuracy"]  # that of log loss may be a point: left out
    assert low <= estimate <= high and low < high and estimate == pytest.approx(metrics["accuracy"])
    words[words.index("max") :] = ["mean", "--model", "ridge", "--output", str(tmp_path / "ridge")]
    with pytest.warns(UserWarning, match=of_source):
        assert main(["fit-features", str(scans.manifest), *words, "--pretrained", str(best(source))]) == 0
    ridge, model = tmp_path / "ridge" / "checkpoints" / "ridge.ckpt", tmp_path / "ridge.pt"
    assert main(["export", str(ridge), "--output", str(model)]) == 0
    assert (
        main(["grade", str(model), str(scans.manifest.parent / "s03.mha"), "--force", "--device", "cpu"]) == 0
    )
    graded = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert graded["tiles"] == 8 and graded["explanation"]["unit"] == "grades"
    tested = {row.patient_id for row in read_predictions(output / "predictions.csv")}
    assert 2 <= len(tested) < 16
    both = [row for row in read_predictions(output / "predictions.csv") if row.patient_id == "p0"]
    assert len(both) in (0, 2)  # a patient with two series is on one side


@pytest.mark.slow
def test_attention_starts_from_the_source_and_leaves_as_one_file(
    source: Path,
    scans: VolumeStudy,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = ["--config", str(CONFIGS / "attention.yaml"), *scans.options(tmp_path), "--data.bag_size=4"]
    options.append(f"--model.backbone.pretrained={best(source)}")
    with pytest.warns(UserWarning, match="slides take the part that their patient had in the training"):
        assert main(["fit", *options, "--trainer.max_epochs=1"]) == 0
    assert main(["test", *options]) == 0
    assert "95 % intervals over patients: accuracy" in caplog.text
    assert len(read_predictions(tmp_path / "test" / "predictions.csv")) >= 3
    trained = load_grader(best(tmp_path))
    begun = load_grader(best(source)).network.backbone
    assert trained.network.backbone.lineage and trained.tile_spec is not None and trained.tile_spec.is_volume
    moved = max(
        float((one - other).detach().abs().max())
        for one, other in zip(trained.network.backbone.parameters(), begun.parameters(), strict=True)
    )
    assert 0 < moved < 0.05  # a short training away from the source's weights
    model, output = tmp_path / "model.pt", tmp_path / "graded"
    capsys.readouterr()
    assert main(["export", str(best(tmp_path)), "--output", str(model)]) == 0
    assert "patches of 16 voxels at 1 mm, -1000 to 400 HU" in capsys.readouterr().out
    series = scans.manifest.parent / "s02.mha"
    assert (
        main(["grade", str(model), str(series), "--output", str(output), "--force", "--device", "cpu"]) == 0
    )
    result = json.loads((output / "s02.json").read_text())
    assert result["tiles"] == 8 and sum(result["probabilities"]) == pytest.approx(1)
    with (output / "s02.patches.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    explained = result["explanation"]
    assert sum(float(row["contribution"]) for row in rows) == pytest.approx(
        explained["score"] - explained["baseline"], abs=1e-4
    )


def test_networks_of_slides_and_caches_of_volumes_do_not_meet(
    scans: VolumeStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*scans.options(tmp_path), "--data.grades=[a,b]", "--model.backbone.name=cbr_tiny"]
    assert main(["fit", *options, EPOCHS, "--model.transfer=slidetl.models.transfer.Scratch"]) != 0
    assert (
        "cbr_tiny takes tiles of slides, the cache has volumes; use a backbone such as"
        in capsys.readouterr().err
    )
    assert main(["embed", str(scans.cache), "--backbone", "tf_efficientnet_lite0"]) != 0
    assert "tf_efficientnet_lite0 takes tiles of slides, the cache has volumes" in capsys.readouterr().err
