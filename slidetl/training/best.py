"""The best checkpoint of a training, also of one that was ended and went on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from slidetl.files import replaced
from slidetl.models.tensors import load_tensors, save_tensors

_LOSS = "val/loss"


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints whole or not at all: a full disk keeps the ones before, and is told by its path."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint; one that is not on a disk as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_tensors(Path(path), checkpoint)


class BestCheckpoint(ModelCheckpoint):
    """Knows the best epochs of the training that it goes on with, and brings their checkpoints along.

    A training that goes on writes into a folder of its own, and Lightning (2.6) then forgets what was best in
    the one before: the best of the rest would be tested in the place of the best of all.

    Epochs of one score, or of an undefined one, as the QWK of constant predictions, differ by the loss.
    """

    _before: Mapping[str, Tensor] = MappingProxyType({})  # paths of the training before, and their scores
    _losses: Mapping[str, float] = MappingProxyType({})  # of checkpoints, by the names of their files

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Decides if an epoch is kept: by its score, and among equal or undefined ones by the loss."""
        if super().check_monitor_top_k(trainer, current):
            return True
        if current is None or self.kth_value is None or self.save_top_k < 1:
            return False
        worst = float("-inf" if self.mode == "max" else "inf")  # as Lightning counts NaN
        is_tie = (worst if current.isnan() else float(current)) == float(self.kth_value)
        is_better = self._loss(trainer) < self._losses.get(Path(self.kth_best_model_path).name, float("inf"))
        return trainer.strategy.reduce_boolean_decision(is_tie and is_better)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self._losses = {**self._losses, Path(filepath).name: self._loss(trainer)}
        if filepath in self.best_k_models:
            for name, score, choose in (
                ("best_model_path", self.best_model_score, min),
                ("kth_best_model_path", self.kth_value, max),
            ):
                tied = [path for path, other in self.best_k_models.items() if other == score]
                if len(tied) > 1:
                    setattr(self, name, choose(tied, key=lambda path: self._losses.get(Path(path).name, 0.0)))
        super()._save_checkpoint(trainer, filepath)

    def _loss(self, trainer: pl.Trainer) -> float:
        return float(trainer.callback_metrics.get(_LOSS, float("inf")))

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed training needs."""
        return {**super().state_dict(), "losses": dict(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what the training before kept, and remembers its best checkpoints."""
        super().load_state_dict(state_dict)
        self._losses = state_dict.get("losses", {})
        if state_dict.get("dirpath") != self.dirpath:
            self._before = state_dict.get("best_k_models", {})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copies the best checkpoints of the training before, so that this folder is complete."""
        super().on_train_start(trainer, pl_module)
        before, self._before = self._before, {}
        assert self.dirpath is not None  # set up
        # The file may be gone, or that of a later epoch than the one from which the training goes on.
        found = {path: score for path, score in before.items() if _step_of(path) <= trainer.global_step}
        if len(found) < len(before):
            rank_zero_warn(
                "the best checkpoint so far is gone, or of a later epoch; the best is counted from here on"
            )
        for path, score in found.items():
            copy = Path(self.dirpath) / Path(path).name
            if trainer.is_global_zero:
                with Path(path).open("rb") as source, replaced(copy) as target:
                    shutil.copyfileobj(source, target)
            self.best_k_models[str(copy)] = score
        trainer.strategy.barrier()
        if found:
            best, worst = (max, min) if self.mode == "max" else (min, max)
            self.best_model_path = best(self.best_k_models, key=self.best_k_models.__getitem__)
            self.best_model_score = self.best_k_models[self.best_model_path]
            self.kth_best_model_path = worst(self.best_k_models, key=self.best_k_models.__getitem__)
            self.kth_value = self.best_k_models[self.kth_best_model_path]


def _step_of(path: str) -> float:
    """After how many steps the checkpoint was written; infinity where it cannot be read."""
    if not Path(path).is_file():
        return float("inf")
    try:
        return float(load_tensors(Path(path))["global_step"])
    except (KeyError, TypeError, ValueError):
        return float("inf")
