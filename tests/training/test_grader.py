from __future__ import annotations

import csv
import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.metrics import log_loss

from slidetl.cli import main
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.datasets import Bag, BagDataset
from slidetl.errors import CheckpointError
from slidetl.evaluation.calibration import judged_probabilities
from slidetl.evaluation.metrics import grade_metrics
from slidetl.models.backbones import Backbone, read_pretrained, weights_sha256
from slidetl.models.transfer import WarmRestart
from slidetl.training.checkpoint import load_grader, read_checkpoint
from slidetl.training.grader import SlideGrader
from slidetl.training.predictions import read_predictions
from slidetl.training.schedules import OneCycle
from tests.conftest import Study
from tests.small import small_spec


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


@pytest.mark.slow
def test_same_seed_same_figures(study: Study, trained: Path, tmp_path: Path) -> None:
    assert main(["fit", *study.options(tmp_path), "--trainer.max_epochs=2"]) == 0
    assert main(["test", *study.options(tmp_path)]) == 0
    again = (tmp_path / "test" / "predictions.csv").read_bytes()
    assert again == (trained / "test" / "predictions.csv").read_bytes()
    other = tmp_path / "other"
    assert main(["fit", *study.options(other), "--trainer.max_epochs=1", "--seed_everything=1"]) == 0
    assert main(["test", *study.options(other)]) == 0
    assert again != (other / "test" / "predictions.csv").read_bytes()


@pytest.mark.slow
def test_bags_are_read_while_the_weights_are(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, read, start = tmp_path / "note", BagDataset.__getitem__, WarmRestart.start
    seen = []

    def noted(self: BagDataset, index: tuple[int, int]) -> Bag:
        note.touch()  # by a worker, which is forked
        return read(self, index)

    def waiting(self: WarmRestart, backbone: Backbone) -> None:
        deadline = time.monotonic() + 60
        while not note.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(note.exists())
        start(self, backbone)

    monkeypatch.setattr(BagDataset, "__getitem__", noted)
    monkeypatch.setattr(WarmRestart, "start", waiting)
    options = ["--data.num_workers=1", "--trainer.max_epochs=1"]
    assert main(["fit", *study.options(tmp_path), *options]) == 0
    assert seen == [True]


@pytest.mark.slow
def test_checkpoint_reloads_as_plain_values_and_grades_alike(study: Study, trained: Path) -> None:
    path = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    checkpoint = read_checkpoint(path)
    grader = load_grader(path)
    assert not grader.training
    for key, value in grader.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][key])
    assert grader.tile_spec is not None and grader.tile_spec.mpp == 4
    assert grader.transfer.start.__qualname__.startswith("WarmRestart")


@pytest.mark.slow
def test_a_training_goes_on_from_the_middle_of_an_epoch(study: Study, tmp_path: Path) -> None:
    # A checkpoint each two steps, by a configuration here and by words there; an epoch has three.
    config = tmp_path / "often.yaml"
    config.write_text(
        """
trainer:
  callbacks:
    - class_path: pytorch_lightning.callbacks.ModelCheckpoint
      init_args: {every_n_train_steps: 2, save_top_k: -1, filename: "{step}"}
"""
    )
    often = ["--trainer.callbacks+=pytorch_lightning.callbacks.ModelCheckpoint"]
    often += [
        f"--trainer.callbacks.{word}"
        for word in ("every_n_train_steps=2", "save_top_k=-1", "filename={step}")
    ]
    whole, two = ["--config", str(config), *study.options(tmp_path / "whole")], "--trainer.max_epochs=2"
    assert main(["fit", *whole, two]) == 0
    kept = tmp_path / "whole" / "logs" / "version_0" / "checkpoints"
    assert {path.name for path in kept.iterdir()} > {f"step={step}.ckpt" for step in (2, 4, 6)}
    assert main(["test", *whole]) == 0  # which finds the best beside them
    end = read_checkpoint(kept / "step=6.ckpt")
    assert end["epoch"] == 1
    options = [*study.options(tmp_path / "again"), two]
    assert main(["fit", *options, *often, f"--ckpt_path={kept / 'step=2.ckpt'}"]) == 0
    again = read_checkpoint(tmp_path / "again" / "logs" / "version_0" / "checkpoints" / "step=6.ckpt")
    assert all(torch.equal(value, again["state_dict"][key]) for key, value in end["state_dict"].items())


@pytest.mark.slow
def test_predictions_name_the_fold(study: Study, trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    options = [*study.options(tmp_path), f"--ckpt_path={checkpoint}", "--data.fold=r2f3"]
    for command in ("test", "predict"):
        assert main([command, *options]) == 0
        with (tmp_path / command / "predictions.csv").open(newline="") as file:
            assert {row["fold"] for row in csv.DictReader(file)} == {"r2f3"}
    with (trained / "test" / "predictions.csv").open(newline="") as file:
        assert {row["fold"] for row in csv.DictReader(file)} == {""}


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert "trained on other tiles: the cache was made with mpp 8.0 (wanted: 4.0), tile_size_px 32" in err


@pytest.mark.slow
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


def test_stored_batch_statistics_stay_as_they_are(trained: Path) -> None:
    grader = load_grader(trained / "logs" / "version_0" / "checkpoints" / "last.ckpt")
    weights = read_pretrained(grader.network.backbone.spec).weights
    state = grader.network.backbone.net.state_dict()
    running = [key for key in weights if "running_" in key]
    assert running and all(torch.equal(state[key], weights[key]) for key in running)
    assert any(not torch.equal(state[key], weights[key]) for key in weights)


@pytest.mark.slow
def test_statistics_of_the_batches_are_learned_from_scratch(study: Study, tmp_path: Path) -> None:
    options = ["--model.transfer=slidetl.models.transfer.Scratch", "--trainer.max_epochs=1"]
    assert main(["fit", *study.options(tmp_path), *options]) == 0
    grader = load_grader(tmp_path / "logs" / "version_0" / "checkpoints" / "last.ckpt")
    state = grader.network.backbone.net.state_dict()
    assert not any((value == 0).all() for key, value in state.items() if key.endswith("running_mean"))


@pytest.mark.slow
def test_an_evaluation_cut_short_leaves_nothing_behind(study: Study, trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    grader = load_grader(checkpoint)
    data = SlideDataModule(str(study.manifest), str(study.cache), num_workers=0, chunk_size=7)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        limit_test_batches=8,
    )
    graded = []
    for _ in range(2):
        trainer.test(grader, data, verbose=False)
        assert grader.tested is not None
        graded.append(grader.tested.predictions)
    assert graded[0] == graded[1]
    whole = {row.slide_id: row.tiles for row in read_predictions(trained / "test" / "predictions.csv")}
    some = graded[0]
    assert some and all(row.tiles == whole[row.slide_id] for row in some)
    # A share, not a number: which of the two a whole number is parsed as depends on what was imported before.
    few = ["--data.chunk_size=1", "--trainer.limit_test_batches=0.02"]
    assert main(["test", *study.options(trained), *few]) == 2


def test_pooling_and_head_stay_in_float32_under_autocast(trained: Path) -> None:
    grader = load_grader(trained / "logs" / "version_0" / "checkpoints" / "best.ckpt")
    tiles = torch.randint(0, 256, (1, 4, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        embeddings = grader.network.embed(tiles)
        logits, _ = grader._evaluation.grade(embeddings, torch.ones(1, 4, dtype=torch.bool))
    assert embeddings.dtype == torch.bfloat16 and logits.dtype == torch.float32


@pytest.mark.slow
def test_two_processes_train_together(study: Study, tmp_path: Path) -> None:
    """Lightning starts the second by the words of the first."""
    options = [*study.options(tmp_path), "--trainer.devices=2", "--trainer.strategy=ddp"]
    command = [sys.executable, "-W", "ignore", "-m", "slidetl", "fit", *options, "--trainer.max_epochs=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr
    assert "2 processes, 2 x 4 slides per step, at the learning rate 0.001 of one process" in done.stderr
    checkpoint = read_checkpoint(tmp_path / "logs" / "version_0" / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 2  # ten slides, four to a step of each process


def test_what_a_training_needs_can_be_sent_to_a_process_that_is_spawned(study: Study) -> None:
    data = SlideDataModule(str(study.manifest), str(study.cache), num_workers=0)
    for value in (SlideGrader(transfer=WarmRestart(), schedule=OneCycle()), data):
        again = pickle.loads(pickle.dumps(value))
        assert again.hparams == value.hparams


@pytest.mark.slow
def test_a_resumed_training_keeps_its_model(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = trained / "logs" / "version_0" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    assert main(["fit", *study.options(tmp_path), f"--ckpt_path={last}", "--model.lr=0.5"]) == 2
    assert "was trained with lr 0.001, the configuration says 0.5" in capsys.readouterr().err
    grades = "--data.grades=[a,b,c,d,e]"
    assert main(["test", *study.options(tmp_path), f"--ckpt_path={last}", grades]) == 2
    assert "was trained with grades" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_tile_is_one_line_from_a_worker_too(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(study.cache, cache)
    for shard in cache.glob("*.zarr/tiles/c/*/*/*/*"):
        content = bytearray(shard.read_bytes())
        content[50] ^= 0xFF
        shard.write_bytes(content)
    capsys.readouterr()
    options = ["--data.num_workers=1", f"--data.cache={cache}", f"--trainer.default_root_dir={trained}"]
    assert main(["test", *study.options(trained), *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("slidetl: error:") and "tile" in last


@pytest.mark.slow
def test_mixed_precision_trains_and_tests(study: Study, tmp_path: Path) -> None:
    options = [*study.options(tmp_path), "--trainer.precision=bf16-mixed"]
    assert main(["fit", *options, "--trainer.max_epochs=1"]) == 0
    assert main(["test", *options]) == 0
    assert len(read_predictions(tmp_path / "test" / "predictions.csv")) >= 4


@pytest.mark.slow
def test_penalties_are_logged_and_the_reference_is_held_to_its_hash(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.pth"
    state = read_pretrained(small_spec()).weights
    torch.save(state, weights)
    options = [
        *study.options(tmp_path),
        "--model.transfer=slidetl.models.transfer.SharedBoth",
        "--model.transfer.layers=[blocks.0, blocks.1]",
        f"--model.backbone.pretrained={weights}",
    ]
    assert main(["fit", *options, "--trainer.max_epochs=1"]) == 0
    log = tmp_path / "logs" / "version_0"
    with (log / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("penalty/weights", "penalty/activations"):
        assert [0 < float(row[name]) < 10 for row in rows if row[name]] == [True]
    last = log / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(last)
    assert checkpoint["reference"].keys() == {"sha256", "attention"}
    assert checkpoint["hyper_parameters"]["transfer"]["init_args"]["layers"] == ["blocks.0", "blocks.1"]
    assert not any("reference" in key for key in checkpoint["state_dict"])
    resume = ["fit", *options, "--trainer.max_epochs=2", f"--ckpt_path={last}"]
    assert main(resume) == 0
    assert read_checkpoint(tmp_path / "logs" / "version_1" / "checkpoints" / "last.ckpt")["epoch"] == 1
    state["conv_stem.weight"] += 1e-3
    torch.save(state, weights)
    capsys.readouterr()
    assert main(resume) == 2
    assert "the training leaned on pretrained weights with sha256" in capsys.readouterr().err
    assert main(["test", *options, f"--ckpt_path={last}"]) == 0  # it needs no reference


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": "evilmod.Head"},
        {"layers": [{"class_path": "evilmod.Head"}]},
        {"start_from": {"class_path": "evilmod.Head"}},
        {"unknown": "evilmod.Head"},
    ],
)
def test_a_checkpoint_has_text_only_where_a_strategy_takes_text(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    transfer = {
        "class_path": "slidetl.models.transfer.SharedBoth",
        "init_args": {"layers": ["a.b"], "start_from": "random"},
    }
    path = tmp_path / "c.ckpt"
    torch.save({"hyper_parameters": {"transfer": transfer}, "state_dict": {}}, path)
    assert read_checkpoint(path)["state_dict"] == {}
    torch.save(
        {"hyper_parameters": {"transfer": {**transfer, "init_args": arguments}}, "state_dict": {}}, path
    )
    with pytest.raises(CheckpointError, match="expected plain numbers as init_args of transfer"):
        read_checkpoint(path)


@pytest.mark.slow
def test_head_first_leaves_the_backbone_alone_in_the_first_epoch(study: Study, tmp_path: Path) -> None:
    options = [
        "--model.transfer=slidetl.models.transfer.WarmRestart",
        "--model.transfer.head_first_epochs=1",
        "--checkpoint.save_top_k=-1",
    ]
    weights = read_pretrained(small_spec()).weights
    for epochs, moved in ((1, False), (2, True)):
        root = tmp_path / str(epochs)
        assert main(["fit", *study.options(root), *options, f"--trainer.max_epochs={epochs}"]) == 0
        state = read_checkpoint(root / "logs" / "version_0" / "checkpoints" / "last.ckpt")["state_dict"]
        same = [torch.equal(state[f"network.backbone.net.{key}"], value) for key, value in weights.items()]
        assert all(same) != moved


def test_predictions_say_whose_they_are_and_by_which_weights(trained: Path) -> None:
    grader = load_grader(trained / "logs" / "version_0" / "checkpoints" / "best.ckpt")
    rows = read_predictions(trained / "test" / "predictions.csv")
    assert {row.checkpoint for row in rows} == {weights_sha256(grader.network)}
    assert all(row.site for row in rows)
    figures = json.loads((trained / "test" / "metrics.json").read_text())
    probabilities = np.array([row.probabilities for row in rows])
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=0, atol=1e-12)
    true = [row.grade for row in rows if row.grade is not None]
    assert figures["log_loss"] == pytest.approx(log_loss(true, probabilities, labels=range(5)), rel=1e-9)
    # What was written has every digit: the same comes out to the last one.
    assert figures | json.loads(json.dumps(judged_probabilities(true, probabilities))) == figures


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize("loads", [True, False])
def test_from_python_too_the_recorded_parts_are_tested(
    loads: bool, study: Study, trained: Path, tmp_path: Path
) -> None:
    path = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    tested = {row.slide_id for row in read_predictions(trained / "test" / "predictions.csv")}

    def test(cache: Path, seed: int) -> set[str]:
        data = SlideDataModule(str(study.manifest), str(cache), num_workers=0, seed=seed)
        data.setup("fit")  # by a seed of its own, as for another training
        assert {slide.row.slide_id for slide in data.slides["test"]} != tested
        grader = load_grader(path)
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
        )
        if loads:
            grader.record = None
        trainer.test(grader, data, ckpt_path=path if loads else None, verbose=False, weights_only=True)
        assert grader.tested is not None
        return {row.slide_id for row in grader.tested.predictions}

    assert test(study.cache, seed=1) == tested
    shutil.copytree(study.cache, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "slide-00.zarr")
    with (
        pytest.warns(UserWarning, match="1 of 20 slides are not in the cache"),
        pytest.raises(CheckpointError, match="1 gone: slide-00"),
    ):
        test(tmp_path / "cache", seed=1)
