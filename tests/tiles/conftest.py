"""Slides to be tiled, whole and damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from slidetl.tiles.grid import TileSpec
from slidetl.tiles.tile import SlideSource
from tests.conftest import Picture, PyramidTiff

Draw = Callable[..., Picture]
SPEC = TileSpec(mpp=1.0, tile_size_px=32, codec="zstd")


@pytest.fixture
def source(pyramid_tiff: PyramidTiff, tissue_picture: Draw) -> SlideSource:
    return SlideSource("S1", pyramid_tiff(tissue_picture(1024), factors=(4,)))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def damaged(path: Path, which: Sequence[int] | slice) -> Path:
    """Overwrites the heads of some of the JPEG tiles of a TIFF."""
    data = bytearray(path.read_bytes())
    heads = [n for n in range(len(data) - 2) if data[n : n + 3] == b"\xff\xd8\xff"]
    for head in heads[which] if isinstance(which, slice) else [heads[n] for n in which]:
        data[head : head + 400] = bytes(400)
    other = path.with_name("damaged.tiff")
    other.write_bytes(data)
    return other
