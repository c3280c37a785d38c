"""The LightningDataModule of a manifest and its cache."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from slidetl.data.augment import (
    Augmentation,
    Pipeline,
    VolumeAugmentation,
    build_augmentation,
    fit_augmentation,
)
from slidetl.data.datasets import (
    Bag,
    BagDataset,
    Chunk,
    ChunkDataset,
    EpochBatches,
    EpochSampler,
    collate_bags,
)
from slidetl.data.manifest import FIVE_GRADES, SPLITS, check_scale, stain_kind
from slidetl.data.record import RecordedSlide, SplitFrom, StudyRecord, ancestors, recorded_parts
from slidetl.data.resuming import ResumableLoader
from slidetl.data.sampling import Sampling, Uniform
from slidetl.data.study import CachedSlide, Study, common_spec, read_study
from slidetl.data.tasks import Task, check_tasks
from slidetl.errors import UsageError
from slidetl.processor import usable_cores
from slidetl.tiles.features import NOT_STATED, FeatureSource, common_source, feature_width, list_features
from slidetl.tiles.grid import TileSpec

_Loader = TypeVar("_Loader", bound=DataLoader[Any])

_ENDLESS = 2**31  # epochs
_WORKERS = 2  # on a CPU: the network needs the other cores
_THREADS_OF_A_GPU = 2  # to feed it; each other core reads tiles
_PASS_OF_VOLUMES = 32  # a first layer of 32 patches of 64 voxels takes 270 MB
_PART_OF = {"validate": "val", "test": "test"}
_KEEP_APART = (
    "put them into the training part by the manifest's column 'split', or start from other weights; if they "
    "are of other patients with the same names, set data.split_from external (of a site of 'slidetl "
    "federate': its split_from)"
)

DEFAULT_BATCH_SIZE = 4
"""Slides per training step, for which the default learning rates are meant."""


class SlideDataModule(pl.LightningDataModule):
    """Slides with their tiles and grades.

    Args:
        manifest: the CSV of the study (or, for ``predict``, a folder of slides).
        cache: the folder written by ``slidetl tile``.
        grades: names of the grades, lowest first; the manifest has their indices 0..K-1.
        bag_size: tiles drawn from each slide in each epoch of training.
        batch_size: slides per training step (and per process).
        chunk_size: tiles per step of evaluation, at most 32 of volumes; it reads every tile of a slide.
        val_fraction: share of the slides for validation, if the manifest has no ``split`` column.
        test_fraction: share of the slides for the test, likewise.
        seed: seed of the split, the draws of tiles and the augmentation.
        num_workers: processes to read tiles ahead, in training and evaluation each; ``auto`` is a GPU's share
            of the cores minus two, or two without a GPU.
        decode_threads: threads per process to decode and augment the tiles of a bag.
        prefetch: batches for each process to read ahead.
        augmentation: changes of training tiles without effect on the grade: options of
            :class:`~slidetl.data.augment.Augmentation`, or a list of albumentations transforms, each with
            ``class_path`` and ``init_args`` (``configs/augmentation/stain.yaml``); on volumes, options of
            :class:`~slidetl.data.augment.VolumeAugmentation`. By default the options' own defaults.
        sampling: rule for drawing tiles, of :mod:`slidetl.data.sampling`; uniform by default.
        features: name of the pretrained backbone's embeddings stored by ``slidetl embed``; empty for none.
            A bag then has all tiles of the slide: drawn tiles go through the backbone and train it, the rest
            add their stored embeddings, without a gradient. These grow stale as the backbone changes, so
            choose a small ``backbone_lr_scale``. With ``bag_size: 0`` no tile is read, in training or
            evaluation: with ``FrozenFeatures`` the result is the same, in a fraction of the time.
        fold: fold of a cross-validation, for ``predictions.csv``.
        tasks: label scales to read beside the grade; set by ``model.tasks``.
        every_grade: refuse a training part without a slide of each grade.
        split_from: choice of slides for testing a checkpoint. ``checkpoint`` takes its recorded parts and
            refuses another study, but tests a study of strangers whole; ``manifest`` takes the column
            ``split``, or without it tests every patient unseen by the checkpoint; ``external`` tests everyone
            as strangers, whatever their patient ids. Slides used to train or choose it are refused. A
            training that starts from a checkpoint compares its slides with those of the checkpoint; with
            ``external`` their content alone.

    Attributes:
        past: the record of the checkpoint to test or resume; None for a new training.
        origin: the record of the checkpoint with the initial weights of a new training, for its patients to
            keep their parts where the manifest has no ``split``; None for other weights.
        config_sha256: SHA-256 of the configuration, for the record of a training.
        options: data options and seed of the configuration as plain values, likewise.
        cores: cores that ``num_workers: auto`` shares out on a GPU; None for all.
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
        num_workers: int | Literal["auto"] = "auto",
        augmentation: Augmentation | VolumeAugmentation | list[dict[str, Any]] | None = None,
        sampling: Sampling | None = None,
        features: str = "",
        fold: str = "",
        decode_threads: int = 1,
        prefetch: int = 2,
        tasks: list[Task] = [],  # noqa: B006 (never changed)
        every_grade: bool = True,
        split_from: SplitFrom = "checkpoint",
    ) -> None:
        super().__init__()
        check_scale(grades)
        check_tasks(tasks)
        for name, value, least in (
            ("bag_size", bag_size, 0 if features else 1),
            ("batch_size", batch_size, 1),
            ("chunk_size", chunk_size, 1),
            ("num_workers", 0 if num_workers == "auto" else num_workers, 0),
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
        self.num_workers, self.augmentation = num_workers, build_augmentation(augmentation)
        self.sampling, self.features, self.fold = sampling or Uniform(), features, fold
        self.decode_threads, self.prefetch = decode_threads, prefetch
        self.split_from: SplitFrom = split_from
        given = {"augmentation": augmentation, "sampling": sampling}
        self._of_tiles = [f"data.{name}" for name, value in given.items() if value is not None]
        self.past: StudyRecord | None = None
        self.origin: StudyRecord | None = None
        self._before: tuple[RecordedSlide, ...] = ()
        self.config_sha256 = ""
        self.cores: int | None = None
        self.options: dict[str, Any] = {}
        self.feature_source: FeatureSource | None = None
        self.slides: dict[str, tuple[CachedSlide, ...]] = {}
        self.tile_spec: TileSpec | None = None
        self._study: Study | None = None
        self._training: ResumableLoader[Bag] | None = None
        self._begun: ResumableLoader[Bag] | None = None  # by read_ahead, for Lightning to ask for
        self._resumed: dict[str, Any] = {}

    @classmethod
    def from_slides(
        cls,
        train: Sequence[CachedSlide] = (),
        val: Sequence[CachedSlide] = (),
        test: Sequence[CachedSlide] = (),
        **options: Any,
    ) -> Self:
        """Makes a data module of slides already read and divided.

        Args:
            train: graded slides to train on.
            val: graded slides for validation.
            test: graded slides for the test.
            options: other options of this class; options of the split are not used.
        """
        data = cls("", "", **options)
        data.slides = {"train": tuple(train), "val": tuple(val), "test": tuple(test)}
        data.slides["predict"] = (*train, *val, *test)
        return data

    def setup(self, stage: str | None = None) -> None:
        """Reads the study, divides its patients, and checks the parts of the stage.

        Raises:
            ManifestError: the manifest has faults.
            CacheMissingError: no slide of the manifest is in the cache.
            CacheMismatchError: slides were tiled differently, or a cache belongs to another slide.
            UsageError: a part of the stage has no slide, or the training part lacks a grade.
        """
        if self.tile_spec is not None:
            return
        # Earlier versions trained with them, which resume.
        if stage == "fit" and not self.bag_size and self._of_tiles and self.past is None:
            raise UsageError(
                f"{', '.join(self._of_tiles)} would have no effect with data.bag_size 0, which reads no "
                "tile; leave it out (null), or change bag_size"
            )
        if not self.slides:
            self._read(stage)
        needed = self._needed(stage)
        self.tile_spec = common_spec([slide.cache for slide in self.slides["predict"]])
        self.augmentation = fit_augmentation(self.augmentation, self.tile_spec.is_volume)
        if self.features and (stage == "fit" or not self.bag_size):
            using = self.slides["train" if self.bag_size else "predict"]  # the latter are all
            self.feature_source = common_source(self.features, [slide.cache for slide in using])
        for part in needed:
            self._check_part(part)

    def follow(self, record: StudyRecord, stage: str) -> None:
        """Divides the study by the record of a checkpoint, unless done before.

        Raises:
            SlidetlError: as :func:`~slidetl.data.record.recorded_parts`, or a part of the stage is empty.
        """
        if self.past == record or self._study is None:
            return
        self.past = record
        self._divide(self._study, stage)
        for part in self._needed(stage):
            self._check_part(part)

    def start_from(self, records: Sequence[StudyRecord] = ()) -> None:
        """Refuses val and test slides that the start of a training has seen; records what it has.

        Args:
            records: of the checkpoints with its initial weights; :attr:`origin` and that of stored features
                are added.

        Raises:
            UsageError: there are such slides; the message names them.
            CacheError: the record of the stored features cannot be read.
        """
        folder = self.slides["predict"][0].cache.path.parent
        sources = [self.feature_source] if self.feature_source is not None else []
        by_content = self.split_from == "external"
        past = ancestors(folder, (self.origin, *records), sources, by_content=by_content)
        past.refuse_seen(self.slides, "the initial weights were", _KEEP_APART)
        self._before = tuple(dict.fromkeys((*self._before, *past.used)))

    @property
    def record(self) -> StudyRecord:
        """The slides of the study and their parts, for the checkpoint of a training."""
        before = self._before if self.past is None else self.past.before
        return StudyRecord.of(self.slides, self.config_sha256, before)

    def _needed(self, stage: str | None) -> tuple[str, ...]:
        needed = ("train", "val") if stage == "fit" else (_PART_OF[stage],) if stage in _PART_OF else ()
        for part in needed:
            if not self.slides[part]:
                raise UsageError(
                    f"the {part} part has no slide; set data.{part}_fraction or the manifest's 'split'"
                )
        return needed

    def _read(self, stage: str | None) -> None:
        with warnings.catch_warnings():
            if self._rank:
                warnings.simplefilter("ignore")  # each process reads, one warns
            self._study = read_study(self.manifest, self.cache, self.grades, self.tasks)
            self._divide(self._study, stage)

    def _divide(self, study: Study, stage: str | None) -> None:
        parts: dict[str, tuple[CachedSlide, ...]]
        note = ""
        if stage == "predict":  # it needs no grades, and so no split
            parts = dict.fromkeys(SPLITS, ())
            if seen := self.past.seen(study) if self.past is not None else 0:
                note = (
                    f"the checkpoint was trained or chosen on {seen} of these {len(study.slides)} slides or "
                    "their patients; predictions of those do not show how well it grades"
                )
        elif self.past is None and (stage == "fit" or self.split_from == "checkpoint"):
            parts = study.parts(
                val_fraction=self.val_fraction, test_fraction=self.test_fraction, seed=self.seed
            )
            if self.split_from != "external":
                parts = ancestors(study.folder, [self.origin], self._sources(study)).keep_parts(parts)
        else:
            resumes = stage == "fit"
            if resumes and self.past is not None:
                study = self.past.in_order(study)
            parts, note = recorded_parts(
                study, self.past, "checkpoint" if resumes else self.split_from, resumes=resumes
            )
        if stage in ("validate", "test") and (others := len(study.graded) - len(parts[_PART_OF[stage]])):
            counts = ", ".join(f"{name} {len(parts[name])}" for name in SPLITS if name != _PART_OF[stage])
            note = f"{note}\n" * bool(note) + f"left out: {others} of {len(study.graded)} slides ({counts})"
        self.slides = {**parts, "predict": study.slides}
        if note:
            rank_zero_info(note)

    def _sources(self, study: Study) -> list[FeatureSource]:
        """Finds the network of the stored features, if any; beside drawn tiles, some slides may have none."""
        caches = [cache for cache in study.caches if self.features and self.features in list_features(cache)]
        return [common_source(self.features, caches)] if caches else []

    def _check_part(self, part: str) -> None:
        slides = self.slides[part]
        counts = Counter(slide.row.grade for slide in slides)
        patients = len({slide.row.patient_id for slide in slides})
        mix = ", ".join(f"{name}: {counts[grade]}" for grade, name in enumerate(self.grades))
        rank_zero_info(f"{part}: {len(slides)} slides of {patients} patients ({mix})")
        if part != "train":
            return
        stains = sorted({stain_kind(slide.row.stain) for slide in slides} & {"trichrome", "sirius"})
        if stains and isinstance(self.augmentation, Pipeline) and self.augmentation.moves_hue:
            rank_zero_warn(
                f"data.augmentation: {', '.join(self.augmentation.moves_hue)} changes hue, and in "
                f"{' and '.join(stains)} the hue is the collagen; leave it out for these stains"
            )
        absent = [name for grade, name in enumerate(self.grades) if not counts[grade]]
        if absent and self.every_grade:
            raise UsageError(
                f"no training slide has grade {', '.join(absent)}, so it could not be learned; add such "
                "slides, move some to the training part (the manifest's 'split', or another data.seed), "
                "or give data.grades a scale without it"
            )
        for number, task in enumerate(self.tasks):
            given = (vote for slide in slides for votes in slide.row.votes[number:][:1] for vote in votes)
            if task.readers and all(vote is None for vote in given):
                raise UsageError(
                    f"task {task.name} takes the readers' labels, and no training slide has any; give the "
                    f"manifest the columns {task.column}_reader1, {task.column}_reader2, ..."
                )
            if not any(np.any(task.is_label(slide.labels[task.name])) for slide in slides):
                raise UsageError(
                    f"no training slide has a label for task {task.name}; the manifest's column "
                    f"{task.column!r} must have some, and a table of tile labels must meet some tiles"
                )

    def check_same_features(self, had_features: bool) -> None:
        """Refuses to resume a training with stored features if it had none, or the reverse.

        Raises:
            UsageError: the two differ.
        """
        if had_features != bool(self.features):
            then, now = ("with", "without") if had_features else ("without", "with")
            raise UsageError(
                f"the checkpoint was trained {then} stored features and cannot go on {now} them; "
                "give data.features as that training had it"
            )

    def check_features(
        self, sha256: str, trains_backbone: bool, width: int, network: tuple[str, str] | None
    ) -> str:
        """Refuses stored features unfit for a training.

        Args:
            sha256: SHA-256 of the initial weights of the training, or :attr:`FeatureSource.identity` of its
                features; empty for a backbone that only stands for stored features.
            trains_backbone: if the training changes them.
            width: length of its embeddings.
            network: name of the backbone and hash of its configuration, as of a :class:`FeatureSource`; None
                if it only stands for stored features.

        Returns:
            The identity of the features.

        Raises:
            UsageError: the features come from other weights, or would keep the backbone from training.
        """
        assert self.feature_source is not None
        if not self.bag_size and trains_backbone:
            raise UsageError(
                "with data.bag_size 0 nothing goes through the backbone, but the strategy trains it; use "
                "slidetl.models.transfer.FrozenFeatures, or a bag_size above 0"
            )
        found = self.feature_source
        stored = feature_width(self.slides["predict"][0].cache, self.features)
        if not found.weights_sha256 and sha256 not in ("", found.identity):
            raise UsageError(
                f"data.features {self.features!r} were imported, and their file states no weights to compare "
                f"with; use model.backbone.name stored_{stored}, or make them with 'slidetl embed'"
            )
        if width != stored:
            raise UsageError(
                f"data.features {self.features!r} have a length of {stored}, the backbone's have {width}; "
                "use the backbone that made them"
            )
        if sha256 not in ("", found.identity):
            raise UsageError(
                f"data.features {self.features!r} are of weights {found.short_identity}, the training starts "
                f"from {sha256[:12]}...; run 'slidetl embed' with the same backbone and pretrained weights, "
                "and let the strategy start from them"
            )
        if network is not None and not found.may_be(*network):
            raise UsageError(
                f"data.features {self.features!r} are of {found.backbone}, the backbone is {network[0]}, "
                "with equal weights but another architecture; use the backbone that made them"
            )
        if sha256 and found.backbone == NOT_STATED:
            rank_zero_warn(
                f"data.features {self.features!r} do not state their network, nor did those of the training: "
                "nothing shows that it is the same. To have them compared, import both with --backbone NAME "
                "and train again"
            )
        return found.identity

    def read_ahead(self) -> None:
        """Starts reading the first bags of a new training, while its network is set up."""
        assert self.trainer is not None
        self._begun = self._training_loader()
        self._begun.batch_sampler.sampler.set_epoch(self.trainer.current_epoch)
        self._begun.read_ahead()

    def train_dataloader(self) -> DataLoader[Bag]:
        """Builds the loader of bags ``[B, N, ...]``, each slide once per epoch; or returns the one begun."""
        begun, self._begun = self._begun, None
        return begun if begun is not None else self._training_loader()

    def _training_loader(self) -> ResumableLoader[Bag]:
        dataset = BagDataset(
            self.slides["train"],
            self.bag_size,
            self.augmentation,
            self.seed,
            self.sampling,
            self.features,
            self.decode_threads,
            self._identity,
        )
        if len(dataset) < self._n_ranks:
            raise UsageError(
                f"{len(dataset)} training slides cannot be shared out among {self._n_ranks} processes; "
                "lower trainer.devices or trainer.num_nodes"
            )
        sampler = EpochSampler(len(dataset), self.seed, self._rank, self._n_ranks)
        # Bags drawn by attention cannot be read ahead of their epoch.
        epochs = self.trainer.max_epochs if self.trainer is not None and dataset.attention is None else 0
        stop = _ENDLESS if epochs in (None, -1) else epochs
        batches = EpochBatches(sampler, self.batch_size, stop)
        self._training = self._loader(ResumableLoader, dataset, batches=batches, collate_fn=collate_bags)
        if self._resumed:
            self._training.load_state_dict(self._resumed["loader"])
            if dataset.attention is not None:
                dataset.attention.copy_(self._resumed["attention"])
        return self._training

    @property
    def training_bags(self) -> BagDataset:
        """The dataset of the training loader."""
        assert self._training is not None
        bags: BagDataset = self._training.dataset  # type: ignore[assignment] # as train_dataloader made it
        return bags

    def attention_dataloader(self) -> DataLoader[Chunk]:
        """Builds a loader of whole training slides, stored features if available, for the attention."""
        return self._evaluation_loader("train", self.features)

    def state_dict(self) -> dict[str, Any]:
        """Returns the progress within the epoch, and the attention for drawing.

        Lightning skips a loader's own state if the optimiser was built from the number of steps.
        """
        if self._training is None:
            return {}
        attention = self.training_bags.attention
        looked = {"attention": attention.clone()} if attention is not None else {}
        return {"loader": self._training.state_dict(), **looked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state, for the next training loader."""
        self._resumed, self._begun = state_dict, None

    def val_dataloader(self) -> DataLoader[Chunk]:
        """Builds the loader of whole slides of the validation part, in chunks."""
        return self._evaluation_loader("val", self.features_instead)

    def test_dataloader(self) -> DataLoader[Chunk]:
        """Builds the loader of whole slides of the test part, in chunks."""
        return self._evaluation_loader("test", self.features_instead)

    def predict_dataloader(self) -> DataLoader[Chunk]:
        """Builds the loader of every slide of the manifest, graded or not, in chunks."""
        return self._evaluation_loader("predict", self.features_instead)

    @property
    def features_instead(self) -> str:
        """Name of the stored features instead of all tiles; empty for none."""
        return self.features if not self.bag_size else ""

    @property
    def _identity(self) -> str | None:
        """The identity of the stored features; None before :meth:`setup`, and without them."""
        return None if self.feature_source is None else self.feature_source.identity

    @property
    def pass_size(self) -> int:
        """Tiles in one pass of an evaluation: ``chunk_size``, fewer of volumes; known after :meth:`setup`."""
        is_volume = self.tile_spec is not None and self.tile_spec.is_volume
        return min(self.chunk_size, _PASS_OF_VOLUMES) if is_volume else self.chunk_size

    def _evaluation_loader(self, part: str, features: str) -> DataLoader[Chunk]:
        # With several processes a short part is padded from its start, to keep every process in step;
        # slides graded twice count once.
        slides = self.slides[part]
        per_rank = -(-len(slides) // self._n_ranks)
        mine = [slides[(self._rank + step * self._n_ranks) % len(slides)] for step in range(per_rank)]
        dataset = ChunkDataset(mine, self.pass_size, features, self._identity)
        return self._loader(DataLoader, dataset, batch_size=None, shuffle=False)

    def _loader(self, kind: type[_Loader], dataset: Any, **options: Any) -> _Loader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        workers = min(self._workers if self.num_workers == "auto" else self.num_workers, len(dataset))
        return kind(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=self.prefetch if workers else None,
            pin_memory=on_gpu,
            **options,
        )

    @property
    def _workers(self) -> int:
        """The number of processes meant by ``auto``."""
        if self.trainer is None or self.trainer.strategy.root_device.type != "cuda":
            return _WORKERS
        cores = usable_cores() if self.cores is None else self.cores
        return max(1, cores // self.trainer.num_devices - _THREADS_OF_A_GPU)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _n_ranks(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1
