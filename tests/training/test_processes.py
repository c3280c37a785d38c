"""However many processes compute, and whether or not they were interrupted, the figures are the same."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slidetl.training.predictions import read_predictions
from tests.conftest import Study
from tests.data.test_datamodule import rewrite
from tests.training.process_runs import RESUMED_AT, STEPS_AN_EPOCH


@pytest.fixture(scope="module")
def runs(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs."""
    folder = tmp_path_factory.mktemp("processes")
    grades = [str(number % 5) for number in range(20)]
    parts = ["train"] * 10 + ["val"] * 3 + ["test"] * 7
    rewrite(study, folder / "manifest.csv", split=parts, grade=grades)
    rewrite(study, folder / "lone.csv", split=["train"] * 17 + ["val"] * 2 + ["test"], grade=grades)
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.process_runs"]
    done = subprocess.run(
        [*command, str(study.cache.parent), str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def logged(root: Path) -> list[dict[str, str]]:
    """The figures of each epoch."""
    with (root / "logs" / "version_0" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    merged: dict[str, dict[str, str]] = {}
    for row in rows:
        merged.setdefault(row["epoch"], {}).update({name: value for name, value in row.items() if value})
    return list(merged.values())


@pytest.mark.parametrize(("name", "step"), [(name, step) for name in RESUMED_AT for step in RESUMED_AT[name]])
def test_a_training_resumed_in_mid_epoch_is_the_undisturbed_one(runs: Path, name: str, step: int) -> None:
    whole, resumed = runs / name, runs / f"{name}, resumed at {step}"
    last = f"step={2 * STEPS_AN_EPOCH}.ckpt"
    # Not weights_only: these runs are from Python, and Lightning keeps their objects among the parameters.
    here, there = (torch.load(root / last, weights_only=False) for root in (whole, resumed))
    for key, value in here["state_dict"].items():
        assert torch.equal(value, there["state_dict"][key]), key
    moments = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (here, there))
    for one, other in zip(*(state.values() for state in moments), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
    epochs, again = logged(whole), logged(resumed)
    assert len(epochs) == 2 and {"train/loss", "penalty/weights", "val/qwk", "val/loss"} <= epochs[0].keys()
    assert again == epochs[step // STEPS_AN_EPOCH :]


def test_workers_change_nothing(runs: Path) -> None:
    assert logged(runs / "alone") == logged(runs / "alone with a worker")


def test_each_slide_is_counted_once_by_however_many_processes(runs: Path) -> None:
    predictions = read_predictions(runs / "tested by 1" / "test" / "predictions.csv")
    assert len(predictions) == 7
    for file in ("predictions.csv", "metrics.json"):
        alone, shared = (runs / name / "test" / file for name in ("tested by 1", "tested by 3"))
        assert alone.read_bytes() == shared.read_bytes(), file


def test_a_process_may_have_no_slide(runs: Path) -> None:
    alone, shared = (runs / name / "test" / "predictions.csv" for name in ("lone", "lone, tested by 3"))
    assert alone.read_bytes() == shared.read_bytes()
    assert len(read_predictions(alone)) == 1


@pytest.mark.slow
def test_nodes_joined_by_torchrun_count_each_slide_once(study: Study, trained: Path, tmp_path: Path) -> None:
    """Two nodes, which happen to be one machine, as ``scripts/slurm/fit.sbatch`` says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    command = [*torchrun, "-m", "slidetl", "test", *study.options(tmp_path)]
    command += ["--ckpt_path", str(trained / "logs" / "version_0" / "checkpoints" / "best.ckpt")]
    command += ["--trainer.strategy=ddp", "--trainer.num_nodes=2", "--trainer.devices=1"]
    nodes = [
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        said = [node.communicate(timeout=900)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "MEMBER: 2/2" in "".join(said)
    for file in ("predictions.csv", "metrics.json"):
        assert (tmp_path / "test" / file).read_bytes() == (trained / "test" / file).read_bytes()
