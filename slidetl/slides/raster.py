"""Images that no scanner's software wrote: PNG, JPEG, TIFF without a vendor, OME-TIFF, items of ``.npz``."""

from __future__ import annotations

import hashlib
import math
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import SlideOpenError, SlideReadError
from slidetl.slides.base import SlideInfo, fingerprint_of
from slidetl.slides.declared import READABLE, check_declared
from slidetl.slides.levels import Level, PyramidSlide, nominal_mpp, scale_of
from slidetl.slides.npz import NpzItem
from slidetl.slides.spacing import UM_PER_UNIT, Pair, settle_spacing

IMAGE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".bmp"])
TIFF_SUFFIXES = frozenset([".tif", ".tiff"])

# A PNG or JPEG is decoded whole; 80 megapixels are 240 MB. It is below Pillow's own limit of 89.
_MAX_PLAIN_PX = 80 * 2**20
# A strip or tile of a TIFF is decoded whole.
_MAX_SEGMENT_PX = 64 * 2**20
# Decoded strips and tiles that are kept, since neighbours share them.
_KEPT_BYTES = 48 * 2**20
_MINISWHITE, _MINISBLACK, _RGB, _YCBCR = 0, 1, 2, 6  # TIFF 6.0, PhotometricInterpretation
_JPEG_COMPRESSION = 7
_ICC_PROFILE = 34675  # TIFF tag, ICC.1:2010 annex B.4

_GLASS = (255, 255, 255)

# What decoders raise on damaged or hostile files; imagecodecs' own errors are RuntimeErrors.
_DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, EOFError, SyntaxError),
    *(ArithmeticError, RuntimeError, MemoryError, struct.error, zlib.error),
)

# A rectangle of one level, wholly inside it: left, top, width, height, to [height, width, 3] uint8.
_ReadPixels = Callable[[int, int, int, int], NDArray[np.uint8]]


@dataclass(frozen=True)
class _Level(Level):
    """One level of the pyramid; beside what every level has, how its pixels are read."""

    read: _ReadPixels


class RasterSlide(PyramidSlide[_Level]):
    """An image read as a slide; see :class:`slidetl.slides.base.Slide` for the interface.

    A tiled or striped TIFF is decoded a piece at a time, so memory stays bounded; a PNG or JPEG is held
    whole, and refused above 80 megapixels. Transparent pixels lie over white. Grey becomes RGB, and what is
    not 8 bits of grey or RGB is refused.

    Args:
        path: a PNG, JPEG, BMP or TIFF, or ``FILE.npz#SPLIT/INDEX``.
        mpp_override: micrometres per pixel of a picture that says none. Only OME-TIFF says its own: the
            resolution of other images is that of a printer.
        mpp_replace: instead of that of the file.

    Raises:
        SlideOpenError: the file is missing, or not an image that can be read.
        SpacingError: its spacing is not known.
    """

    def __init__(
        self,
        path: Path,
        mpp_override: float | None = None,
        mpp_replace: float | Pair | None = None,
    ) -> None:
        self._path = path
        self._tiff: _Tiff | None = None
        self._closed = False
        self._profile: bytes | None = None
        try:
            vendor, fingerprint, mpp, sizes, readers = self._open()
            if not all(side > 0 for size in sizes for side in size):
                raise SlideOpenError(f"{path}: its header is damaged: an image of no pixels")
            (width, height), levels = sizes[0], zip(sizes, readers, strict=True)
            self._levels = tuple(
                _Level(size, scale_of(sizes[0], size, math.sqrt(width * height / math.prod(size))), read)
                for size, read in levels
            )
            mpp, notes = settle_spacing(path, mpp, mpp_override, mpp_replace)
        except BaseException:  # whatever it was, the file must not stay open
            self.close()
            raise
        self._info = SlideInfo(
            path=path,
            fingerprint=fingerprint,
            vendor=vendor,
            size_level0=sizes[0],
            mpp_level0=mpp,
            mpp_levels=nominal_mpp(mpp, self._levels),
            background_rgb=_GLASS,
            objective_power=None,
            notes=notes,
        )

    @property
    def colour_profile(self) -> bytes | None:
        """Its ICC profile, if it has one."""
        return self._profile

    def close(self) -> None:
        """Releases the file. Closing twice is harmless."""
        self._closed = True
        if self._tiff is not None:
            self._tiff.close()
            self._tiff = None

    def _open(
        self,
    ) -> tuple[str, str, tuple[float, float] | None, list[tuple[int, int]], list[_ReadPixels]]:
        """Opens the file: vendor, fingerprint, spacing, and for every level its size and reader."""
        item = NpzItem.of(self._path)
        if item is not None:
            image = _as_rgb(item.read(), str(self._path))
            digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
            return "npz", digest, None, *_whole(image)
        if not self._path.is_file():
            raise SlideOpenError(f"{self._path}: {'not a file' if self._path.exists() else 'no such file'}")
        fingerprint = fingerprint_of([self._path])
        if self._path.suffix.lower() in TIFF_SUFFIXES:
            self._tiff = _Tiff(self._path)
            self._profile = self._tiff.profile
            vendor = "ome-tiff" if self._tiff.is_ome else "plain-tiff"
            return vendor, fingerprint, self._tiff.mpp, self._tiff.sizes_px, self._tiff.readers
        image, self._profile, name = _read_plain(self._path)
        return name, fingerprint, None, *_whole(image)

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
    """A TIFF as tifffile understands it: the levels of its first image, decoded piece by piece."""

    def __init__(self, path: Path) -> None:
        # Imported here: PNGs and arrays need not pay for it.
        import tifffile

        self._path = path
        self._kept: OrderedDict[tuple[int, int], NDArray[np.uint8] | None] = OrderedDict()
        self._kept_bytes = 0
        with _damage_told(path):
            self._file = tifffile.TiffFile(path)
        try:
            with _damage_told(path):
                self.is_ome = bool(self._file.is_ome)
                self.mpp = _ome_mpp(self._file.ome_metadata) if self.is_ome else None
                levels = list(self._file.series[0].levels)
                pages = [level.keyframe for level in levels]
                for level, page in zip(levels, pages, strict=True):
                    self._check(level, page)
                self.sizes_px = [(int(page.imagewidth), int(page.imagelength)) for page in pages]
                tag = pages[0].tags.get(_ICC_PROFILE)
                self.profile = bytes(tag.value) if tag is not None else None
        except BaseException:  # whatever it was, the file must not stay open
            self.close()
            raise
        self.readers: list[_ReadPixels] = [self._reader(number, page) for number, page in enumerate(pages)]

    def close(self) -> None:
        self._file.close()

    def _check(self, level: Any, page: Any) -> None:
        if len(level.pages) != 1 or level.axes not in ("YX", "YXS", "SYX"):
            raise SlideOpenError(
                f"{self._path}: expected one grey or RGB image, found {level.axes} of {tuple(level.shape)}; "
                "write the plane that is meant to a file of its own"
            )
        samples = int(page.samplesperpixel)
        photometric = int(page.photometric)
        is_known = photometric in (_MINISWHITE, _MINISBLACK, _RGB) or (
            photometric == _YCBCR and int(page.compression) == _JPEG_COMPRESSION
        )
        wanted = (1, 2) if photometric in (_MINISWHITE, _MINISBLACK) else (3, 4)
        if not is_known or samples not in wanted or page.dtype != np.uint8 or page.bitspersample != 8:
            raise SlideOpenError(
                f"{self._path}: expected 8-bit grey or RGB, found {samples} samples of {page.dtype}, "
                f"photometric {page.photometric!s}; convert it"
            )
        if int(page.compression) not in READABLE:
            name = getattr(page.compression, "name", page.compression)  # tifffile may have none
            raise SlideOpenError(f"{self._path}: compressed by {name}, which is not read; convert it to JPEG")
        if not page.is_memmappable and math.prod(page.chunks) > _MAX_SEGMENT_PX * samples:
            raise SlideOpenError(
                f"{self._path}: its pixels are compressed in pieces of {page.chunks[1]} x {page.chunks[0]}, "
                f"more than {_MAX_SEGMENT_PX} each; convert it to a tiled TIFF"
            )

    def _reader(self, number: int, page: Any) -> _ReadPixels:
        if page.is_memmappable:
            shape = (int(page.imagelength), int(page.imagewidth), int(page.samplesperpixel))
            is_planar = shape[2] > 1 and int(page.planarconfig) == 2
            stored = (shape[2], shape[0], shape[1]) if is_planar else shape
            # Left to the kernel: an uncompressed image may be larger than memory.
            mapped = np.memmap(self._path, np.uint8, "r", offset=page.dataoffsets[0], shape=stored)
            pixels = np.moveaxis(mapped, 0, 2) if is_planar else mapped
            return lambda x, y, width, height: self._rgb(
                page, np.asarray(pixels[y : y + height, x : x + width])
            )
        return lambda x, y, width, height: self._decode(number, page, x, y, width, height)

    def _decode(self, number: int, page: Any, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Puts a rectangle together from the strips or tiles that it touches."""
        samples = int(page.samplesperpixel)
        image = np.full((height, width, samples), 255, np.uint8)
        is_planar = samples > 1 and int(page.planarconfig) == 2
        chunk_width = int(page.tilewidth if page.is_tiled else page.imagewidth)
        chunk_height = int(page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength))
        across, down = -(-page.imagewidth // chunk_width), -(-page.imagelength // chunk_height)
        for plane in range(samples if is_planar else 1):
            for row in range(y // chunk_height, (y + height - 1) // chunk_height + 1):
                for column in range(x // chunk_width, (x + width - 1) // chunk_width + 1):
                    piece = self._segment(number, page, (plane * down + row) * across + column)
                    if piece is None:
                        continue
                    top, left = row * chunk_height, column * chunk_width
                    rows = slice(max(top, y), min(top + piece.shape[0], y + height))
                    columns = slice(max(left, x), min(left + piece.shape[1], x + width))
                    part = piece[:, columns.start - left : columns.stop - left]
                    channels = slice(plane, plane + 1) if is_planar else slice(None)
                    into = image[:, columns.start - x : columns.stop - x, channels]
                    into[rows.start - y : rows.stop - y] = part[rows.start - top : rows.stop - top]
        return self._rgb(page, image)

    def _segment(self, number: int, page: Any, index: int) -> NDArray[np.uint8] | None:
        """Decodes a strip or tile, ``[h, w, S]``, cut to the image; None where the file has none."""
        key = (number, index)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        handle = self._file.filehandle
        handle.seek(page.dataoffsets[index])
        data = handle.read(page.databytecounts[index])
        piece_px = math.prod(page.chunks) // (int(page.samplesperpixel) if int(page.planarconfig) == 1 else 1)
        check_declared(int(page.compression), data, page.jpegtables, piece_px)
        decoded, _, shape = page.decode(data, index, jpegtables=page.jpegtables)
        piece = None if decoded is None else decoded[0, : shape[1], : shape[2]]
        self._kept[key] = piece
        self._kept_bytes += 0 if piece is None else piece.nbytes
        while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._kept_bytes -= 0 if old is None else old.nbytes
        return piece

    @staticmethod
    def _rgb(page: Any, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if int(page.photometric) == _MINISWHITE:
            pixels = pixels.copy()
            pixels[..., 0] = 255 - pixels[..., 0]
        # An extra sample that is not alpha has no meaning that we know.
        has_alpha = bool(page.extrasamples) and int(page.extrasamples[0]) in (1, 2)
        colours = pixels.shape[-1] - (pixels.shape[-1] in (2, 4))
        return _as_rgb(pixels if has_alpha else pixels[..., :colours], page.parent.filename)


def _read_plain(path: Path) -> tuple[NDArray[np.uint8], bytes | None, str]:
    """Reads the pixels of a PNG, JPEG or BMP, its ICC profile, and the name of its format."""
    from PIL import Image

    with _damage_told(path):
        try:
            with warnings.catch_warnings():
                # Our own limit is lower, and has a remedy.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                opened = Image.open(path)
        except Image.DecompressionBombError as error:
            raise SlideOpenError(f"{path}: {_line(error)}; convert it to a tiled TIFF") from error
        with opened as image:
            if image.width * image.height > _MAX_PLAIN_PX:
                raise SlideOpenError(
                    f"{path}: {image.width} x {image.height} pixels in one piece, more than {_MAX_PLAIN_PX}; "
                    "convert it to a tiled TIFF"
                )
            if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
                raise SlideOpenError(
                    f"{path}: expected 8-bit grey or RGB, found {image.format} {image.mode}; convert it"
                )
            profile = image.info.get("icc_profile")
            has_alpha = image.has_transparency_data
            pixels = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
            return _as_rgb(pixels, str(path)), profile or None, str(image.format).lower()


def _as_rgb(pixels: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """Turns grey, RGB, and either with alpha, into ``[h, w, 3]``; what is transparent lies over white."""
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


def _whole(image: NDArray[np.uint8]) -> tuple[list[tuple[int, int]], list[_ReadPixels]]:
    """Returns size and reader of the one level of an image in memory."""
    size = (image.shape[1], image.shape[0])
    return [size], [lambda x, y, width, height: image[y : y + height, x : x + width]]


def _ome_mpp(xml: str | None) -> tuple[float, float] | None:
    """Reads micrometres per pixel of the first image of an OME-XML description, if it says so."""
    try:
        root = ElementTree.fromstring((xml or "").encode())
    except ElementTree.ParseError:
        return None
    pixels = next((element for element in root.iter() if element.tag.rpartition("}")[2] == "Pixels"), None)
    if pixels is None:
        return None
    spacing = []
    for axis in "XY":
        unit = UM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        try:
            value = float(pixels.get(f"PhysicalSize{axis}", "nan"))
        except ValueError:
            return None
        if unit is None or not (math.isfinite(value) and value > 0):
            return None
        spacing.append(value * unit)
    return spacing[0], spacing[1]


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Turns what decoders raise on damaged files into one error that names the file."""
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
    """Tells if a path is for :class:`RasterSlide`: an image by its name, or a TIFF that OpenSlide refuses."""
    if NpzItem.of(path) is not None or path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    if path.suffix.lower() not in TIFF_SUFFIXES or not path.is_file():
        return False
    import openslide

    return openslide.OpenSlide.detect_format(path) is None
