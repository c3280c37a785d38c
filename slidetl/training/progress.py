"""The progress of a training, for the file of ``--status``."""

from __future__ import annotations

import pytorch_lightning as pl

from slidetl.status import show_metrics, show_stage


class StatusReport(pl.Callback):
    """Reports epochs and metrics; does nothing without ``--status``."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports the finished epochs, also those before a resumed training."""
        self._report(trainer, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports the epoch and its metrics, of the validation too."""
        self._report(trainer, trainer.current_epoch + 1)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports the metrics of the test."""
        show_metrics({name: float(value) for name, value in trainer.callback_metrics.items()})

    def _report(self, trainer: pl.Trainer, epochs: int) -> None:
        show_metrics({name: float(value) for name, value in trainer.callback_metrics.items()})
        total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        show_stage("training", epochs, total, "epochs")
