"""Means over the steps of an epoch, kept across checkpoints within it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor


class EpochMeans:
    """Means of scalars of training steps over all processes, weighted by the slides of each step.

    Lightning's own means (``log(..., on_epoch=True)``) restart when a training resumes within an epoch.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._sums: dict[str, Tensor] = {}  # [2] each: weighted sum, weight

    def add(self, figures: Mapping[str, Tensor], slides: int | Tensor) -> None:
        """Adds the scalars of a step over ``slides`` slides; waits for no device."""
        for name, value in figures.items():
            value = value.detach().float()
            weighted = torch.stack([value * slides, torch.ones_like(value) * slides])
            self._sums[name] = self._sums.get(name, 0) + weighted

    def take(self) -> dict[str, Tensor]:
        """Returns the means since the last call; every process must call it with the same names added.

        Scalars of weight 0 are left out.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        # Copied at once: reading each sum on a GPU would synchronise each time.
        sums = self._module.trainer.strategy.reduce(self._stacked(), reduce_op="sum").cpu()
        self._sums = {}
        return {name: total / weight for name, (total, weight) in zip(names, sums, strict=True) if weight > 0}

    def state_dict(self) -> dict[str, Any]:
        """Returns names, and the sums ``[R, n, 2]`` of R processes; every process must call it."""
        if not self._sums:
            return {}
        sums = self._module.all_gather(self._stacked())
        assert isinstance(sums, Tensor)  # the type of its argument
        return {"names": sorted(self._sums), "sums": sums.view(-1, len(self._sums), 2).cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state, also for another number of processes."""
        self._sums = {}
        if not state:
            return
        trainer, sums = self._module.trainer, state["sums"].to(self._module.device)
        if len(sums) == trainer.world_size:
            mine = sums[trainer.global_rank]
        else:
            mine = sums.sum(0) * trainer.is_global_zero
        self._sums = dict(zip(state["names"], mine, strict=True))

    def _stacked(self) -> Tensor:
        return torch.stack([self._sums[name] for name in sorted(self._sums)])  # [n, 2]
