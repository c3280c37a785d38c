"""A loader of training batches that reads ahead into the next epoch, and that a checkpoint can continue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from slidetl.data.datasets import EpochBatches

T_co = TypeVar("T_co", covariant=True)


class ResumableLoader(DataLoader[T_co]):
    """Knows how far into the epoch it is, goes on from there, and does not stop reading at its end.

    While the last batches of an epoch train, its workers read the first of the next one; otherwise every
    epoch would begin by waiting for a batch. Lightning keeps :meth:`state_dict` in every checkpoint. Without
    it a resumed epoch would begin with the slides that it has already seen.

    Args:
        dataset: of bags, by epoch and slide.
        batches: their order.
        options: further options of ``DataLoader``.
    """

    batch_sampler: EpochBatches
    _done = 0
    _resume: tuple[int, int] | None = None  # epoch, batches of it that are done
    _live: Iterator[T_co] | None = None
    _next = (-1, 0)  # epoch and batch that ``_live`` gives next

    def __init__(self, dataset: Dataset[T_co], batches: EpochBatches, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=batches, **options)

    def __iter__(self) -> Iterator[T_co]:  # type: ignore[override] # torch promises its own iterator
        """Batches of the sampler's epoch; the workers start with the first that is asked for.

        Not before: when it resumes, Lightning makes the iterator before it says which epoch it is, and
        workers would have read ahead in the first.
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
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": self.batch_sampler.sampler.epoch, "batches": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes what :meth:`state_dict` gave: that epoch will go on; another begins at its beginning."""
        self._resume = state["epoch"], state["batches"]
