"""Augmentation: of tiles a fast default, or a pipeline of albumentations; of volumes a fast default."""

from __future__ import annotations

import copy
import itertools
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError
from slidetl.slides.opencv import opencv

# Else albumentations asks a server for its version as it is imported, be it by the parser of a configuration.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

_JITTERED = 0.8  # share of the tiles whose colours change
_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass(frozen=True)
class Augmentation:
    """Changes of a tile without effect on its grade.

    Hue stays unchanged: in trichrome and Sirius red it *is* the collagen. The colour changes of torchvision's
    and albumentations' ``ColorJitter`` apply in the order below with one clip at the end: as one affine map
    per pixel they are several times faster.

    Attributes:
        flips: the eight symmetries of the square; tissue has no upright position.
        brightness: greatest relative change of brightness, 0..1.
        contrast: greatest relative change of contrast about the tile's mean grey, 0..1.
        saturation: greatest relative change of saturation, 0..1; stains vary in strength.
    """

    flips: bool = True
    brightness: float = 0.15
    contrast: float = 0.15
    saturation: float = 0.15

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"augmentation.{name} must be from 0 to below 1, not {getattr(self, name)}")

    def __call__(self, tiles: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """Augments tiles ``[N, S, S, 3] uint8`` one by one; the same seed gives the same result."""
        out = np.empty_like(tiles)
        for tile, change, target in zip(tiles, self.draw(len(tiles), seed), out, strict=True):
            self.apply(tile, change, target)
        return out

    def draw(self, n: int, seed: int) -> NDArray[np.float64]:
        """Draws the changes of ``n`` tiles, for :meth:`apply`.

        Returns:
            ``[n, 4]``: the symmetry, 0..7, then the factors of brightness, contrast and saturation.
        """
        rng = np.random.default_rng(seed)
        symmetries = rng.integers(8, size=n) if self.flips else np.zeros(n)
        greatest = np.array([self.brightness, self.contrast, self.saturation])
        factors = 1 + rng.uniform(-1, 1, (n, 3)) * greatest
        factors[rng.random(n) >= _JITTERED] = 1
        return np.column_stack([symmetries, factors])

    def apply(self, tile: NDArray[np.uint8], change: NDArray[np.float64], out: NDArray[np.uint8]) -> None:
        """Writes a tile ``[S, S, 3] uint8`` to ``out``, changed as drawn by :meth:`draw`; thread-safe."""
        cv2 = opencv()
        symmetry, (brightness, contrast, saturation) = int(change[0]), change[1:]
        if symmetry & 4:
            tile = cv2.transpose(tile)
        if symmetry & 3:
            tile = cv2.flip(tile, (symmetry & 3) - 2)
        if (change[1:] == 1).all():
            out[:] = tile
            return
        grey = _GREY @ cv2.mean(tile)[:3]
        matrix = np.empty((3, 4))
        matrix[:, :3] = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * _GREY)
        matrix[:, 3] = brightness * (1 - contrast) * grey
        cv2.transform(tile, matrix, dst=out)


@dataclass(frozen=True)
class VolumeAugmentation:
    """Changes of a patch of a volume without effect on its label; the default on volumes.

    The default symmetries keep the axial axis: slices are often thicker than pixels are wide, and resampling
    does not restore the detail lost between them, so a patch turned onto its side looks like no scan.

    Attributes:
        symmetries: ``axial``, the 16 symmetries of the cube that keep the axial axis; ``cube``, all 48, for
            thin slices; or ``none``.
        shift_hu: greatest shift, Hounsfield units.
        scale: greatest relative change of the density above that of air at -1000 HU, 0..1.
        noise_hu: greatest standard deviation of added normal noise, Hounsfield units.
    """

    symmetries: Literal["axial", "cube", "none"] = "axial"
    shift_hu: float = 20.0
    scale: float = 0.05
    noise_hu: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < 1:
            raise UsageError(f"augmentation.scale must be from 0 to below 1, not {self.scale}")
        for name in ("shift_hu", "noise_hu"):
            if not 0 <= getattr(self, name) <= 1000:
                raise UsageError(f"augmentation.{name} must be from 0 to 1000, not {getattr(self, name)}")

    def draw(self, n: int, seed: int) -> NDArray[np.float64]:
        """Draws the changes of ``n`` patches, for :meth:`apply`.

        Returns:
            ``[n, 5]``: the symmetry, 0..47, shift, scale, standard deviation and seed of the noise.
        """
        rng = np.random.default_rng(seed)
        symmetries = rng.integers({"none": 1, "axial": 16, "cube": 48}[self.symmetries], size=n)
        greatest = np.array([self.shift_hu, self.scale, self.noise_hu])
        change = rng.uniform(-1, 1, (n, 3)) * greatest
        change[rng.random(n) >= _JITTERED] = 0
        return np.column_stack([symmetries, change, rng.integers(2**32, size=n)])

    def apply(self, tile: NDArray[np.int16], change: NDArray[np.float64], out: NDArray[np.int16]) -> None:
        """Writes a patch ``[S, S, S] int16`` to ``out``, changed as drawn by :meth:`draw`; thread-safe."""
        axes, flips = divmod(int(change[0]), 8)
        shift, scale, noise = change[1:4]
        tile = tile.transpose(_AXES[axes])[
            tuple(slice(None, None, -1 if flips & bit else 1) for bit in (4, 2, 1))
        ]
        if not change[1:4].any():
            out[:] = tile
            return
        hu = (tile.astype(np.float32) - _AIR_HU) * np.float32(1 + scale) + np.float32(_AIR_HU + shift)
        if noise:
            rng = np.random.default_rng(int(change[4]))
            hu += np.float32(noise) * rng.standard_normal(hu.shape, np.float32)
        np.rint(hu, out=hu)
        out[:] = np.clip(hu, -32768, 32767)


_AIR_HU = -1000
_AXES = tuple(itertools.permutations(range(3)))  # the first two keep the axial axis, which is the first


class Transform(Protocol):
    """The interface of an albumentations transform or composition, as used by slidetl."""

    def set_random_seed(self, seed: int | None) -> None:
        """Sets the seed of the next call."""

    def __call__(self, *, image: NDArray[np.uint8]) -> dict[str, Any]:
        """Changes an image ``[S, S, 3] uint8``."""


class Pipeline:
    """A pipeline of albumentations; a tile's seed alone decides its changes, for repeatable trainings.

    A core reads and changes half as many tiles as by :class:`Augmentation` (docs/evidence/augmentation.md).

    Args:
        transforms: each with ``class_path`` of albumentations and ``init_args``; likewise within ``OneOf``.

    Raises:
        UsageError: there is no such transform, or albumentations refuses its arguments.
    """

    def __init__(self, transforms: Sequence[Mapping[str, Any]]) -> None:
        import albumentations

        self._pipeline: Transform = albumentations.Compose([_build(item) for item in transforms])
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"_pipeline": self._pipeline}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    @property
    def moves_hue(self) -> tuple[str, ...]:
        """Names of the transforms of hue; in trichrome and Sirius red, hue is the collagen."""
        return tuple(name for name in _class_names(self._pipeline) if name in _MOVE_HUE)

    def draw(self, n: int, seed: int) -> NDArray[np.int64]:
        """Draws the seeds ``[n]`` of ``n`` tiles, for :meth:`apply`."""
        return np.random.default_rng(seed).integers(2**32, size=n)

    def apply(self, tile: NDArray[np.uint8], change: np.int64, out: NDArray[np.uint8]) -> None:
        """Writes a tile ``[S, S, 3] uint8`` to ``out``, changed by its seed; thread-safe.

        Raises:
            UsageError: the pipeline changes size or type of the tile.
        """
        if not hasattr(self._local, "pipeline"):  # a pipeline keeps its state between calls
            self._local.pipeline = copy.deepcopy(self._pipeline)
        self._local.pipeline.set_random_seed(int(change))
        changed = self._local.pipeline(image=tile)["image"]
        if changed.shape != tile.shape or changed.dtype != np.uint8:
            raise UsageError(
                f"data.augmentation: expected tiles {tile.shape} uint8 back, found {changed.shape} "
                f"{changed.dtype}; leave out what resizes or normalises, the network does the latter"
            )
        out[:] = changed


def build_augmentation(
    value: Augmentation | VolumeAugmentation | Sequence[Mapping[str, Any]] | None,
) -> Augmentation | VolumeAugmentation | Pipeline | None:
    """Builds the augmentation of a configuration; a list is a pipeline of albumentations."""
    return Pipeline(value) if isinstance(value, Sequence) else value


def fit_augmentation(
    augmentation: Augmentation | VolumeAugmentation | Pipeline | None, is_volume: bool
) -> Augmentation | VolumeAugmentation | Pipeline:
    """Returns the augmentation, or without any the default one of tiles or volumes.

    Raises:
        UsageError: it is of tiles and the data are volumes, or the reverse.
    """
    if augmentation is None:
        return VolumeAugmentation() if is_volume else Augmentation()
    if is_volume != isinstance(augmentation, VolumeAugmentation):
        kinds = ("volumes", "VolumeAugmentation") if is_volume else ("tiles of slides", "Augmentation")
        raise UsageError(
            f"data.augmentation is {type(augmentation).__name__}, but the cache has {kinds[0]}; give options "
            f"of slidetl.data.augment.{kinds[1]}"
        )
    return augmentation


def read_augmentation(config: Mapping[str, Any]) -> Augmentation | Pipeline:
    """Reads the augmentation of a configuration of ``slidetl fit``; :class:`Augmentation` by default."""
    value = (config.get("data") or {}).get("augmentation") or {}
    return Augmentation(**value) if isinstance(value, Mapping) else Pipeline(value)


def draw_sheet(
    tile: NDArray[np.uint8], augmentation: Augmentation | Pipeline, rows: int, columns: int, seed: int
) -> NDArray[np.uint8]:
    """Draws a contact sheet of a tile: unchanged in the upper-left corner, changed elsewhere.

    Args:
        tile: ``[S, S, 3] uint8``.
        augmentation: the changes.
        rows: tiles below each other.
        columns: tiles beside each other.
        seed: of the changes.

    Returns:
        ``[rows * (S + 4) + 4, columns * (S + 4) + 4, 3] uint8``, 4 px between tiles, the first framed.
    """
    step = len(tile) + 4
    sheet = np.full((rows * step + 4, columns * step + 4, 3), 255, np.uint8)
    sheet[: step + 4, : step + 4] = 0
    changes = augmentation.draw(rows * columns, seed)
    for number, change in enumerate(changes):
        top, left = (place * step + 4 for place in divmod(number, columns))
        target = sheet[top : top + len(tile), left : left + len(tile)]
        if number:
            changed = np.empty_like(tile)
            augmentation.apply(tile, change, changed)
            target[:] = changed
        else:
            target[:] = tile
    return sheet


_MOVE_HUE = (
    "ChannelDropout",
    "ChannelShuffle",
    "ColorJitter",
    "HEStain",
    "HueSaturationValue",
    "InvertImg",
    "PlanckianJitter",
    "RGBShift",
    "RandomToneCurve",
    "Solarize",
    "ToGray",
    "ToSepia",
)


def _class_names(transform: Any) -> Iterator[str]:
    """Yields the names of a transform and its inner transforms."""
    yield type(transform).__name__
    for inner in getattr(transform, "transforms", ()):
        yield from _class_names(inner)


def _build(item: Any) -> Any:
    """Builds a transform and its inner transforms; other values stay."""
    if isinstance(item, (list, tuple)):
        return [_build(part) for part in item]
    if not isinstance(item, Mapping) or "class_path" not in item:
        return item
    import albumentations

    package, _, name = str(item["class_path"]).rpartition(".")
    made = getattr(albumentations, name, None) if package == "albumentations" else None
    if not isinstance(made, type) or not issubclass(
        made, (albumentations.BasicTransform, albumentations.BaseCompose)
    ):
        raise UsageError(
            f"data.augmentation: expected a transform such as albumentations.GaussianBlur, found "
            f"{item['class_path']!r:.100}"
        )
    arguments = {key: _build(value) for key, value in (item.get("init_args") or {}).items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # it warns of unknown arguments and ignores them
            return made(**arguments)
    except (TypeError, ValueError, UserWarning) as error:
        raise UsageError(f"data.augmentation: {name}: {' '.join(str(error).split())}") from error
