from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from slidetl.cli import main
from slidetl.data.datasets import Bag
from slidetl.errors import UsageError
from slidetl.models.transfer import WarmRestart
from slidetl.tiles.grid import TileSpec
from slidetl.training.grader import SlideGrader
from slidetl.training.range_test import RangeResult, RangeTest, find_rate, steepest_fall
from tests.cli.test_training import SLURM_JOB
from tests.conftest import Study
from tests.small import small_spec

STEPS = 13
TILE_PX = 32  # the least that the small backbone takes


class SameBatch(pl.LightningDataModule):
    """The same three bags in every step: the loss depends on the weights alone."""

    tile_spec = TileSpec(mpp=4, tile_size_px=TILE_PX)
    batch_size = 3

    def train_dataloader(self) -> DataLoader[Bag]:
        generator = torch.Generator().manual_seed(5)
        bags: list[Bag] = [
            {
                "tiles": torch.randint(
                    0, 256, (2, 3, TILE_PX, TILE_PX), dtype=torch.uint8, generator=generator
                ),
                "mask": torch.ones(2, dtype=torch.bool),
                "grade": torch.tensor(grade),
                "readers": torch.tensor([grade]),
                "labels": {},
            }
            for grade in (0, 2, 4)
        ]
        return DataLoader(bags, batch_size=3)  # type: ignore[arg-type]


class Watched(SlideGrader):
    """Notes the rates of each step of the optimiser."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.seen = [
            *getattr(self, "seen", []),
            [group["lr"] for group in self.trainer.optimizers[0].param_groups],
        ]


class Lost(Watched):
    """Has no finite loss."""

    def training_step(self, *args: Any) -> torch.Tensor:
        return super().training_step(*args) * math.nan


def run(
    root: Path, tried: RangeTest, kind: type[Watched] = Watched, accumulate: int = 1, **options: Any
) -> tuple[Watched, RangeResult]:
    torch.manual_seed(0)
    grader = kind(small_spec(), transfer=WarmRestart(backbone_lr_scale=0.25), **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=root,
        max_epochs=accumulate * tried.steps,
        accumulate_grad_batches=accumulate,
    )
    return grader, find_rate(trainer, grader, SameBatch(), tried)


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*have no `val_dataloader`"
)


@pytest.mark.slow
def test_the_weights_come_back_and_nothing_is_left_behind(tmp_path: Path) -> None:
    grader, result = run(tmp_path, RangeTest(1e-4, 1e-1, STEPS))
    torch.manual_seed(0)
    fresh = SlideGrader(small_spec())
    fresh.transfer.start(fresh.network.backbone)
    for (name, value), there in zip(grader.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(value, there), name
    assert not list(tmp_path.iterdir())
    assert len(result.rates) == len(result.losses) == STEPS
    assert np.ptp(result.losses) > 0.1  # it did train


@pytest.mark.slow
def test_every_group_keeps_its_rate_relative_to_the_new_layers(tmp_path: Path) -> None:
    grader, result = run(tmp_path, RangeTest(1e-5, 1e-2, STEPS), lr_scale_with_batch=True)
    groups = grader.parameter_groups(1.0)
    assert {group["lr"] for group in groups} == {0.25, 1.0}
    assert result.rates[0] == pytest.approx(1e-5) and result.rates[-1] == pytest.approx(1e-2, rel=0.01)
    for tried, used in zip(result.rates, grader.seen, strict=True):
        # Three slides in a step, where the rates are meant for four.
        assert used == pytest.approx([tried * 0.75 * group["lr"] for group in groups])


@pytest.mark.slow
def test_weights_that_rest_have_a_level_loss(tmp_path: Path) -> None:
    _, result = run(tmp_path, RangeTest(1e-12, 1e-11, STEPS))
    assert result.losses == pytest.approx([result.losses[0]] * STEPS, rel=1e-5)
    assert result.suggestion is None


def test_gradients_of_several_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected trainer\.accumulate_grad_batches 1, not 2"):
        run(tmp_path, RangeTest(1e-4, 1e-1, STEPS), accumulate=2)


def test_losses_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"found {STEPS} that are not finite"):
        run(tmp_path, RangeTest(1e-4, 1e-1, STEPS), Lost)


def test_the_steepest_fall_is_per_factor_of_the_rate() -> None:
    rates = np.geomspace(1e-6, 1, 61)
    losses = 2 - 1 / (1 + np.exp(-3 * np.log(rates / 1e-3)))  # falls from 2 to 1, fastest at 1e-3
    losses[:10] = np.linspace(9, 2, 10)  # not looked at
    losses[55:] = math.nan
    assert steepest_fall(rates.tolist(), losses.tolist()) == pytest.approx(1e-3)
    assert steepest_fall(rates.tolist(), np.arange(61.0).tolist()) is None
    level = 1.5 + 1e-7 * np.random.default_rng(0).normal(size=61)
    assert steepest_fall(rates.tolist(), level.tolist()) is None
    assert steepest_fall(rates[:11].tolist(), losses[:11].tolist()) is None


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(UsageError, match=r"not 0\.1, 0\.01, 100"):
        RangeTest(lowest=0.1, highest=0.01)
    with pytest.raises(UsageError, match="at least 12"):
        RangeTest(steps=11)


@pytest.mark.slow
def test_the_command_writes_a_table_and_a_picture(
    study: Study,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in SLURM_JOB.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of a fit")  # Lightning would go on from it
    options = ["--range.steps=12", "--range.lowest=1e-4", "--data.bag_size=2"]
    assert main(["find-lr", *study.options(tmp_path), *options]) == 0
    with (tmp_path / "find-lr" / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and float(rows[0]["lr"]) == 1e-4
    assert (tmp_path / "find-lr" / "loss.png").stat().st_size > 5_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["find-lr", "hpc_ckpt_1.ckpt"]
    assert sorted(path.name for path in (tmp_path / "find-lr").iterdir()) == ["loss.csv", "loss.png"]
    assert str(tmp_path / "find-lr") in capsys.readouterr().out
