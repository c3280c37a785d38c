"""Tiles, and the tissue of a slide, as objects for QuPath."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.files import replaced
from slidetl.slides.turn import ViewerFrame
from slidetl.tiles.polygons import outlines
from slidetl.tiles.store import SlideCache

TISSUE = "Tissue"
_COLOUR = (0, 170, 190)
_DECIMALS = 6  # of a pixel: the same tiles must come back


def write_tile_objects(
    path: Path,
    origins_level0: NDArray[np.integer[Any]],
    extent_level0: tuple[float, float],
    viewer: ViewerFrame,
    source: str,
    properties: Iterable[Mapping[str, Any]],
) -> None:
    """Writes a ``FeatureCollection`` of squares, in the level-0 pixels of QuPath's image of the slide.

    QuPath crops a slide to the scanned area given by OpenSlide in ``openslide.bounds-*`` (MIRAX, Leica,
    Ventana), unless opened with ``--no-crop``, and counts from the corner of this area; it shows pictures as
    stored, without their orientation. Each square has the ``objectType`` ``tile``.

    Args:
        path: the file.
        origins_level0: ``[N, 2]``, upper-left corners ``(x, y)``, level-0 pixels of the whole slide.
        extent_level0: size of a tile ``(x, y)``, level-0 pixels.
        viewer: the frame of the slide in QuPath.
        source: a tile of the same source has the same ``id``, so QuPath recognises repeated imports.
        properties: of each tile, beside its type.

    Raises:
        OSError: the file cannot be written.
    """
    space = uuid.uuid5(uuid.NAMESPACE_OID, source)
    origins = origins_level0.astype(np.float64)
    ends = origins + np.asarray(extent_level0)
    sides = np.round([viewer.from_level0(origins), viewer.from_level0(ends)], 2)
    squares = np.concatenate([sides.min(0), sides.max(0)], axis=1).tolist()

    def features() -> Iterator[dict[str, Any]]:
        for square, values in zip(squares, properties, strict=True):
            x, y, right, bottom = (int(side) if side.is_integer() else side for side in square)
            yield {
                "type": "Feature",
                "id": str(uuid.uuid5(space, f"{x} {y}")),
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [[[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]],
                },
                "properties": {"objectType": "tile", "isLocked": True, **values},
            }

    _write_features(path, features())


def _write_features(path: Path, features: Iterable[dict[str, Any]]) -> None:
    with replaced(path) as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(features):
            file.write((("," if number else "") + "\n" + json.dumps(feature, allow_nan=False)).encode())
        file.write(b"\n]}\n")


def write_tissue(cache: SlideCache, path: Path) -> int:
    """Writes the tissue of a slide as annotations of class ``Tissue``, in the pixels of QuPath's image.

    Each piece is a polygon with its holes, along the edges of the pixels of the mask.

    Returns:
        The number of pieces.

    Raises:
        CacheError: the mask cannot be read, or the cache does not record the frame of QuPath.
        OutputError: the file cannot be written.
    """
    features = list(_pieces(cache))
    _write_features(path, features)
    return len(features)


def _pieces(cache: SlideCache) -> Iterator[dict[str, Any]]:
    viewer, tissue = cache.header.viewer, cache.tissue_mask
    scale = tissue.mpp / np.asarray(cache.mpp_level0)
    for number, rings in enumerate(outlines(tissue.mask)):
        coordinates = []
        for ring in rings:
            # The mask's last pixels may reach beyond the slide.
            places = viewer.from_level0(np.minimum(ring * scale, cache.size_level0))
            coordinates.append(np.round(np.vstack([places, places[:1]]), _DECIMALS).tolist())
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{cache.fingerprint} tissue {number}")),
            "geometry": {"type": "Polygon", "coordinates": coordinates},
            "properties": {
                "objectType": "annotation",
                "classification": {"name": TISSUE, "color": _COLOUR},
            },
        }
