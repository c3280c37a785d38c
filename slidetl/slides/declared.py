"""Reads the declared size of compressed pixels, before a decoder allocates memory for it.

A tile of a TIFF has two sizes: in the directory, checked when the file is opened, and in its own header, used
by the decoder. A JPEG of 600 bytes may declare 65,500 pixels in width and height.
"""

from __future__ import annotations

import struct

# TIFF compressions without a size of their own: the directory alone decides how much is unpacked.
_NO_HEADER = frozenset([1, 5, 8, 32773, 32946, 34925, 34926, 50000])  # none, LZW, deflate, LZMA, zstd
_JPEG, _PNG = 7, 34933
JPEG_2000 = frozenset([33003, 33004, 33005, 34712])
_WEBP = frozenset([34927, 50001])

READABLE = _NO_HEADER | JPEG_2000 | _WEBP | {_JPEG, _PNG}

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # ITU-T T.81, table B.1
_CODESTREAM = b"\xff\x4f\xff\x51"  # ITU-T T.800, annex A: the markers SOC and SIZ


def check_declared(compression: int, data: bytes, tables: bytes | None, limit_px: int) -> None:
    """Refuses compressed pixels with a larger size than the directory's.

    Args:
        compression: a TIFF's number of it, one of :data:`READABLE`.
        data: one tile or strip.
        tables: of its JPEG, if it has them.
        limit_px: greatest number of pixels.

    Raises:
        ValueError: its size cannot be found, or is too large.
    """
    if compression in _NO_HEADER:
        return
    if compression == _JPEG:
        size = _jpeg_size(data)
        if tables and _jpeg_size(tables) is not None:
            raise ValueError("its JPEG tables hold a picture")
    elif compression in JPEG_2000:
        size = _jpeg_2000_size(data)
    elif compression in _WEBP:
        size = _webp_size(data)
    else:
        size = struct.unpack_from(">II", data, 16) if len(data) >= 24 else None  # PNG: IHDR comes first
    if size is None or size[0] * size[1] > limit_px:
        raise ValueError(f"its header says {size} pixels, more than the {limit_px} of the directory")


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Reads the first frame header; None if the markers before it are out of order."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in _START_OF_FRAME:
            height, width = struct.unpack_from(">HH", data, place + 5)
            return width, height
        if marker == 0xFF:  # a fill byte
            place += 1
        elif 0xD0 <= marker <= 0xD9 or marker in (0x00, 0x01) or length < 2:
            return None
        else:
            place += 2 + length
    return None


def _jpeg_2000_size(data: bytes) -> tuple[int, int] | None:
    """Reads the size of a codestream, alone or in the boxes of a JP2 file (T.800, annex I)."""
    place = 0
    while not data.startswith(_CODESTREAM, place):
        if place + 16 > len(data):
            return None
        size, kind = struct.unpack_from(">I4s", data, place)
        head = 16 if size == 1 else 8
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if kind == b"jp2c":
            place += head
            if not data.startswith(_CODESTREAM, place):
                return None
        elif size < head:
            return None
        else:
            place += size
    if place + 24 > len(data):
        return None
    right, bottom, left, top = struct.unpack_from(">4I", data, place + 8)
    return right - left, bottom - top


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Reads the size of a WebP file (RFC 9649): lossy, lossless or extended."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None
