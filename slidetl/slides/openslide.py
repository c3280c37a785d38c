"""Reads every vendor's format known to OpenSlide."""

from __future__ import annotations

import ctypes
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import openslide
from numpy.typing import NDArray

from slidetl.errors import SlideOpenError, SlideReadError
from slidetl.slides.area import average_areas
from slidetl.slides.base import SlideInfo, check_there, fingerprint_of, is_left_behind
from slidetl.slides.decoding import JpegCutter, Placement, map_in_order, reduction_for
from slidetl.slides.dicom import series_instance_uid
from slidetl.slides.levels import (
    MAX_SOURCE_PX,
    Level,
    PyramidSlide,
    View,
    is_same_picture,
    nominal_mpp,
    scale_of,
)
from slidetl.slides.ome import note_of_others
from slidetl.slides.opencv import opencv
from slidetl.slides.spacing import Pair, settle_spacing
from slidetl.slides.tiff import (
    GENERIC_TIFF,
    PLAIN_TIFFS,
    JpegTiles,
    picture_sizes,
    read_jpeg_level,
    stored_orientation,
)
from slidetl.slides.turn import Turn
from slidetl.slides.unread import describe_unread

_Result = TypeVar("_Result")

# Most tiles read or decoded together, and most pixels of their level.
_MAX_RUN = 16
_MAX_RUN_PX = 4 * 2**20

# Reads of at most so many pixels share a buffer: new memory costs more than the write into it.
_BUFFER_PX = 4 * 2**20

# Neighbours with gaps are not read together beyond so many times their own pixels.
_MAX_WASTE = 1.5

# Keys with file names in MIRAX and Hamamatsu, with a value outside the folder.
_OUTSIDE = re.compile(
    r"^\s*(?:FILE_\d+|INDEXFILE|ImageFile[^=]*|MapFile|OptimisationFile|MacroImage)\s*=\s*(.*[/\\].*)$",
    re.MULTILINE | re.IGNORECASE,
)
_MAX_INDEX_CHARACTERS = 2**22

# Most pixels of a level for reading its alpha beside its colours.
_MAX_ALPHA_PX = 64 * 2**20

# Tiles copied at once.
_COPIED_TOGETHER = 64

# Greatest difference of decoded JPEGs from OpenSlide if either resamples, grey levels on average: over the
# compared tiles, and in the worst of them.
_MEAN_DIFFERENCE = 1.5
_MAX_DIFFERENCE = 3.0


@dataclass(frozen=True)
class _Level(Level):
    """One level of the pyramid, with attributes of OpenSlide.

    Attributes:
        index: OpenSlide's number for it.
        downsample: OpenSlide's scale, one mean for both axes.
        tile_px: width and height of its tiles in the file, if known to OpenSlide.
    """

    index: int
    downsample: float
    tile_px: tuple[int, int] | None

    @property
    def is_exact(self) -> bool:
        """True if OpenSlide can read from any pixel of it."""
        return self.downsample.is_integer()


class OpenSlideSlide(PyramidSlide[_Level]):
    """A slide read through OpenSlide; see :class:`slidetl.slides.base.Slide` for the interface.

    If a level's size is no whole fraction of level 0, OpenSlide interpolates by a fraction of a pixel; the
    weights of the averaging include this fraction, so nothing shifts. After an error OpenSlide refuses every
    read, so the next read opens the slide again.

    Many tiles at once are copied or decoded from the file itself if it is a TIFF of JPEGs and the first,
    middle and last of them equal OpenSlide's pixels. See docs/design/fast-paths.md.
    """

    def __init__(
        self,
        path: Path,
        mpp_override: float | None = None,
        mpp_replace: float | Pair | None = None,
    ) -> None:
        self._path = path
        handle = _open(path)
        try:
            self._levels = _levels(handle)
            self._info = _describe(path, handle, self._levels, mpp_override, mpp_replace)
        except BaseException:  # close the file after any error
            handle.close()
            raise
        profile = handle.color_profile
        self._profile = profile.tobytes() if profile is not None else None
        self._regions = self._open_regions(handle)
        self._file: IO[bytes] | None = None
        self._found: dict[int, JpegTiles | None] = {}

    @property
    def colour_profile(self) -> bytes | None:
        """Its ICC profile, if it has one."""
        return self._profile

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
        """Reads many tiles and calls ``work`` with each; see :meth:`slidetl.slides.base.Slide.map_tiles`.

        The JPEGs of a TIFF are decoded, each once; of other slides, neighbours are read together. Every
        thread has its own handle, since OpenSlide refuses everything after an error.
        """
        view = self._view(mpp, mpp_tolerance)
        placement = Placement(view.starts(origins_level0), view.step, side_px)
        extent_px = placement.extent[0] * placement.extent[1]
        most = min(_MAX_RUN, max(1, int(_MAX_RUN_PX / max(1.0, extent_px))))
        cutter = self._cutter(view, placement, list(placement.runs(first, most)))
        local, opened = threading.local(), list[_Regions]()

        def mine() -> _Regions:
            """Returns this thread's own handle, opened at its first call; with one thread, the slide's."""
            if threads > 1 and not hasattr(local, "regions"):
                local.regions = self._open_regions(None)
                opened.append(local.regions)
            return local.regions if threads > 1 else self._regions

        def at(run: range) -> list[_Result | SlideReadError]:
            cut = cutter.cut(run) if cutter is not None else _read_run(view, mine(), placement, run)
            results: list[_Result | SlideReadError] = []
            for tile, rgb in zip(run, cut, strict=True):
                try:
                    found = _read_tile(view, mine(), placement, tile) if rgb is None else rgb
                    results.append(work(found))
                except SlideReadError as error:
                    results.append(error)
            return results

        try:
            for results in map_in_order(at, placement.runs(first, most), threads):
                yield from results
        finally:
            for regions in opened:
                regions.close()

    def copy_tiles(
        self,
        origins_level0: NDArray[np.int32],
        side_px: int,
        mpp: float,
        mpp_tolerance: float = 0.01,
        first: int = 0,
    ) -> Iterator[bytes | None] | None:
        """Copies the slide's own JPEGs; see :meth:`slidetl.slides.base.Slide.copy_tiles`."""
        view = self._view(mpp, mpp_tolerance)
        placement = Placement(view.starts(origins_level0), view.step, side_px)
        jpegs = self._jpegs(view.level)
        if jpegs is None or not all(view.as_it_is) or jpegs.level.tile_px != (side_px, side_px):
            return None
        if np.any(placement.start % side_px) or not self._agrees(JpegCutter(jpegs, placement), view):
            return None
        return _copies(jpegs, placement, first)

    def missing(self, size_px: tuple[int, int], mpp: float) -> NDArray[np.bool_] | None:
        """Marks unscanned areas, by OpenSlide's alpha; see :meth:`slidetl.slides.base.Slide.missing`."""
        view = self._view(mpp, 0.0)
        if math.prod(view.level.size_px) > _MAX_ALPHA_PX:
            return None
        read = partial(self._regions.read_level, view.level, of_alpha=True)
        return np.asarray(view.read(read, (0.0, 0.0), size_px)[..., 0] < 128)

    def close(self) -> None:
        """Releases the file. Closing twice is harmless."""
        self._regions.close()
        if self._file is not None:
            self._file.close()
            self._file = None
            self._found = {}

    def _window(
        self, level: _Level, first: tuple[int, int], size: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], list[float]]:
        return self._regions.read_level(level, first, size)

    def _open_regions(self, handle: openslide.OpenSlide | None) -> _Regions:
        return _Regions(self._path, self._info.background_rgb, handle, self._is_damaged)

    def _is_damaged(self, level: _Level, low: list[int], high: list[int]) -> bool:
        """Tells if a JPEG under a rectangle is damaged: OpenSlide would show most of them, pixels made up."""
        jpegs = self._jpegs(level)
        if jpegs is None:
            return False
        columns, rows = (
            range(first // side, -(-last // side))
            for first, last, side in zip(low, high, jpegs.level.tile_px, strict=True)
        )
        return any(jpegs.is_damaged(row, column) for row in rows for column in columns) and self._has_sound

    @cached_property
    def _has_sound(self) -> bool:
        """True if some JPEG in the file is sound, so that none is refused for a habit of its encoder."""
        return any(jpegs.has_sound() for jpegs in map(self._jpegs, self._levels) if jpegs is not None)

    def _jpegs(self, level: _Level) -> JpegTiles | None:
        """Returns the level's tiles in the file, if the format is known."""
        if self._info.vendor not in PLAIN_TIFFS or level.tile_px is None:
            return None
        if self._regions.is_closed:
            raise SlideReadError(f"{self._path}: the slide is closed")
        if self._file is None:
            self._file = self._path.open("rb", buffering=0)
        if level.index not in self._found:
            found = read_jpeg_level(self._file, level.size_px, level.tile_px)
            self._found[level.index] = None if found is None else JpegTiles(self._file, found)
        return self._found[level.index]

    def _cutter(self, view: View[_Level], placement: Placement, runs: list[range]) -> JpegCutter | None:
        jpegs = self._jpegs(view.level)
        if jpegs is None or not runs or placement.extent[0] * placement.extent[1] > MAX_SOURCE_PX:
            return None
        for reduction in sorted({reduction_for(placement, jpegs.level.tile_px), 1}, reverse=True):
            if self._agrees(JpegCutter(jpegs, placement, reduction), view):
                return JpegCutter(jpegs, placement, reduction, runs)
        return None

    def _agrees(self, cutter: JpegCutter, view: View[_Level]) -> bool:
        """Compares some tiles, completely on the level, with OpenSlide's pixels."""
        placement = cutter.placement
        count = len(placement.start)
        differences: list[float] = []
        for tile in sorted({0, count // 2, count - 1}) if count else ():
            (rgb,) = cutter.cut(range(tile, tile + 1))
            if rgb is None:
                continue
            try:
                wanted = _read_tile(view, self._regions, placement, tile)
            except SlideReadError:
                continue  # damage, reported later with its tile
            differences.append(float(np.abs(rgb.astype(np.int16) - wanted).mean()))
        if not differences or (cutter.reduction == 1 and view.level.is_exact):
            return bool(differences) and not any(differences)
        mean = sum(differences) / len(differences)
        return max(differences) <= _MAX_DIFFERENCE and mean <= _MEAN_DIFFERENCE


def _read_tile(view: View[_Level], regions: _Regions, placement: Placement, tile: int) -> NDArray[np.uint8]:
    """Reads one tile."""
    x, y = placement.start[tile].tolist()
    side_px = placement.side_px
    return view.read(
        lambda first, size: regions.read_level(view.level, first, size), (x, y), (side_px, side_px)
    )


def _read_run(
    view: View[_Level], regions: _Regions, placement: Placement, run: range
) -> list[NDArray[np.uint8] | None]:
    """Reads neighbours at once; None for tiles left to :func:`_read_tile`, otherwise equal to its result."""
    edges = [placement.edges(tile) for tile in run]
    low = [min(math.floor(e[axis][0]) for e in edges) for axis in (0, 1)]
    high = [max(math.ceil(e[axis][-1]) for e in edges) for axis in (0, 1)]
    size = (high[0] - low[0], high[1] - low[1])
    alone = placement.extent[0] * placement.extent[1]
    # If OpenSlide interpolates, its pixels depend on the start of the read.
    if len(run) == 1 or not view.level.is_exact or size[0] * size[1] > _MAX_WASTE * alone * len(run):
        return [None] * len(run)
    try:
        source, _ = regions.read_level(view.level, (low[0], low[1]), size)
    except SlideReadError:
        return [None] * len(run)
    tiles: list[NDArray[np.uint8] | None] = []
    for x, y in edges:
        left, right = math.floor(x[0]), math.ceil(x[-1])
        tiles.append(average_areas(source[:, left - low[0] : right - low[0]], x - left, y - low[1]))
    return tiles


def _copies(jpegs: JpegTiles, placement: Placement, first: int) -> Iterator[bytes | None]:
    places = (placement.start // placement.side_px).astype(np.intp)
    # A tile across the border of the slide is not complete in the file either.
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


class _Regions:
    """OpenSlide's handle of a slide, opened again after an error."""

    def __init__(
        self,
        path: Path,
        background_rgb: tuple[int, int, int],
        handle: openslide.OpenSlide | None,
        is_damaged: Callable[[_Level, list[int], list[int]], bool],
    ) -> None:
        self._path, self._background_rgb, self._handle = path, background_rgb, handle
        self._is_damaged = is_damaged
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def read_level(
        self, level: _Level, first: tuple[int, int], size: tuple[int, int], of_alpha: bool = False
    ) -> tuple[NDArray[np.uint8], list[float]]:
        """Reads pixels of one level, background outside, and their actual corner, level pixels.

        ``of_alpha`` reads alpha in place of the colours.
        """
        low = [max(f, 0) for f in first]
        high = [min(f + s, limit) for f, s, limit in zip(first, size, level.size_px, strict=True)]
        inside = [h - p for h, p in zip(high, low, strict=True)]
        if min(inside) <= 0:
            return self._glass(size), [float(f) for f in first]
        location = [round(p * level.downsample) for p in low]
        if not of_alpha and self._is_damaged(level, low, high):
            raise SlideReadError(
                f"{self._path}: {inside[0]} x {inside[1]} pixels at level-0 ({location[0]}, {location[1]}) "
                "cannot be read: a JPEG of the file is damaged there; copy it again"
            )
        image = self._read((location[0], location[1]), level.index, (inside[0], inside[1]), of_alpha)
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
        self, location_level0: tuple[int, int], level: int, size_px: tuple[int, int], of_alpha: bool
    ) -> NDArray[np.uint8]:
        if self.is_closed:
            raise SlideReadError(f"{self._path}: the slide is closed")
        width, height = size_px
        argb = _buffer(width * height)
        try:
            if self._handle is None:
                self._handle = openslide.OpenSlide(self._path)
            # Like `read_region` of openslide-python, without its image: three copies fewer for each tile.
            pointer = argb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
            openslide.lowlevel._read_region(self._handle._osr, pointer, *location_level0, level, *size_px)
        except openslide.OpenSlideError as error:
            if self._handle is not None:
                self._handle.close()
                self._handle = None
            raise SlideReadError(
                f"{self._path}: {width} x {height} pixels at level-0 {location_level0} "
                f"cannot be read; OpenSlide says: {error}"
            ) from error
        bgra = argb.view(np.uint8).reshape(height, width, 4)
        if of_alpha:
            return np.repeat(bgra[..., 3:], 3, axis=2)
        if argb.min() >= 0xFF000000:
            return np.asarray(opencv().cvtColor(bgra, opencv().COLOR_BGRA2RGB))
        return composite(bgra, self._background_rgb)


_local = threading.local()


def _buffer(count: int) -> NDArray[np.uint32]:
    """Returns a buffer of so many pixels, valid until the next call of the thread."""
    if count > _BUFFER_PX:
        return np.empty(count, np.uint32)
    if not hasattr(_local, "buffer") or len(_local.buffer) < count:
        _local.buffer = np.empty(count, np.uint32)
    return np.asarray(_local.buffer[:count])


def composite(bgra: NDArray[np.uint8], background_rgb: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Lays an image over a background colour.

    Args:
        bgra: ``[h, w, 4] uint8``, alpha multiplied into the colours, as from OpenSlide.
        background_rgb: 0..255.

    Returns:
        ``[h, w, 3] uint8``.
    """
    clear = 255 - bgra[..., 3:].astype(np.uint16)
    behind = (clear * np.asarray(background_rgb, np.uint16) + 127) // 255
    return (bgra[..., 2::-1] + behind).clip(0, 255).astype(np.uint8)


def _open(path: Path) -> openslide.OpenSlide:
    check_there(path)
    for beside in _beside(path):
        # OpenSlide would wait for a pipe for ever.
        if beside.exists() and not (beside.is_file() or beside.is_dir()):
            raise SlideOpenError(f"{path}: {beside.name} beside it is no regular file; move it away")
    outside = _OUTSIDE.search(_index_of(path))
    if outside:
        raise SlideOpenError(
            f"{path}: it names a file in another folder, {outside[1][:80]!r}; nothing outside is read"
        )
    advice = f"; {unread}" if (unread := describe_unread(path)) else ""
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideOpenError(
            f"{path}: not a slide in a format that OpenSlide reads, or its header is damaged{advice}"
        ) from error
    except openslide.OpenSlideError as error:
        advice = advice if "not supported" in str(error) else ""
        raise SlideOpenError(
            f"{path}: the slide cannot be opened; OpenSlide says: {error}{advice}"
        ) from error


def _levels(handle: openslide.OpenSlide) -> tuple[_Level, ...]:
    """Lists the levels; of a plain TIFF, OpenSlide counts every tiled picture, so labels are left out."""
    size0 = handle.dimensions
    is_plain = handle.properties.get(openslide.PROPERTY_NAME_VENDOR) in PLAIN_TIFFS
    levels = []
    every = zip(handle.level_dimensions, handle.level_downsamples, strict=True)
    for index, (size, downsample) in enumerate(every):
        if is_plain and not is_same_picture(size0, size):
            continue
        scale = scale_of(size0, size, downsample)
        sides = [handle.properties.get(f"openslide.level[{index}].tile-{s}") for s in ("width", "height")]
        tile_px = (int(sides[0]), int(sides[1])) if sides[0] and sides[1] else None
        levels.append(_Level(size, scale, index, float(downsample), tile_px))
    return tuple(levels)


def _describe(
    path: Path,
    handle: openslide.OpenSlide,
    levels: tuple[_Level, ...],
    mpp_override: float | None,
    mpp_replace: float | Pair | None,
) -> SlideInfo:
    properties = handle.properties
    objective = _positive(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
    x = _positive(properties.get(openslide.PROPERTY_NAME_MPP_X))
    y = _positive(properties.get(openslide.PROPERTY_NAME_MPP_Y))
    stated = (x, y) if x is not None and y is not None else None
    mpp, notes = settle_spacing(path, stated, mpp_override, mpp_replace, objective)
    orientation = stored_orientation(path)
    if Turn.of(orientation)[0] != Turn():
        said = f"orientation {orientation}, which its TIFF tag says, is not applied to a scanner's file"
        notes = (*notes, said)
    if properties.get(openslide.PROPERTY_NAME_VENDOR) == GENERIC_TIFF:
        notes = (*notes, *note_of_others(picture_sizes(path)))
    used = {level.index for level in levels}
    notes += tuple(
        f"a picture of {width} x {height} pixels in it is no level of the slide, and is not read"
        for index, (width, height) in enumerate(handle.level_dimensions)
        if index not in used
    )
    background = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "FFFFFF")
    return SlideInfo(
        path=path,
        fingerprint=fingerprint_of(_files(path, properties.get("dicom.SeriesInstanceUID"))),
        vendor=str(properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")),
        size_level0=handle.dimensions,
        mpp_level0=mpp,
        mpp_levels=nominal_mpp(mpp, levels),
        background_rgb=(int(background[0:2], 16), int(background[2:4], 16), int(background[4:6], 16)),
        objective_power=objective,
        notes=notes,
        corner_level0=_corner(properties),
    )


def _corner(properties: Mapping[str, str]) -> tuple[int, int]:
    """Finds the corner of the scanned area like QuPath (``OpenslideImageServer``): by all four bounds."""
    sides = ("x", "y", "width", "height")
    try:
        x, y, _, _ = (int(properties[f"openslide.bounds-{side}"]) for side in sides)
    except (KeyError, ValueError):
        return 0, 0
    return x, y


def _positive(text: str | None) -> float | None:
    """Parses a property as a positive number; vendors write 0 or nothing for unknown values."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _beside(path: Path) -> Iterable[Path]:
    """Lists the files beside a slide that OpenSlide may open for it."""
    if path.suffix.lower() == ".mrxs":
        return path.with_suffix("").rglob("*")
    if path.suffix.lower() in (".vms", ".vmu") or series_instance_uid(path) is not None:
        return path.parent.iterdir()
    return ()


def _index_of(path: Path) -> str:
    """Reads the text with a slide's file names; nothing if it has none."""
    index = path.with_suffix("") / "Slidedat.ini" if path.suffix.lower() == ".mrxs" else path
    if index.suffix.lower() not in (".ini", ".vms", ".vmu") or not index.is_file():
        return ""
    with index.open(encoding="latin-1") as file:
        return file.read(_MAX_INDEX_CHARACTERS)


def _files(path: Path, dicom_series: str | None) -> Iterable[Path]:
    """Lists all the files of the slide at ``path``."""
    if dicom_series is not None:
        beside = (p for p in path.parent.iterdir() if p != path and p.is_file())
        return [path, *(p for p in beside if series_instance_uid(p) == dicom_series)]
    if path.suffix.lower() == ".mrxs":
        folder = path.with_suffix("")
        beside = (p for p in folder.rglob("*") if p.is_file())
        return [path, *(p for p in beside if not any(map(is_left_behind, p.relative_to(folder).parts)))]
    if path.suffix.lower() in (".vms", ".vmu"):
        values = (line.partition("=")[2].strip() for line in path.read_text("latin-1").splitlines())
        return [path, *(path.parent / v for v in values if v and (path.parent / v).is_file())]
    return [path]
