"""Options of the commands for embedding tiles; loads no torch, to keep their help fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from slidetl.data.manifest import FIVE_GRADES
from slidetl.errors import UsageError


@dataclass(frozen=True)
class EmbedOptions:
    """Options of embedding and storing the tiles of a cache.

    Attributes:
        blocks: inner blocks to store too, averaged over space, as NAME.BLOCK; separated by commas.
        name: name of the features, instead of the backbone's; distinguishes weights of one network.
        slides: identifiers of the slides to embed, instead of all in the cache.
        batch_size: tiles per forward pass; by default 128, of volumes 16.
        device: auto takes a GPU if there is one.
        precision: number format of the forward pass; auto is bfloat16 on a GPU that computes in it, else
            float32. Features are stored in float16.
        devices: number of GPUs, one process each, to share the slides; on a CPU, number of processes.
        overwrite: replace stored features of the same name, even from other weights.
        profile: print tiles per second with everything on, and of the network alone, of one process.

    Raises:
        UsageError: batch_size or devices is below 1, or devices above 1 with profile.
    """

    blocks: str = ""
    name: str | None = None
    slides: tuple[str, ...] = ()
    batch_size: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    devices: int = 1
    overwrite: bool = False
    profile: bool = False

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size must be at least 1, not {self.batch_size}")
        if self.devices < 1:
            raise UsageError(f"--devices must be at least 1, not {self.devices}")
        if self.profile and self.devices > 1:
            raise UsageError(f"--profile measures one process; leave out --devices {self.devices}")


@dataclass(frozen=True)
class SimilarityOptions:
    """Options of comparing networks.

    Attributes:
        slides: identifiers of the slides to draw tiles from, instead of all in the cache.
        tiles: number of tiles to compare; all if there are fewer.
        permutations: number of permutations for the noise floor.
        seed: seed of tiles, permutations and the random network; with the seed_everything of a training from
            scratch, 'random' is its start.
        batch_size: tiles per forward pass.
        allow: package or class outside slidetl for a checkpoint to import; may be repeated.

    Raises:
        UsageError: tiles is below 4, or batch_size below 1.
    """

    slides: tuple[str, ...] = ()
    tiles: int = 2000
    permutations: int = 10
    seed: int = 0
    batch_size: int = 64
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tiles < 4 or self.batch_size < 1:
            raise UsageError(
                f"expected at least 4 tiles and a batch of 1, not {self.tiles} and {self.batch_size}"
            )


@dataclass(frozen=True)
class FeatureStudy:
    """A study for classical models, split as by :class:`~slidetl.data.datamodule.SlideDataModule`.

    Attributes:
        manifest: the manifest (CSV) of the study.
        cache: the folder written by 'slidetl tile' and 'slidetl embed'.
        names: names of stored features, e.g. resnet18 resnet18.layer3; several are joined.
        grades: names of the grades, lowest first.
        val_fraction: share of the slides for validation, as data.val_fraction of 'slidetl fit', to get the
            same test part; here these slides are trained on, since there is no epoch to choose.
        test_fraction: share of the slides for the test, as data.test_fraction.
        seed: seed of the split, as data.seed; also of inner folds and trees.
    """

    manifest: Path
    cache: Path
    names: tuple[str, ...] = field(metadata={"option": "features"})
    grades: tuple[str, ...] = FIVE_GRADES
    val_fraction: float = 0.15
    test_fraction: float = 0.25
    seed: int = 0
