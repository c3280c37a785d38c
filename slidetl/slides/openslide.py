"""Every vendor's format that OpenSlide reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import openslide
from numpy.typing import NDArray

from slidetl.errors import SlideOpenError, SlideReadError, SpacingError, UsageError
from slidetl.slides.area import average_areas, pixel_edges
from slidetl.slides.base import SlideInfo, fingerprint_of
from slidetl.slides.dicom import series_instance_uid

# One read from OpenSlide is at most this many pixels (4 bytes each), whatever is asked for.
_MAX_SOURCE_PX = 8 * 2**20

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
    """

    index: int
    size_px: tuple[int, int]
    scale: tuple[float, float]
    downsample: float


class OpenSlideSlide:
    """A slide read through OpenSlide; see :class:`slidetl.slides.base.Slide` for the interface.

    The coarsest level that is fine enough is read, at an integer pixel of that level, and averaged over
    areas in bands, so memory stays below about 100 MB for any region. Where OpenSlide can't be asked for
    an integer pixel (a level whose size is no whole fraction of level 0) it interpolates by a fraction of a
    pixel; that fraction is put into the weights, so nothing shifts.
    """

    def __init__(self, path: Path, mpp_override: float | None = None) -> None:
        if mpp_override is not None and not (math.isfinite(mpp_override) and mpp_override > 0):
            raise UsageError(f"the spacing of a slide must be a positive number, not {mpp_override}")
        self._path = path
        self._closed = False
        self._handle: openslide.OpenSlide | None = _open(path)
        try:
            self._levels = _levels(self._handle)
            self._info = _describe(path, self._handle, self._levels, mpp_override)
        except BaseException:  # whatever it was, the file must not stay open
            self.close()
            raise

    @property
    def info(self) -> SlideInfo:
        """What is known of the slide without reading its pixels."""
        return self._info

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
        level = self._level_for(mpp, mpp_tolerance)
        spacing = self._spacing(level)
        as_it_is = tuple(_is_close(s, mpp, mpp_tolerance) for s in spacing)
        start = [o / s for o, s in zip(origin_level0, level.scale, strict=True)]
        start = [float(round(s)) if same else s for s, same in zip(start, as_it_is, strict=True)]
        step = [1.0 if same else mpp / s for s, same in zip(spacing, as_it_is, strict=True)]

        image = np.empty((size_px[1], size_px[0], 3), np.uint8)
        for x0, x1, y0, y1 in _blocks(size_px, step):
            edges = [pixel_edges(start[0], step[0], x0, x1), pixel_edges(start[1], step[1], y0, y1)]
            # Room for the fraction of a pixel by which OpenSlide may miss the corner.
            margin = [0 if same or level.downsample.is_integer() else 1 for same in as_it_is]
            first = [math.floor(e[0]) - m for e, m in zip(edges, margin, strict=True)]
            size = [math.ceil(e[-1]) + m - f for e, m, f in zip(edges, margin, first, strict=True)]
            source, corner = self._read_level(level, (first[0], first[1]), (size[0], size[1]))
            # A level that is read as it is is not resampled again for the sake of that fraction.
            corner = [f if same else c for f, c, same in zip(first, corner, as_it_is, strict=True)]
            image[y0:y1, x0:x1] = average_areas(source, edges[0] - corner[0], edges[1] - corner[1])
        return image

    def close(self) -> None:
        """Releases the file. Closing twice is harmless."""
        self._closed = True
        if self._handle is not None:
            self._handle.close()
            self._handle = None

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

    def _read_level(
        self, level: _Level, first: tuple[int, int], size: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], list[float]]:
        """Pixels of one level, background outside; and where their corner really lies, level pixels."""
        low = [max(f, 0) for f in first]
        high = [min(f + s, limit) for f, s, limit in zip(first, size, level.size_px, strict=True)]
        inside = [h - p for h, p in zip(high, low, strict=True)]
        if min(inside) <= 0:
            return self._glass(size), [float(f) for f in first]
        location = [round(p * level.downsample) for p in low]
        image = self._read_region((location[0], location[1]), level.index, (inside[0], inside[1]))
        if inside != list(size):
            y, x = low[1] - first[1], low[0] - first[0]
            rgb, image = image, self._glass(size)
            image[y : y + inside[1], x : x + inside[0]] = rgb
        missed = [at / level.downsample - p for at, p in zip(location, low, strict=True)]
        return image, [f + m for f, m in zip(first, missed, strict=True)]

    def _glass(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        image = np.empty((size[1], size[0], 3), np.uint8)
        image[:] = self._info.background_rgb
        return image

    def _read_region(
        self, location_level0: tuple[int, int], level: int, size_px: tuple[int, int]
    ) -> NDArray[np.uint8]:
        if self._closed:
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
        return composite(np.asarray(image), self._info.background_rgb)


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


def _blocks(size_px: tuple[int, int], step: list[float]) -> Iterator[tuple[int, int, int, int]]:
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
        levels.append(_Level(index, size, scale, float(downsample)))
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
