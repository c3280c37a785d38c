"""Writes TIFFs of JPEG tiles of every structure that the fast paths know."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from tests.conftest import Picture, block_means


def write_jpeg_tiff(
    path: Path,
    picture: Picture,
    subsampling: str = "420",
    is_rgb: bool = False,
    shared_tables: bool = False,
    bigtiff: bool = False,
    byteorder: Literal["<", ">"] = "<",
    tile_px: int = 64,
    mpp: float = 0.5,
    factors: tuple[int, ...] = (),
    quality: int = 90,
) -> Path:
    """A pyramid; every factor adds a level of block means."""
    import tifffile

    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder=byteorder) as file:
        for factor in (1, *factors):
            image = block_means(picture, factor)
            jpegs = [
                encode(
                    image[y : y + tile_px, x : x + tile_px],
                    tile_px,
                    subsampling,
                    is_rgb,
                    quality,
                )
                for y in range(0, image.shape[0], tile_px)
                for x in range(0, image.shape[1], tile_px)
            ]
            tags = []
            if shared_tables:
                tables = join_tables(jpegs[0])
                jpegs = [without_tables(jpeg) for jpeg in jpegs]
                tags = [(347, 7, len(tables), tables, True)]
            file.write(
                iter(jpegs),
                shape=image.shape,
                dtype=np.uint8,
                tile=(tile_px, tile_px),
                photometric="rgb" if is_rgb else "ycbcr",
                compression="jpeg",
                subsampling=None
                if is_rgb
                else (int(subsampling != "444") + 1, int(subsampling == "420") + 1),
                subfiletype=int(factor > 1),
                resolution=(1e4 / (mpp * factor), 1e4 / (mpp * factor)),
                resolutionunit="CENTIMETER",
                metadata=None,
                extratags=tags,
            )
    return path


def encode(tile: Picture, tile_px: int, subsampling: str, is_rgb: bool, quality: int) -> bytes:
    import imagecodecs

    padding = [(0, tile_px - tile.shape[0]), (0, tile_px - tile.shape[1]), (0, 0)]
    return bytes(
        imagecodecs.jpeg8_encode(
            np.ascontiguousarray(np.pad(tile, padding, mode="edge")),
            quality,
            colorspace="rgb",
            outcolorspace="rgb" if is_rgb else "ycbcr",
            subsampling="444" if is_rgb else subsampling,
            optimize=False,
        )
    )


def segments(jpeg: bytes) -> list[bytes]:
    """The segments between the start of the image and its scan; last, the scan and all after it."""
    found, at = [], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        found.append(jpeg[at:end])
        at = end
    return [*found, jpeg[at:]]


def join_tables(jpeg: bytes) -> bytes:
    tables = [segment for segment in segments(jpeg) if segment[1] in (0xDB, 0xC4)]
    return b"".join([b"\xff\xd8", *tables, b"\xff\xd9"])


def without_tables(jpeg: bytes) -> bytes:
    kept = [s for s in segments(jpeg) if s[1] not in (0xDB, 0xC4) and not 0xE0 <= s[1] <= 0xEF]
    return b"".join([b"\xff\xd8", *kept])
