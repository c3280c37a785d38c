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
from slidetl.tiles.regions import RegionOptions, read_regions
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_map_read_as_regions_has_the_tiles_of_a_turned_slide(
    graded: Graded, tmp_path: Path, orientation: int
) -> None:
    """What grade writes for QuPath and what tile reads from it agree on the frame."""
    result = graded(spec=TileSpec(1.0, 50, stride_px=75))
    info = replace(result.plan.info, orientation=orientation, corner_level0=(0, 0))
    write_geojson(replace(result, plan=replace(result.plan, info=info)), tmp_path / "map.geojson")
    found = read_regions(tmp_path / "map.geojson", RegionOptions(tmp_path), info.viewer, "")
    squares = np.array([np.concatenate([ring.min(0), ring.max(0)]) for (ring,) in found.layers[0].areas])
    assert squares == pytest.approx(np.hstack([result.origins_level0, result.origins_level0 + 100]))
    feature = json.loads((tmp_path / "map.geojson").read_text())["features"][0]
    x, y = result.origins_level0[0]
    width, height = info.size_level0
    # The first row and column of the picture lie there in the file (TIFF 6.0, Orientation).
    sides = {1: (x, y), 2: (width - x - 100, y), 3: (width - x - 100, height - y - 100)}
    sides |= {4: (x, height - y - 100), 5: (y, x), 6: (y, width - x - 100)}
    sides |= {7: (height - y - 100, width - x - 100), 8: (height - y - 100, x)}
    assert tuple(feature["geometry"]["coordinates"][0][0]) == sides[orientation]


def test_it_counts_from_the_corner_to_which_qupath_crops(graded: Graded, tmp_path: Path) -> None:
    result = graded()
    info = replace(result.plan.info, corner_level0=(30, 70))
    write_geojson(replace(result, plan=replace(result.plan, info=info)), tmp_path / "map.geojson")
    features = json.loads((tmp_path / "map.geojson").read_text())["features"]
    corners = [feature["geometry"]["coordinates"][0][0] for feature in features]
    assert corners == (result.origins_level0 - [30, 70]).tolist()
