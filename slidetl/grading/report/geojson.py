"""The map of a graded slide for QuPath: a tile object per tile, with its class and measurements."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slidetl.files import replaced
from slidetl.grading.explain import DIVERGING
from slidetl.grading.report.maps import colour_table

if TYPE_CHECKING:
    from slidetl.grading.grade import SlideGrade


def write_geojson(result: SlideGrade, path: Path) -> None:
    """Writes a ``FeatureCollection`` of squares, in the level-0 pixels of QuPath's image of the slide.

    QuPath crops a slide to the scanned area given by OpenSlide in ``openslide.bounds-*`` (MIRAX, Leica,
    Ventana), unless opened with ``--no-crop``, and counts from the corner of this area.

    Each square has the ``objectType`` ``tile``, the measurements ``attention`` (1: the average tile) and
    ``contribution`` with its unit (:class:`slidetl.grading.explain.Explanation`), and as ``classification``
    its third of the report's colours, visible without a measurement map. Measurements are an object of names
    and values, and colours three integers, as in QuPath since version 0.4 (qupath/qupath pull request 1099).
    A tile has the same ``id`` each time a model grades a slide, so QuPath recognises repeated imports.


    Raises:
        OSError: the file cannot be written.
    """
    with replaced(path) as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(_features(result)):
            file.write(
                ("" if number == 0 else ",").encode() + b"\n" + json.dumps(feature, allow_nan=False).encode()
            )
        file.write(b"\n]}\n")


def _features(result: SlideGrade) -> Iterator[dict[str, Any]]:
    attention = result.attention * np.float32(len(result.attention))
    width, height = result.plan.extent_level0
    corner = np.asarray(result.plan.info.corner_level0)
    source = uuid.uuid5(uuid.NAMESPACE_OID, f"{result.fingerprint} {result.model_sha256}")
    colours = colour_table(DIVERGING)
    classes = [
        {"name": name, "color": colours[shade].tolist()}
        for name, shade in (("lowers the score", 42), ("changes little", 128), ("raises the score", 213))
    ]
    origins = (result.origins_level0 - corner).tolist()
    explanation = result.explanation
    measured = f"contribution ({explanation.unit})"
    values = explanation.contributions.tolist(), (explanation.shades // 86).tolist()
    for (x, y), weight, contribution, third in zip(origins, attention.tolist(), *values, strict=True):
        right, bottom = round(x + width, 2), round(y + height, 2)
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(source, f"{x} {y}")),
            "geometry": {
                "type": "Polygon",
                "coordinates": [[[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]],
            },
            "properties": {
                "objectType": "tile",
                "isLocked": True,
                "classification": classes[third],
                "measurements": {"attention": round(weight, 6), measured: float(f"{contribution:.6g}")},
            },
        }
