"""Images without scanner software: PNG, JPEG, plain TIFF, OME-TIFF, OME-Zarr, items of ``.npz``."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import SlideOpenError, SlideReadError
from slidetl.slides.base import SlideInfo, check_there, fingerprint_of
from slidetl.slides.declared import JPEG_2000, READABLE, check_declared
from slidetl.slides.depth import full_of, sample_windows, to_8_bits
from slidetl.slides.levels import Level, PyramidSlide, is_same_picture, nominal_mpp, scale_of
from slidetl.slides.ngff import is_ngff, read_ngff
from slidetl.slides.npz import NpzItem
from slidetl.slides.ome import OmeImage, choose_channels, is_ome, note_of_others, read_ome
from slidetl.slides.spacing import PRINTER_UM, Pair, settle_spacing
from slidetl.slides.tiff import (
    GENERIC_TIFF,
    NO_PICTURE,
    PLAIN_TIFFS,
    decode_sound_jpeg,
    is_damaged_jpeg,
    is_plain,
    is_tiff,
)
from slidetl.slides.turn import ReadPixels, Turn

IMAGE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".bmp"])
TIFF_SUFFIXES = frozenset([".tif", ".tiff"])

# A PNG or JPEG is decoded at once; 80 megapixels are 240 MB. It is below Pillow's own limit of 89.
_MAX_PLAIN_PX = 80 * 2**20
# A strip or tile of a TIFF is decoded at once.
_MAX_SEGMENT_PX = 64 * 2**20
# Most bytes of cached strips and tiles, shared by neighbours.
_KEPT_BYTES = 48 * 2**20
_MINISWHITE, _MINISBLACK, _RGB, _YCBCR = 0, 1, 2, 6  # TIFF 6.0, PhotometricInterpretation
_GREYS = (_MINISWHITE, _MINISBLACK)
_JPEG_COMPRESSION = 7
_CODESTREAM, _END_OF_CODESTREAM = b"\xff\x4f", b"\xff\xd9"  # of JPEG 2000, ITU-T T.800, annex A
# TIFF tags: of TIFF 6.0, and of ICC.1:2010, annex B.4.
_SUBFILE_TYPE, _ORIENTATION, _RESOLUTIONS, _RESOLUTION_UNIT, _ICC_PROFILE = 254, 274, (282, 283), 296, 34675

_AGAIN = "copy it again"

_APERIO = re.compile(r"\|\s*(MPP|AppMag)\s*=\s*([0-9.,]+)")
# More levels than any pyramid has, and more channels than any microscope.
_MAX_LEVELS = 64
_MAX_CHANNELS = 256
_MAX_SAMPLES = 32  # of one page, which are read together

_GLASS = (255, 255, 255)

# Errors of decoders on damaged or hostile files; imagecodecs' own errors are RuntimeErrors.
_DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, EOFError, SyntaxError),
    *(ArithmeticError, RuntimeError, MemoryError, struct.error, zlib.error),
)


# A rectangle of one page, to stored samples [height, width, samples].
_ReadSamples = Callable[[int, int, int, int], NDArray[Any]]


@dataclass(frozen=True)
class _Level(Level):
    """One level of the pyramid, with the reader of its pixels."""

    read: ReadPixels


@dataclass(frozen=True)
class _Opened:
    """An open image.

    Attributes:
        vendor: name of its format.
        fingerprint: of its content.
        sizes_px: width and height of every level.
        readers: of every level.
        mpp: its own spacing.
        power: of its objective, if known.
        profile: its ICC profile.
        notes: on its pixels.
        turn: applied to its pixels.
    """

    vendor: str
    fingerprint: str
    sizes_px: list[tuple[int, int]]
    readers: list[ReadPixels]
    mpp: Pair | None = None
    power: float | None = None
    profile: bytes | None = None
    notes: tuple[str, ...] = ()
    turn: Turn = Turn()  # noqa: RUF009 - frozen

    @classmethod
    def whole(cls, vendor: str, fingerprint: str, image: NDArray[np.uint8], **more: Any) -> Self:
        """Returns an image in memory, of one level."""
        size = (image.shape[1], image.shape[0])
        reader = lambda x, y, width, height: image[y : y + height, x : x + width]  # noqa: E731
        return cls(vendor, fingerprint, [size], [reader], **more)


class RasterSlide(PyramidSlide[_Level]):
    """An image read as a slide; see :class:`slidetl.slides.base.Slide` for the interface.

    A tiled or striped TIFF is decoded a piece at a time, so memory stays bounded; a PNG or JPEG is held
    completely, and refused above 80 megapixels. Transparent pixels lie over white. Grey becomes RGB. Samples
    of 9 to 16 bits are scaled to 8 by their significant bits: from the file, else by its highest values.
    Orientation is applied. OME-XML selects the planes.

    Args:
        path: a PNG, JPEG, BMP or TIFF, the folder of an OME-Zarr, or ``FILE.npz#SPLIT/INDEX``.
        mpp_override: micrometres per pixel of a picture without a spacing. OME-XML has one, and so does the
            resolution of a TIFF if it is finer than a printer's.
        mpp_replace: micrometres per pixel instead of the file's.
        channels: planes to read of several, by number from 0 or by name, separated by commas: one, or those
            of red, green and blue.

    Raises:
        SlideOpenError: the file is missing, or not a readable image.
        SpacingError: its spacing is not known.
    """

    def __init__(
        self,
        path: Path,
        mpp_override: float | None = None,
        mpp_replace: float | Pair | None = None,
        channels: str = "",
    ) -> None:
        self._path = path
        self._tiff: _Tiff | None = None
        self._closed = False
        try:
            opened = self._open(channels)
            sizes = opened.sizes_px
            if not all(side > 0 for size in sizes for side in size):
                raise SlideOpenError(f"{path}: its header is damaged: an image of no pixels")
            (width, height), levels = sizes[0], zip(sizes, opened.readers, strict=True)
            self._levels = tuple(
                _Level(size, scale_of(sizes[0], size, math.sqrt(width * height / math.prod(size))), read)
                for size, read in levels
            )
            mpp, notes = settle_spacing(path, opened.mpp, mpp_override, mpp_replace, opened.power)
        except BaseException:  # close the file after any error
            self.close()
            raise
        self._profile = opened.profile
        self._info = SlideInfo(
            path=path,
            fingerprint=opened.fingerprint,
            vendor=opened.vendor,
            size_level0=sizes[0],
            mpp_level0=mpp,
            mpp_levels=nominal_mpp(mpp, self._levels),
            background_rgb=_GLASS,
            objective_power=opened.power,
            notes=(*opened.notes, *notes),
            orientation=opened.turn.orientation,
        )

    @property
    def colour_profile(self) -> bytes | None:
        """Its ICC profile, if it has one."""
        return self._profile

    def missing(self, size_px: tuple[int, int], mpp: float) -> NDArray[np.bool_] | None:
        """Marks pieces missing in a TIFF; see :meth:`slidetl.slides.base.Slide.missing`."""
        if self._tiff is None:
            return None
        scale = [m / mpp for m in self._info.mpp_level0]
        return self._tiff.missing(size_px, (scale[0], scale[1]))

    def close(self) -> None:
        """Releases the file. Closing twice is harmless."""
        self._closed = True
        if self._tiff is not None:
            self._tiff.close()
            self._tiff = None

    def _open(self, channels: str) -> _Opened:
        """Opens the file."""
        item = NpzItem.of(self._path)
        if item is not None:
            image = _as_rgb(item.read(), str(self._path))
            digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
            return _Opened.whole("npz", digest, image)
        if self._path.is_dir():
            return _read_ngff(self._path, channels)
        check_there(self._path)
        fingerprint = fingerprint_of([self._path])
        if self._path.suffix.lower() in IMAGE_SUFFIXES:
            return _read_plain(self._path, fingerprint)
        self._tiff = _Tiff(self._path, channels)
        with _damage_told(self._path):
            return self._tiff.opened(fingerprint)

    def _window(
        self, level: _Level, first: tuple[int, int], size: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], list[float]]:
        """Reads pixels of one level, background outside."""
        if self._closed:
            raise SlideReadError(f"{self._path}: the slide is closed")
        low = [max(f, 0) for f in first]
        high = [min(f + s, limit) for f, s, limit in zip(first, size, level.size_px, strict=True)]
        width, height = high[0] - low[0], high[1] - low[1]
        corner = [float(f) for f in first]
        if (width, height) == size:
            return self._inside(level, low[0], low[1], width, height), corner
        image = np.full((size[1], size[0], 3), _GLASS, np.uint8)
        if width > 0 and height > 0:
            x, y = low[0] - first[0], low[1] - first[1]
            image[y : y + height, x : x + width] = self._inside(level, low[0], low[1], width, height)
        return image, corner

    def _inside(self, level: _Level, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        try:
            return level.read(x, y, width, height)
        except _DAMAGE as error:
            raise SlideReadError(
                f"{self._path}: {width} x {height} pixels at {(x, y)} cannot be read: {_line(error)}"
            ) from error


class _Tiff:
    """A TIFF read by tifffile: the levels of its first image, decoded piece by piece.

    ``channels`` selects planes by :func:`slidetl.slides.ome.choose_channels`.
    """

    def __init__(self, path: Path, channels: str = "") -> None:
        # Imported here: PNGs and arrays need not pay for it.
        import tifffile

        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # our own errors report damage
        self._path = path
        self._ome: OmeImage | None = None
        self._kept: OrderedDict[tuple[int, int], NDArray[Any] | None] = OrderedDict()
        self._kept_bytes = 0
        self._notes: list[str] = []
        with _damage_told(path):
            # As OME-TIFF it would open other files, and allocate memory for every plane counted in its XML.
            self._file = tifffile.TiffFile(path, is_ome=False)
        try:
            with _damage_told(path):
                levels = self._levels(channels)
                first = levels[0][0]
                numbers: tuple[int | None, ...] = (None,) * len(levels[0])
                if int(first.photometric) in _GREYS and int(first.samplesperpixel) > 2:
                    # The channels are samples of one page.
                    names = ("",) * min(int(first.samplesperpixel), _MAX_CHANNELS)
                    numbers = self._choose(channels, names, None)
                    levels = [planes[:1] * len(numbers) for planes in levels]
                for page in (page for planes in levels for page in planes):
                    self._check(page, first, len(levels[0]))
                self._first = first
                self._turn, turned = Turn.of(_tag(first, _ORIENTATION, 1))
                raw = [
                    [self._reader(page, number) for page, number in zip(planes, numbers, strict=True)]
                    for planes in levels
                ]
                sizes = [(int(planes[0].imagewidth), int(planes[0].imagelength)) for planes in levels]
                self._full = self._full_scale(levels[-1], raw[-1], sizes[-1])
        except BaseException:  # close the file after any error
            self.close()
            raise
        self._notes += turned
        self._sizes_px = [self._turn.size(size) for size in sizes]
        self._readers: list[ReadPixels] = [
            self._turn.reader(partial(self._rgb, planes, samples), size)
            for planes, samples, size in zip(levels, raw, sizes, strict=True)
        ]

    def opened(self, fingerprint: str) -> _Opened:
        """Returns the values for :class:`RasterSlide`."""
        profile = _tag(self._first, _ICC_PROFILE, None)
        aperio = dict(_APERIO.findall(self._first.description))
        power = aperio.get("AppMag") if self._ome is None else self._ome.objective_power
        return _Opened(
            vendor="plain-tiff" if self._ome is None else "ome-tiff",
            fingerprint=fingerprint,
            sizes_px=self._sizes_px,
            readers=self._readers,
            mpp=(_number(aperio["MPP"]),) * 2 if "MPP" in aperio else self._mpp(),
            power=_number(power) or None,
            profile=None if profile is None else bytes(profile),
            notes=tuple(self._notes),
            turn=self._turn,
        )

    def close(self) -> None:
        self._file.close()

    def missing(self, size_px: tuple[int, int], scale: tuple[float, float]) -> NDArray[np.bool_] | None:
        """Marks the pieces of the finest level without bytes, at ``scale`` pixels per level-0 pixel."""
        page = self._first
        counts = np.asarray(page.databytecounts)
        piece_px, pieces = _pieces(page)
        is_whole = page.is_memmappable or counts.all()
        if is_whole or self._turn != Turn() or len(counts) < math.prod(pieces):
            return None
        is_empty = counts[: math.prod(pieces)].reshape(pieces[::-1]) == 0
        x, y = (
            ((np.arange(size) + 0.5) / s // piece).astype(int).clip(0, count - 1)
            for size, s, piece, count in zip(size_px, scale, piece_px, pieces, strict=True)
        )
        return np.asarray(is_empty[y[:, None], x[None]])

    def _levels(self, channels: str) -> list[list[Any]]:
        """Lists the pages of every level, one or three planes each; finest first."""
        pages = self._file.pages
        first = pages.first
        self._check_chain()
        if is_ome(first.description):
            count = len(pages)
            try:
                self._ome = read_ome(first.description, self._path.name, int(first.samplesperpixel), count)
                self._notes += note_of_others(self._ome.sizes_px)
            except SlideOpenError as error:
                raise SlideOpenError(f"{self._path}: {error}") from error
            numbers = self._choose(channels, self._ome.channels, self._ome.rgb)
            chosen = [pages[self._ome.directories[number]] for number in numbers]
            reduced = [list(page.pages or ()) for page in chosen]
            if len(chosen) == 1 and not reduced[0]:
                reduced = [
                    [page for page in pages[: min(count, _MAX_LEVELS)] if _tag(page, _SUBFILE_TYPE, 0) & 1]
                ]
            return _pyramid(chosen, reduced)
        series = self._file.series
        first, *further = (one.keyframe for one in series)
        pictures = [first, *(page for page in further if not _tag(page, _SUBFILE_TYPE, 0) & NO_PICTURE)]
        try:
            self._notes += note_of_others([(int(p.imagewidth), int(p.imagelength)) for p in pictures])
        except SlideOpenError as error:
            raise SlideOpenError(f"{self._path}: {error}") from error
        levels = list(series[0].levels)
        stacks = [list(level.pages) for level in levels]
        n_planes = len(stacks[0])
        if levels[0].axes not in ("YX", "YXS", "SYX") and (
            n_planes == 1 or any(page is None for page in stacks[0]) or n_planes > _MAX_CHANNELS
        ):
            raise SlideOpenError(
                f"{self._path}: expected one grey or RGB image, found {levels[0].axes} of "
                f"{tuple(levels[0].shape)}; write the plane that is meant to a file of its own"
            )
        numbers = self._choose(channels, ("",) * n_planes, None)
        if n_planes == 1:
            return [[level.keyframe] for level in levels]
        return [
            [page.aspage() for page in (stack[number] for number in numbers) if page is not None]
            for stack in stacks
            if len(stack) == n_planes
        ]

    def _check_chain(self) -> None:
        """Refuses a file in which the list of pages is cut off: planes or levels would be missing."""
        handle = self._file.filehandle
        handle.seek(self._file.pages.next_page_offset or 0)
        if handle.read(self._file.tiff.offsetsize) != bytes(self._file.tiff.offsetsize):
            raise SlideOpenError(f"{self._path}: it ends early, its list of pictures is cut off; {_AGAIN}")

    def _choose(
        self, channels: str, names: tuple[str, ...], rgb: tuple[int, int, int] | None
    ) -> tuple[int, ...]:
        try:
            return choose_channels(channels, names, rgb)
        except SlideOpenError as error:
            raise SlideOpenError(f"{self._path}: {error}") from error

    def _check(self, page: Any, first: Any, n_planes: int) -> None:
        samples = int(page.samplesperpixel)
        photometric = int(page.photometric)
        is_grey = photometric in _GREYS
        is_known = (
            is_grey
            or photometric == _RGB
            or (photometric == _YCBCR and int(page.compression) == _JPEG_COMPRESSION)
        )
        bits = page.bitspersample
        is_whole = (page.dtype == np.uint8 and bits == 8) or (page.dtype == np.uint16 and 8 < bits <= 16)
        if not is_known or not (1 if is_grey else 3) <= samples <= _MAX_SAMPLES or not is_whole:
            raise SlideOpenError(
                f"{self._path}: expected grey or RGB of 8 to 16 bits, found {samples} samples of "
                f"{page.dtype} ({bits} bits), photometric {page.photometric!s}; convert it"
            )
        if n_planes > 1 and not is_grey:
            raise SlideOpenError(f"{self._path}: --channels: expected three grey channels, found RGB ones")
        if (page.dtype, samples) != (first.dtype, first.samplesperpixel):
            raise SlideOpenError(f"{self._path}: its planes or levels are of different kinds; convert it")
        if int(page.compression) not in READABLE:
            name = getattr(page.compression, "name", page.compression)  # tifffile may have none
            raise SlideOpenError(f"{self._path}: compressed by {name}, which is not read; convert it to JPEG")
        ends = (at + count for at, count in zip(page.dataoffsets, page.databytecounts, strict=False) if count)
        if not page.is_memmappable and (end := max(ends, default=0)) > self._file.filehandle.size:
            raise SlideOpenError(
                f"{self._path}: it ends early: its pixels lie in {end} bytes, the file has "
                f"{self._file.filehandle.size}; {_AGAIN}"
            )
        piece_bytes = math.prod(page.chunks) * page.dtype.itemsize
        if not page.is_memmappable and piece_bytes > _MAX_SEGMENT_PX * min(samples, 4):
            raise SlideOpenError(
                f"{self._path}: its pixels are compressed in pieces of {page.chunks[1]} x {page.chunks[0]}, "
                f"more than {_MAX_SEGMENT_PX} each; convert it to a tiled TIFF"
            )

    def _mpp(self) -> Pair | None:
        """Reads the spacing of the turned picture from OME-XML, or a resolution finer than a printer's."""
        mpp = self._ome.mpp if self._ome is not None else None
        if mpp is None:
            unit_um = {2: 25400.0, 3: 10000.0}.get(int(_tag(self._first, _RESOLUTION_UNIT, 2)))
            x, y = (_ratio(_tag(self._first, axis, 0)) for axis in _RESOLUTIONS)
            mpp = (unit_um / x, unit_um / y) if unit_um and x > 0 and y > 0 else None
            mpp = mpp if mpp is not None and max(mpp) <= PRINTER_UM else None
        return mpp if mpp is None or not self._turn.is_transposed else (mpp[1], mpp[0])

    def _reader(self, page: Any, number: int | None) -> _ReadSamples:
        """Returns the reader of a rectangle of a page, ``[h, w, samples]`` as stored, or of one sample."""
        if number is not None:
            read = self._reader(page, None)
            return lambda *window: read(*window)[..., number : number + 1]
        if page.is_memmappable:
            shape = (int(page.imagelength), int(page.imagewidth), int(page.samplesperpixel))
            is_planar = shape[2] > 1 and int(page.planarconfig) == 2
            stored = (shape[2], shape[0], shape[1]) if is_planar else shape
            dtype = page.dtype.newbyteorder(self._file.byteorder)
            # Left to the kernel: an uncompressed image may be larger than memory.
            mapped = np.memmap(self._path, dtype, "r", offset=page.dataoffsets[0], shape=stored)
            pixels = np.moveaxis(mapped, 0, 2) if is_planar else mapped
            return lambda x, y, width, height: np.asarray(pixels[y : y + height, x : x + width])
        return partial(self._decode, page)

    def _decode(self, page: Any, x: int, y: int, width: int, height: int) -> NDArray[Any]:
        """Puts a rectangle together from its strips or tiles."""
        samples = int(page.samplesperpixel)
        # Missing pieces are bright.
        bright = 0 if int(page.photometric) == _MINISWHITE else np.iinfo(page.dtype).max
        image = np.full((height, width, samples), bright, page.dtype)
        is_planar = samples > 1 and int(page.planarconfig) == 2
        (chunk_width, chunk_height), (across, down) = _pieces(page)
        for plane in range(samples if is_planar else 1):
            for row in range(y // chunk_height, (y + height - 1) // chunk_height + 1):
                for column in range(x // chunk_width, (x + width - 1) // chunk_width + 1):
                    piece = self._segment(page, (plane * down + row) * across + column)
                    if piece is None:
                        continue
                    top, left = row * chunk_height, column * chunk_width
                    rows = slice(max(top, y), min(top + piece.shape[0], y + height))
                    columns = slice(max(left, x), min(left + piece.shape[1], x + width))
                    part = piece[:, columns.start - left : columns.stop - left]
                    channels = slice(plane, plane + 1) if is_planar else slice(None)
                    into = image[:, columns.start - x : columns.stop - x, channels]
                    into[rows.start - y : rows.stop - y] = part[rows.start - top : rows.stop - top]
        return image

    def _segment(self, page: Any, index: int) -> NDArray[Any] | None:
        """Decodes a strip or tile, ``[h, w, S]``, cut to the image; None if the file has none."""
        key = (int(page.offset), index)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        handle = self._file.filehandle
        handle.seek(page.dataoffsets[index])
        data = handle.read(page.databytecounts[index])
        if len(data) < page.databytecounts[index]:
            raise EOFError("the file ends early")
        piece = None
        if data:
            samples = int(page.samplesperpixel) if int(page.planarconfig) == 1 else 1
            check_declared(int(page.compression), data, page.jpegtables, math.prod(page.chunks) // samples)
            try:
                piece = _decode_sound(page, data, samples)
            except ValueError as error:
                raise ValueError(f"it is damaged; {_AGAIN}") from error
            if piece is None:
                decoded, _, shape = page.decode(data, index, jpegtables=page.jpegtables)
                piece = None if decoded is None else decoded[0, : shape[1], : shape[2]]
        self._kept[key] = piece
        self._kept_bytes += 0 if piece is None else piece.nbytes
        while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._kept_bytes -= 0 if old is None else old.nbytes
        return piece

    def _full_scale(
        self, planes: list[Any], readers: list[_ReadSamples], size: tuple[int, int]
    ) -> tuple[float, float]:
        """Finds the white value, and the opaque one, of samples of more than 8 bits."""
        page = planes[0]
        if page.dtype == np.uint8:
            return 255.0, 255.0
        stated = min(page.bitspersample, (self._ome and self._ome.significant_bits) or 16)
        if 8 <= stated < 16:
            self._notes.append(f"samples of {stated} bits are scaled to 8")
            return 2.0**stated - 1, 2.0**stated - 1
        windows = [read(*window) for window in sample_windows(size) for read in readers]
        n_colours = _n_colours(page)
        full, note = full_of([window[..., :n_colours] for window in windows])
        self._notes.append(note)
        alphas = [window[..., n_colours:] for window in windows]
        return full, full_of(alphas)[0] if alphas[0].size else full

    def _rgb(self, planes: list[Any], raw: list[_ReadSamples], *window: int) -> NDArray[np.uint8]:
        pictures = [
            _as_rgb(self._to_8_bits(page, read(*window)), self._file.filename)
            for page, read in zip(planes, raw, strict=True)
        ]
        if len(pictures) == 1:
            return pictures[0]
        return np.stack([picture[..., 0] for picture in pictures], axis=2)

    def _to_8_bits(self, page: Any, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        """Scales samples, and drops all but colours and alpha."""
        n_colours = _n_colours(page)
        if pixels.dtype != np.uint8:
            scale = np.full(pixels.shape[-1], self._full[0], np.float32)
            scale[n_colours:] = self._full[1]
            pixels = to_8_bits(pixels, scale)
        if int(page.photometric) == _MINISWHITE:
            pixels = pixels.copy()
            pixels[..., 0] = 255 - pixels[..., 0]
        # Extra samples other than alpha have no known meaning.
        has_alpha = bool(page.extrasamples) and int(page.extrasamples[0]) in (1, 2)
        return pixels[..., : n_colours + has_alpha]


def _decode_sound(page: Any, data: bytes, samples: int) -> NDArray[np.uint8] | None:
    """Decodes a strip or tile of the usual colours in JPEG, ``[h, w, 3]``; others are left to tifffile.

    Raises:
        ValueError: if it is damaged, and its decoder might show it all the same.
    """
    compression = int(page.compression)
    if compression in JPEG_2000 and data.startswith(_CODESTREAM):
        if not data.rstrip(b"\0").endswith(_END_OF_CODESTREAM):
            raise ValueError("its codestream has no end")
    elif compression == _JPEG_COMPRESSION and page.dtype == np.uint8 and samples in (1, 3):
        if (int(page.photometric), samples) == (_YCBCR, 3):
            pixels = decode_sound_jpeg(data, page.jpegtables)
            return pixels if pixels is not None and pixels.shape == tuple(page.chunks) else None
        if is_damaged_jpeg(data, page.jpegtables):
            raise ValueError("it does not decode completely")
    return None


def _number(text: Any) -> float:
    """Returns a number of a description, with a point or a comma; 0 for none."""
    try:
        return float(str(text).replace(",", "."))
    except ValueError:
        return 0.0


def _n_colours(page: Any) -> int:
    return 1 if int(page.photometric) in _GREYS else 3


def _pieces(page: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns width and height of a strip or tile, and their number across and down."""
    width, height = int(page.imagewidth), int(page.imagelength)
    piece = (
        (int(page.tilewidth), int(page.tilelength))
        if page.is_tiled
        else (width, int(min(page.rowsperstrip, height)))
    )
    return piece, (-(-width // piece[0]), -(-height // piece[1]))


def _tag(page: Any, code: int, default: Any) -> Any:
    tag = page.tags.get(code)
    return default if tag is None else tag.value


def _ratio(value: Any) -> float:
    """Returns a rational number of a TIFF; 0 for any other value."""
    if isinstance(value, tuple):
        return value[0] / value[1] if len(value) >= 2 and value[1] else 0.0
    return float(value)


def _pyramid(planes: list[Any], reduced: list[list[Any]]) -> list[list[Any]]:
    """Lists the levels of planes: the finest, and the reduced pages with the same picture."""
    size0 = int(planes[0].imagewidth), int(planes[0].imagelength)
    levels = [planes]
    for pages in zip(*reduced, strict=False):
        sizes = {(int(page.imagewidth), int(page.imagelength)) for page in pages}
        size = min(sizes)
        is_smaller = len(sizes) == 1 and 0 < size[0] < int(levels[-1][0].imagewidth)
        if is_smaller and is_same_picture(size0, size):
            levels.append(list(pages))
    return levels


def _read_plain(path: Path, fingerprint: str) -> _Opened:
    """Reads a PNG, JPEG or BMP, turned as in viewers."""
    from PIL import Image, UnidentifiedImageError

    with _damage_told(path):
        try:
            with warnings.catch_warnings():
                # Our own limit is lower, and has a remedy.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                # Any format: Pillow would run Ghostscript on PostScript named .png.
                opened = Image.open(path, formats=("PNG", "JPEG", "BMP"))
        except Image.DecompressionBombError as error:
            raise SlideOpenError(f"{path}: {_line(error)}; convert it to a tiled TIFF") from error
        except UnidentifiedImageError as error:
            raise SlideOpenError(
                f"{path}: not a slide or image that can be read: expected a PNG, JPEG or BMP, found another "
                f"format, or damage; convert it, or {_AGAIN}"
            ) from error
        with opened as image:
            if image.width * image.height > _MAX_PLAIN_PX:
                raise SlideOpenError(
                    f"{path}: {image.width} x {image.height} pixels in one piece, more than {_MAX_PLAIN_PX}; "
                    "convert it to a tiled TIFF"
                )
            is_deep = _is_deep_png(path)
            if not is_deep and image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
                raise SlideOpenError(
                    f"{path}: expected grey or RGB of 8 to 16 bits, found {image.format} {image.mode}; "
                    "convert it"
                )
            if image.format in ("JPEG", "MPO") and is_damaged_jpeg(path.read_bytes()):
                raise SlideOpenError(
                    f"{path}: its JPEG does not decode completely; {_AGAIN}, or convert it to PNG if it is "
                    "right in a viewer"
                )
            turn, notes = Turn.of(image.getexif().get(_ORIENTATION, 1))
            if is_deep:
                pixels, note = _read_deep_png(path)
                notes = [note, *notes]
            else:
                pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
            rgb = turn.apply(_as_rgb(pixels, str(path)))
            profile = image.info.get("icc_profile") or None
            name = str(image.format).lower()
    return _Opened.whole(name, fingerprint, rgb, profile=profile, notes=tuple(notes), turn=turn)


def _read_ngff(path: Path, channels: str) -> _Opened:
    """Reads the description of an OME-Zarr."""
    try:
        image = read_ngff(path, channels)
    except SlideOpenError as error:
        raise SlideOpenError(f"{path}: {error}") from error
    except _DAMAGE as error:
        raise SlideOpenError(f"{path}: not an OME-Zarr that can be read: {_line(error)}") from error
    return _Opened(
        "ome-zarr", image.fingerprint, image.sizes_px, image.readers, mpp=image.mpp, notes=image.notes
    )


def _is_deep_png(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(25)
    return head.startswith(b"\x89PNG") and head[24:] == b"\x10"


def _read_deep_png(path: Path) -> tuple[NDArray[np.uint8], str]:
    """Reads a PNG of 16 bits, and a note of its scale; Pillow would keep the higher 8 only."""
    import imagecodecs

    pixels = np.atleast_3d(imagecodecs.png_decode(path.read_bytes()))
    n_colours = pixels.shape[2] - (pixels.shape[2] in (2, 4))
    full, note = full_of([pixels[..., :n_colours]])
    scale = np.full(pixels.shape[2], full, np.float32)
    scale[n_colours:] = 2**16 - 1
    return to_8_bits(pixels, scale), note


def _as_rgb(pixels: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """Turns grey, RGB, and either with alpha, into ``[h, w, 3]``; transparent pixels lie over white."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    channels = pixels.shape[-1]
    if channels not in (1, 2, 3, 4) or 0 in pixels.shape:
        raise SlideOpenError(f"{name}: expected a grey or RGB image, found {list(pixels.shape)}; convert it")
    colours = pixels if channels in (1, 3) else pixels[..., :-1]
    if channels in (2, 4):
        alpha = pixels[..., -1:].astype(np.uint16)
        colours = ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else np.ascontiguousarray(colours)


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Turns errors of decoders on damaged files into one with the file's name."""
    try:
        yield
    except SlideOpenError:
        raise
    except _DAMAGE as error:
        raise SlideOpenError(f"{path}: not a slide or image that can be read: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """Puts a decoder's message into one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def is_raster(path: Path) -> bool:
    """Tells if :class:`RasterSlide` reads a path.

    It reads images, and TIFFs unknown to OpenSlide or shown wrongly by it.
    """
    if NpzItem.of(path) is not None or path.suffix.lower() in IMAGE_SUFFIXES or is_ngff(path):
        return True
    if not path.is_file() or not (path.suffix.lower() in TIFF_SUFFIXES or is_tiff(path)):
        return False
    import openslide

    vendor = openslide.OpenSlide.detect_format(path)
    if vendor is None:  # a scanner's file without its vendor is truncated
        return path.suffix.lower() in TIFF_SUFFIXES
    return vendor in PLAIN_TIFFS and not is_plain(path, vendor == GENERIC_TIFF)
