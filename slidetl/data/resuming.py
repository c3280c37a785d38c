"""A resumable loader of training batches; it reads ahead into the next epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from slidetl.data.datasets import EpochBatches

T_co = TypeVar("T_co", covariant=True)


class ResumableLoader(DataLoader[T_co]):
    """A loader with its progress within the epoch as state, reading beyond the end of the epoch.

    While the last batches of an epoch train, its workers read the first of the next one, to start it without
    waiting. Lightning saves :meth:`state_dict` in every checkpoint; without it resuming would repeat slides.

    Args:
        dataset: bags, by epoch and slide.
        batches: their order.
        options: further options of ``DataLoader``.
    """

    batch_sampler: EpochBatches
    _done = 0
    _resume: tuple[int, int] | None = None  # epoch, number of its batches done
    _live: Iterator[T_co] | None = None
    _next = (-1, 0)  # epoch and batch of the next item of ``_live``

    def __init__(self, dataset: Dataset[T_co], batches: EpochBatches, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=batches, **options)

    def read_ahead(self) -> None:
        """Starts the workers on the sampler's epoch, before its first batch is asked for."""
        if self.num_workers and self.batch_sampler.stop:
            with torch.random.fork_rng(devices=[]):  # the workers' seeds must not change later draws
                self._live = super().__iter__()
            self._next = self.batch_sampler.sampler.epoch, 0

    def __iter__(self) -> Iterator[T_co]:  # type: ignore[override] # torch promises its own iterator
        """Yields the batches of the sampler's epoch; workers start on the first request.

        On resuming, Lightning builds the iterator before it sets the epoch: workers would read epoch 0.
        """
        batches, epoch = self.batch_sampler, self.batch_sampler.sampler.epoch
        resumed, done = self._resume or (-1, 0)
        self._done = done if resumed == epoch else 0
        self._resume = None
        is_live = self._live is not None and (not self.num_workers or self._live is self._iterator)
        if not is_live or self._next != (epoch, self._done) or epoch >= batches.stop:
            batches.first = self._done
            self._live = super().__iter__()
        live = self._live
        assert live is not None
        while self._done < len(batches):
            batch = next(live)
            self._done += 1
            self._next = (epoch, self._done) if self._done < len(batches) else (epoch + 1, 0)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch, and the number of its batches handed out."""
        return {"epoch": self.batch_sampler.sampler.epoch, "batches": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores the state: its epoch continues, another starts from its first batch."""
        self._resume = state["epoch"], state["batches"]
