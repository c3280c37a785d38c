from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slidetl.cli import main
from slidetl.models.backbones import read_pretrained
from slidetl.training.checkpoint import read_checkpoint
from slidetl.training.drift import DriftReport, distances
from slidetl.training.grader import SlideGrader
from tests.conftest import Study
from tests.small import small_spec


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_distances_are_those_of_numpy_and_other_layers_are_left_out() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Linear(2, 2))
    anchors = {"0.weight": torch.randn(4, 3), "2.weight": torch.randn(3, 3), "3.weight": torch.zeros(2, 2)}
    found = distances(network, anchors)
    here, there = network.get_parameter("0.weight").detach().numpy(), anchors["0.weight"].numpy()
    assert found == {"0": pytest.approx((np.linalg.norm(here - there), np.linalg.norm(there)))}


def test_weights_read_for_the_training_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    grader, report = SlideGrader(small_spec()), DriftReport()
    net = grader.network.backbone.net
    grader.transfer.start(grader.network.backbone)
    trainer: Any = SimpleNamespace(ckpt_path=None, current_epoch=0, log_dir=None, is_global_zero=True)
    with monkeypatch.context() as patch:
        patch.setattr("slidetl.training.drift.pretrained_backbone", lambda backbone: pytest.fail("read"))
        report.on_train_start(trainer, grader)
    assert report.rows and all(apart == 0 for _, _, apart in report.rows)
    with torch.no_grad():
        net.get_parameter("conv_stem.weight").mul_(1.5)
    trainer.ckpt_path, trainer.current_epoch = "last.ckpt", 1  # resumed: the weights are trained ones
    report.on_train_start(trainer, grader)
    assert {layer: apart for _, layer, apart in report.rows}["conv_stem"] == pytest.approx(0.5)


@pytest.mark.slow
def test_a_fit_reports_how_far_each_layer_went(trained: Path) -> None:
    log = trained / "logs" / "version_0"
    rows = rows_of(log / "drift.csv")
    checkpoint = read_checkpoint(log / "checkpoints" / "last.ckpt")
    weights = read_pretrained(small_spec()).weights
    layers = sorted(key.removesuffix(".weight") for key in weights if weights[key].ndim > 1)
    for epochs in (0, 1, 2):
        assert sorted(row["layer"] for row in rows if row["epochs"] == str(epochs)) == layers
    for row in rows:
        key = f"{row['layer']}.weight"
        there, here = weights[key], checkpoint["state_dict"][f"network.backbone.net.{key}"]
        apart = float(row["relative_distance"])
        if row["epochs"] == "0":
            assert apart == 0
        elif int(row["epochs"]) == checkpoint["epoch"] + 1:
            assert apart == pytest.approx(((here - there).norm() / there.norm()).item(), rel=1e-4)
    last = [float(row["relative_distance"]) for row in rows if row["epochs"] == "2"]
    whole = [row["drift/backbone"] for row in rows_of(log / "metrics.csv") if row["drift/backbone"]]
    assert len(whole) == 2 and float(whole[0]) > 0 and min(last) < float(whole[1]) < max(last)
    assert (log / "drift.png").stat().st_size > 10_000


@pytest.mark.slow
def test_without_pretrained_weights_there_is_no_report(study: Study, tmp_path: Path) -> None:
    options = ["--model.transfer=slidetl.models.transfer.Scratch", "--model.backbone.pretrained=nowhere.pth"]
    assert main(["fit", *study.options(tmp_path), *options, "--trainer.max_epochs=1"]) == 0
    assert not list(tmp_path.rglob("drift.*"))
