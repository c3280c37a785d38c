"""The manifest and the cache together, as Lightning wants them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from slidetl.data.augment import Augmentation
from slidetl.data.datasets import (
    Bag,
    BagDataset,
    CachedSlide,
    Chunk,
    ChunkDataset,
    EpochSampler,
    collate_bags,
)
from slidetl.data.manifest import ManifestRow, check_scale, read_manifest
from slidetl.data.resuming import ResumableLoader
from slidetl.data.sampling import Sampling, Uniform
from slidetl.data.splits import split_patients
from slidetl.data.tasks import Task, check_tasks, read_points
from slidetl.errors import CacheMismatchError, CacheMissingError, UsageError
from slidetl.slides import open_slide
from slidetl.tiles.features import FeatureSource, read_source
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import USED, Ledger
from slidetl.tiles.store import SlideCache

_Loader = TypeVar("_Loader", bound=DataLoader[Any])

FIVE_GRADES = ("0", "1", "2", "3", "4")
DEFAULT_BATCH_SIZE = 4
"""Slides per training step, for which the default learning rates are meant."""


class SlideDataModule(pl.LightningDataModule):
    """Slides with their tiles and grades.

    Args:
        manifest: the CSV of the study (or, for ``predict``, a folder of slides).
        cache: the folder that ``slidetl tile`` wrote.
        grades: names of the grades, lowest first; the manifest gives their indices 0..K-1.
        bag_size: tiles drawn from each slide in each epoch of training.
        batch_size: slides per training step (and per process).
        chunk_size: tiles per step of evaluation, which sees every tile of a slide.
        val_fraction: share of the slides for validation, where the manifest has no ``split`` column.
        test_fraction: share of the slides for the test, likewise.
        seed: of the split, the draws of tiles and the augmentation.
        num_workers: processes that read tiles ahead, in training and evaluation each.
        decode_threads: threads in each of them that decode and augment the tiles of a bag.
        prefetch: batches that each of them reads ahead.
        augmentation: changes of training tiles that leave the grade as it is.
        sampling: how the tiles of a bag are drawn: :class:`~slidetl.data.sampling.Uniform` by default, by
            their tissue, or where the model looked.
        features: name under which ``slidetl embed`` stored the embeddings of the pretrained backbone; empty
            for none. A bag then has all tiles of the slide: those drawn go through the backbone and train it,
            the rest take part by their stored embeddings, without a gradient. These grow stale as the
            backbone moves away from the weights that made them; so a small ``backbone_lr_scale`` suits them.
            With ``bag_size: 0`` no tile is read at all, in training or evaluation: for ``FrozenFeatures``,
            whose embeddings never change, the same result in a fraction of the time.
        fold: which fold of a cross-validation this is, written into ``predictions.csv``.
        tasks: further scales to read from the manifest; set by ``model.tasks``.
        every_grade: whether a training part that lacks a grade is refused, since that could not be learned.
    """

    def __init__(
        self,
        manifest: str,
        cache: str,
        grades: list[str] = list(FIVE_GRADES),  # noqa: B006 (never changed; jsonargparse shows the default)
        bag_size: int = 48,
        batch_size: int = DEFAULT_BATCH_SIZE,
        chunk_size: int = 256,
        val_fraction: float = 0.15,
        test_fraction: float = 0.25,
        seed: int = 0,
        num_workers: int = 2,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 (frozen)
        sampling: Sampling | None = None,
        features: str = "",
        fold: str = "",
        decode_threads: int = 1,
        prefetch: int = 2,
        tasks: list[Task] = [],  # noqa: B006 (never changed)
        every_grade: bool = True,
    ) -> None:
        super().__init__()
        check_scale(grades)
        check_tasks(tasks)
        for name, value, least in (
            ("bag_size", bag_size, 0 if features else 1),
            ("batch_size", batch_size, 1),
            ("chunk_size", chunk_size, 1),
            ("num_workers", num_workers, 0),
            ("decode_threads", decode_threads, 1),
            ("prefetch", prefetch, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise UsageError(f"data.{name} must be at least {least}, not {value}")
        self.manifest, self.cache = Path(manifest), Path(cache)
        self.grades, self.tasks, self.every_grade = tuple(grades), tuple(tasks), every_grade
        self.bag_size, self.batch_size, self.chunk_size = bag_size, batch_size, chunk_size
        self.val_fraction, self.test_fraction, self.seed = val_fraction, test_fraction, seed
        self.num_workers, self.augmentation = num_workers, augmentation
        self.sampling, self.features, self.fold = sampling or Uniform(), features, fold
        self.decode_threads, self.prefetch = decode_threads, prefetch
        self.feature_source: FeatureSource | None = None
        self.slides: dict[str, tuple[CachedSlide, ...]] = {}
        self.tile_spec: TileSpec | None = None
        self._training: ResumableLoader[Bag] | None = None
        self._resumed: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Reads the manifest, opens the caches and splits the patients.

        Raises:
            ManifestError: the manifest has faults.
            CacheMissingError: no slide of the manifest is in the cache.
            CacheMismatchError: the slides were not all tiled alike.
            UsageError: a part that is needed has no slide, or training would lack a grade.
        """
        if self.slides:
            return
        rows = read_manifest(self.manifest, len(self.grades), tasks=self.tasks).rows
        slides = self._open(rows)
        specs = {slide.cache.spec for slide in slides}
        if len(specs) > 1:
            raise CacheMismatchError(
                f"{self.cache}: the slides were tiled in {len(specs)} different ways "
                f"(mpp {sorted({spec.mpp for spec in specs})}, "
                f"tile size {sorted({spec.tile_size_px for spec in specs})}); tile them all alike"
            )
        self.tile_spec = specs.pop()
        graded = [slide for slide in slides if slide.row.grade is not None]
        if stage != "predict" and len(graded) < len(slides):
            rank_zero_warn(f"{len(slides) - len(graded)} of {len(slides)} slides have no grade, left out")
        if any(slide.row.split for slide in graded):
            split = {slide.row.slide_id: slide.row.split for slide in graded}
        elif stage == "predict":
            split = {}
        else:
            # Decided over the whole manifest, so that a slide lost in tiling moves no other patient.
            split = split_patients(
                [row for row in rows if row.grade is not None],
                val_fraction=self.val_fraction,
                test_fraction=self.test_fraction,
                seed=self.seed,
            )
        self.slides = {
            part: tuple(slide for slide in graded if split.get(slide.row.slide_id) == part)
            for part in ("train", "val", "test")
        }
        self.slides["predict"] = tuple(slides)
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage or "", ())
        for part in needed:
            if not self.slides[part]:
                raise UsageError(
                    f"the {part} part has no slide; set data.{part}_fraction or the manifest's 'split'"
                )
        if self.features and (stage == "fit" or not self.bag_size):
            using = self.slides["train" if self.bag_size else "predict"]  # the latter are all
            self.feature_source = _one_source(self.features, using)
        for part in needed:
            counts = Counter(slide.row.grade for slide in self.slides[part])
            patients = len({slide.row.patient_id for slide in self.slides[part]})
            mix = ", ".join(f"{name}: {counts[grade]}" for grade, name in enumerate(self.grades))
            rank_zero_info(f"{part}: {len(self.slides[part])} slides of {patients} patients ({mix})")
            absent = [name for grade, name in enumerate(self.grades) if not counts[grade]]
            if part == "train" and absent and self.every_grade:
                raise UsageError(
                    f"no training slide has grade {', '.join(absent)}, so it could not be learned; add such "
                    "slides, move some to the training part (the manifest's 'split', or another data.seed), "
                    "or give data.grades a scale without it"
                )
            for task in self.tasks if part == "train" else ():
                if not any(np.any(slide.labels[task.name] >= 0) for slide in self.slides[part]):
                    raise UsageError(
                        f"no training slide has a label for task {task.name}; the manifest's column "
                        f"{task.column!r} must have some, and a table of tile labels must meet some tiles"
                    )

    def _open(self, rows: tuple[ManifestRow, ...]) -> list[CachedSlide]:
        ledger = {entry.slide_id: entry for entry in Ledger(self.cache / "ledger.csv").rows()}
        slides, lost = [], []
        for row in rows:
            entry = ledger.get(row.slide_id)
            try:
                if entry is not None and entry.status != USED:
                    raise CacheMissingError(entry.reason)
                cache = SlideCache.open(self.cache / f"{row.slide_id}.zarr")
            except CacheMissingError:
                lost.append(row.slide_id)
                continue
            if entry is None or entry.path != str(row.path):
                _check_same_slide(row, cache)
            slides.append(CachedSlide(row, cache, _labels(row, cache, self.tasks)))
        if not slides:
            raise CacheMissingError(
                f"{self.cache}: none of the {len(rows)} slides of {self.manifest} is here; "
                "run 'slidetl tile' first"
            )
        if lost:
            rank_zero_warn(
                f"{len(lost)} of {len(rows)} slides are not in the cache, left out (ledger.csv says why): "
                + ", ".join(lost[:10])
                + (" ..." if len(lost) > 10 else "")
            )
        return slides

    def train_dataloader(self) -> DataLoader[Bag]:
        """Bags ``[B, N, ...]``, each slide once per epoch."""
        dataset = BagDataset(
            self.slides["train"],
            self.bag_size,
            self.augmentation,
            self.seed,
            self.sampling,
            self.features,
            self.decode_threads,
        )
        if len(dataset) < self._n_ranks:
            raise UsageError(
                f"{len(dataset)} training slides cannot be shared out among {self._n_ranks} processes; "
                "lower trainer.devices or trainer.num_nodes"
            )
        sampler = EpochSampler(len(dataset), self.seed, self._rank, self._n_ranks)
        self._training = self._loader(
            ResumableLoader, dataset, batch_size=self.batch_size, sampler=sampler, collate_fn=collate_bags
        )
        if self._resumed:
            self._training.load_state_dict(self._resumed["loader"])
            if dataset.attention is not None:
                dataset.attention.copy_(self._resumed["attention"])
        return self._training

    @property
    def training_bags(self) -> BagDataset:
        """What the training loader draws from."""
        assert self._training is not None
        bags: BagDataset = self._training.dataset  # type: ignore[assignment] # as train_dataloader made it
        return bags

    def attention_dataloader(self) -> DataLoader[Chunk]:
        """Whole training slides, for the model to look at: stored features if there are, else tiles."""
        return self._evaluation_loader("train", self.features)

    def state_dict(self) -> dict[str, Any]:
        """How far the training is into its epoch, and where it looked before that.

        Lightning asks the loader too, but gives it back only to a training whose optimiser was made without
        a look at the number of steps.
        """
        if self._training is None:
            return {}
        attention = self.training_bags.attention
        looked = {"attention": attention.clone()} if attention is not None else {}
        return {"loader": self._training.state_dict(), **looked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave."""
        self._resumed = state_dict

    def val_dataloader(self) -> DataLoader[Chunk]:
        """Whole slides of the validation part, in chunks."""
        return self._evaluation_loader("val", self._instead)

    def test_dataloader(self) -> DataLoader[Chunk]:
        """Whole slides of the test part, in chunks."""
        return self._evaluation_loader("test", self._instead)

    def predict_dataloader(self) -> DataLoader[Chunk]:
        """Every slide of the manifest, graded or not, in chunks."""
        return self._evaluation_loader("predict", self._instead)

    @property
    def _instead(self) -> str:
        """The stored features that take the place of all tiles; empty for none."""
        return self.features if not self.bag_size else ""

    def _evaluation_loader(self, part: str, features: str) -> DataLoader[Chunk]:
        # With several processes a short part is filled up from its start, so that no process has
        # nothing to do; slides graded twice are counted once.
        slides = self.slides[part]
        per_rank = -(-len(slides) // self._n_ranks)
        mine = [slides[(self._rank + step * self._n_ranks) % len(slides)] for step in range(per_rank)]
        dataset = ChunkDataset(mine, self.chunk_size, features)
        return self._loader(DataLoader, dataset, batch_size=None, shuffle=False)

    def _loader(self, kind: type[_Loader], dataset: Any, **options: Any) -> _Loader:
        workers = min(self.num_workers, len(dataset))
        return kind(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=self.prefetch if workers else None,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            **options,
        )

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _n_ranks(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1


def _labels(row: ManifestRow, cache: SlideCache, tasks: Sequence[Task]) -> dict[str, int | NDArray[np.int64]]:
    """What :class:`~slidetl.data.datasets.CachedSlide` has of each task."""
    labels: dict[str, int | NDArray[np.int64]] = {}
    for task, label in zip(tasks, row.labels, strict=True):
        if isinstance(label, Path):
            points = read_points(label, len(task.grades))
            labels[task.name] = points.of_tiles(cache.origins_level0, cache.extent_level0)
        elif task.of_tiles:
            labels[task.name] = np.full(len(cache), -1 if label is None else label)
        else:
            labels[task.name] = -1 if label is None else label
    return labels


def _one_source(name: str, slides: Sequence[CachedSlide]) -> FeatureSource:
    """What the stored features of all these slides were computed by: one network."""
    sources = [read_source(slide.cache, name) for slide in slides]
    for slide, source in zip(slides, sources, strict=True):
        if not source.same_network(sources[0]):
            raise CacheMismatchError(
                f"features {name!r} of {slide.row.slide_id} are of other weights "
                f"({source.weights_sha256[:12]}...) than those of {slides[0].row.slide_id} "
                f"({sources[0].weights_sha256[:12]}...); run 'slidetl embed --overwrite' for all"
            )
    return sources[0]


def _check_same_slide(row: ManifestRow, cache: SlideCache) -> None:
    """Refuses tiles of one slide under the name, and so with the grade, of another."""
    with open_slide(row.path, row.mpp or cache.mpp_level0[0]) as slide:
        if slide.info.fingerprint != cache.fingerprint:
            raise CacheMismatchError(
                f"slide {row.slide_id!r}: the cache holds the tiles of another file than {row.path}; "
                "tile this manifest into a cache of its own, or again with --overwrite"
            )
