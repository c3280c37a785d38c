from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from slidetl.training.waiting import EpochTimes, WaitingReport, describe_times

READ_S, STEP_S, EVALUATE_S, BOUNDARY_S = 0.5, 0.25, 4.0, 8.0


class Clock:
    """The time as the report sees it: it passes only where a piece of work says so."""

    now = 0.0


class Slow(Dataset[torch.Tensor]):
    """Four items, each of which takes a while."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        self.clock.now += self.seconds
        return torch.zeros(1)


class Sleeper(pl.LightningModule):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.clock.now += STEP_S
        loss: torch.Tensor = self.layer(batch).sum()
        return loss

    def validation_step(self, batch: torch.Tensor) -> None:
        self.clock.now += EVALUATE_S

    def on_train_epoch_end(self) -> None:
        self.clock.now += BOUNDARY_S

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*in eval mode at the start")
@pytest.mark.parametrize("every", [1.0, 0.5])
def test_waiting_and_computing_are_told_apart(
    tmp_path: Path, every: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    fake = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr("slidetl.training.waiting.time", fake)
    report = WaitingReport()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=every,
        limit_val_batches=1,
        callbacks=[report],
        default_root_dir=tmp_path,
    )
    trainer.fit(Sleeper(clock), DataLoader(Slow(clock, READ_S)), DataLoader(Slow(clock, 0.0)))
    assert report.epochs == [
        EpochTimes(0, 4 * READ_S, 4 * STEP_S),
        EpochTimes(1, 4 * READ_S, 4 * STEP_S, BOUNDARY_S),
    ]
    assert report.epochs[0].share == pytest.approx(READ_S / (READ_S + STEP_S))
    logged = trainer.callback_metrics
    assert logged["time/data_wait"].item() == pytest.approx(report.epochs[-1].data_wait_s, rel=1e-5)
    assert logged["time/between"].item() == pytest.approx(BOUNDARY_S)
    assert logged["time/data_wait_share"].item() == pytest.approx(report.epochs[-1].share, rel=1e-5)


def test_the_table_shows_the_first_and_the_last_epochs() -> None:
    epochs = [EpochTimes(number, 1.0, 3.0, 0.5) for number in range(12)]
    lines = describe_times(epochs).splitlines()
    assert [line.split()[0] for line in lines] == ["epoch", *"01234", "...", *"789", "10", "11", "all"]
    assert lines[-1].split() == ["all", "12.0", "s", "36.0", "s", "25.0%", "6.0", "s"]
    assert len(describe_times(epochs[:10]).splitlines()) == 12


def test_a_training_without_a_step_waits_for_nothing() -> None:
    assert EpochTimes(0, 0.0, 0.0).share == 0
