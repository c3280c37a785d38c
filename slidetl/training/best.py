"""The best checkpoint of a training, interrupted and resumed trainings included."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from slidetl.errors import OutputError, UsageError
from slidetl.files import describe_full, replaced, write_whole
from slidetl.models.tensors import load_tensors, save_tensors

COMPLETE = "complete"
"""Name of the mark beside the checkpoints of a training that has ended by itself."""
NOTHING_LEFT = "resumed with no epoch left\n"
"""First line of the mark of a resumed training that made no step and so keeps no checkpoint.

The second one is the resumed checkpoint, relative to the mark: its training has ended too.
"""
_LOSS = "val/loss"


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints whole or not at all: on a full disk the earlier ones stay."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint; remote ones as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_tensors(Path(path), checkpoint)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best epochs of a resumed training, and copies their checkpoints.

    A resumed training writes into its own folder, and Lightning (2.6) then forgets the best epochs of the
    earlier folder, and would test the best of the rest. The loss decides
    between equal or undefined scores (the QWK of constant predictions).
    """

    _before: Mapping[str, Tensor] = MappingProxyType({})  # scores by checkpoint path, before resuming
    _losses: Mapping[str, float] = MappingProxyType({})  # by checkpoint file name

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Decides if an epoch is kept, by its score, then by its loss."""
        if super().check_monitor_top_k(trainer, current):
            return True
        if current is None or self.kth_value is None or self.save_top_k < 1:
            return False
        is_tie = self._counted(current) == float(self.kth_value)
        of_worst = self._losses.get(Path(self.kth_best_model_path).name, float("inf"))
        is_better = self._loss(trainer.callback_metrics) < of_worst
        return trainer.strategy.reduce_boolean_decision(is_tie and is_better)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self._losses = {**self._losses, Path(filepath).name: self._loss(trainer.callback_metrics)}
        if filepath in self.best_k_models:
            for name, score, choose in (
                ("best_model_path", self.best_model_score, min),
                ("kth_best_model_path", self.kth_value, max),
            ):
                tied = [path for path, other in self.best_k_models.items() if other == score]
                if len(tied) > 1:
                    setattr(self, name, choose(tied, key=lambda path: self._losses.get(Path(path).name, 0.0)))
        super()._save_checkpoint(trainer, filepath)

    def _counted(self, score: Any) -> float:
        """Returns a score, the worst for NaN, as Lightning counts it."""
        return float("-inf" if self.mode == "max" else "inf") if math.isnan(score) else float(score)

    def _loss(self, metrics: Mapping[str, Any]) -> float:
        loss = float(metrics.get(_LOSS, float("inf")))
        return float("inf") if math.isnan(loss) else loss

    @property
    def has_judged(self) -> bool:
        """False if the best epoch has neither a score nor a loss that is a number."""
        score, loss = self.best_model_score, self._losses.get(Path(self.best_model_path).name, 0.0)
        return score is None or bool(score.isfinite()) or math.isfinite(loss)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a resumed training."""
        return {**super().state_dict(), "losses": dict(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of the earlier training, its best checkpoints included."""
        # Its paths are of then, and relative ones may agree by chance: none is kept that was not looked at.
        super().load_state_dict({**state_dict, "dirpath": None})
        self._losses = state_dict.get("losses", {})
        self._before = state_dict.get("best_k_models", {})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copies the best checkpoints of the earlier training, to complete this folder."""
        super().on_train_start(trainer, pl_module)
        before, self._before = self._before, {}
        assert self.dirpath is not None  # set up
        found: dict[Path, Tensor] = {}
        for then, score in before.items():
            # The run may have been moved since, and another training may be in its place.
            beside = Path(trainer.ckpt_path or then).with_name(Path(then).name)
            held = (place for place in (beside, Path(then)) if self._holds(place, score, trainer.global_step))
            if (place := next(held, None)) is not None:
                found[place] = score
        if len(found) < len(before):
            rank_zero_warn(
                "the best checkpoint so far is gone, of a later epoch, or not known to be of this training; "
                "the best is counted from here on"
            )
        for path, score in found.items():
            copy = Path(self.dirpath) / path.name
            if trainer.is_global_zero:
                with path.open("rb") as source, replaced(copy) as target:
                    shutil.copyfileobj(source, target)
            self.best_k_models[str(copy)] = score
        trainer.strategy.barrier()
        if found:
            best, worst = (max, min) if self.mode == "max" else (min, max)
            self.best_model_path = best(self.best_k_models, key=self.best_k_models.__getitem__)
            self.best_model_score = self.best_k_models[self.best_model_path]
            self.kth_best_model_path = worst(self.best_k_models, key=self.best_k_models.__getitem__)
            self.kth_value = self.best_k_models[self.kth_best_model_path]

    def _holds(self, path: Path, score: Tensor, step: int) -> bool:
        """Tells if a file has a best epoch of the resumed training: no later step, equal score and loss."""
        try:
            checkpoint = load_tensors(path)
            if "callbacks" in checkpoint:
                state = checkpoint["callbacks"][self.state_key]
                scores = {Path(name).name: float(other) for name, other in state["best_k_models"].items()}
                then, loss = scores[path.name], state.get("losses", {}).get(path.name)
            else:  # of save_weights_only
                then = self._counted(checkpoint["metrics"][self.monitor])
                loss = self._loss(checkpoint["metrics"])
            is_same = then == float(score) and loss == self._losses.get(path.name)
            return is_same and bool(checkpoint["global_step"] <= step)
        except (AttributeError, KeyError, TypeError, ValueError):  # unreadable, or of something else
            return False


class LastCheckpoint(ModelCheckpoint):
    """Keeps the last epoch, to resume an interrupted training from, and marks a training that has ended.

    The end of a training is validated and kept too, if ``max_steps`` or ``max_time`` ends it within an epoch
    or ``max_epochs`` between two validations; Lightning (2.6) would drop these last steps.
    """

    _has_begun = False
    _before: Sequence[str | None] = ()  # folders of the trainings that were resumed, earliest first

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes the mark of an earlier training in the same folder.

        Raises:
            UsageError: its checkpoints are elsewhere than those of earlier fits, which a test would take.
        """
        self._has_begun = False
        # Lightning normalises the one, not the other.
        root, here = (Path(path or "").resolve() for path in (trainer.default_root_dir, self.dirpath))
        is_found = here.name == "checkpoints" and here.parent.parent == root / "logs" and _is_fit(here.parent)
        kept = ((last, has_ended) for last, has_ended in fits(root) if last.is_file())
        earlier, has_ended = next(kept, (None, True))
        if not (is_found or trainer.fast_dev_run) and earlier is not None:  # type: ignore[attr-defined] # set elsewhere
            raise UsageError(
                f"the checkpoints of this fit would be in {self.dirpath}, and 'slidetl test' and 'export' "
                f"would take those of an earlier fit in {root / 'logs'}; leave out trainer.logger and "
                "last_checkpoint.dirpath, or choose another trainer.default_root_dir"
            )
        if not has_ended and trainer.ckpt_path is None and not trainer.fast_dev_run:  # type: ignore[attr-defined] # set elsewhere
            rank_zero_warn(
                f"an earlier fit has not ended, or is still running: --ckpt_path {earlier} resumes it, and "
                "this one starts from the beginning"
            )
        if (mark := self._mark(trainer)) is not None:
            mark.unlink(missing_ok=True)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Goes on with the epoch that the end of the training cut; Lightning (2.6) counts it as whole."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        loop = checkpoint["loops"]["fit_loop"]
        epochs, is_whole = loop["epoch_progress"], loop["epoch_loop.batch_progress"]["is_last_batch"]
        if not is_whole and 0 < epochs["current"]["ready"] == epochs["current"]["processed"]:
            for counts in (epochs["current"], epochs["total"]):
                counts["processed"] -= 1
                counts["completed"] = min(counts["completed"], counts["processed"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes that there are steps to make."""
        super().on_train_start(trainer, pl_module)
        self._has_begun = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks for a validation after the last step of the training."""
        loop, limit = trainer.fit_loop, trainer.max_epochs or -1
        is_last_epoch = trainer.is_last_batch and 0 <= limit <= trainer.current_epoch + 1
        is_stopped = trainer.should_stop and loop._can_stop_early
        if is_last_epoch or is_stopped or 0 <= trainer.max_steps <= trainer.global_step:
            trainer.should_stop, trainer.check_val_every_n_epoch = True, 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the mark: after the last epoch, early stopping, or ``max_time``.

        Raises:
            UsageError: no checkpoint is kept, though epochs were left.
        """
        has_nothing_left = trainer.ckpt_path is not None and not self._has_begun
        if not (self._last_checkpoint_saved or has_nothing_left or trainer.fast_dev_run):  # type: ignore[attr-defined] # set elsewhere
            raise UsageError(
                f"the training ended after {trainer.global_step} steps and has kept no checkpoint; "
                + (
                    "see the options last_checkpoint"
                    if self._has_begun
                    else "raise trainer.max_time, max_epochs, max_steps or limit_train_batches"
                )
            )
        if (mark := self._mark(trainer)) is not None:
            resumed = os.path.relpath(os.path.realpath(trainer.ckpt_path or ""), mark.parent.resolve())
            write_whole(mark, "" if self._last_checkpoint_saved else f"{NOTHING_LEFT}{resumed}\n")
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined] # set elsewhere
            self._remove_requeued(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a resumed training."""
        return {**super().state_dict(), "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of the earlier training, and notes its folder beside those before it."""
        super().load_state_dict(state_dict)
        self._before = [*state_dict.get("before", []), state_dict.get("dirpath")]

    def _remove_requeued(self, trainer: pl.Trainer) -> None:
        """Removes the checkpoints for a requeued job of this training: a later one would go on from them.

        These are the one that it went on from, earlier ones, and those that it, or a training that it was
        resumed from, has saved. Others may be of a training that is still running.
        """
        left = requeued(Path(trainer.default_root_dir).resolve())
        resumed = Path(trainer.ckpt_path or "").resolve()
        done = left[: left.index(resumed) + 1] if resumed in left else []
        folders = {Path(folder).resolve() for folder in (*self._before, self.dirpath) if folder}
        for path in [path for path in left if path in done or self._folder_in(path) in folders]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                rank_zero_warn(f"{describe_full(error)}; remove {path}, or a later job would go on from it")

    def _folder_in(self, path: Path) -> Path | None:
        """Returns the folder of the training that saved a checkpoint; None if it is not known."""
        try:
            return Path(load_tensors(path)["callbacks"][self.state_key]["dirpath"]).resolve()
        except (KeyError, TypeError, ValueError):  # unreadable, or of something else
            return None

    def _mark(self, trainer: pl.Trainer) -> Path | None:
        """Returns the place of the mark, in the process and the trainings that keep one."""
        folder = str(self.dirpath or "")
        keeps = trainer.is_global_zero and trainer.loggers and not trainer.fast_dev_run  # type: ignore[attr-defined] # set elsewhere
        return Path(folder) / COMPLETE if keeps and folder and "://" not in folder else None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Notes in an interruption how to resume."""
        super().on_exception(trainer, pl_module, exception)
        is_interrupted = isinstance(exception, KeyboardInterrupt) or trainer.received_sigterm
        if is_interrupted and trainer.is_global_zero and self.best_model_path:
            exception.add_note(f"resume with --ckpt_path {self.best_model_path}")


def fits(root: Path) -> Iterator[tuple[Path, bool]]:
    """Yields the place of the last checkpoint of each fit below a run's folder, and if the fit has ended.

    The latest comes first. A resumed fit with no epoch left keeps no checkpoint: it ends the one
    that it resumed, and is left out.
    """
    found = filter(_is_fit, root.glob("logs/version_*"))
    ended: set[Path] = set()
    for log in sorted(found, key=lambda log: int(log.name.removeprefix("version_")), reverse=True):
        last = log / "checkpoints" / "last.ckpt"
        mark = last.with_name(COMPLETE)
        text = mark.read_text(encoding="utf-8") if mark.is_file() else None
        if text is not None and text.startswith(NOTHING_LEFT) and not last.is_file():
            ended.add((mark.parent / text.removeprefix(NOTHING_LEFT).rstrip("\n")).resolve())
        else:
            yield last, text is not None or last.resolve() in ended


@contextmanager
def claimed_version(root: str | Path) -> Iterator[int | None]:
    """Makes the folder ``logs/version_N`` of a new fit: of two begun together, each has its own.

    It is removed if the fit fails before its first file.

    Yields:
        N; None for a remote folder, and in further processes of a training, which take the first one's.

    Raises:
        OutputError: it cannot be made.
    """
    if getattr(rank_zero_only, "rank", 0) or "://" in str(root):
        yield None
        return
    logs, number = Path(root, "logs"), int(CSVLogger(root, name="logs").version)
    new = [folder for folder in (logs, logs.parent) if not folder.exists()]
    try:
        logs.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError):
                logs.joinpath(f"version_{number}").mkdir()
                break
            number += 1
    except OSError as error:
        raise OutputError(f"{logs}: cannot be written: {describe_full(error)}") from error
    try:
        yield number
    finally:
        with suppress(OSError):  # not empty
            for folder in (logs / f"version_{number}", *new):
                folder.rmdir()


def requeued(root: Path) -> list[Path]:
    """Lists the checkpoints that Lightning left in a run's folder for a requeued Slurm job, latest last."""
    found = (path for path in root.glob("hpc_ckpt_*.ckpt") if _number_of(path).isdecimal())
    return sorted(found, key=lambda path: int(_number_of(path)))


def _number_of(path: Path) -> str:
    return path.stem.removeprefix("hpc_ckpt_")


def _is_fit(log: Path) -> bool:
    return log.name.startswith("version_") and log.name.removeprefix("version_").isdecimal()
