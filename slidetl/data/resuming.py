"""A loader of training batches that a checkpoint in the middle of an epoch can continue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch.utils.data import DataLoader

from slidetl.data.datasets import EpochSampler

T_co = TypeVar("T_co", covariant=True)


class ResumableLoader(DataLoader[T_co]):
    """Knows how far into the epoch it is, and goes on from there.

    Lightning keeps :meth:`state_dict` in every checkpoint. Without it a resumed epoch would begin with the
    slides that it has already seen. Its sampler is an :class:`~slidetl.data.datasets.EpochSampler`.
    """

    sampler: EpochSampler
    _done = 0
    _resume: tuple[int, int] | None = None  # epoch, batches of it that are done

    def __iter__(self) -> Iterator[T_co]:  # type: ignore[override] # torch promises its own iterator
        """Batches of the sampler's epoch; the workers start with the first that is asked for.

        Not before: when it resumes, Lightning makes the iterator before it says which epoch it is, and
        workers would have read ahead in the first.
        """
        epoch, done = self._resume or (-1, 0)
        self._done = done if epoch == self.sampler.epoch else 0
        self._resume = None
        self.sampler.skip(self._done * (self.batch_size or 1))
        for batch in super().__iter__():
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": self.sampler.epoch, "batches": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes what :meth:`state_dict` gave: that epoch will go on; another begins at its beginning."""
        self._resume = state["epoch"], state["batches"]
