from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from slidetl.grid import TileSpec
from slidetl.report.geojson import write_geojson
from tests.report.conftest import Graded


def test_every_tile_is_a_square_in_level_0_pixels(graded: Graded, tmp_path: Path) -> None:
    result = graded(spec=TileSpec(1.0, 50, stride_px=75))
    write_geojson(result, tmp_path / "new" / "map.geojson")
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
