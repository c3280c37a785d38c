"""Writes tiled JPEG pyramids that OpenSlide reads, from bands of rows, in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_TILE_PX = 256
_LEVEL_FACTOR = 4
_COARSEST_PX = 128  # no level is narrower

BAND_PX = 2 * _TILE_PX
"""Height of the bands for :func:`write_pyramid`."""


def write_pyramid(
    path: Path,
    size_px: tuple[int, int],
    mpp: float,
    bands: Iterable[NDArray[np.uint8]],
    jpeg_quality: int,
) -> None:
    """Writes a tiled JPEG pyramid with its spacing, as OpenSlide's ``generic-tiff`` reads it.

    Level 0 streams straight into the file; the coarser levels, each a quarter as wide as the last and
    its exact average, wait in a temporary file. Memory holds a few bands. Nothing in the file
    depends on the clock, the host or the path, so equal pixels give equal bytes.

    Args:
        path: the TIFF to write.
        size_px: width and height of level 0, pixels.
        mpp: spacing of level 0, micrometres per pixel.
        bands: ``[BAND_PX, width, 3] uint8`` RGB each, from top to bottom; the last may be lower.
        jpeg_quality: 1..100; chroma is halved along both axes.
    """
    import tifffile

    levels: list[_CoarseLevel] = []
    with tempfile.TemporaryFile() as spool:
        size = (size_px[0] // _LEVEL_FACTOR, size_px[1] // _LEVEL_FACTOR)
        while min(size) >= _COARSEST_PX:
            levels.append(_CoarseLevel(size, jpeg_quality, spool))
            size = (size[0] // _LEVEL_FACTOR, size[1] // _LEVEL_FACTOR)

        def finest() -> Iterator[bytes]:
            for band in bands:
                rows = band
                for level in levels:
                    rows = level.push(rows)
                yield from _jpeg_tiles(band, jpeg_quality)

        # Classic TIFF ends at 4 GiB; a tile at the highest quality needs less than two bytes a pixel.
        with tifffile.TiffWriter(path, bigtiff=size_px[0] * size_px[1] >= 1 << 31) as file:
            for number in range(len(levels) + 1):
                level_size = levels[number - 1].size_px if number else size_px
                per_cm = 1e4 / (mpp * _LEVEL_FACTOR**number)
                file.write(
                    levels[number - 1].tiles() if number else finest(),
                    shape=(level_size[1], level_size[0], 3),
                    dtype=np.uint8,
                    tile=(_TILE_PX, _TILE_PX),
                    photometric="ycbcr",
                    compression="jpeg",
                    subsampling=(2, 2),
                    subfiletype=1 if number else 0,
                    resolution=(per_cm, per_cm),
                    resolutionunit="CENTIMETER",
                    software="slidetl",
                    metadata=None,  # or tifffile describes the shape, and names itself, in a tag
                )


def _jpeg_tiles(rows: NDArray[np.uint8], quality: int) -> Iterator[bytes]:
    """Yields the JPEG tiles of whole rows of pixels, row by row; the last ones are filled by their edge."""
    import imagecodecs

    padding = [(0, -rows.shape[0] % _TILE_PX), (0, -rows.shape[1] % _TILE_PX), (0, 0)]
    padded = np.pad(rows, padding, mode="edge")
    for top in range(0, padded.shape[0], _TILE_PX):
        for left in range(0, padded.shape[1], _TILE_PX):
            tile = np.ascontiguousarray(padded[top : top + _TILE_PX, left : left + _TILE_PX])
            # Every option is stated, so that another version's defaults give the same bytes.
            yield bytes(
                imagecodecs.jpeg8_encode(
                    tile, quality, colorspace="rgb", outcolorspace="ycbcr", subsampling="420", optimize=False
                )
            )


class _CoarseLevel:
    """A reduced level that grows by rows; its encoded tiles wait in a shared spool file."""

    def __init__(self, size_px: tuple[int, int], quality: int, spool: BinaryIO) -> None:
        self.size_px = size_px
        self._quality = quality
        self._spool = spool
        self._unreduced: NDArray[np.uint8] | None = None
        self._unencoded = np.empty((0, size_px[0], 3), np.uint8)
        self._places: list[tuple[int, int]] = []

    def push(self, finer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Takes the next rows of the finer level and returns the rows of this one that they complete."""
        if self._unreduced is not None:
            finer = np.concatenate([self._unreduced, finer])
        count, width = len(finer) // _LEVEL_FACTOR, self.size_px[0]
        self._unreduced = finer[count * _LEVEL_FACTOR :]
        whole = finer[: count * _LEVEL_FACTOR, : width * _LEVEL_FACTOR]
        total = np.zeros((count, width, 3), np.uint16)
        for row in range(_LEVEL_FACTOR):
            for column in range(_LEVEL_FACTOR):
                total += whole[row::_LEVEL_FACTOR, column::_LEVEL_FACTOR]
        area = _LEVEL_FACTOR**2
        rows = ((total + area // 2) // area).astype(np.uint8)
        self._unencoded = np.concatenate([self._unencoded, rows])
        self._encode(len(self._unencoded) // _TILE_PX * _TILE_PX)
        return rows

    def _encode(self, count: int) -> None:
        for tile in _jpeg_tiles(self._unencoded[:count], self._quality):
            self._places.append((self._spool.tell(), len(tile)))
            self._spool.write(tile)
        self._unencoded = self._unencoded[count:]

    def tiles(self) -> Iterator[bytes]:
        """Yields all tiles in order, once every row has been pushed."""
        self._spool.seek(0, 2)
        self._encode(len(self._unencoded))
        for offset, length in self._places:
            self._spool.seek(offset)
            yield self._spool.read(length)
