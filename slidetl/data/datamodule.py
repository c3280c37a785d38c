"""The manifest and the cache together, as Lightning wants them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from slidetl.cache.ledger import USED, Ledger
from slidetl.cache.store import SlideCache
from slidetl.data.augment import Augmentation
from slidetl.data.datasets import Bag, BagDataset, CachedSlide, Chunk, ChunkDataset, EpochSampler
from slidetl.data.manifest import ManifestRow, check_scale, read_manifest
from slidetl.data.splits import split_patients
from slidetl.errors import CacheMismatchError, CacheMissingError, UsageError
from slidetl.grid import TileSpec
from slidetl.slides import open_slide

FIVE_GRADES = ("0", "1", "2", "3", "4")


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
        num_workers: processes that read tiles ahead.
        augmentation: changes of training tiles that leave the grade as it is.
    """

    def __init__(
        self,
        manifest: str,
        cache: str,
        grades: list[str] = list(FIVE_GRADES),  # noqa: B006 (never changed; jsonargparse shows the default)
        bag_size: int = 48,
        batch_size: int = 4,
        chunk_size: int = 256,
        val_fraction: float = 0.15,
        test_fraction: float = 0.25,
        seed: int = 0,
        num_workers: int = 2,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        check_scale(grades)
        for name, value, least in (
            ("bag_size", bag_size, 1),
            ("batch_size", batch_size, 1),
            ("chunk_size", chunk_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise UsageError(f"data.{name} must be at least {least}, not {value}")
        self.manifest, self.cache = Path(manifest), Path(cache)
        self.grades = tuple(grades)
        self.bag_size, self.batch_size, self.chunk_size = bag_size, batch_size, chunk_size
        self.val_fraction, self.test_fraction, self.seed = val_fraction, test_fraction, seed
        self.num_workers, self.augmentation = num_workers, augmentation
        self.slides: dict[str, tuple[CachedSlide, ...]] = {}
        self.tile_spec: TileSpec | None = None

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
        rows = read_manifest(self.manifest, len(self.grades)).rows
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
        for part in needed:
            counts = Counter(slide.row.grade for slide in self.slides[part])
            patients = len({slide.row.patient_id for slide in self.slides[part]})
            mix = ", ".join(f"{name}: {counts[grade]}" for grade, name in enumerate(self.grades))
            rank_zero_info(f"{part}: {len(self.slides[part])} slides of {patients} patients ({mix})")
            absent = [name for grade, name in enumerate(self.grades) if not counts[grade]]
            if part == "train" and absent:
                raise UsageError(
                    f"no training slide has grade {', '.join(absent)}, so it could not be learned; add such "
                    "slides, move some to the training part (the manifest's 'split', or another data.seed), "
                    "or give data.grades a scale without it"
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
            slides.append(CachedSlide(row, cache))
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
        dataset = BagDataset(self.slides["train"], self.bag_size, self.augmentation, self.seed)
        sampler = EpochSampler(len(dataset), self.seed, self._rank, self._n_ranks)
        return self._loader(dataset, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Chunk]:
        """Whole slides of the validation part, in chunks."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Chunk]:
        """Whole slides of the test part, in chunks."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Chunk]:
        """Every slide of the manifest, graded or not, in chunks."""
        return self._evaluation_loader("predict")

    def _evaluation_loader(self, part: str) -> DataLoader[Chunk]:
        # With several processes a short part is filled up from its start, so that no process has
        # nothing to do; slides graded twice are counted once.
        slides = self.slides[part]
        per_rank = -(-len(slides) // self._n_ranks)
        mine = [slides[(self._rank + step * self._n_ranks) % len(slides)] for step in range(per_rank)]
        return self._loader(ChunkDataset(mine, self.chunk_size), batch_size=None, shuffle=False)

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        workers = min(self.num_workers, len(dataset))
        return DataLoader(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            **options,
        )

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _n_ranks(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1


def _check_same_slide(row: ManifestRow, cache: SlideCache) -> None:
    """Refuses tiles of one slide under the name, and so with the grade, of another."""
    with open_slide(row.path, row.mpp or cache.mpp_level0[0]) as slide:
        if slide.info.fingerprint != cache.fingerprint:
            raise CacheMismatchError(
                f"slide {row.slide_id!r}: the cache holds the tiles of another file than {row.path}; "
                "tile this manifest into a cache of its own, or again with --overwrite"
            )
