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
from tests.grading.report.conftest import Graded


def test_every_tile_is_a_square_in_level_0_pixels(graded: Graded, tmp_path: Path) -> None:
    result = graded(spec=TileSpec(1.0, 50, stride_px=75))
    write_geojson(result, tmp_path / "new" / "map.geojson")
    read = json.loads((tmp_path / "new" / "map.geojson").read_text())
    assert read["type"] == "FeatureCollection"
    assert len(read["features"]) == len(result.attention) > 20
    mean = total = 0.0
    for tile, feature in enumerate(read["features"]):
        assert feature["type"] == "Feature" and feature["properties"]["objectType"] == "tile"
        (ring,) = feature["geometry"]["coordinates"]
        assert len(ring) == 5 and ring[0] == ring[-1]  # closed, as RFC 7946 says
        x, y = result.origins_level0[tile]
        corners = np.array(ring)
        # 50 px of 1 um are 100 px of 0.5 um.
        assert corners.min(0).tolist() == [x, y] and corners.max(0).tolist() == [x + 100, y + 100]
        found = feature["properties"]["measurements"]
        total += found["contribution (log-odds)"]
        mean += found["attention"] / len(result.attention)
    assert mean == pytest.approx(1, abs=1e-4)
    explanation = result.explanation
    assert explanation.baseline is not None
    assert total == pytest.approx(explanation.score - explanation.baseline, abs=1e-5)


def test_it_has_the_fields_that_qupath_reads(graded: Graded, tmp_path: Path) -> None:
    """As QuPath 0.4 and later write tiles themselves."""
    result = graded()
    write_geojson(result, tmp_path / "map.geojson")
    features = json.loads((tmp_path / "map.geojson").read_text())["features"]
    relative = result.explanation.relative / result.explanation.reach
    for feature, place in zip(features, relative, strict=True):
        assert feature.keys() == {"type", "id", "geometry", "properties"}
        assert feature["geometry"]["type"] == "Polygon"
        properties = feature["properties"]
        assert properties.keys() == {"objectType", "isLocked", "classification", "measurements"}
        assert properties["isLocked"] is True
        assert all(type(value) is float for value in properties["measurements"].values())
        shown = properties["classification"]
        if abs(abs(place) - 1 / 3) > 0.01:
            raises, lowers = place > 1 / 3, place < -1 / 3
            name = "raises the score" if raises else "lowers the score" if lowers else "changes little"
            assert shown["name"] == name
        red, _, blue = shown["color"]
        assert all(type(part) is int for part in shown["color"])
        signs = {"raises the score": 1, "lowers the score": -1, "changes little": 0}
        assert np.sign((red - blue) // 50) == signs[shown["name"]]
    assert len({feature["properties"]["classification"]["name"] for feature in features}) == 3


def test_a_tile_is_known_again(graded: Graded, tmp_path: Path) -> None:
    result = graded()

    def ids(of: SlideGrade) -> list[str]:
        write_geojson(of, tmp_path / "map.geojson")
        return [feature["id"] for feature in json.loads((tmp_path / "map.geojson").read_text())["features"]]

    first = ids(result)
    assert len({uuid.UUID(name) for name in first}) == len(first)
    assert ids(result) == first
    assert not set(ids(replace(result, model_sha256="00" * 32))) & set(first)


def test_it_counts_from_the_corner_to_which_qupath_crops(graded: Graded, tmp_path: Path) -> None:
    result = graded()
    info = replace(result.plan.info, corner_level0=(30, 70))
    write_geojson(replace(result, plan=replace(result.plan, info=info)), tmp_path / "map.geojson")
    features = json.loads((tmp_path / "map.geojson").read_text())["features"]
    corners = [feature["geometry"]["coordinates"][0][0] for feature in features]
    assert corners == (result.origins_level0 - [30, 70]).tolist()
