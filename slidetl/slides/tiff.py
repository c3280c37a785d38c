"""JPEG tiles of TIFF and SVS files: copied from the file, or decoded without OpenSlide.

OpenSlide's metadata stay authoritative; this module only finds the tiles behind a level of OpenSlide. It
trusts nothing in the file: any structure other than the plain one of :func:`read_jpeg_level` gives None, and
the caller reads through OpenSlide instead.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slidetl.slides.ome import is_ome

# TIFF 6.0 and BigTIFF: tag numbers, and types of whole numbers.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_SAMPLES, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT = 277, 284, 322, 323
_TILE_OFFSETS, _TILE_BYTE_COUNTS, _JPEG_TABLES = 324, 325, 347
_SUBFILE_TYPE, _DESCRIPTION, _ORIENTATION, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 254, 270, 274, 338, 339
_ASCII = 2
_INTEGER_TYPES = {3: "u2", 4: "u4", 16: "u8"}
_BYTE_TYPES = {1: "u1", 7: "u1"}
_JPEG, _RGB, _YCBCR = 7, 2, 6
_JPEG_2000 = (33003, 33005)  # of Aperio
_COLOURS = {0: 1, 1: 1, _RGB: 3, _YCBCR: 3}  # samples by photometric interpretation

# More than any scanner writes; beyond it a file is left to OpenSlide.
_MAX_DIRECTORIES = 64
_MAX_ENTRIES = 512
_MAX_TILES = 2**24
_MAX_TILE_PX = 4096
_MAX_TABLES_BYTES = 2**16
_MAX_JPEG_BYTES = 2**26
_MAX_DESCRIPTION_BYTES = 2**16

# ITU-T T.81, table B.1.
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_CODES = 17  # bytes of a Huffman table before its symbols, those with the shortest codes first
_EIGHTH = 8  # least of libjpeg's reductions
_DHT, _SOF0, _RST0, _SOS, _DQT, _DRI, _COM = 0xC4, 0xC0, 0xD0, 0xDA, 0xDB, 0xDD, 0xFE

# One read takes adjacent tiles, with gaps up to this size. Larger reads are slower: for each of them the
# system would clear new memory.
_MAX_READ_BYTES = 2**18
_MAX_GAP_BYTES = 2**16

# Compressed data with so many zero bytes would encode nothing, 256 times.
_ZEROS = bytes(32)

# JPEGs of a level tried for a sound one.
_TRIED = 16


@dataclass(frozen=True, eq=False)
class JpegLevel:
    """One level of a pyramid with tiles in baseline JPEG.

    Attributes:
        size_px: width and height of the level.
        tile_px: width and height of a tile; the last ones reach beyond the level.
        is_rgb: the JPEGs hold RGB, not YCbCr.
        tables: quantisation and Huffman tables shared by the tiles, as segments of a JPEG; may be empty.
        offsets: ``[rows, columns] int64``, start of each tile in the file.
        byte_counts: ``[rows, columns] int64``, 0 for a missing tile.
    """

    size_px: tuple[int, int]
    tile_px: tuple[int, int]
    is_rgb: bool
    tables: bytes
    offsets: NDArray[np.int64]
    byte_counts: NDArray[np.int64]


def read_jpeg_level(file: IO[bytes], size_px: tuple[int, int], tile_px: tuple[int, int]) -> JpegLevel | None:
    """Finds the one directory of a TIFF with this size and these tiles, if its JPEGs are of a known form.

    Known are classic TIFF and BigTIFF, of either byte order; 8 bits, three interleaved samples, RGB or YCbCr;
    compression 7 (TIFF technical note 2), with ``JPEGTables`` or without.

    Args:
        file: the TIFF, unbuffered.
        size_px: width and height of the level, from OpenSlide.
        tile_px: width and height of its tiles, from OpenSlide.

    Returns:
        None if there is no such directory, or several, or anything in it is unusual.
    """
    try:
        directories = _directories(file)
        matching = [
            d
            for d in directories
            if (d.number(_WIDTH), d.number(_HEIGHT)) == size_px
            and (d.number(_TILE_WIDTH), d.number(_TILE_HEIGHT)) == tile_px
        ]
        return _jpeg_level(matching[0], size_px, tile_px) if len(matching) == 1 else None
    except _UnusualError:
        return None


GENERIC_TIFF = "generic-tiff"
"""OpenSlide's word for a tiled TIFF of no vendor."""
PLAIN_TIFFS = ("aperio", GENERIC_TIFF)
"""Vendors, in OpenSlide's words, with the directories of a TIFF as levels and nothing else."""

NO_PICTURE = 1 | 4
"""Bits of a TIFF's subfile type: a reduced picture, a mask."""


def is_tiff(path: Path) -> bool:
    """Tells if a file begins like a TIFF or BigTIFF."""
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def stored_orientation(path: Path) -> int:
    """Reads the orientation of the first picture of a TIFF, 1..8; 1 if there is none."""
    with path.open("rb", buffering=0) as file:
        try:
            return next(_walk(file)).number(_ORIENTATION, 1)
        except (_UnusualError, StopIteration):
            return 1


def is_plain(path: Path, is_generic: bool) -> bool:
    """Tells if OpenSlide shows a TIFF correctly, or the file is too unusual to judge.

    It does not if samples are deeper than 8 bits or no whole numbers. Of a generic TIFF it knows only the
    pixels, so neither if OME-XML describes it, it has an orientation, its channels are further samples or
    directories, or a further picture is larger than the first.
    """
    with path.open("rb", buffering=0) as file:
        try:
            walk = _walk(file)
            first = next(walk)
            samples = first.number(_SAMPLES, 1)
            kinds, bits = first.few(_SAMPLE_FORMAT), first.few(_BITS)
            if bits.max() > 8 or np.any((kinds != 1) & (kinds != 4)):
                return False
            if not is_generic:
                # OpenSlide passes all other tiles to libtiff, which would turn each separately.
                is_left = first.number(_COMPRESSION, 1) in (_JPEG, *_JPEG_2000)
                return is_left or first.number(_ORIENTATION, 1) == 1
            is_described = is_ome(first.text(_DESCRIPTION, _MAX_DESCRIPTION_BYTES))
            if is_described or first.number(_ORIENTATION, 1) != 1:
                return False
            # It shows the first sample of grey alone, and takes any extra sample for alpha.
            colours = _COLOURS.get(first.number(_PHOTOMETRIC, 1), samples)
            if samples > colours + 1 or (samples > colours and first.few(_EXTRA_SAMPLES, 0)[0] not in (1, 2)):
                return False
            for number, other in enumerate(walk):
                is_plane = other.size_px == first.size_px and not other.number(_SUBFILE_TYPE, 0)
                is_larger = other.is_picture and other.area_px > first.area_px
                if is_plane or is_larger or number > _MAX_DIRECTORIES:
                    return False
        except (_UnusualError, StopIteration):
            return True
    return True


def picture_sizes(path: Path) -> list[tuple[int, int]]:
    """Lists width and height of the pictures of a TIFF, except levels and masks; none if it is unusual."""
    with path.open("rb", buffering=0) as file:
        try:
            first, *further = _directories(file)
            return [first.size_px, *(other.size_px for other in further if other.is_picture)]
        except (_UnusualError, ValueError):
            return []


def is_damaged_jpeg(data: bytes, tables: bytes | None = None) -> bool:
    """Tells if a JPEG with a known header does not decode completely; most decoders show it all the same.

    Args:
        data: the JPEG, of 8 bits, and one component or three.
        tables: the stream of tables shared with others, if there is one (TIFF technical note 2).
    """
    try:
        decode_sound_jpeg(data, tables, least_factor=_EIGHTH)
    except ValueError:
        return True
    return False


def decode_sound_jpeg(
    data: bytes, tables: bytes | None = None, least_factor: int = 1
) -> NDArray[np.uint8] | None:
    """Decodes a JPEG to RGB, ``[h, w, 3]``, its colours as libjpeg guesses them.

    Args:
        data: the JPEG, of 8 bits, and one component or three.
        tables: the stream of tables shared with others, if there is one (TIFF technical note 2).
        least_factor: 8 for a picture of an eighth, which spares the arithmetic, not the reading.

    Returns:
        None if the header is unknown.

    Raises:
        ValueError: if it does not decode completely.
    """
    # Imported here: most commands need no decoder.
    import simplejpeg

    shared = (tables or b"")[len(_SOI) :].rpartition(_EOI)[0]
    jpeg = b"".join((_SOI, shared, data[len(_SOI) :])) if shared else data
    try:
        simplejpeg.decode_jpeg_header(jpeg)
    except (ValueError, KeyError):  # left to the decoder of its pixels; KeyError for an unknown subsampling
        return None
    size = {"min_width": 1, "min_height": 1, "min_factor": least_factor} if least_factor > 1 else {}
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(jpeg, strict=True, **size)
    if _has_hole(jpeg):
        raise ValueError("zeros interrupt its compressed data")
    return pixels


def _has_hole(jpeg: bytes) -> bool:
    """Tells if zeros interrupt the compressed data of a baseline JPEG; decoders often find their way again.

    If every table of its coefficients gives the shortest code to the end of a block, they are blank blocks.
    """
    at, is_baseline, shortest = len(_SOI), False, set[int]()
    try:
        marker = 0
        while marker != _SOS:
            marker, segment = _segment(jpeg, at)
            at += len(segment)
            is_baseline |= marker == _SOF0
            place = 4 if marker == _DHT else len(segment)
            while place + _CODES < len(segment):
                if segment[place] & 0xF0:
                    shortest.add(segment[place + _CODES])
                place += _CODES + sum(segment[place + 1 : place + _CODES])
    except _UnusualError:
        return False
    return is_baseline and any(shortest) and jpeg.find(_ZEROS, at, jpeg.find(_EOI, at)) >= 0


class Jpeg(NamedTuple):
    """A standalone JPEG; ``subsampling`` is ``"444"``, ``"422"`` or ``"420"``."""

    data: bytes
    subsampling: str


class JpegTiles:
    """Reads the tiles of one level as standalone JPEGs. Threads may share it.

    Args:
        file: the TIFF, unbuffered; the caller closes it.
        level: of that file.
    """

    def __init__(self, file: IO[bytes], level: JpegLevel) -> None:
        self.level = level
        self._descriptor = file.fileno()
        # The heads of tiles are alike, so for most tiles one comparison replaces the reading of markers.
        self._known: _Head | None = None

    def read(self, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> list[Jpeg | None]:
        """Reads tiles at ``[n]`` rows and columns in the given order, adjacent ones at once.

        Returns:
            A standalone JPEG for each tile; None for a missing or defective one.
        """
        offsets = self.level.offsets[rows, columns].tolist()
        counts = self.level.byte_counts[rows, columns].tolist()
        jpegs: list[Jpeg | None] = []
        first = 0
        for last in range(1, len(offsets) + 1):
            if last < len(offsets):
                gap = offsets[last] - offsets[last - 1] - counts[last - 1]
                span = offsets[last] + counts[last] - offsets[first]
                if 0 <= gap <= _MAX_GAP_BYTES and span <= _MAX_READ_BYTES:
                    continue
            start = offsets[first]
            data = _Data(os.pread(self._descriptor, offsets[last - 1] + counts[last - 1] - start, start))
            for place in range(first, last):
                at = offsets[place] - start
                jpegs.append(self._standalone(data, at, at + counts[place]))
            first = last
        return jpegs

    def is_damaged(self, row: int, column: int) -> bool:
        """Tells if a tile is there and does not decode completely; see :func:`is_damaged_jpeg`."""
        offset, count = int(self.level.offsets[row, column]), int(self.level.byte_counts[row, column])
        tables = _SOI + self.level.tables + _EOI
        return count > 0 and is_damaged_jpeg(os.pread(self._descriptor, count, offset), tables)

    def has_sound(self) -> bool:
        """Tells if any of some tiles, spread over the level, decodes completely."""
        places = np.argwhere(self.level.byte_counts)
        chosen = places[np.linspace(0, len(places) - 1, min(_TRIED, len(places))).astype(int)]
        return not all(self.is_damaged(row, column) for row, column in chosen.tolist())

    def _standalone(self, data: _Data, begin: int, end: int) -> Jpeg | None:
        raw = data.raw
        if begin == end or end > len(raw):
            return None
        # Some writers pad to an even length.
        if not raw.endswith(_EOI, begin, end):
            end -= 1
            if not raw.endswith(_EOI, begin, end):
                return None
        head = self._known
        if head is None or not raw.startswith(head.raw, begin, end):
            head = _head(raw[begin:end], self.level)
            if head is None:
                return None
            self._known = head
        begin += len(head.raw)
        if not data.is_plausible(begin, end):
            return None
        return Jpeg(b"".join((head.prefix, data.view[begin:end])), head.subsampling)


class _Data:
    """Part of a file with many tiles, searched once for bytes impossible in compressed data.

    In it 0xFF is followed by 0 or is a restart marker (T.81, B.1.1.5); zeros are a block lost on a disk. The
    search is far cheaper than decoding.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.view = memoryview(raw)
        values = np.frombuffer(raw, np.uint8)
        places = np.flatnonzero(values[:-1] == 0xFF)
        following = values[places + 1]
        self._markers = places[(following != 0) & (following & 0xF8 != _RST0)].tolist()
        self._has_zeros = _ZEROS in raw

    def is_plausible(self, begin: int, end: int) -> bool:
        """Tells if compressed data, including the end of the image, can be complete."""
        # The marker that ends the image is the last of them.
        is_clean = bisect_left(self._markers, begin) == bisect_left(self._markers, end - len(_EOI))
        return is_clean and not (self._has_zeros and self.raw.find(_ZEROS, begin, end) >= 0)


class _UnusualError(Exception):
    """A structure left to OpenSlide."""


def _need(is_usual: bool) -> None:
    if not is_usual:
        raise _UnusualError


@dataclass(frozen=True)
class _Directory:
    """One directory; ``entries`` by tag: type, count, and values if they fit in the entry, or their place."""

    file: IO[bytes]
    order: str
    file_bytes: int
    entries: dict[int, tuple[int, int, bytes]]

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height; 0 if unknown."""
        return self.number(_WIDTH, 0), self.number(_HEIGHT, 0)

    @property
    def area_px(self) -> int:
        """Number of pixels."""
        return self.size_px[0] * self.size_px[1]

    @property
    def is_picture(self) -> bool:
        """True for a picture of its own, no level or mask."""
        return not self.number(_SUBFILE_TYPE, 0) & NO_PICTURE

    def number(self, tag: int, default: int | None = None) -> int:
        if tag not in self.entries and default is not None:
            return default
        return int(self.numbers(tag, 1)[0])

    def numbers(self, tag: int, count: int) -> NDArray[np.int64]:
        """Reads the ``count`` whole numbers of a tag."""
        return self._values(tag, count, _INTEGER_TYPES).astype(np.int64)

    def few(self, tag: int, default: int = 1) -> NDArray[np.int64]:
        """Reads the whole numbers of a tag, of any count; the default if it is missing."""
        if tag not in self.entries:
            return np.array([default])
        count = self.entries[tag][1]
        _need(0 < count <= _MAX_ENTRIES)
        return self.numbers(tag, count)

    def bytes(self, tag: int, most: int) -> bytes:
        """Reads the content of a tag; nothing if it is missing."""
        if tag not in self.entries:
            return b""
        count = self.entries[tag][1]
        _need(count <= most)
        return self._values(tag, count, _BYTE_TYPES).tobytes()

    def text(self, tag: int, most: int) -> str:
        """Reads the beginning of a text; nothing if it is missing."""
        if tag not in self.entries or self.entries[tag][0] != _ASCII:
            return ""
        _, count, value = self.entries[tag]
        if count > len(value):
            value = _read(self.file, int.from_bytes(value, self.byteorder), min(count, most))
        return value.decode("utf-8", "replace")

    @property
    def byteorder(self) -> Literal["little", "big"]:
        """The byte order of the file's numbers."""
        return "little" if self.order == "<" else "big"

    def _values(self, tag: int, count: int, types: dict[int, str]) -> NDArray[np.unsignedinteger]:
        _need(tag in self.entries)
        kind, stored, value = self.entries[tag]
        _need(kind in types and stored == count)
        dtype = np.dtype(self.order + types[kind])
        size = count * dtype.itemsize
        if size <= len(value):
            return np.frombuffer(value[:size], dtype)
        offset = int.from_bytes(value, self.byteorder)
        _need(offset + size <= self.file_bytes)
        return np.frombuffer(_read(self.file, offset, size), dtype)


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    _need(len(data) == size)
    return data


def _directories(file: IO[bytes]) -> list[_Directory]:
    """Reads the main chain of directories, up to the length of a pyramid."""
    directories = list(islice(_walk(file), _MAX_DIRECTORIES + 1))
    _need(len(directories) <= _MAX_DIRECTORIES)
    return directories


def _walk(file: IO[bytes]) -> Iterator[_Directory]:
    """Reads one directory of the main chain after the other."""
    file_bytes = os.fstat(file.fileno()).st_size
    head = _read(file, 0, 16)
    _need(head[:2] in (b"II", b"MM"))
    order = "<" if head[:2] == b"II" else ">"
    (version,) = struct.unpack(order + "H", head[2:4])
    _need(version in (42, 43))
    is_big = version == 43
    if is_big:
        _need(struct.unpack(order + "HH", head[4:8]) == (8, 0))
        (offset,) = struct.unpack(order + "Q", head[8:16])
    else:
        (offset,) = struct.unpack(order + "I", head[4:8])
    count_format, entry_format, next_format = ("Q", "HHQ8s", "Q") if is_big else ("H", "HHI4s", "I")
    entry_size = struct.calcsize(order + entry_format)

    seen: set[int] = set()
    while offset:
        _need(offset not in seen)
        seen.add(offset)
        count_size = struct.calcsize(order + count_format)
        (count,) = struct.unpack(order + count_format, _read(file, offset, count_size))
        _need(count <= _MAX_ENTRIES)
        packed = _read(file, offset + count_size, count * entry_size)
        entries: dict[int, tuple[int, int, bytes]] = {}
        for tag, *entry in struct.iter_unpack(order + entry_format, packed):
            _need(tag not in entries)
            entries[tag] = (entry[0], entry[1], entry[2])
        yield _Directory(file, order, file_bytes, entries)
        at = offset + count_size + count * entry_size
        (offset,) = struct.unpack(order + next_format, _read(file, at, struct.calcsize(order + next_format)))


def _jpeg_level(directory: _Directory, size_px: tuple[int, int], tile_px: tuple[int, int]) -> JpegLevel:
    _need(directory.number(_COMPRESSION) == _JPEG)
    _need(directory.number(_SAMPLES) == 3)
    _need(directory.numbers(_BITS, 3).tolist() == [8, 8, 8])
    _need(directory.number(_PLANAR, 1) == 1)
    photometric = directory.number(_PHOTOMETRIC)
    _need(photometric in (_RGB, _YCBCR))
    _need(all(0 < t <= _MAX_TILE_PX for t in tile_px) and all(s > 0 for s in size_px))
    columns, rows = (-(-s // t) for s, t in zip(size_px, tile_px, strict=True))
    _need(columns * rows <= _MAX_TILES)
    offsets = directory.numbers(_TILE_OFFSETS, columns * rows)
    byte_counts = directory.numbers(_TILE_BYTE_COUNTS, columns * rows)
    limit = directory.file_bytes
    _need(bool(np.all((offsets >= 0) & (offsets <= limit))))
    _need(bool(np.all((byte_counts >= 0) & (byte_counts <= min(limit, _MAX_JPEG_BYTES)))))
    _need(bool(np.all(offsets + byte_counts <= limit)))
    return JpegLevel(
        size_px=size_px,
        tile_px=tile_px,
        is_rgb=photometric == _RGB,
        tables=_tables(directory.bytes(_JPEG_TABLES, _MAX_TABLES_BYTES)),
        offsets=offsets.reshape(rows, columns),
        byte_counts=byte_counts.reshape(rows, columns),
    )


def _tables(data: bytes) -> bytes:
    """Returns the segments between the markers at both ends of a stream of tables."""
    if not data:
        return b""
    _need(data.startswith(_SOI))
    kept, at = [], 2
    while data[at : at + 2] != _EOI:
        marker, segment = _segment(data, at)
        _need(marker in (_DQT, _DHT, _DRI) or _is_comment(marker))
        if not _is_comment(marker):
            kept.append(segment)
        at += len(segment)
    return b"".join(kept)


def _segment(data: bytes, at: int) -> tuple[int, bytes]:
    """Reads the marker at a place, and its complete segment."""
    _need(len(data) >= at + 4 and data[at] == 0xFF)
    size = int.from_bytes(data[at + 2 : at + 4], "big")
    _need(size >= 2 and at + 2 + size <= len(data))
    return data[at + 1], data[at : at + 2 + size]


def _is_comment(marker: int) -> bool:
    """Tells if a marker holds comments or application data; decoders would guess colours by it."""
    return marker == _COM or 0xE0 <= marker <= 0xEF


@dataclass(frozen=True)
class _Head:
    """The bytes before the compressed data of a tile.

    Attributes:
        raw: as in the file.
        prefix: their replacement in a standalone JPEG.
        subsampling: of the colours.
    """

    raw: bytes
    prefix: bytes
    subsampling: str


# Sampling factors of the three components, T.81 B.2.2.
_SUBSAMPLINGS = {(0x11, 0x11, 0x11): "444", (0x21, 0x11, 0x11): "422", (0x22, 0x11, 0x11): "420"}


def _head(data: bytes, level: JpegLevel) -> _Head | None:
    """Reads the markers of a tile up to its compressed data; None if it is no plain baseline JPEG."""
    try:
        _need(data.startswith(_SOI))
        kept, at, subsampling = [], 2, None
        while True:
            marker, segment = _segment(data, at)
            at += len(segment)
            if marker == _SOF0:
                _need(subsampling is None)
                subsampling = _subsampling(segment, level.tile_px)
            elif marker == _SOS:
                _need(segment[4:5] == b"\x03")  # one scan of all three components
            else:
                _need(marker in (_DQT, _DHT, _DRI) or _is_comment(marker))
            if not _is_comment(marker):
                kept.append(segment)
            if marker == _SOS:
                break
        _need(subsampling is not None)
    except _UnusualError:
        return None
    assert subsampling is not None
    # An Adobe marker with its transform, 0 for RGB and 1 for YCbCr: else decoders guess from the components'
    # names, and OpenSlide goes by the TIFF.
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([0 if level.is_rgb else 1])
    prefix = b"".join((_SOI, adobe, level.tables, *kept))
    return _Head(data[:at], prefix, subsampling)


def _subsampling(frame: bytes, tile_px: tuple[int, int]) -> str:
    """Reads a start-of-frame segment, required to be of a whole tile."""
    _need(len(frame) == 19)
    precision, height, width, components = struct.unpack(">BHHB", frame[4:10])
    _need((precision, components) == (8, 3) and (width, height) == tile_px)
    factors = (frame[11], frame[14], frame[17])
    _need(factors in _SUBSAMPLINGS)
    return _SUBSAMPLINGS[factors]
