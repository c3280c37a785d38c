"""Every vendor's format that OpenSlide reads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import numpy as np
import openslide
from numpy.typing import NDArray

from slidetl.errors import SlideOpenError, SlideReadError, SpacingError, UsageError
from slidetl.slides.area import average_areas, pixel_edges
from slidetl.slides.base import Slide, SlideInfo, fingerprint_of
from slidetl.slides.decoding import JpegCutter, Placement, map_in_order, reduction_for
from slidetl.slides.dicom import series_instance_uid
from slidetl.slides.tiff import JpegTiles, read_jpeg_level

_Result = TypeVar("_Result")

# One read from OpenSlide is at most this many pixels (4 bytes each), whatever is asked for.
_MAX_SOURCE_PX = 8 * 2**20

# Tiles that are read, or decoded, together: so many, of at most so many pixels of their level.
_MAX_RUN = 16
_MAX_RUN_PX = 4 * 2**20

# Neighbours that have gaps between them are not read together beyond so many times their own pixels.
_MAX_WASTE = 1.5

# Tiles that are copied at once.
_COPIED_TOGETHER = 64

# Vendors, in OpenSlide's words, whose levels are the directories of a TIFF and nothing else.
_PLAIN_TIFF = ("aperio", "generic-tiff")

# How much decoded JPEGs may differ from OpenSlide where either of them resamples, grey levels on average:
# over the tiles that are compared, and in the worst of them.
_MEAN_DIFFERENCE = 1.5
_MAX_DIFFERENCE = 3.0

# Spacings that differ by less are the same number, written with other digits.
_SAME = 1e-9


@dataclass(frozen=True)
class _Level:
    """One level of the pyramid.

    Attributes:
        index: OpenSlide's number for it.
        size_px: width and height.
        scale: level-0 pixels per pixel of this level, along x and y.
        downsample: the same as OpenSlide reckons it, one mean for both axes.
        tile_px: width and height of its tiles in the file, where OpenSlide says so.
    """

    index: int
    size_px: tuple[int, int]
    scale: tuple[float, float]
    downsample: float
    tile_px: tuple[int, int] | None


class OpenSlideSlide(Slide):
    """A slide read through OpenSlide; see :class:`slidetl.slides.base.Slide` for the interface.

    The coarsest level that is fine enough is read, at an integer pixel of that level, and averaged over
    areas in bands, so memory stays below about 100 MB for any region. Where OpenSlide can't be asked for
    an integer pixel (a level whose size is no whole fraction of level 0) it interpolates by a fraction of a
    pixel; that fraction is put into the weights, so nothing shifts.

    Many tiles at once are copied or decoded from the file itself where it is a TIFF of JPEGs and the first,
    middle and last of them prove equal to what OpenSlide reads. See docs/design/fast-paths.md.
    """

    def __init__(self, path: Path, mpp_override: float | None = None) -> None:
        if mpp_override is not None and not (math.isfinite(mpp_override) and mpp_override > 0):
            raise UsageError(f"the spacing of a slide must be a positive number, not {mpp_override}")
        self._path = path
        handle = _open(path)
        try:
            self._levels = _levels(handle)
            self._info = _describe(path, handle, self._levels, mpp_override)
        except BaseException:  # whatever it was, the file must not stay open
            handle.close()
            raise
        profile = handle.color_profile
        self._profile = profile.tobytes() if profile is not None else None
        self._regions = _Regions(path, self._info.background_rgb, handle)
        self._file: IO[bytes] | None = None

    @property
    def info(self) -> SlideInfo:
        """What is known of the slide without reading its pixels."""
        return self._info

    @property
    def colour_profile(self) -> bytes | None:
        """Its ICC profile, if it has one."""
        return self._profile

    def mpp_read(self, mpp: float, mpp_tolerance: float = 0.01) -> tuple[float, float]:
        """The spacing ``(x, y)`` that :meth:`read` returns for ``mpp``.

        Raises:
            SpacingError: the slide is coarser than ``mpp``.
        """
        spacing = self._spacing(self._level_for(mpp, mpp_tolerance))
        x, y = (s if _is_close(s, mpp, mpp_tolerance) else mpp for s in spacing)
        return x, y

    def read(
        self,
        origin_level0: tuple[int, int],
        size_px: tuple[int, int],
        mpp: float,
        mpp_tolerance: float = 0.01,
    ) -> NDArray[np.uint8]:
        """Reads a rectangle at a physical spacing; see :meth:`slidetl.slides.base.Slide.read`.

        Raises:
            SlideReadError: the region is damaged. The next read opens the slide anew, since OpenSlide
                refuses everything after an error.
            SpacingError: the slide is coarser than ``mpp``.
        """
        view = self._view(mpp, mpp_tolerance)
        (start,) = view.starts(np.array([origin_level0])).tolist()
        return view.read(self._regions, (start[0], start[1]), size_px)

    def map_tiles(
        self,
        work: Callable[[NDArray[np.uint8]], _Result],
        origins_level0: NDArray[np.int32],
        side_px: int,
        mpp: float,
        mpp_tolerance: float = 0.01,
        first: int = 0,
        threads: int = 1,
    ) -> Iterator[_Result | SlideReadError]:
        """Reads many tiles and does something with each; see :meth:`slidetl.slides.base.Slide.map_tiles`.

        The JPEGs of a TIFF are decoded, each once; of other slides, neighbours are read together. Every
        thread reads through a handle of its own, since OpenSlide refuses everything after an error.
        """
        view = self._view(mpp, mpp_tolerance)
        placement = Placement(view.starts(origins_level0), view.step, side_px)
        extent_px = placement.extent[0] * placement.extent[1]
        most = min(_MAX_RUN, max(1, int(_MAX_RUN_PX / max(1.0, extent_px))))
        cutter = self._cutter(view, placement, list(placement.runs(first, most)))
        handles = _Handles(self._regions, threads)

        def at(run: range) -> list[_Result | SlideReadError]:
            cut = cutter.cut(run) if cutter is not None else view.read_run(handles.mine(), placement, run)
            results: list[_Result | SlideReadError] = []
            for tile, rgb in zip(run, cut, strict=True):
                try:
                    results.append(
                        work(view.read_tile(handles.mine(), placement, tile) if rgb is None else rgb)
                    )
                except SlideReadError as error:
                    results.append(error)
            return results

        try:
            for results in map_in_order(at, placement.runs(first, most), threads):
                yield from results
        finally:
            handles.close()

    def copy_tiles(
        self,
        origins_level0: NDArray[np.int32],
        side_px: int,
        mpp: float,
        mpp_tolerance: float = 0.01,
        first: int = 0,
    ) -> Iterator[bytes | None] | None:
        """The slide's own JPEGs; see :meth:`slidetl.slides.base.Slide.copy_tiles`."""
        view = self._view(mpp, mpp_tolerance)
        placement = Placement(view.starts(origins_level0), view.step, side_px)
        jpegs = self._jpegs(view.level)
        if jpegs is None or not all(view.as_it_is) or jpegs.level.tile_px != (side_px, side_px):
            return None
        if np.any(placement.start % side_px) or not self._agrees(JpegCutter(jpegs, placement), view):
            return None
        return _copies(jpegs, placement, first)

    def close(self) -> None:
        """Releases the file. Closing twice is harmless."""
        self._regions.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _spacing(self, level: _Level) -> tuple[float, float]:
        mpp = self._info.mpp_level0
        return mpp[0] * level.scale[0], mpp[1] * level.scale[1]

    def _level_for(self, mpp: float, mpp_tolerance: float) -> _Level:
        """The coarsest level that is as fine as ``mpp`` on both axes, or within the tolerance of it."""
        for level in reversed(self._levels):
            if all(s <= mpp or _is_close(s, mpp, mpp_tolerance) for s in self._spacing(level)):
                return level
        finest = max(self._info.mpp_level0)
        raise SpacingError(
            f"{self._path}: its finest spacing is {finest:.6g} um per pixel, coarser than "
            f"the {mpp:.6g} asked for; a slide is never enlarged: ask for a coarser "
            "spacing or leave the slide out"
        )

    def _view(self, mpp: float, mpp_tolerance: float) -> _View:
        level = self._level_for(mpp, mpp_tolerance)
        x, y = self._spacing(level)
        as_it_is = (_is_close(x, mpp, mpp_tolerance), _is_close(y, mpp, mpp_tolerance))
        step = (1.0 if as_it_is[0] else mpp / x, 1.0 if as_it_is[1] else mpp / y)
        return _View(level, step, as_it_is)

    def _jpegs(self, level: _Level) -> JpegTiles | None:
        """The level's tiles as they lie in the file, if it is of a kind that can be read so."""
        if self._info.vendor not in _PLAIN_TIFF or level.tile_px is None:
            return None
        if self._regions.is_closed:
            raise SlideReadError(f"{self._path}: the slide is closed")
        if self._file is None:
            self._file = self._path.open("rb", buffering=0)
        found = read_jpeg_level(self._file, level.size_px, level.tile_px)
        return None if found is None else JpegTiles(self._file, found)

    def _cutter(self, view: _View, placement: Placement, runs: list[range]) -> JpegCutter | None:
        if not runs or placement.extent[0] * placement.extent[1] > _MAX_SOURCE_PX:
            return None
        jpegs = self._jpegs(view.level)
        if jpegs is None:
            return None
        for reduction in sorted({reduction_for(placement, jpegs.level.tile_px), 1}, reverse=True):
            if self._agrees(JpegCutter(jpegs, placement, reduction), view):
                return JpegCutter(jpegs, placement, reduction, runs)
        return None

    def _agrees(self, cutter: JpegCutter, view: _View) -> bool:
        """Whether some of the tiles that lie whole on the level are what OpenSlide reads there."""
        placement = cutter.placement
        count = len(placement.start)
        differences: list[float] = []
        for tile in sorted({0, count // 2, count - 1}) if count else ():
            (rgb,) = cutter.cut(range(tile, tile + 1))
            if rgb is None:
                continue
            try:
                wanted = view.read_tile(self._regions, placement, tile)
            except SlideReadError:
                continue  # damage, which shows in its turn
            differences.append(float(np.abs(rgb.astype(np.int16) - wanted).mean()))
        if cutter.reduction == 1 and view.level.downsample.is_integer():
            return bool(differences) and not any(differences)
        return (
            bool(differences)
            and max(differences) <= _MAX_DIFFERENCE
            and sum(differences) <= _MEAN_DIFFERENCE * len(differences)
        )


@dataclass(frozen=True)
class _View:
    """A level, and how it is seen at a spacing.

    Attributes:
        level: that is read.
        step: level pixels per pixel of the result, along x and y.
        as_it_is: the axes along which nothing is resampled.
    """

    level: _Level
    step: tuple[float, float]
    as_it_is: tuple[bool, bool]

    def starts(self, origins_level0: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """``[N, 2] int`` level-0 pixels as ``[N, 2] float64`` level pixels, whole ones as the level is."""
        start = origins_level0 / np.array(self.level.scale)
        return np.asarray(np.where(self.as_it_is, np.round(start), start))

    def read(
        self, regions: _Regions, start: tuple[float, float], size_px: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """Reads a rectangle of ``size_px`` that begins at ``start``, level pixels."""
        image = np.empty((size_px[1], size_px[0], 3), np.uint8)
        for x0, x1, y0, y1 in _blocks(size_px, self.step):
            edges = [pixel_edges(start[0], self.step[0], x0, x1), pixel_edges(start[1], self.step[1], y0, y1)]
            # Room for the fraction of a pixel by which OpenSlide may miss the corner.
            exact = self.level.downsample.is_integer()
            margin = [0 if same or exact else 1 for same in self.as_it_is]
            first = [math.floor(e[0]) - m for e, m in zip(edges, margin, strict=True)]
            size = [math.ceil(e[-1]) + m - f for e, m, f in zip(edges, margin, first, strict=True)]
            source, corner = regions.read_level(self.level, (first[0], first[1]), (size[0], size[1]))
            # A level that is read as it is is not resampled again for the sake of that fraction.
            corner = [f if same else c for f, c, same in zip(first, corner, self.as_it_is, strict=True)]
            image[y0:y1, x0:x1] = average_areas(source, edges[0] - corner[0], edges[1] - corner[1])
        return image

    def read_tile(self, regions: _Regions, placement: Placement, tile: int) -> NDArray[np.uint8]:
        """Reads one tile."""
        x, y = placement.start[tile].tolist()
        return self.read(regions, (x, y), (placement.side_px, placement.side_px))

    def read_run(self, regions: _Regions, placement: Placement, run: range) -> list[NDArray[np.uint8] | None]:
        """Reads neighbours at once.

        Returns:
            The tiles as :meth:`read_tile` returns them; None for those that must be read by it.
        """
        edges = [placement.edges(tile) for tile in run]
        low = [min(math.floor(e[axis][0]) for e in edges) for axis in (0, 1)]
        high = [max(math.ceil(e[axis][-1]) for e in edges) for axis in (0, 1)]
        size = (high[0] - low[0], high[1] - low[1])
        alone = placement.extent[0] * placement.extent[1]
        # Where OpenSlide interpolates, what it shows of a place depends on where the reading begins.
        is_exact = self.level.downsample.is_integer()
        if len(run) == 1 or not is_exact or size[0] * size[1] > _MAX_WASTE * alone * len(run):
            return [None] * len(run)
        try:
            source, _ = regions.read_level(self.level, (low[0], low[1]), size)
        except SlideReadError:
            return [None] * len(run)
        tiles: list[NDArray[np.uint8] | None] = []
        for x, y in edges:
            left, right = math.floor(x[0]), math.ceil(x[-1])
            tiles.append(average_areas(source[:, left - low[0] : right - low[0]], x - left, y - low[1]))
        return tiles


def _copies(jpegs: JpegTiles, placement: Placement, first: int) -> Iterator[bytes | None]:
    places = (placement.start // placement.side_px).astype(np.intp)
    # A tile that the border of the slide cuts is not whole in the file either.
    is_whole = np.all(
        (placement.start >= 0) & (placement.start + placement.side_px <= jpegs.level.size_px), 1
    )
    for at in range(first, len(places), _COPIED_TOGETHER):
        columns, rows = places[at : at + _COPIED_TOGETHER].T
        whole = is_whole[at : at + _COPIED_TOGETHER]
        found = iter(jpegs.read(rows[whole], columns[whole]))
        for is_in in whole.tolist():
            jpeg = next(found) if is_in else None
            yield None if jpeg is None else jpeg.data


class _Handles:
    """For every thread a handle of its own, opened when it first asks; for one thread, the slide's."""

    def __init__(self, regions: _Regions, threads: int) -> None:
        self._regions = regions
        self._is_shared = threads <= 1
        self._local = threading.local()
        self._opened: list[_Regions] = []

    def mine(self) -> _Regions:
        if self._is_shared:
            return self._regions
        if not hasattr(self._local, "regions"):
            self._local.regions = self._regions.another()
            self._opened.append(self._local.regions)
        mine: _Regions = self._local.regions
        return mine

    def close(self) -> None:
        for regions in self._opened:
            regions.close()


class _Regions:
    """OpenSlide's handle of a slide, opened anew after an error."""

    def __init__(
        self, path: Path, background_rgb: tuple[int, int, int], handle: openslide.OpenSlide | None
    ) -> None:
        self._path = path
        self._background_rgb = background_rgb
        self._handle = handle
        self.is_closed = False

    def another(self) -> _Regions:
        """A handle of the same slide for another thread."""
        return _Regions(self._path, self._background_rgb, None)

    def close(self) -> None:
        self.is_closed = True
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def read_level(
        self, level: _Level, first: tuple[int, int], size: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], list[float]]:
        """Pixels of one level, background outside; and where their corner really lies, level pixels."""
        low = [max(f, 0) for f in first]
        high = [min(f + s, limit) for f, s, limit in zip(first, size, level.size_px, strict=True)]
        inside = [h - p for h, p in zip(high, low, strict=True)]
        if min(inside) <= 0:
            return self._glass(size), [float(f) for f in first]
        location = [round(p * level.downsample) for p in low]
        image = self._read((location[0], location[1]), level.index, (inside[0], inside[1]))
        if inside != list(size):
            y, x = low[1] - first[1], low[0] - first[0]
            rgb, image = image, self._glass(size)
            image[y : y + inside[1], x : x + inside[0]] = rgb
        missed = [at / level.downsample - p for at, p in zip(location, low, strict=True)]
        return image, [f + m for f, m in zip(first, missed, strict=True)]

    def _glass(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        image = np.empty((size[1], size[0], 3), np.uint8)
        image[:] = self._background_rgb
        return image

    def _read(
        self, location_level0: tuple[int, int], level: int, size_px: tuple[int, int]
    ) -> NDArray[np.uint8]:
        if self.is_closed:
            raise SlideReadError(f"{self._path}: the slide is closed")
        try:
            if self._handle is None:
                self._handle = openslide.OpenSlide(self._path)
            image = self._handle.read_region(location_level0, level, size_px)
        except openslide.OpenSlideError as error:
            if self._handle is not None:
                self._handle.close()
                self._handle = None
            raise SlideReadError(
                f"{self._path}: {size_px[0]} x {size_px[1]} pixels at level-0 {location_level0} "
                f"cannot be read; OpenSlide says: {error}"
            ) from error
        # The common case by Pillow's own code: in NumPy, to pick three of four channels costs milliseconds.
        if image.getchannel("A").getextrema() == (255, 255):
            return np.asarray(image.convert("RGB"))
        return composite(np.asarray(image), self._background_rgb)


def composite(rgba: NDArray[np.uint8], background_rgb: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Lays an image over a background colour.

    Args:
        rgba: ``[h, w, 4] uint8``, alpha not multiplied into the colours.
        background_rgb: 0..255.

    Returns:
        ``[h, w, 3] uint8``.
    """
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    over = rgb.astype(np.uint32) * alpha + np.asarray(background_rgb, np.uint32) * (
        255 - alpha.astype(np.uint32)
    )
    return ((over + 127) // 255).astype(np.uint8)


def _is_close(spacing: float, mpp: float, mpp_tolerance: float) -> bool:
    return abs(spacing / mpp - 1) <= max(mpp_tolerance, _SAME)


def _blocks(size_px: tuple[int, int], step: tuple[float, float]) -> Iterator[tuple[int, int, int, int]]:
    """Splits an output image so that each block's source stays below ``_MAX_SOURCE_PX``, in full rows."""
    per_pixel = step[0] * step[1]
    columns = min(size_px[0], max(1, int(_MAX_SOURCE_PX / per_pixel)))
    rows = min(size_px[1], max(1, int(_MAX_SOURCE_PX / (per_pixel * columns))))
    for y in range(0, size_px[1], rows):
        for x in range(0, size_px[0], columns):
            yield x, min(x + columns, size_px[0]), y, min(y + rows, size_px[1])


def _open(path: Path) -> openslide.OpenSlide:
    if not path.is_file():
        raise SlideOpenError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideOpenError(
            f"{path}: not a slide in a format that OpenSlide reads, or its header is damaged"
        ) from error
    except openslide.OpenSlideError as error:
        raise SlideOpenError(f"{path}: the slide cannot be opened; OpenSlide says: {error}") from error


def _levels(handle: openslide.OpenSlide) -> tuple[_Level, ...]:
    size0 = handle.dimensions
    levels = []
    for index, (size, downsample) in enumerate(
        zip(handle.level_dimensions, handle.level_downsamples, strict=True)
    ):
        # Scanners halve and drop what is left over: 3567 pixels become 1783, and each still covers two.
        whole = round(downsample)
        is_whole = all(s in (s0 // whole, -(-s0 // whole)) for s, s0 in zip(size, size0, strict=True))
        scale = (float(whole), float(whole)) if is_whole else (size0[0] / size[0], size0[1] / size[1])
        sides = [handle.properties.get(f"openslide.level[{index}].tile-{s}") for s in ("width", "height")]
        tile_px = (int(sides[0]), int(sides[1])) if sides[0] and sides[1] else None
        levels.append(_Level(index, size, scale, float(downsample), tile_px))
    return tuple(levels)


def _describe(
    path: Path, handle: openslide.OpenSlide, levels: tuple[_Level, ...], mpp_override: float | None
) -> SlideInfo:
    properties = handle.properties
    objective = _positive(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
    if mpp_override is not None:
        mpp = (mpp_override, mpp_override)
    else:
        x = _positive(properties.get(openslide.PROPERTY_NAME_MPP_X))
        y = _positive(properties.get(openslide.PROPERTY_NAME_MPP_Y))
        if x is None or y is None:
            hint = f"; its objective power is {objective:g}" if objective else ""
            raise SpacingError(
                f"{path}: the slide does not say how many micrometres a pixel is; give it with "
                f"--mpp-override or in the manifest's mpp column{hint}"
            )
        mpp = (x, y)
    background = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "FFFFFF")
    return SlideInfo(
        path=path,
        fingerprint=fingerprint_of(_files(path, properties.get("dicom.SeriesInstanceUID"))),
        vendor=str(properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")),
        size_level0=handle.dimensions,
        mpp_level0=mpp,
        mpp_levels=tuple(math.sqrt(mpp[0] * mpp[1] * level.scale[0] * level.scale[1]) for level in levels),
        background_rgb=(int(background[0:2], 16), int(background[2:4], 16), int(background[4:6], 16)),
        objective_power=objective,
    )


def _positive(text: str | None) -> float | None:
    """A property as a positive number; vendors write 0 or nothing for what they don't know."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _files(path: Path, dicom_series: str | None) -> Iterable[Path]:
    """All the files of the slide that ``path`` names."""
    if dicom_series is not None:
        beside = (p for p in path.parent.iterdir() if p != path and p.is_file())
        return [path, *(p for p in beside if series_instance_uid(p) == dicom_series)]
    if path.suffix.lower() == ".mrxs":
        return [path, *(p for p in path.with_suffix("").rglob("*") if p.is_file())]
    if path.suffix.lower() in (".vms", ".vmu"):
        values = (line.partition("=")[2].strip() for line in path.read_text("latin-1").splitlines())
        return [path, *(path.parent / v for v in values if v and (path.parent / v).is_file())]
    return [path]
