"""Datasets of slides: bags of sampled tiles for training, whole slides in chunks for evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, Sampler, default_collate

from slidetl.data.augment import Augmentation, Pipeline, VolumeAugmentation
from slidetl.data.sampling import Sampling, Uniform
from slidetl.data.study import CachedSlide
from slidetl.models.runner import channels_first
from slidetl.models.volumes import unit_window
from slidetl.tiles.features import read_features
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.store import SlideCache


class Bag(TypedDict):
    """Tiles drawn from a slide; collated, every entry has a leading axis B.

    ``tiles [N, 3, S, S] uint8``, or patches ``[N, 1, S, S, S] float32``, 0..1 over the window; ``mask [N]
    bool``, False for padding; ``grade`` int64; ``readers [R]`` int64, each reader's grade or -1; ``labels``
    by task name, int64, -1 for none: of the slide, or ``[N]`` of its tiles; of a number float32, NaN for
    none; ``votes`` likewise, ``[R]`` readers' labels of a task with readers. Stored features add
    ``stored [M, D] float16`` of the other tiles, and ``stored_mask [M] bool``; if no tile is drawn, labels of
    tiles are ``[M]`` of these.
    """

    tiles: Tensor
    mask: Tensor
    grade: Tensor
    readers: Tensor
    labels: dict[str, Tensor]
    votes: NotRequired[dict[str, Tensor]]
    stored: NotRequired[Tensor]
    stored_mask: NotRequired[Tensor]


class Chunk(TypedDict):
    """A run of a slide's tiles. Chunks of a slide come in order, without another slide's between.

    ``tiles`` as in a :class:`Bag`, or instead their features ``stored [n, D] float16``; identifiers;
    ``fingerprint`` of the slide's content; ``grade`` 0..K-1, or -1 for none; ``labels`` by task name,
    likewise: of the slide, or ``[n]`` of its tiles; ``last``: True if the chunk ends the slide; ``full``: the
    number of tiles in a chunk that does not.
    """

    tiles: NotRequired[Tensor]
    full: NotRequired[int]
    stored: NotRequired[Tensor]
    slide_id: str
    patient_id: str
    site: str
    fingerprint: str
    grade: int
    labels: dict[str, int | float | Tensor]
    last: bool


class BagDataset(Dataset[Bag]):
    """Bags for training. An index is ``(epoch, slide)``; it and the seed alone decide the draw.

    Args:
        slides: graded slides.
        bag_size: tiles drawn per slide without replacement; slides with fewer are padded with repeats.
        augmentation: applied to each tile, or None.
        seed: seed of the draws and the augmentation.
        sampling: probabilities of the tiles.
        features: name of stored features, added to a bag for the tiles not drawn; empty for none.
        threads: number of threads to read and augment the tiles of a bag; it does not change the result.
        identity: of the network of the features (:attr:`~slidetl.tiles.features.FeatureSource.identity`);
            others are refused, also if they are stored in the middle of a training. None takes any.
    """

    def __init__(
        self,
        slides: Sequence[CachedSlide],
        bag_size: int,
        augmentation: Augmentation | Pipeline | VolumeAugmentation | None,
        seed: int,
        sampling: Sampling = Uniform(),  # noqa: B008 (frozen)
        features: str = "",
        threads: int = 1,
        identity: str | None = None,
    ) -> None:
        self.slides = tuple(slides)
        self.bag_size = bag_size
        self.augmentation = augmentation
        self.seed = seed
        self.sampling = sampling
        self.features, self.identity = features, identity
        self.threads = threads
        ends = np.cumsum([len(slide.cache) for slide in self.slides])
        # The latest attention of each tile, slide after slide, in memory shared with the workers.
        self.attention = torch.zeros(int(ends[-1])) if sampling.attends_every else None
        if self.attention is not None:
            self.attention.share_memory_()  # type: ignore[no-untyped-call] # torch's
        self._starts = [0, *ends.tolist()]

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, index: tuple[int, int]) -> Bag:
        epoch, number = index
        slide = self.slides[number]
        rng = np.random.default_rng((self.seed, epoch, number))
        size = min(self.bag_size, len(slide.cache))
        weights = self.sampling.weights(slide.cache.tissue_fraction, self._attention(number))
        drawn = rng.choice(len(slide.cache), size, replace=False, p=weights)
        drawn.sort()  # neighbours share a shard
        tiles = self._read(slide.cache, drawn, int(rng.integers(2**31)))
        bag: Bag = {
            "tiles": network_input(tiles, slide.cache.spec),
            "mask": torch.arange(self.bag_size) < size,
            "grade": torch.tensor(slide.row.grade),
            "readers": _votes(slide.row.reader_grades),
            "labels": {name: _padded(label, drawn, self.bag_size) for name, label in slide.labels.items()},
        }
        if any(slide.row.votes):  # in the order of the labels, both of the tasks
            of_tasks = zip(slide.labels, slide.row.votes, strict=True)
            bag["votes"] = {name: _votes(votes) for name, votes in of_tasks if votes}
        if self.features:
            rest = np.setdiff1d(np.arange(len(slide.cache)), drawn, assume_unique=True)
            bag["stored"] = torch.from_numpy(
                read_features(slide.cache, self.features, identity=self.identity)[rest]
            )
            bag["stored_mask"] = torch.ones(len(rest), dtype=torch.bool)
        return bag

    def _read(self, cache: SlideCache, drawn: NDArray[np.int64], seed: int) -> NDArray[Any]:
        """Reads the drawn tiles, augmented; they are repeated up to the size of a bag.

        Batch norm sees padding too: tiles of the slide leave its statistics alone, as black would not.
        """
        spec = cache.spec
        bag = np.empty((self.bag_size, *spec.tile_shape), spec.dtype)
        changes = self.augmentation.draw(len(drawn), seed) if self.augmentation is not None else None

        def fill(places: NDArray[np.intp]) -> None:
            tiles = cache.read(drawn[places])
            if self.augmentation is None or changes is None:
                bag[places] = tiles
                return
            for place, tile in zip(places, tiles, strict=True):
                self.augmentation.apply(tile, changes[place], bag[place])

        parts = np.array_split(np.arange(len(drawn)), self.threads)
        if self.threads == 1:
            fill(parts[0])
        else:
            list(_pool(os.getpid(), self.threads).map(fill, parts))  # waits, and raises their errors
        for place in range(len(drawn), self.bag_size):
            bag[place] = bag[place - len(drawn)]
        return bag

    def _attention(self, number: int) -> NDArray[np.float32] | None:
        if self.attention is None:
            return None
        values: NDArray[np.float32] = self.attention[self._starts[number] : self._starts[number + 1]].numpy()
        return values

    def attend(self, attention: Mapping[str, NDArray[np.float32]]) -> None:
        """Sets the model's attention of the tiles ``[N]``, by slide identifier."""
        if self.attention is not None:
            every = [attention[slide.row.slide_id] for slide in self.slides]
            self.attention.copy_(torch.from_numpy(np.concatenate(every)))


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Returns the threads of this worker process; threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="tiles")


def collate_bags(bags: list[Bag]) -> Bag:
    """Stacks bags, and pads stored features to one number.

    Tiles stay in channels-last memory, the fast format of most networks.
    """
    if "stored" in bags[0]:
        most = max(len(bag["stored"]) for bag in bags)
        for bag in bags:
            missing = most - len(bag["stored"])
            bag["stored"] = functional.pad(bag["stored"], (0, 0, 0, missing))
            bag["stored_mask"] = functional.pad(bag["stored_mask"], (0, missing))
            if not len(bag["mask"]):
                bag["labels"] = {
                    name: functional.pad(label, (0, missing), value=-1) if label.ndim else label
                    for name, label in bag["labels"].items()
                }
    # Stacked in memory order: a worker copies in the order of the axes, and would transpose them.
    stacked: Bag = default_collate([{**bag, "tiles": bag["tiles"].movedim(1, -1)} for bag in bags])
    stacked["tiles"] = stacked["tiles"].movedim(-1, 2)
    return stacked


def with_stored(embeddings: Tensor | None, batch: Bag) -> tuple[Tensor, Bag]:
    """Appends stored embeddings to embeddings ``[B, N, D]``, and joins their masks."""
    stored = batch["stored"].float()
    joined = stored if embeddings is None else torch.cat([embeddings.float(), stored], dim=1)
    labels = {  # beside drawn tiles, stored ones get no tile label: they serve the slide alone
        name: functional.pad(label, (0, joined.shape[1] - label.shape[1]), value=-1)
        if label.ndim == 2
        else label
        for name, label in batch["labels"].items()
    }
    mask = torch.cat([batch["mask"], batch["stored_mask"]], dim=1)
    return joined, {**batch, "mask": mask, "labels": labels}


class ChunkDataset(Dataset[Chunk]):
    """Whole slides for evaluation, in chunks to bound memory.

    Args:
        slides: the slides, in order.
        chunk_size: greatest number of tiles in a chunk.
        features: name of stored features to use instead of tiles, a whole slide per chunk; empty for tiles.
        identity: as for :class:`BagDataset`.
    """

    def __init__(
        self,
        slides: Sequence[CachedSlide],
        chunk_size: int,
        features: str = "",
        identity: str | None = None,
    ) -> None:
        self.slides = tuple(slides)
        self.chunk_size = max(len(slide.cache) for slide in self.slides) if features else chunk_size
        self.features, self.identity = features, identity
        self._chunks = [
            (number, start)
            for number, slide in enumerate(self.slides)
            for start in range(0, len(slide.cache), self.chunk_size)
        ]

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> Chunk:
        number, start = self._chunks[index]
        row, cache = self.slides[number].row, self.slides[number].cache
        stop = min(start + self.chunk_size, len(cache))
        chunk: Chunk = {
            "slide_id": row.slide_id,
            "patient_id": row.patient_id,
            "site": row.site,
            "fingerprint": cache.fingerprint,
            "grade": -1 if row.grade is None else row.grade,
            "labels": {
                name: torch.from_numpy(label[start:stop]) if isinstance(label, np.ndarray) else label
                for name, label in self.slides[number].labels.items()
            },
            "last": stop == len(cache),
        }
        if self.features:
            chunk["stored"] = torch.from_numpy(read_features(cache, self.features, identity=self.identity))
        else:
            chunk["tiles"] = network_input(cache.read(np.arange(start, stop)), cache.spec)
            chunk["full"] = self.chunk_size
        return chunk


class EpochSampler(Sampler[tuple[int, int]]):
    """Every slide once per epoch, in an order given by seed and epoch alone.

    Lightning calls :meth:`set_epoch`. With several processes each takes every n-th slide; an epoch skips
    the remainder.
    """

    def __init__(self, n_slides: int, seed: int, rank: int = 0, n_ranks: int = 1) -> None:
        self.n_slides, self.seed, self.rank, self.n_ranks = n_slides, seed, rank, n_ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_slides // self.n_ranks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.order(self.epoch))

    def order(self, epoch: int) -> list[tuple[int, int]]:
        """Draws the order of an epoch: ``(epoch, slide)`` each."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.n_slides)
        return [(epoch, int(number)) for number in order[self.rank :: self.n_ranks][: len(self)]]


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of the sampler's epoch, then of later epochs, to read them ahead.

    Args:
        sampler: gives the order of each epoch, and the epoch to begin with.
        batch_size: slides in a batch; the last of an epoch may have fewer.
        stop: end of reading ahead, an epoch (exclusive); 0 reads none ahead.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, stop: int = 0) -> None:
        self.sampler, self.batch_size, self.stop = sampler, batch_size, stop
        self.first = 0
        """Index of the first batch in the first epoch."""

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        begin = self.sampler.epoch, self.first
        for epoch in range(begin[0], max(begin[0] + 1, self.stop)):
            order = self.sampler.order(epoch)
            for batch in range(begin[1] if epoch == begin[0] else 0, len(self)):
                yield order[batch * self.batch_size : (batch + 1) * self.batch_size]


def _votes(grades: Sequence[int | None]) -> Tensor:
    return torch.tensor([-1 if grade is None else grade for grade in grades]).long()


def _padded(label: int | float | NDArray[np.int64], drawn: NDArray[np.int64], bag_size: int) -> Tensor:
    """Returns the slide's label, or those ``[N]`` of drawn tiles, -1 for padding; all if none is drawn."""
    if not isinstance(label, np.ndarray):
        return torch.tensor(label)
    if not bag_size:
        return torch.from_numpy(label)
    padded = torch.full((bag_size,), -1)
    padded[: len(drawn)] = torch.from_numpy(label[drawn])
    return padded


def network_input(tiles: NDArray[Any], spec: TileSpec) -> Tensor:
    """Converts an array of tiles, as a cache reads them, to the input of a backbone.

    Args:
        tiles: ``[N, S, S, 3] uint8``, or patches ``[N, S, S, S] int16``.
        spec: their specification.

    Returns:
        ``[N, 3, S, S] uint8``, a channels-last view; or ``[N, 1, S, S, S] float32``, 0..1 over the window.
    """
    found = channels_first(torch.from_numpy(tiles))
    return unit_window(found, *spec.window_hu) if spec.is_volume else found
