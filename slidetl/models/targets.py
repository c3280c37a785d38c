"""Uncertain grades as probabilities ``[B, K]``, targets of a loss; a zero row is a slide without a grade."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from slidetl.errors import UsageError


def one_hot_grades(grades: Tensor, n_grades: int) -> Tensor:
    """Turns grades ``[...]`` int64, below 0 for none, into ``[..., K] float32``.

    On a GPU a kernel asserts that grades are below K: reading one here would wait for the card in each step.

    Raises:
        UsageError: a grade of K or more, on a CPU.
    """
    if grades.device.type == "cpu" and grades.numel() and int(grades.max()) >= n_grades:
        raise UsageError(f"expected grades 0..{n_grades - 1}, found {int(grades.max())}")
    present = (grades >= 0).unsqueeze(-1)
    return functional.one_hot(grades.clamp_min(0), n_grades).to(torch.float32) * present


def smoothed_grades(target: Tensor, amount: float) -> Tensor:
    """Moves a share of each probability to the neighbouring grades, half to either side.

    Label smoothing (Szegedy et al., CVPR 2016, section 7) for an ordered scale: a reader who errs mostly
    errs by one grade. At an end of the scale all of the share goes to the one neighbour.

    Args:
        target: ``[B, K]`` probabilities, K at least 2.
        amount: the share, 0..1.
    """
    if not 0 <= amount <= 1:
        raise UsageError(f"label smoothing moves a share between 0 and 1, not {amount}")
    moved = amount * target
    none, half = torch.zeros_like(moved[:, :1]), moved[:, 1:-1] / 2
    up = torch.cat([moved[:, :1], half, none], dim=1)
    down = torch.cat([none, half, moved[:, -1:]], dim=1)
    return target - moved + up.roll(1, dims=1) + down.roll(-1, dims=1)


def reader_grades(grades: Tensor, n_grades: int) -> Tensor:
    """Computes the share of readers for each grade.

    Args:
        grades: ``[B, R]`` int64, one of each reader, below 0 for none.
        n_grades: K.

    Returns:
        ``[B, K] float32``; zeros without any reader's grade.
    """
    votes = one_hot_grades(grades, n_grades).sum(1)
    return votes / votes.sum(1, keepdim=True).clamp_min(1)


def bootstrapped_grades(target: Tensor, probabilities: Tensor, beta: float, hard: bool = False) -> Tensor:
    """Mixes the network's own predictions into the target, for labels with many errors.

    Reed et al., "Training deep neural networks on noisy labels with bootstrapping", ICLR 2015 workshop,
    section 3: ``beta t + (1 - beta) q``, q the probabilities (equation 6; beta .95 there) or their most
    probable grade (equation 7; .8). No gradient passes through q. Train on the plain target first:
    predictions of an untrained network are noise.

    Args:
        target: ``[B, K]`` probabilities.
        probabilities: ``[B, K]``, the head's.
        beta: share of the target, 0..1.
        hard: count only the most probable grade.
    """
    if not 0 <= beta <= 1:
        raise UsageError(f"bootstrapping trusts the target by a share between 0 and 1, not {beta}")
    believed = probabilities.detach()
    if hard:
        believed = functional.one_hot(believed.argmax(1), believed.shape[1]).to(target.dtype)
    present = target.sum(1, keepdim=True) > 0
    return (beta * target + (1 - beta) * believed) * present


@dataclass(frozen=True)
class Targets:
    """Options of the target in training, for uncertain labels.

    Readers' votes come first, then smoothing, then bootstrapping, each if set.

    Attributes:
        smoothing: share of each grade moved to its neighbours, 0..1 (:func:`smoothed_grades`).
        readers: take the readers' votes as a slide's target (:func:`reader_grades`), or its grade if there
            are none.
        bootstrap: mix in the network's predictions, ``soft`` or ``hard`` (:func:`bootstrapped_grades`).
        beta: share of the labels in the mix, 0..1; None: .95 soft and .8 hard, as in the paper.
        bootstrap_after: share of the training steps, 0..1, before bootstrapping starts.
    """

    smoothing: float = 0.0
    readers: bool = False
    bootstrap: Literal["none", "soft", "hard"] = "none"
    beta: float | None = None
    bootstrap_after: float = 0.3

    def __post_init__(self) -> None:
        for name in ("smoothing", "beta", "bootstrap_after"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"targets.{name} must be from 0 to 1, not {value}")

    def check_readers(self, votes: Iterable[Sequence[int | None]]) -> None:
        """Refuses ``readers`` for slides without any reader's grade."""
        if self.readers and all(grade is None for of_slide in votes for grade in of_slide):
            raise UsageError(
                "model.targets.readers needs readers' grades, and no training slide has any; give the "
                "manifest the columns grade_reader1, grade_reader2, ..."
            )

    def __call__(self, grades: Tensor, readers: Tensor, probabilities: Tensor, progress: float) -> Tensor:
        """Computes the target ``[B, K]`` of a step; zeros for a slide without a grade.

        Args:
            grades: ``[B]`` int64, below 0 for none.
            readers: ``[B, R]`` int64, one of each reader, below 0 for none; R may be 0.
            probabilities: ``[B, K]``, the head's.
            progress: share of the training steps done, 0..1.
        """
        n_grades = probabilities.shape[1]
        target = one_hot_grades(grades, n_grades)
        if self.readers:
            votes = reader_grades(readers, n_grades)
            target = torch.where(votes.sum(1, keepdim=True) > 0, votes, target)
        if self.smoothing:
            target = smoothed_grades(target, self.smoothing)
        if self.bootstrap != "none" and progress >= self.bootstrap_after:
            hard = self.bootstrap == "hard"
            beta = self.beta if self.beta is not None else 0.8 if hard else 0.95
            target = bootstrapped_grades(target, probabilities.float(), beta, hard)
        return target


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """Computes weights ``[K]`` of equal total for each grade, and of mean 1 over the slides.

    Args:
        counts: slides of each grade; a grade without any weighs 0.
    """
    present = sum(count > 0 for count in counts)
    return torch.tensor([sum(counts) / (present * count) if count else 0.0 for count in counts])
