"""Tiles as objects for QuPath."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.files import replaced


def write_tile_objects(
    path: Path,
    origins_level0: NDArray[np.integer[Any]],
    extent_level0: tuple[float, float],
    corner_level0: tuple[int, int],
    source: str,
    properties: Iterable[Mapping[str, Any]],
) -> None:
    """Writes a ``FeatureCollection`` of squares, in the level-0 pixels of QuPath's image of the slide.

    QuPath crops a slide to the scanned area given by OpenSlide in ``openslide.bounds-*`` (MIRAX, Leica,
    Ventana), unless opened with ``--no-crop``, and counts from the corner of this area. Each square has the
    ``objectType`` ``tile``.

    Args:
        path: the file.
        origins_level0: ``[N, 2]``, upper-left corners ``(x, y)``, level-0 pixels of the whole slide.
        extent_level0: size of a tile ``(x, y)``, level-0 pixels.
        corner_level0: corner of the scanned area.
        source: a tile of the same source has the same ``id``, so QuPath recognises repeated imports.
        properties: of each tile, beside its type.

    Raises:
        OSError: the file cannot be written.
    """
    width, height = extent_level0
    space = uuid.uuid5(uuid.NAMESPACE_OID, source)
    with replaced(path) as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        origins = (origins_level0 - np.asarray(corner_level0)).tolist()
        for number, ((x, y), values) in enumerate(zip(origins, properties, strict=True)):
            right, bottom = round(x + width, 2), round(y + height, 2)
            feature = {
                "type": "Feature",
                "id": str(uuid.uuid5(space, f"{x} {y}")),
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [[[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]],
                },
                "properties": {"objectType": "tile", "isLocked": True, **values},
            }
            file.write((("," if number else "") + "\n" + json.dumps(feature, allow_nan=False)).encode())
        file.write(b"\n]}\n")
