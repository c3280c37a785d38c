"""Finds a batch size for a GPU out of memory."""

from __future__ import annotations

import gc
import traceback
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from slidetl.errors import UsageError, is_gpu_full
from slidetl.text import one_line


class RoomOnDevice(pl.Callback):
    """Turns an out-of-memory error of a GPU into one line with a smaller batch, tried out."""

    _batch: Any = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch of the step."""
        self._batch = batch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Drops the batch."""
        self._batch = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Tries smaller batches if memory runs out, and raises a UsageError naming the first to fit."""
        batch, self._batch = self._batch, None
        if not is_gpu_full(exception) or batch is None:
            return
        shared = _used_by_others(pl_module.device)
        traceback.clear_frames(exception.__traceback__)  # its frames hold the activations of the step
        slides, tiles = batch["tiles"].shape[:2]
        alone = trainer.world_size == 1  # other processes would not join the trial steps
        sizes = _smaller(slides, tiles) if alone else []
        fits = next((size for size in sizes if _fits(trainer, pl_module, batch, *size)), None)
        remedy = "lower it"
        if alone:  # with the card's words: cuDNN may lack an engine for another reason
            remedy = "not even one tile fits, or the card cannot run the network: use a smaller "
            remedy += f"--model.backbone.name ({one_line(str(exception))[:200]})"
        if fits:
            remedy = f"this fits: --data.batch_size {fits[0]}"
            remedy += f" --data.bag_size {fits[1]}" if fits[1] < tiles else ""
        raise UsageError(
            f"{pl_module.device} has no room for --data.batch_size {slides} with --data.bag_size {tiles}"
            f"{shared}; {remedy}"
        ) from exception


def _used_by_others(device: torch.device) -> str:
    """Describes the memory of a GPU that other processes use, if it is a large part."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return describe_others(free, total, torch.cuda.memory_reserved(device))


def describe_others(free: int, total: int, own: int) -> str:
    """Describes the bytes of ``total`` that are neither free nor our own; empty for less than a quarter."""
    others = total - free - own
    if others < total / 4:  # CUDA itself takes half a GiB in each process
        return ""
    return f" (other processes use {others / 2**30:.0f} of its {total / 2**30:.0f} GiB)"


def _smaller(slides: int, tiles: int) -> list[tuple[int, int]]:
    """Lists batches of half the size each: fewer slides first, then fewer tiles of one slide."""
    sizes = []
    while slides * tiles > 1:
        slides, tiles = (slides // 2, tiles) if slides > 1 else (1, tiles // 2)
        sizes.append((slides, tiles))
    return sizes


def _fits(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, slides: int, tiles: int) -> bool:
    """Runs a step without an update on a part of a batch; False if memory runs out."""
    reserve: list[Tensor] = []
    try:
        _clear(module)
        if not trainer.optimizers[0].state:  # room for the two moments of the first update
            reserve = [torch.empty_like(weight) for weight in module.parameters() for _ in range(2)]
        part = _part(batch, slides, tiles, batch["tiles"].shape[1])
        with trainer.precision_plugin.forward_context():
            loss = module.training_step(part, 0)
        assert isinstance(loss, Tensor)  # as returned by a SlideGrader
        loss.backward()  # type: ignore[no-untyped-call] # torch's
        return True
    except Exception as error:
        if not is_gpu_full(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return False
    finally:
        reserve.clear()
        loss = part = None
        _clear(module)


def _clear(module: pl.LightningModule) -> None:
    module.zero_grad(set_to_none=True)
    gc.collect()
    if module.device.type == "cuda":
        torch.cuda.empty_cache()


def _part(value: Any, slides: int, tiles: int, bag_size: int) -> Any:
    """Selects the first slides of a batch, and the first tiles of each."""
    if isinstance(value, dict):
        return {name: _part(entry, slides, tiles, bag_size) for name, entry in value.items()}
    is_of_tiles = value.ndim > 1 and value.shape[1] == bag_size
    return value[:slides, :tiles] if is_of_tiles else value[:slides]
