"""Means over the steps of an epoch that survive a checkpoint in its middle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor


class EpochMeans:
    """Means of figures of the training steps, weighted by the slides in each, over all processes.

    Lightning's own (``log(..., on_epoch=True)``) begin anew when a training is resumed: the figures of the
    epoch that was interrupted would be those of its end alone.

    Args:
        module: whose steps they are; its trainer knows the other processes.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._sums: dict[str, Tensor] = {}  # [2] each: weighted sum, weight

    def add(self, figures: Mapping[str, Tensor], slides: int | Tensor) -> None:
        """Counts the figures, scalars each, of a step over so many slides; waits for no device."""
        for name, value in figures.items():
            value = value.detach().float()
            weighted = torch.stack([value * slides, torch.ones_like(value) * slides])
            self._sums[name] = self._sums.get(name, 0) + weighted

    def take(self) -> dict[str, Tensor]:
        """The means since the last call; every process must call it, and has added the same names.

        A figure that no slide had a part in has no mean, and is left out.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        # Copied at once: to look at each sum on a GPU would wait for it each time.
        sums = self._module.trainer.strategy.reduce(self._stacked(), reduce_op="sum").cpu()
        self._sums = {}
        return {name: total / weight for name, (total, weight) in zip(names, sums, strict=True) if weight > 0}

    def state_dict(self) -> dict[str, Any]:
        """The names, and each process's sums ``[R, n, 2]``; every process must call it."""
        if not self._sums:
            return {}
        sums = self._module.all_gather(self._stacked())
        assert isinstance(sums, Tensor)  # as what was given
        return {"names": sorted(self._sums), "sums": sums.view(-1, len(self._sums), 2).cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave, also for another number of processes."""
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
