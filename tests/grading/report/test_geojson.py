from __future__ import annotations

import json
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slidetl.grading.grade import SlideGrade
from slidetl.grading.report.geojson import write_geojson
from slidetl.tiles.grid import TileSpec
from tests.grading.report.conftest import GRADES, Graded


def test_every_tile_is_a_square_in_level_0_pixels(graded: Graded, tmp_path: Path) -> None:
    result = graded(spec=TileSpec(1.0, 50, stride_px=75))
    write_geojson(result, GRADES, tmp_path / "new" / "map.geojson")
    read = json.loads((tmp_path / "new" / "map.geojson").read_text())
    assert read["type"] == "FeatureCollection"
    assert len(read["features"]) == len(result.attention) > 20
    mean = 0.0
    for tile, feature in enumerate(read["features"]):
        assert feature["type"] == "Feature" and feature["properties"]["objectType"] == "tile"
        (ring,) = feature["geometry"]["coordinates"]
        assert len(ring) == 5 and ring[0] == ring[-1]  # closed, as RFC 7946 says
        x, y = result.origins_level0[tile]
        corners = np.array(ring)
        # 50 px of 1 um are 100 px of 0.5 um.
        assert corners.min(0).tolist() == [x, y] and corners.max(0).tolist() == [x + 100, y + 100]
        found = feature["properties"]["measurements"]
        assert found["tile grade"] == pytest.approx(result.tile_grades[tile], abs=1e-4)
        mean += found["attention"] / len(result.attention)
    assert mean == pytest.approx(1, abs=1e-4)


def test_it_has_the_fields_that_qupath_reads(graded: Graded, tmp_path: Path) -> None:
    """As QuPath 0.4 and later write tiles themselves."""
    result = graded()
    write_geojson(result, GRADES, tmp_path / "map.geojson")
    features = json.loads((tmp_path / "map.geojson").read_text())["features"]
    for feature, grade in zip(features, result.tile_grades, strict=True):
        assert feature.keys() == {"type", "id", "geometry", "properties"}
        assert feature["geometry"]["type"] == "Polygon"
        properties = feature["properties"]
        assert properties.keys() == {"objectType", "isLocked", "classification", "measurements"}
        assert properties["isLocked"] is True
        assert all(type(value) is float for value in properties["measurements"].values())
        shown = properties["classification"]
        assert shown["name"] == f"grade {GRADES[int(np.rint(grade))]}"
        assert len(shown["color"]) == 3 and all(type(part) is int for part in shown["color"])
    assert {feature["properties"]["classification"]["name"] for feature in features} == {
        f"grade {name}" for name in GRADES
    }


def test_a_tile_is_known_again(graded: Graded, tmp_path: Path) -> None:
    result = graded()

    def ids(of: SlideGrade) -> list[str]:
        write_geojson(of, GRADES, tmp_path / "map.geojson")
        return [feature["id"] for feature in json.loads((tmp_path / "map.geojson").read_text())["features"]]

    first = ids(result)
    assert len({uuid.UUID(name) for name in first}) == len(first)
    assert ids(result) == first
    assert not set(ids(replace(result, model_sha256="00" * 32))) & set(first)


def test_it_counts_from_the_corner_to_which_qupath_crops(graded: Graded, tmp_path: Path) -> None:
    result = graded()
    info = replace(result.plan.info, corner_level0=(30, 70))
    write_geojson(replace(result, plan=replace(result.plan, info=info)), GRADES, tmp_path / "map.geojson")
    features = json.loads((tmp_path / "map.geojson").read_text())["features"]
    corners = [feature["geometry"]["coordinates"][0][0] for feature in features]
    assert corners == (result.origins_level0 - [30, 70]).tolist()
