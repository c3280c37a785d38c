"""The map of a graded slide as QuPath reads it: a tile object per tile, with its measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from slidetl.inference import SlideGrade


def write_geojson(result: SlideGrade, path: Path) -> None:
    """Writes a ``FeatureCollection`` of squares, in level-0 pixels from the slide's upper-left corner.

    Each has the ``objectType`` ``tile`` and the measurements ``attention`` (1: the average tile) and ``tile
    grade`` (the grade expected of the tile alone). QuPath 0.4 and later read measurements in this form.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(_features(result)):
            file.write(("" if number == 0 else ",") + "\n" + json.dumps(feature))
        file.write("\n]}\n")
    partial.replace(path)


def _features(result: SlideGrade) -> Iterator[dict[str, Any]]:
    attention = result.attention * np.float32(len(result.attention))
    width, height = result.plan.extent_level0
    for (x, y), weight, grade in zip(
        result.origins_level0.tolist(), attention.tolist(), result.tile_grades.tolist(), strict=True
    ):
        right, bottom = round(x + width, 2), round(y + height, 2)
        yield {
            "type": "Feature",
            "geometry": {
                "type": "Polygon",
                "coordinates": [[[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]],
            },
            "properties": {
                "objectType": "tile",
                "measurements": {"attention": round(weight, 6), "tile grade": round(grade, 5)},
            },
        }
