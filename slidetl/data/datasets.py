"""Slides as a training loop wants them: bags of sampled tiles, or the whole slide in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from slidetl.cache.store import SlideCache
from slidetl.data.augment import Augmentation
from slidetl.data.manifest import ManifestRow


@dataclass(frozen=True)
class CachedSlide:
    """A slide of the manifest whose tiles are in the cache."""

    row: ManifestRow
    cache: SlideCache


class Bag(TypedDict):
    """Tiles drawn from a slide; collated, every entry has a leading axis B.

    ``tiles [N, 3, S, S] uint8``; ``mask [N] bool``, False for padding; ``grade`` int64.
    """

    tiles: Tensor
    mask: Tensor
    grade: Tensor


class Chunk(TypedDict):
    """A run of a slide's tiles. Chunks of a slide come in order, without another slide's between.

    ``tiles [n, 3, S, S] uint8``; whose they are; ``grade`` 0..K-1, or -1 for none; ``last`` whether the
    chunk ends the slide.
    """

    tiles: Tensor
    slide_id: str
    patient_id: str
    site: str
    grade: int
    last: bool


class BagDataset(Dataset[Bag]):
    """Bags for training. An index is ``(epoch, slide)``: the draw depends on it and the seed alone.

    Args:
        slides: graded slides.
        bag_size: tiles drawn per slide without replacement; slides with fewer are padded.
        augmentation: applied to each tile, or None.
        seed: of the draws and the augmentation.
    """

    def __init__(
        self, slides: Sequence[CachedSlide], bag_size: int, augmentation: Augmentation | None, seed: int
    ) -> None:
        self.slides = tuple(slides)
        self.bag_size = bag_size
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, index: tuple[int, int]) -> Bag:
        epoch, number = index
        slide = self.slides[number]
        rng = np.random.default_rng((self.seed, epoch, number))
        size = min(self.bag_size, len(slide.cache))
        drawn = np.sort(rng.choice(len(slide.cache), size, replace=False))  # neighbours share a shard
        tiles = slide.cache.read(drawn)
        if self.augmentation is not None:
            tiles = self.augmentation(tiles, int(rng.integers(2**31)))
        padded = np.zeros((self.bag_size, *tiles.shape[1:]), np.uint8)
        padded[:size] = tiles
        return {
            "tiles": channels_first(padded),
            "mask": torch.arange(self.bag_size) < size,
            "grade": torch.tensor(slide.row.grade),
        }


class ChunkDataset(Dataset[Chunk]):
    """Whole slides for evaluation, in chunks, so that memory does not grow with the slide.

    Args:
        slides: the slides, in the order in which they will come.
        chunk_size: greatest number of tiles in a chunk.
    """

    def __init__(self, slides: Sequence[CachedSlide], chunk_size: int) -> None:
        self.slides = tuple(slides)
        self.chunk_size = chunk_size
        self._chunks = [
            (number, start)
            for number, slide in enumerate(self.slides)
            for start in range(0, len(slide.cache), chunk_size)
        ]

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> Chunk:
        number, start = self._chunks[index]
        row, cache = self.slides[number].row, self.slides[number].cache
        stop = min(start + self.chunk_size, len(cache))
        return {
            "tiles": channels_first(cache.read(np.arange(start, stop))),
            "slide_id": row.slide_id,
            "patient_id": row.patient_id,
            "site": row.site,
            "grade": -1 if row.grade is None else row.grade,
            "last": stop == len(cache),
        }


class EpochSampler(Sampler[tuple[int, int]]):
    """Every slide once per epoch, in an order that depends on the seed and the epoch alone.

    Lightning calls :meth:`set_epoch`. With several processes each takes every n-th slide; those left
    over at the end wait for another epoch's order.
    """

    def __init__(self, n_slides: int, seed: int, rank: int = 0, n_ranks: int = 1) -> None:
        self.n_slides, self.seed, self.rank, self.n_ranks = n_slides, seed, rank, n_ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_slides // self.n_ranks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n_slides)
        for number in order[self.rank :: self.n_ranks][: len(self)]:
            yield self.epoch, int(number)


def channels_first(tiles: NDArray[np.uint8]) -> Tensor:
    """``[N, S, S, 3]`` array -> ``[N, 3, S, S]`` tensor: a view in channels-last memory, no copy."""
    return torch.from_numpy(tiles).permute(0, 3, 1, 2)
