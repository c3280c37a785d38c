"""Times of a training spent waiting for data, and computing."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info


@dataclass(frozen=True)
class EpochTimes:
    """The times of one epoch, in the process that logs.

    Attributes:
        epoch: its number, from 0.
        data_wait_s: seconds between steps, waiting for the next batch.
        compute_s: seconds within steps.
        between_s: seconds between the epoch before and this one, as to write checkpoints; evaluation is not
            counted.
    """

    epoch: int
    data_wait_s: float
    compute_s: float
    between_s: float = 0.0

    @property
    def share(self) -> float:
        """The share of the time of an epoch spent waiting for data, 0..1."""
        total = self.data_wait_s + self.compute_s
        return self.data_wait_s / total if total else 0.0


class WaitingReport(pl.Callback):
    """Logs ``time/data_wait``, ``time/compute`` and ``time/between`` (seconds) and ``time/data_wait_share``.

    At the end it prints them as a table. Evaluation is not counted. A GPU works through a queue, so the marks
    are CUDA events in it, and cause no synchronisation.
    """

    def __init__(self) -> None:
        self.epochs: list[EpochTimes] = []
        self._marks: list[Any] = []  # alternating: end of a step, start of the next
        self._between: tuple[Any, Any] | None = None  # end of the epoch before, start of this one

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins a new table, also on resuming within an epoch."""
        self.epochs, self._between = [], None
        self._marks = [_mark(pl_module.device)]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the wait for the first batch."""
        begun = _mark(pl_module.device)
        if self.epochs:
            self._between = self._marks[-1], begun
        self._marks = [begun]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Marks the arrival of the batch."""
        self._marks.append(_mark(pl_module.device))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Marks the end of the step."""
        self._marks.append(_mark(pl_module.device))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds up the times until here; evaluation is not counted."""
        self._take(trainer.current_epoch)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on counting, with the wait for the next batch or the time until the next epoch."""
        self._marks = [_mark(pl_module.device)]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the times of the epoch."""
        self._take(trainer.current_epoch)
        if self.epochs and self.epochs[-1].epoch == trainer.current_epoch:
            times = self.epochs[-1]
            figures = {"data_wait": times.data_wait_s, "compute": times.compute_s}
            figures["between"] = times.between_s
            figures["data_wait_share"] = times.share
            for name, value in figures.items():
                pl_module.log(f"time/{name}", value, batch_size=1, rank_zero_only=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the table."""
        if self.epochs:
            rank_zero_info(describe_times(self.epochs))

    def _take(self, epoch: int) -> None:
        """Adds the gaps between marks to the times of the epoch."""
        marks, self._marks = self._marks, self._marks[-1:]
        if len(marks) < 3:  # no step has ended
            return
        gaps = [_seconds(*pair) for pair in itertools.pairwise(marks)]
        waited, computed = sum(gaps[0::2]), sum(gaps[1::2])
        between = _seconds(*self._between) if self._between is not None else 0.0
        self._between = None
        if self.epochs and self.epochs[-1].epoch == epoch:  # evaluated within it
            earlier = self.epochs.pop()
            waited += earlier.data_wait_s
            computed += earlier.compute_s
            between += earlier.between_s
        self.epochs.append(EpochTimes(epoch, waited, computed, between))


def describe_times(epochs: list[EpochTimes]) -> str:
    """Formats the times as a table: the first and last five epochs, and the sum."""
    lines = [f"{'epoch':>8}{'data wait':>12}{'compute':>12}{'waiting':>10}{'before it':>12}"]
    shown = epochs if len(epochs) <= 10 else epochs[:5] + epochs[-5:]
    total = EpochTimes(
        -1,
        sum(times.data_wait_s for times in epochs),
        sum(times.compute_s for times in epochs),
        sum(times.between_s for times in epochs),
    )
    for number, times in enumerate([*shown, total]):
        if len(shown) < len(epochs) and number == 5:
            lines.append(f"{'...':>8}")
        name = "all" if times is total else str(times.epoch)
        lines.append(
            f"{name:>8}{times.data_wait_s:10.1f} s{times.compute_s:10.1f} s{times.share:10.1%}"
            f"{times.between_s:10.1f} s"
        )
    return "\n".join(lines)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch's
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
