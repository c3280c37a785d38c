"""The range test: losses at growing learning rates, to choose a rate."""

from __future__ import annotations

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
from slidetl.files import replaced, write_csv
from slidetl.training.grader import SlideGrader

_SETTLING_STEPS = 10  # the mean of fewer losses reflects the slides more than the rate
_MOMENTUM = 0.98  # of the running mean of the losses in Lightning's finder
_ROUNDING = 1e-6  # relative, of losses in float32


@dataclass(frozen=True)
class RangeTest:
    """The rates of a range test.

    Attributes:
        lowest, highest: first and last value of ``model.lr``; it grows by the same factor in each step.
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
        rates: the values of ``model.lr``, increasing.
        losses: the training loss at each, smoothed over earlier steps.
        suggestion: the rate with the fastest fall of the loss; None if it never falls.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float | None


def find_rate(
    trainer: pl.Trainer, grader: SlideGrader, data: pl.LightningDataModule, tried: RangeTest
) -> RangeResult:
    """Trains with a growing rate, and restores the initial weights.

    Smith, "Cyclical learning rates for training neural networks", WACV 2017, section 3.3, through Lightning's
    finder, with four changes. Each parameter keeps its rate relative to the new layers, as set by the
    strategy and ``lr_scale_with_batch``; Lightning gives all the same rate. All rates are tried: with few
    slides per batch the loss often seems to diverge. The running mean of the losses is corrected for its
    start by its number of losses; Lightning counts one more, and its loss seems to double in the first
    steps. For the fourth, see :func:`steepest_fall`.

    Args:
        trainer: must allow as many epochs as steps.
        grader: untrained.
        data: must have a training part.
        tried: the rates.

    Raises:
        UsageError: the trainer runs no real training steps, or accumulates gradients over batches; or no loss
            is finite.
    """
    if trainer.accumulate_grad_batches != 1:
        # Lightning's finder takes the loss of one of these batches, divided by their number, for a step's.
        raise UsageError(
            f"a range test makes a step of each batch; expected trainer.accumulate_grad_batches 1, not "
            f"{trainer.accumulate_grad_batches}: leave it out here; a rate found with "
            "model.lr_scale_with_batch holds for larger steps"
        )
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
    if not any(map(math.isfinite, losses)):
        raise UsageError(
            f"expected a training loss that is a number, found {len(losses)} that are not finite, the first "
            "one before any step; check the data and the initial weights"
        )
    return RangeResult(tuple(rates), tuple(losses), steepest_fall(rates, losses))


def steepest_fall(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Finds the rate of the steepest fall of the loss over the logarithm of the rate; None if it never falls.

    A fall within rounding is none. Lightning takes the slope over the rate itself, and nearly always finds
    noise at the smallest rates.

    Args:
        rates: increasing by the same factor.
        losses: at each rate; the first ten and non-finite ones are left out.
    """
    steps = [step for step in range(_SETTLING_STEPS, len(losses)) if math.isfinite(losses[step])]
    if len(steps) < 2:
        return None
    x, y = np.log([rates[step] for step in steps]), np.array([losses[step] for step in steps])
    slopes = np.gradient(y, x)
    steepest = int(slopes.argmin())
    fall = -slopes[steepest] * np.gradient(x)[steepest]  # in one step
    return rates[steps[steepest]] if fall > _ROUNDING * abs(y[steepest]) else None


@contextmanager
def _rates_in_proportion(grader: SlideGrader) -> Iterator[None]:
    """Scales the single rate set by the finder to the rate of each group, at every step."""
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
    """Keeps hyper-parameters out of the finder's checkpoint: objects among them would block its loading."""
    kept = dict(grader.hparams)
    grader.hparams.clear()
    try:
        yield
    finally:
        grader.hparams.update(kept)


def write_range(folder: Path, result: RangeResult) -> None:
    """Writes ``loss.csv`` (``lr``, ``loss``) and ``loss.png``."""
    rows = zip(result.rates, result.losses, strict=True)
    write_csv(
        folder / "loss.csv",
        ["lr", "loss"],
        ({"lr": f"{lr:.6g}", "loss": f"{loss:.6g}"} for lr, loss in rows),
    )
    _draw(folder / "loss.png", result.rates, result.losses, result.suggestion)


def _draw(path: Path, rates: Sequence[float], losses: Sequence[float], suggestion: float | None) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot(
        title="Range test", xlabel="learning rate (model.lr)", ylabel="training loss, smoothed", xscale="log"
    )
    axes.plot(rates, losses)
    finite = [loss for loss in losses if math.isfinite(loss)]
    axes.set_ylim(0, 1.5 * finite[0])  # cuts off a diverging loss
    if suggestion is not None:
        axes.axvline(suggestion, color="tab:red", linewidth=1, label=f"steepest fall: {suggestion:.2g}")
        axes.legend()
    axes.grid(alpha=0.3)
    with replaced(path) as file:
        figure.savefig(file, dpi=120, format="png")
