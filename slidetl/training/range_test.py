"""The range test: the loss while the learning rate grows from step to step, to choose a rate by."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner.tuning import Tuner
from torch.optim.optimizer import register_optimizer_step_pre_hook

from slidetl.errors import UsageError
from slidetl.training.grader import SlideGrader

_SETTLING_STEPS = 10  # the mean of fewer losses says more about the slides than about the rate
_MOMENTUM = 0.98  # of the running mean of the losses in Lightning's finder


@dataclass(frozen=True)
class RangeTest:
    """The rates of a range test.

    Attributes:
        lowest, highest: the first and the last value of ``model.lr``; between them it grows by the same
            factor in each step.
        steps: training steps, at least 12.
    """

    lowest: float = 1e-6
    highest: float = 0.1
    steps: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.lowest < self.highest or self.steps < _SETTLING_STEPS + 2:
            raise UsageError(
                f"expected 0 < range.lowest < range.highest and range.steps of at least "
                f"{_SETTLING_STEPS + 2}, not {self.lowest}, {self.highest}, {self.steps}"
            )


@dataclass(frozen=True)
class RangeResult:
    """The result of a range test.

    Attributes:
        rates: the values of ``model.lr`` that were tried, increasing.
        losses: the training loss at each, smoothed over the steps before.
        suggestion: where the loss falls fastest; None where it never does.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float | None


def find_rate(
    trainer: pl.Trainer, grader: SlideGrader, data: pl.LightningDataModule, tried: RangeTest
) -> RangeResult:
    """Trains with a growing rate, and puts the weights back to where training starts.

    Smith, "Cyclical learning rates for training neural networks", WACV 2017, section 3.3, through Lightning's
    finder. It departs from that in four points. There every parameter has the same rate; here each keeps
    its rate relative to that of the new layers, as the strategy has it, and as ``lr_scale_with_batch``
    scales it. All rates are tried: with a few slides in a batch the loss often looks like diverging. And the
    running mean of the losses is corrected for its start by the number of losses in it, where Lightning
    counts one more, so that the loss seems to double in the first steps. The last is told at
    :func:`steepest_fall`.

    Args:
        trainer: which allows for as many epochs as there are steps.
        grader: not trained yet.
        data: with a training part.
        tried: which rates.
    """
    with _rates_in_proportion(grader), _without_hyper_parameters(grader):
        finder = Tuner(trainer).lr_find(
            grader,
            datamodule=data,
            min_lr=tried.lowest,
            max_lr=tried.highest,
            num_training=tried.steps,
            early_stop_threshold=None,
            update_attr=False,
        )
    if finder is None:
        raise UsageError("a range test needs real training steps; leave trainer.fast_dev_run out")
    losses = [
        loss * (1 - _MOMENTUM ** (count + 1)) / (1 - _MOMENTUM**count)
        for count, loss in enumerate(finder.results["loss"], start=1)
    ]
    rates = finder.results["lr"]
    return RangeResult(tuple(rates), tuple(losses), steepest_fall(rates, losses))


def steepest_fall(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the loss falls most per factor by which the rate grows; None where it never falls.

    Lightning suggests where it falls most per unit of the rate. As the rates grow by factors, that is nearly
    always the noise at the smallest ones.

    Args:
        rates: increasing by the same factor.
        losses: at each of them; the first ten, and what is not finite, are left out.
    """
    steps = [step for step in range(_SETTLING_STEPS, len(losses)) if math.isfinite(losses[step])]
    if len(steps) < 2:
        return None
    slopes = np.gradient([losses[step] for step in steps], np.log([rates[step] for step in steps]))
    steepest = int(slopes.argmin())
    return rates[steps[steepest]] if slopes[steepest] < 0 else None


@contextmanager
def _rates_in_proportion(grader: SlideGrader) -> Iterator[None]:
    """Scales the one rate that the finder sets after each step to each group's own."""
    shares: list[float] = []

    def scale(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not shares:
            shares.extend(group["lr"] for group in grader.parameter_groups(grader.peak_lr / grader.lr))
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] *= share

    handle = register_optimizer_step_pre_hook(scale)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _without_hyper_parameters(grader: SlideGrader) -> Iterator[None]:
    """Leaves them out of the finder's checkpoint, which is then read as plain values and tensors.

    Where Python made the grader, they are objects.
    """
    kept = dict(grader.hparams)
    grader.hparams.clear()
    try:
        yield
    finally:
        grader.hparams.update(kept)


def write_range(folder: Path, result: RangeResult) -> None:
    """Writes ``loss.csv`` (``lr``, ``loss``) and ``loss.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["lr", "loss"])
        rows = zip(result.rates, result.losses, strict=True)
        writer.writerows([f"{lr:.6g}", f"{loss:.6g}"] for lr, loss in rows)
    _draw(folder / "loss.png", result.rates, result.losses, result.suggestion)


def _draw(path: Path, rates: Sequence[float], losses: Sequence[float], suggestion: float | None) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot(
        title="Range test", xlabel="learning rate (model.lr)", ylabel="training loss, smoothed", xscale="log"
    )
    axes.plot(rates, losses)
    finite = [loss for loss in losses if math.isfinite(loss)]
    axes.set_ylim(0, 1.5 * finite[0])  # where it diverges it leaves the picture
    if suggestion is not None:
        axes.axvline(suggestion, color="tab:red", linewidth=1, label=f"steepest fall: {suggestion:.2g}")
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
