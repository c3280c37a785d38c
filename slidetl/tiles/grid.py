"""Grids of tiles: pure arithmetic, no slide and no file.

Two frames occur. *Level 0* is the slide's own finest pixel grid, the frame of a tile's origin. *Tile pixels*
are squares of ``mpp`` micrometres, independent of the slide's pyramid. Points are ``(x, y)``, array indices
``(row, column)``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError

Codec = Literal["jpeg", "zstd"]
Edge = Literal["drop", "pad"]
Mask = Literal["lung", "body", "none"]

_SIZE_PX, _SIZE_VOXEL = 224, 64  # of tiles of slides and of series


@dataclass(frozen=True)
class TileSpec:
    """The choice of a slide's tiles and of their pixels, or of a CT series' patches and of their voxels.

    ``slidetl tile`` has these fields as its options, with the help below. Those of slides alone must keep
    their defaults with ``spacing_mm``, which makes it a choice of patches.

    Attributes:
        mpp: spacing of the tiles, micrometres per pixel; slides need it.
        spacing_mm: spacing of the patches along all axes, millimetres per voxel; CT series need it, instead
            of ``mpp``.
        tile_size_px: side of a tile or patch, pixels or voxels; 0 is 224, for patches 64.
        stride_px: distance between neighbouring tiles, pixels or voxels; 0 is ``tile_size_px`` (no overlap,
            no gap).
        min_tissue: least share of tissue in a tile, or of ``mask`` in a patch, 0..1.
        window_hu: lowest and highest Hounsfield unit kept in patches; voxels beyond get the limit.
        mask: part of the body that patches must lie in: the lungs, the whole body, or none of both.
        mpp_tolerance: greatest relative difference from ``mpp`` at which a pyramid level is read without
            resampling, 0..0.5.
        codec: compression of the tiles; zstd is lossless, and any zarr reader opens it. Of patches always
            zstd.
        jpeg_quality: quality of ``codec`` jpeg, 1..100; unused if the grid coincides with the slide's own
            JPEG tiles, which are copied unchanged.
        edge: treatment of tiles cut by the right and bottom border; pad fills them with the slide's
            background, which is no tissue.
        icc: convert colours to sRGB by the slide's ICC profile, if it has one.
        min_focus: least sharpness of a tile (0.08: blurred by 2 um); 0 measures none, which is faster.
        max_pen: greatest share of a tile covered by the ink of a pen, 0..1; 1 keeps all.
        max_fold: greatest share of a tile covered by folded tissue, 0..1; 1 keeps all.
        max_air: greatest share of air or fat within the tissue of a tile, 0..1; 1 keeps all.
        channels: channels of a slide with several other than RGB, by number from 0 or name, separated by
            commas: one (grey), or three as red, green and blue.
        foreign: the tool that cut the tiles, and what else tells its tiles from others; empty for slidetl.
            ``mpp`` and ``tile_size_px`` are then 0 if its files do not state them.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    mpp: float = 0.0
    tile_size_px: int = 0
    stride_px: int = 0
    min_tissue: float = 0.25
    mpp_tolerance: float = 0.01
    codec: Codec = "jpeg"
    jpeg_quality: int = 90
    edge: Edge = "drop"
    icc: bool = False
    min_focus: float = 0.0
    max_pen: float = 1.0
    max_fold: float = 1.0
    max_air: float = 1.0
    channels: str = ""
    foreign: str = dataclasses.field(default="", metadata={"option": ""})
    spacing_mm: float = 0.0
    window_hu: tuple[float, float] = dataclasses.field(
        default=(-1000.0, 400.0), metadata={"option": "window"}
    )
    mask: Mask = "lung"

    def __post_init__(self) -> None:
        least = 0 if self.foreign else 1
        self._check_volume()
        if not (self.tile_size_px or self.foreign):
            object.__setattr__(self, "tile_size_px", _SIZE_VOXEL if self.spacing_mm else _SIZE_PX)
        if not (np.isfinite(self.mpp) and (self.mpp > 0 or (self.foreign and self.mpp == 0))):
            raise UsageError(
                f"mpp must be a positive number of micrometres, not {self.mpp} (CT series take spacing_mm "
                "instead)"
            )
        if self.tile_size_px < least:
            raise UsageError(f"tile size must be at least 1 pixel, not {self.tile_size_px}")
        if self.stride_px < 0:
            raise UsageError(f"stride must be at least 1 pixel (0: the tile size), not {self.stride_px}")
        if self.stride_px == 0:
            object.__setattr__(self, "stride_px", self.tile_size_px)
        if not 0 <= self.min_tissue <= 1:
            raise UsageError(f"least tissue must be a share from 0 to 1, not {self.min_tissue}")
        if not 0 <= self.mpp_tolerance < 0.5:
            raise UsageError(f"mpp tolerance must be from 0 to 0.5, not {self.mpp_tolerance}")
        if self.codec not in ("jpeg", "zstd"):
            raise UsageError(f"codec must be 'jpeg' or 'zstd', not {self.codec!r}")
        if not 1 <= self.jpeg_quality <= 100:
            raise UsageError(f"JPEG quality must be from 1 to 100, not {self.jpeg_quality}")
        if self.edge not in ("drop", "pad"):
            raise UsageError(f"edge must be 'drop' or 'pad', not {self.edge!r}")
        if not (np.isfinite(self.min_focus) and self.min_focus >= 0):
            raise UsageError(f"least focus must be a number from 0 up, not {self.min_focus}")
        for name, share in (("pen", self.max_pen), ("fold", self.max_fold), ("air", self.max_air)):
            if not 0 <= share <= 1:
                raise UsageError(f"greatest share of {name} must be from 0 to 1, not {share}")
        words = self.channels.split(",") if self.channels else [""] * 3
        if len(words) not in (1, 3) or (self.channels and not all(map(str.strip, words))):
            raise UsageError(f"channels must be one, or three separated by commas, not {self.channels!r}")

    def _check_volume(self) -> None:
        """Checks and completes the fields of patches."""
        object.__setattr__(self, "window_hu", tuple(map(float, self.window_hu)))
        if not (np.isfinite(self.spacing_mm) and self.spacing_mm >= 0):
            raise UsageError(f"spacing must be a positive number of millimetres, not {self.spacing_mm}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if not self.spacing_mm:
            if any(getattr(self, name) != defaults[name] for name in _OF_VOLUMES):
                raise UsageError("window and mask are for CT series, with spacing_mm instead of mpp")
            return
        mpp = 1000.0 * self.spacing_mm
        if self.mpp not in (0, mpp):
            raise UsageError("spacing_mm is for CT series and mpp for slides; give one of them")
        if others := [name for name in _OF_SLIDES if getattr(self, name) != defaults[name]]:
            raise UsageError(f"{', '.join(others)} is for slides, and has no meaning with spacing_mm")
        low, high = self.window_hu if len(self.window_hu) == 2 else (0.0, 0.0)
        if not (-32768 <= low < high <= 32767 and low == int(low) and high == int(high)):
            raise UsageError(
                f"window must be two whole numbers of Hounsfield units, the lower one first, "
                f"not {self.window_hu}"
            )
        if self.mask not in ("lung", "body", "none"):
            raise UsageError(f"mask must be 'lung', 'body' or 'none', not {self.mask!r}")
        object.__setattr__(self, "mpp", mpp)
        object.__setattr__(self, "codec", "zstd")

    @property
    def is_volume(self) -> bool:
        """True for patches of CT series, False for tiles of slides."""
        return self.spacing_mm > 0

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """Shape of a tile's array: ``(S, S, 3)``, ``(S, S, S)`` of a patch, ``(z, y, x)``."""
        side = self.tile_size_px
        return side, side, side if self.is_volume else 3

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a tile's numbers: ``uint8``; of a patch, ``int16`` Hounsfield units."""
        return np.dtype(np.int16 if self.is_volume else np.uint8)

    def tile_mm2(self, mpp_read: tuple[float, float]) -> float:
        """Returns a tile's share of the area, square millimetres; overlapping tiles count by their stride.

        ``mpp_read`` is the spacing really read along x and y, within :attr:`mpp_tolerance` of :attr:`mpp`.
        """
        return self.stride_px**2 * mpp_read[0] * mpp_read[1] / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values, as stored beside the tiles, without the fields of the other kind.

        Channels and a tool are there only if named.
        """
        values = dataclasses.asdict(self)
        left_out = _OF_SLIDES if self.is_volume else ("spacing_mm", *_OF_VOLUMES)
        return {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in values.items()
            if k not in left_out and (v or k not in ("channels", "foreign"))
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverts :meth:`to_dict`.

        Raises:
            UsageError: a key is missing or unknown.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise UsageError(f"not a tile specification: {error}") from error


_OF_VOLUMES = ("window_hu", "mask")
_OF_SLIDES = (
    *("mpp_tolerance", "jpeg_quality", "edge", "icc", "min_focus", "max_pen", "max_fold", "max_air"),
    *("channels", "foreign"),
)


@dataclass(frozen=True)
class TileGrid:
    """A regular grid of tiles over a slide, from its upper-left corner.

    :attr:`TileSpec.edge` drops or pads tiles across the right or bottom border.

    Attributes:
        columns: tiles along x.
        rows: tiles along y.
        stride_level0: distance between neighbouring origins ``(x, y)``, level-0 pixels, fractional.
        extent_level0: size of a tile ``(x, y)``, level-0 pixels, fractional.
    """

    columns: int
    rows: int
    stride_level0: tuple[float, float]
    extent_level0: tuple[float, float]

    @classmethod
    def over(
        cls,
        size_level0: tuple[int, int],
        mpp_level0: tuple[float, float],
        mpp_read: tuple[float, float],
        spec: TileSpec,
    ) -> Self:
        """Lays the grid of ``spec`` over a slide.

        Args:
            size_level0: width and height of the slide, level-0 pixels.
            mpp_level0: spacing of level 0 along x and y, micrometres per pixel.
            mpp_read: actual spacing of the read for ``spec.mpp`` along x and y
                (:meth:`slidetl.slides.base.Slide.mpp_read`).
            spec: the tiles wanted.
        """
        scale = (mpp_read[0] / mpp_level0[0], mpp_read[1] / mpp_level0[1])
        extent = (spec.tile_size_px * scale[0], spec.tile_size_px * scale[1])
        stride = (spec.stride_px * scale[0], spec.stride_px * scale[1])
        count = _count_whole if spec.edge == "drop" else _count_covering
        counts = [count(*axis) for axis in zip(size_level0, extent, stride, strict=True)]
        return cls(counts[0], counts[1], stride, extent)

    def __len__(self) -> int:
        return self.columns * self.rows

    def origins_level0(self) -> NDArray[np.int32]:
        """Computes upper-left corners ``[N, 2]`` as ``(x, y)`` in level-0 pixels, row by row."""
        x = np.round(np.arange(self.columns) * self.stride_level0[0]).astype(np.int32)
        y = np.round(np.arange(self.rows) * self.stride_level0[1]).astype(np.int32)
        return np.stack(np.broadcast_arrays(x[None, :], y[:, None]), axis=-1).reshape(-1, 2)


def _count_whole(size: int, extent: float, stride: float) -> int:
    """Counts the whole tiles along an axis."""
    # The small allowance keeps a tile that ends exactly at the border when the division rounds.
    return int(np.floor((size - extent) / stride + 1e-9)) + 1 if size + 1e-6 >= extent else 0


def _count_covering(size: int, extent: float, stride: float) -> int:
    """Counts the tiles needed to reach the border of an axis, each beginning inside it."""
    # Origins are rounded to pixels: half a pixel left over would give a tile outside the slide.
    rest = max(size - 0.5 - extent, 0.0)
    return min(int(np.ceil(rest / stride)) + 1, int(np.ceil((size - 0.5) / stride)))
