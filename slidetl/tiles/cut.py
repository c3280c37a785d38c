"""Cuts the tiles of a plan: reads them from the slide, as the bytes and pixels of a cache."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import CacheCorruptError, SlideReadError
from slidetl.slides import Slide, open_slide
from slidetl.slides.decoding import map_in_order
from slidetl.tiles.codec import tile_codec
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.patches import PatchPlan
from slidetl.tiles.plan import MAX_UNREADABLE, TilePlan, plan_tiles


@dataclass(frozen=True, eq=False)
class TileBatch:
    """Tiles as held by a cache.

    Attributes:
        origins_level0: ``[n, 2] int32``, upper-left corners ``(x, y)``, level-0 pixels.
        tissue_fraction: ``[n] float32``.
        pixels: ``[n, S, S, 3] uint8`` RGB.
    """

    origins_level0: NDArray[np.int32]
    tissue_fraction: NDArray[np.float32]
    pixels: NDArray[np.uint8]


def encode_tiles(
    slide: Slide, plan: TilePlan, first: int = 0, unreadable: int = 0, threads: int = 1
) -> Iterator[tuple[int, bytes | None]]:
    """Reads the tiles of a plan as the bytes of a cache, from the tile ``first`` on.

    Tiles that coincide with the slide's own JPEGs are copied, at any ``spec.jpeg_quality``: to compress them
    again would lose once more. ``unreadable`` counts unreadable tiles before ``first``; the bytes do not
    depend on ``threads``.

    Yields:
        The number of the tile in the plan, and its bytes; None instead of them if it cannot be read.

    Raises:
        SlideReadError: more than a tenth of all tiles cannot be read.
    """
    for tile, result in enumerate(_encoded(slide, plan, first, threads), first):
        if not isinstance(result, SlideReadError):
            yield tile, result
            continue
        unreadable += 1
        check_unreadable(plan, unreadable, result)
        yield tile, None


def check_unreadable(plan: TilePlan | PatchPlan, unreadable: int, last: SlideReadError) -> None:
    """Ends the reading of a slide with too much damage.

    Raises:
        SlideReadError: more than a tenth of the tiles wanted cannot be read.
    """
    if unreadable > MAX_UNREADABLE * len(plan):
        raise SlideReadError(
            f"more than {MAX_UNREADABLE:.0%} of the {len(plan)} tiles wanted cannot be read; the last: {last}"
        ) from last


def encode_tile(slide: Slide, plan: TilePlan, tile: int) -> bytes:
    """Reads one tile of a plan as the bytes of a cache, never copying the slide's own JPEG.

    Raises:
        SlideReadError: the slide is damaged there.
    """
    spec = plan.spec
    x, y = plan.origins_level0[tile].tolist()
    size_px = (spec.tile_size_px, spec.tile_size_px)
    return tile_codec(spec).encode(slide.read((x, y), size_px, spec.mpp, spec.mpp_tolerance))


def _encoded(slide: Slide, plan: TilePlan, first: int, threads: int) -> Iterator[bytes | SlideReadError]:
    """Yields the bytes of each tile, or the error if it cannot be read."""
    spec = plan.spec
    encode = tile_codec(spec).encode
    copies = _copies(slide, plan, first)
    if copies is None:
        yield from slide.map_tiles(
            encode, plan.origins_level0, spec.tile_size_px, spec.mpp, spec.mpp_tolerance, first, threads
        )
        return
    for tile, copied in enumerate(copies, first):
        if copied is not None:
            yield copied
            continue
        try:
            yield encode_tile(slide, plan, tile)
        except SlideReadError as error:
            yield error


def stream_tiles(slide: Slide, plan: TilePlan, batch_size: int = 64, threads: int = 1) -> Iterator[TileBatch]:
    """Yields the tiles of a plan exactly as a cache would, compression included, in bounded memory.

    Raises:
        SlideReadError: more than a tenth of all tiles cannot be read.
    """
    tiles: list[int] = []
    pixels: list[NDArray[np.uint8]] = []
    unreadable = 0
    for tile, result in enumerate(_as_stored(slide, plan, threads)):
        if isinstance(result, SlideReadError):
            unreadable += 1
            check_unreadable(plan, unreadable, result)
        else:
            tiles.append(tile)
            pixels.append(result)
        if pixels and (len(pixels) == batch_size or tile == len(plan) - 1):
            yield TileBatch(plan.origins_level0[tiles], plan.tissue_fraction[tiles], np.stack(pixels))
            tiles, pixels = [], []


def read_slide(
    path: Path,
    mpp_override: float | None,
    mpp_replace: float | None,
    spec: TileSpec,
    batch_size: int,
    threads: int = 1,
) -> Generator[TilePlan | TileBatch, None, None]:
    """Opens a slide and yields the plan of its tiles, then the tiles, as :func:`stream_tiles` does.

    Raises:
        SlideError: the slide cannot be opened or read, has no spacing, or is too coarse.
    """
    with open_slide(path, mpp_override, spec.icc, mpp_replace=mpp_replace, channels=spec.channels) as slide:
        plan = plan_tiles(slide, spec, threads)
        yield plan
        yield from stream_tiles(slide, plan, batch_size, threads)


def slide_parts(*arguments: Any) -> Generator[tuple[Any, NDArray[np.uint8] | None], None, None]:
    """Yields the parts of :func:`read_slide` in the form of :class:`slidetl.tiles.readers.Readers`."""
    for item in read_slide(*arguments):
        if isinstance(item, TilePlan):
            yield item, None
        else:
            yield (item.origins_level0, item.tissue_fraction), item.pixels


def _as_stored(slide: Slide, plan: TilePlan, threads: int) -> Iterator[NDArray[np.uint8] | SlideReadError]:
    """Yields the pixels of each tile as read back from a cache, or the error if it cannot be read."""
    spec = plan.spec
    codec = tile_codec(spec)
    copies = _copies(slide, plan, 0)
    if copies is None:
        yield from slide.map_tiles(
            lambda rgb: codec.decode(codec.encode(rgb)),
            *(plan.origins_level0, spec.tile_size_px, spec.mpp, spec.mpp_tolerance),
            threads=threads,
        )
        return

    def decode(copied: bytes | None) -> NDArray[np.uint8] | None:
        try:
            return None if copied is None else codec.decode(copied)
        except CacheCorruptError:  # the slide is damaged within the JPEG
            return None

    for tile, decoded in enumerate(map_in_order(decode, copies, threads)):
        if decoded is not None:
            yield decoded
            continue
        try:
            yield codec.decode(encode_tile(slide, plan, tile))
        except SlideReadError as error:
            yield error


def _copies(slide: Slide, plan: TilePlan, first: int) -> Iterator[bytes | None] | None:
    """Returns the slide's own JPEGs from the tile ``first`` on, if a cache takes them unchanged."""
    spec = plan.spec
    if spec.codec != "jpeg":
        return None
    return slide.copy_tiles(plan.origins_level0, spec.tile_size_px, spec.mpp, spec.mpp_tolerance, first)
