"""The map of a graded slide for QuPath: a tile object per tile, with its class and measurements."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slidetl.grading.explain import DIVERGING
from slidetl.grading.report.maps import colour_table
from slidetl.tiles.geojson import write_tile_objects

if TYPE_CHECKING:
    from slidetl.grading.grade import SlideGrade


def write_geojson(result: SlideGrade, path: Path) -> None:
    """Writes the tiles as :func:`slidetl.tiles.geojson.write_tile_objects`.

    Each has the measurements ``attention`` (1: the average tile) and ``contribution`` with its unit
    (:class:`slidetl.grading.explain.Explanation`), and as ``classification`` its third of the report's
    colours, visible without a measurement map. Measurements are an object of names and values, and colours
    three integers, as in QuPath since version 0.4 (qupath/qupath pull request 1099).

    Raises:
        OSError: the file cannot be written.
    """
    write_tile_objects(
        path,
        result.origins_level0,
        result.plan.extent_level0,
        result.plan.info.viewer,
        f"{result.fingerprint} {result.model_sha256}",
        _properties(result),
    )


def _properties(result: SlideGrade) -> Iterator[dict[str, Any]]:
    attention = result.attention * np.float32(len(result.attention))
    colours = colour_table(DIVERGING)
    classes = [
        {"name": name, "color": colours[shade].tolist()}
        for name, shade in (("lowers the score", 42), ("changes little", 128), ("raises the score", 213))
    ]
    explanation = result.explanation
    measured = f"contribution ({explanation.unit})"
    values = explanation.contributions.tolist(), (explanation.shades // 86).tolist()
    for weight, contribution, third in zip(attention.tolist(), *values, strict=True):
        yield {
            "classification": classes[third],
            "measurements": {"attention": round(weight, 6), measured: float(f"{contribution:.6g}")},
        }
