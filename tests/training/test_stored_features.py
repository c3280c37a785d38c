"""Trainings on stored features, alone or beside tiles that go through the backbone."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slidetl.cli import main
from slidetl.data.augment import Augmentation
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.record import read_record
from slidetl.errors import UsageError
from slidetl.models.backbones import read_pretrained
from slidetl.tiles.features import read_features, read_source, write_features
from slidetl.tiles.store import SlideCache
from slidetl.training.checkpoint import load_grader, read_checkpoint
from slidetl.training.predictions import read_predictions
from tests.conftest import Study
from tests.small import SMALL, small_embed, small_spec

FROZEN = "--model.transfer=slidetl.models.transfer.FrozenFeatures"
PLAIN = ("flips=false", "brightness=0", "contrast=0", "saturation=0")


@pytest.fixture(scope="module")
def embedded(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The study with the embeddings of the small backbone, in a cache of its own."""
    cache = tmp_path_factory.mktemp("embedded") / "cache"
    shutil.copytree(study.cache, cache)
    assert main(["embed", str(cache), *small_embed(), "--name", "plain", "--device", "cpu"]) == 0
    return Study(study.manifest, cache)


def fit_and_test(study: Study, root: Path, *options: str, epochs: int = 2) -> tuple[list[float], np.ndarray]:
    """The losses of the epochs, and the probabilities of the test."""
    words = [*study.options(root), f"--trainer.max_epochs={epochs}", *options]
    if "--data.bag_size=0" not in options:  # refused where no tile is read
        words += [f"--data.augmentation.{change}" for change in PLAIN]
    assert main(["fit", *words]) == 0
    assert main(["test", *words]) == 0
    with (root / "logs" / "version_0" / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    rows = read_predictions(root / "test" / "predictions.csv")
    return losses, np.array([row.probabilities for row in rows])


@pytest.mark.slow
def test_a_frozen_backbone_trains_alike_on_tiles_on_features_and_on_both(
    embedded: Study, tmp_path: Path
) -> None:
    whole = fit_and_test(embedded, tmp_path / "tiles", FROZEN, "--data.bag_size=60")
    stored = fit_and_test(embedded, tmp_path / "stored", FROZEN, "--data.bag_size=0", "--data.features=plain")
    both = fit_and_test(embedded, tmp_path / "both", FROZEN, "--data.bag_size=8", "--data.features=plain")
    for losses, probabilities in (stored, both):  # stored in float16
        np.testing.assert_allclose(losses, whole[0], rtol=2e-3)
        np.testing.assert_allclose(probabilities, whole[1], atol=2e-3)


def test_tasks_of_tiles_learn_from_stored_features_alone(embedded: Study, tmp_path: Path) -> None:
    """Before, no stored tile had a label: the head of the task stayed at random."""
    tasks = (
        "--model.tasks=[{name: tiles, column: grade, of_tiles: true, grades: ['0', '1', '2', '3', '4']},"
        " {name: slides, column: grade, grades: ['0', '1', '2', '3', '4']}]"
    )

    def losses(root: Path, *options: str) -> list[list[float]]:
        assert main(["fit", *embedded.options(root), FROZEN, tasks, "--trainer.max_epochs=2", *options]) == 0
        with (root / "logs" / "version_0" / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["train/loss"]]
        return [[float(row[f"train/{task}/loss"]) for row in rows] for task in ("tiles", "slides")]

    plain = [f"--data.augmentation.{change}" for change in PLAIN]
    on_tiles = losses(tmp_path / "tiles", "--data.bag_size=60", *plain)
    on_features = losses(tmp_path / "stored", "--data.bag_size=0", "--data.features=plain")
    np.testing.assert_allclose(on_features, on_tiles, rtol=5e-3)


def test_an_augmentation_without_an_effect_is_no_reason_not_to_resume(embedded: Study) -> None:
    """Versions before trained with it, and without it they refuse as with other options."""
    words: dict[str, Any] = {"bag_size": 0, "features": "plain"}
    new = SlideDataModule(str(embedded.manifest), str(embedded.cache), **words)
    new.setup("fit")
    data = SlideDataModule(str(embedded.manifest), str(embedded.cache), augmentation=Augmentation(), **words)
    with pytest.raises(UsageError, match=r"data\.augmentation would have no effect"):
        data.setup("fit")
    data.past = new.record
    data.setup("fit")
    assert data.record.slides == new.record.slides


@pytest.mark.slow
def test_fresh_tiles_train_the_backbone_beside_stored_ones(embedded: Study, tmp_path: Path) -> None:
    guided = "--data.sampling=slidetl.data.sampling.AttentionGuided"
    every = "--checkpoint.save_top_k=-1"
    losses, _ = fit_and_test(embedded, tmp_path, "--data.features=plain", guided, every)
    assert len(losses) == 2
    last = tmp_path / "logs" / "version_0" / "checkpoints" / "last.ckpt"
    state, weights = load_grader(last).state_dict(), read_pretrained(small_spec()).weights
    assert not torch.equal(state["network.backbone.net.conv_stem.weight"], weights["conv_stem.weight"])
    attention = read_checkpoint(last)["SlideDataModule"]["attention"]
    assert attention.sum().item() == pytest.approx(10, rel=1e-4)  # ten training slides, one each


@pytest.mark.slow
def test_features_of_other_weights_are_refused(
    embedded: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.pth"
    state = read_pretrained(small_spec()).weights
    state["conv_stem.weight"] += 1e-3
    torch.save(state, weights)
    options = [*embedded.options(tmp_path), "--data.features=plain", "--trainer.max_epochs=1"]
    for change in (
        [f"--model.backbone.pretrained={weights}"],
        ["--model.transfer=slidetl.models.transfer.Scratch"],
    ):
        assert main(["fit", *options, *change]) == 2
        assert "run 'slidetl embed' with the same backbone and pretrained weights" in capsys.readouterr().err


@pytest.mark.slow
def test_features_of_another_architecture_with_equal_weights_are_refused(
    embedded: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(embedded.cache, tmp_path / "cache")
    for path in (tmp_path / "cache").glob("*.zarr"):
        cache = SlideCache.open(path)
        source = replace(read_source(cache, "plain"), backbone=f"{SMALL}_silu")
        write_features(cache, {"plain": (source, read_features(cache, "plain"))})
    study = Study(embedded.manifest, tmp_path / "cache")
    options = [*study.options(tmp_path), "--data.features=plain", "--trainer.max_epochs=1"]
    assert main(["fit", *options]) == 2
    assert f"are of {SMALL}_silu, the backbone is {SMALL}, with equal weights" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_goes_on_with_the_features_that_it_began_with(
    embedded: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(embedded.cache, cache)
    options = [*embedded.options(tmp_path), f"--data.cache={cache}", "--data.features=plain"]
    assert main(["fit", *options, "--trainer.max_epochs=1"]) == 0
    last = tmp_path / "logs" / "version_0" / "checkpoints" / "last.ckpt"
    resume = ["fit", *options, "--trainer.max_epochs=2", f"--ckpt_path={last}"]
    assert main(resume) == 0  # the backbone has moved since
    state = read_pretrained(small_spec()).weights
    state["conv_stem.weight"] += 1e-3
    torch.save(state, tmp_path / "weights.pth")
    again = ["--name", "plain", *small_embed(), "--pretrained", str(tmp_path / "weights.pth"), "--overwrite"]
    assert main(["embed", str(cache), "--device", "cpu", *again]) == 0
    capsys.readouterr()
    assert main(resume) == 2
    assert "data.features 'plain' are of weights" in capsys.readouterr().err


@pytest.mark.slow
def test_features_of_a_checkpoint_bring_its_patients(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    record = read_record(read_checkpoint(best))
    assert record is not None
    parts = {slide.slide_id: slide.part for slide in record.slides}
    cache = tmp_path / "cache"
    shutil.copytree(study.cache, cache)
    embed = ["embed", str(cache), "--backbone", SMALL, "--pretrained", str(best), "--name", "own"]
    assert main([*embed, "--device", "cpu"]) == 0
    fit = ["fit-features", str(study.manifest), "--cache", str(cache), "--features", "own"]
    with pytest.warns(UserWarning, match="slides take the part that their patient had in the training"):
        assert (
            main([*fit, "--seed", "1", "--output", str(tmp_path / "ridge"), "--pretrained", str(best)]) == 0
        )
    tested = {row.slide_id for row in read_predictions(tmp_path / "ridge" / "predictions.csv")}
    assert tested == {name for name in parts if parts[name] == "test"}
    ridge = read_record(read_checkpoint(tmp_path / "ridge" / "checkpoints" / "ridge.ckpt"))
    assert ridge is not None and set(ridge.before) == set(record.used)
    for path in cache.glob("*.zarr"):  # as an earlier version stored them, without the record
        stored_in = SlideCache.open(path)
        unnamed = replace(read_source(stored_in, "own"), record="")
        write_features(stored_in, {"own": (unnamed, read_features(stored_in, "own"))})
    with pytest.warns(UserWarning, match="slides take the part that their patient had in the training"):
        words = [*fit, "--seed", "1", "--output", str(tmp_path / "unnamed"), "--pretrained", str(best)]
        assert main(words) == 0
    again = read_record(read_checkpoint(tmp_path / "unnamed" / "checkpoints" / "ridge.ckpt"))
    assert again is not None and again.before == ridge.before
    assert main([*embed, "--device", "cpu"]) == 0
    stored = [FROZEN, "--model.backbone.name=stored_1024", "--data.features=own", "--data.bag_size=0"]
    options = [*Study(study.manifest, cache).options(tmp_path / "again"), *stored, "--data.every_grade=false"]
    with pytest.warns(UserWarning, match="slides take the part that their patient had in the training"):
        assert main(["fit", *options, "--data.seed=1", "--trainer.max_epochs=1"]) == 0
    kept = load_grader(tmp_path / "again" / "logs" / "version_0" / "checkpoints" / "last.ckpt").record
    assert kept is not None and {slide.slide_id: slide.part for slide in kept.slides} == parts

    first = next(name for name in parts if parts[name] == "train")
    moved = tmp_path / "moved.csv"
    with study.manifest.open(newline="") as file:
        rows = [{**row, "path": str(study.manifest.parent / row["path"])} for row in csv.DictReader(file)]
    with moved.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *(() if "split" in rows[0] else ("split",))])
        writer.writeheader()
        for row in rows:
            name = row["slide_id"]
            writer.writerow({**row, "split": "test" if name == first else parts[name]})
    capsys.readouterr()
    assert main([fit[0], str(moved), *fit[2:], "--output", str(tmp_path / "out")]) == 2
    seen = f"trained or chosen on 1 of the slides of the test part, or on their patients: {first};"
    assert f"the network of the features was {seen}" in capsys.readouterr().err
    options = [*Study(moved, cache).options(tmp_path / "fit"), "--data.every_grade=false"]
    assert main(["fit", *options, *stored]) == 2
    assert f"the initial weights were {seen}" in capsys.readouterr().err

    shutil.rmtree(cache / "records")
    assert main([*fit, "--output", str(tmp_path / "out")]) == 2
    assert "run 'slidetl embed' again" in capsys.readouterr().err
    assert main([*embed, "--device", "cpu"]) == 0
    assert "0 embedded, 20 there already" in capsys.readouterr().out


@pytest.mark.slow
def test_features_are_not_added_to_a_training_that_had_none(
    embedded: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(trained / "logs" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["options"] = {}  # as of a training from Python
    torch.save(checkpoint, tmp_path / "last.ckpt")
    options = [*embedded.options(tmp_path), "--trainer.max_epochs=3", f"--ckpt_path={tmp_path / 'last.ckpt'}"]
    assert main(["fit", *options, "--data.features=plain"]) == 2
    assert "was trained without stored features and cannot go on with them" in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_meant_is_refused(
    embedded: Study, study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = "--data.bag_size=0"
    assert main(["fit", *embedded.options(tmp_path), none]) == 2
    assert "data.bag_size must be at least 1, not 0" in capsys.readouterr().err
    assert main(["fit", *embedded.options(tmp_path), none, "--data.features=plain"]) == 2
    assert "nothing goes through the backbone, but the strategy trains it" in capsys.readouterr().err
    assert main(["fit", *study.options(tmp_path), none, FROZEN, "--data.features=plain"]) == 2
    assert "no such features, there are: none; make it with 'slidetl embed'" in capsys.readouterr().err
