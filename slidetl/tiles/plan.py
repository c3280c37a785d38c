"""Plans the tiles of a slide worth reading, from its thumbnail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import SlideReadError
from slidetl.slides import Slide, SlideInfo
from slidetl.slides.spacing import REMEDY, request_note
from slidetl.tiles.grid import TileGrid, TileSpec
from slidetl.tiles.quality import focus_of, measure_quality
from slidetl.tiles.regions import Regions
from slidetl.tiles.tissue import (
    TissueMask,
    area_means,
    blank_fill,
    find_tissue,
    mask_size,
    thumbnail_mpp,
)

# Do not trust the rest of a slide with a larger unreadable share. It also bounds how often a damaged slide
# is opened again.
MAX_UNREADABLE = 0.1

# Note tissue shares this near to all, or ten times nearer to nothing, on slides of at least so many tiles.
_EXTREME_SHARE = 0.03
MANY_PLACES = 16

# Least tissue is compared with float32 shares of an area.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The wanted tiles of a slide, before any is read.

    Attributes:
        spec: the specification.
        info: the slide.
        mpp_read: spacing of the tiles along x and y, micrometres per pixel.
        origins_level0: ``[N, 2] int32``, upper-left corners ``(x, y)``, level-0 pixels, row by row.
        extent_level0: size of a tile ``(x, y)``, level-0 pixels.
        tissue_fraction: ``[N] float32``, at least ``spec.min_tissue``.
        tiles_without_tissue: places on the grid with less tissue.
        thumbnail: ``[h, w, 3] uint8``, the whole slide.
        tissue_mask: its tissue; unreadable areas count as tissue, to show as unreadable tiles, not as glass.
        quality: ``[N] float32`` each: shares of ``pen``, ``fold`` and ``air`` (:mod:`slidetl.tiles.quality`),
            and ``focus`` if ``spec.min_focus`` asks for it, NaN if unreadable.
        left_out_level0: ``[n, 2] int32``, corners of tiles with tissue left out for their quality, by the
            first reason that applies: ``outside regions`` (if there are any), ``pen``, ``fold``, ``air``,
            ``out of focus``.
        tiles_without_data: places without tissue on areas without data.
        notes: doubts about the slide, :func:`notes_on`.
        regions: share inside the regions of each pixel of the thumbnail, ``[h, w] float32``; None without.
        areas_unreadable: squares of the thumbnail, and tiles for their focus, that could not be read.
    """

    spec: TileSpec
    info: SlideInfo
    mpp_read: tuple[float, float]
    origins_level0: NDArray[np.int32]
    extent_level0: tuple[float, float]
    tissue_fraction: NDArray[np.float32]
    tiles_without_tissue: int
    thumbnail: NDArray[np.uint8]
    tissue_mask: TissueMask
    quality: dict[str, NDArray[np.float32]]
    left_out_level0: dict[str, NDArray[np.int32]]
    tiles_without_data: int = 0
    notes: tuple[str, ...] = ()
    regions: NDArray[np.float32] | None = None
    areas_unreadable: int = 0

    def __len__(self) -> int:
        return len(self.origins_level0)

    @property
    def identity(self) -> bytes:
        """Bytes that differ for other tiles."""
        return self.origins_level0.tobytes() + self.tissue_fraction.tobytes()

    def arrays(self, is_kept: NDArray[np.bool_]) -> dict[str, tuple[NDArray[Any], dict[str, Any]]]:
        """Returns the arrays of a cache beside the tiles ``is_kept``, with their attributes."""
        spacing = {"mpp": self.tissue_mask.mpp}
        doubts = {"areas_unreadable": self.areas_unreadable} if self.areas_unreadable else {}
        return {
            "origin_level0": (self.origins_level0[is_kept], {}),
            "tissue_fraction": (self.tissue_fraction[is_kept], {}),
            **{name: (values[is_kept], {}) for name, values in self.quality.items()},
            "thumbnail": (self.thumbnail, spacing),
            "tissue_mask": (self.tissue_mask.mask, spacing | doubts),
        }

    @property
    def spoilt(self) -> str:
        """Numbers of tiles with tissue left out, by the reason, as words; empty if none is."""
        return ", ".join(f"{reason} {len(o)}" for reason, o in self.left_out_level0.items() if len(o))

    def describe_empty(self, regions: Regions | None = None) -> str:
        """Describes why there is no tile; ``regions`` are those of the plan."""
        if regions is not None and len(self.left_out_level0["outside regions"]):
            return (
                f"no tile with tissue is good enough and {regions.share:.0%} inside the regions "
                f"({self.spoilt})"
            )
        if self.spoilt:
            return f"no tile with tissue is good enough ({self.spoilt})"
        if self.tiles_without_tissue:
            return f"no tile has {self.spec.min_tissue:.0%} tissue"
        return "the slide is smaller than one tile"

    @property
    def left_out(self) -> dict[str, Any]:
        """Numbers (int) of tiles left out, by the names of the ledger's columns."""
        spoilt = {f"tiles_{reason.replace(' ', '_')}": len(o) for reason, o in self.left_out_level0.items()}
        without = {
            "tiles_without_tissue": self.tiles_without_tissue,
            "tiles_without_data": self.tiles_without_data,
        }
        return without | spoilt


def plan_tiles(slide: Slide, spec: TileSpec, threads: int = 1, regions: Regions | None = None) -> TilePlan:
    """Selects the tiles worth reading from the thumbnail of a slide, of those in its regions if it has any.

    A thumbnail does not show focus: if the specification asks for it, all tiles are read once.

    Raises:
        AnnotationError: the regions are too intricate.
        SpacingError: the slide is coarser than ``spec.mpp``.
        SlideReadError: more than a tenth of the slide cannot be read.
    """
    info = slide.info
    mpp_read = slide.mpp_read(spec.mpp, spec.mpp_tolerance)
    mpp = thumbnail_mpp(info.size_level0, info.mpp_level0, spec)
    thumbnail, is_unreadable, areas_unreadable = _read_thumbnail(slide, mpp, spec.tile_size_px * spec.mpp)
    size_px = thumbnail.shape[1], thumbnail.shape[0]
    seen, background, is_fill = blank_fill(
        thumbnail, mpp, info.background_rgb, lambda: _missing(slide, size_px, mpp)
    )
    found = find_tissue(seen, mpp, background)
    tissue_mask = TissueMask(found.mask | is_unreadable, mpp)
    grid = TileGrid.over(info.size_level0, info.mpp_level0, mpp_read, spec)
    origins = grid.origins_level0()
    extent, mpp_level0 = grid.extent_level0, info.mpp_level0
    fraction = tissue_mask.fraction(origins, extent, mpp_level0)
    is_wanted = fraction >= spec.min_tissue - _ROUNDING
    without_tissue = int((~is_wanted).sum())
    fill = TissueMask(is_fill, mpp).fraction(origins[~is_wanted], extent, mpp_level0)
    origins, fraction = origins[is_wanted], fraction[is_wanted]
    maps = measure_quality(seen, mpp, found.mask, background)
    quality = {name: mask.fraction(origins, extent, mpp_level0) for name, mask in maps.items()}
    left_out: dict[str, NDArray[np.int32]] = {}

    def leave_out(reason: str, is_spoilt: NDArray[np.bool_]) -> None:
        nonlocal origins, fraction, quality
        left_out[reason] = origins[is_spoilt]
        origins, fraction = origins[~is_spoilt], fraction[~is_spoilt]
        quality = {name: values[~is_spoilt] for name, values in quality.items()}

    covered = None
    if regions is not None:
        covered = regions.cover(size_px, mpp, mpp_level0)
        share = area_means(covered, mpp, origins, extent, mpp_level0)
        leave_out("outside regions", share < regions.share - _ROUNDING)
    for reason, most in (("pen", spec.max_pen), ("fold", spec.max_fold), ("air", spec.max_air)):
        leave_out(reason, quality[reason] > most + _ROUNDING)
    if spec.min_focus > 0:
        quality["focus"] = _focus(slide, origins, spec, threads)
        areas_unreadable += int(np.isnan(quality["focus"]).sum())
        leave_out("out of focus", quality["focus"] < spec.min_focus)  # NaN, unreadable, is not
    return TilePlan(
        spec=spec,
        info=info,
        mpp_read=mpp_read,
        origins_level0=origins,
        extent_level0=grid.extent_level0,
        tissue_fraction=fraction,
        tiles_without_tissue=without_tissue,
        tiles_without_data=int((fill > 0.5).sum()),
        thumbnail=thumbnail,
        tissue_mask=tissue_mask,
        quality=quality,
        left_out_level0=left_out,
        notes=notes_on(
            info, spec, tissue_mask.mask[~is_fill] if len(grid) >= MANY_PLACES else None, areas_unreadable
        ),
        regions=covered,
        areas_unreadable=areas_unreadable,
    )


def notes_on(
    info: SlideInfo, spec: TileSpec, tissue: NDArray[np.bool_] | None, areas_unreadable: int
) -> tuple[str, ...]:
    """Notes doubts about a slide and about the request.

    ``tissue`` is the tissue mask over areas with data; None if the grid has less than :data:`MANY_PLACES`,
    since a small picture may well be all tissue.
    """
    notes = list(info.notes)
    if areas_unreadable:
        notes.append(
            "areas that could not be read when its tiles were chosen count as tissue, and are tried again by "
            "the next run"
        )
    request = request_note(spec.mpp, max(info.mpp_level0))
    if request is not None and not any(REMEDY in note for note in notes):  # of one mistake, one line
        notes.append(request)
    if tissue is not None and tissue.size and spec.min_tissue > 0:
        share = float(tissue.mean())
        if share > 1 - _EXTREME_SHARE:
            notes.append("nearly all of it counts as tissue, no glass is found (look at it with --preview)")
        elif 0 < share < _EXTREME_SHARE / 10:
            notes.append("hardly any of it counts as tissue (look at it with --preview)")
    return tuple(notes)


def _missing(slide: Slide, size_px: tuple[int, int], mpp: float) -> NDArray[np.bool_] | None:
    try:
        return slide.missing(size_px, mpp)
    except SlideReadError:  # damage, shown as unreadable tiles
        return None


def _focus(slide: Slide, origins: NDArray[np.int32], spec: TileSpec, threads: int) -> NDArray[np.float32]:
    """Measures the sharpness of each tile, ``[N]``; NaN if it cannot be read."""

    def measure(rgb: NDArray[np.uint8]) -> float:
        return focus_of(rgb, spec.mpp)

    results = slide.map_tiles(
        measure, origins, spec.tile_size_px, spec.mpp, spec.mpp_tolerance, threads=threads
    )
    values = [math.nan if isinstance(result, SlideReadError) else result for result in results]
    return np.array(values, np.float32)


def _read_thumbnail(
    slide: Slide, mpp: float, tile_um: float
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], int]:
    """Reads the whole slide at a coarse spacing, in squares as wide as a tile if one read fails.

    Squares that fail are read once more, after all others, since a share may have hung.

    Returns:
        The thumbnail, its unreadable pixels ``[h, w] bool``, and the number of unreadable squares.
    """
    info = slide.info
    width, height = mask_size(info.size_level0, info.mpp_level0, mpp)
    is_unreadable = np.zeros((height, width), bool)
    try:
        return slide.read((0, 0), (width, height), mpp, mpp_tolerance=0.0), is_unreadable, 0
    except SlideReadError as error:
        whole_error = error
    image = np.empty((height, width, 3), np.uint8)
    image[:] = info.background_rgb
    side = max(1, round(tile_um / mpp))
    squares = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]

    def is_lost(x: int, y: int) -> bool:
        size = (min(side, width - x), min(side, height - y))
        origin = (round(x * mpp / info.mpp_level0[0]), round(y * mpp / info.mpp_level0[1]))
        try:
            image[y : y + size[1], x : x + size[0]] = slide.read(origin, size, mpp, mpp_tolerance=0.0)
        except SlideReadError:
            return True
        return False

    lost: list[tuple[int, int]] = []
    for square in squares:
        if is_lost(*square):
            lost.append(square)
        if len(lost) > MAX_UNREADABLE * len(squares):
            raise SlideReadError(
                f"more than {MAX_UNREADABLE:.0%} of the slide cannot be read; first: {whole_error}"
            ) from whole_error
    lost = [square for square in lost if is_lost(*square)]
    for x, y in lost:
        is_unreadable[y : y + side, x : x + side] = True
    return image, is_unreadable, len(lost)
