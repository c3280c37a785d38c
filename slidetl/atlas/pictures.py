"""Pictures and words about a tile, for the pages of the atlas."""

from __future__ import annotations

import shlex
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.atlas.collection import Collection
from slidetl.atlas.options import Selection
from slidetl.page import data_uri
from slidetl.tiles.mosaic import Mosaic
from slidetl.tiles.pyramid import encode_thumbnail

_SHOWN_PX = 224
_QUALITY = 80


def picture_of(rgb: NDArray[np.uint8], longest_px: int = _SHOWN_PX) -> str:
    """Encodes a picture, at most so large, for a page."""
    return data_uri("jpeg", encode_thumbnail(rgb, longest_px, _QUALITY))


def describe_tile(collection: Collection, tile: int) -> dict[str, Any]:
    """Describes a tile: its slide, place, patient, site and grade, empty if unknown."""
    slide, number = collection.place(tile)
    x, y = slide.cache.origins_level0[number].tolist()
    row = slide.row
    return {
        "tile": f"{row.slide_id}@{x},{y}",
        "slide": row.slide_id,
        "patient": row.patient_id if collection.has_manifest else "",
        "site": row.site,
        "grade": "" if row.grade is None else str(row.grade),
        "x_level0": x,
        "y_level0": y,
    }


def draw_tile(collection: Collection, tile: int, longest_px: int = _SHOWN_PX) -> str:
    """Draws a tile for a page."""
    slide, number = collection.place(tile)
    return picture_of(slide.cache.read([number])[0], longest_px)


def draw_surroundings(collection: Collection, tile: int) -> str:
    """Draws a tile and as much to each side for a page."""
    slide, number = collection.place(tile)
    cache = slide.cache
    x, y = (cache.origins_level0[number] - np.asarray(cache.extent_level0)).tolist()
    mpp = 3 * cache.spec.tile_size_px * cache.mpp_read[0] / _SHOWN_PX
    return picture_of(Mosaic(cache).read((x, y), (_SHOWN_PX, _SHOWN_PX), mpp))


def similar_command(selection: Selection, tile: str) -> str:
    """Writes the command for tiles like this one."""
    words = ["slidetl", "atlas", "similar", str(selection.cache), "--features", selection.features]
    if selection.manifest is not None:
        words += ["--manifest", str(selection.manifest)]
    return shlex.join([*words, "--tile", tile, "--output", "similar"])
