from __future__ import annotations

import numpy as np
import pytest

from slidetl.compare.colour import collagen_density, collagen_features, colour_features
from slidetl.tiles.store import SlideCache
from tests.conftest import Study


def test_colour_and_area_of_the_tissue_alone(study: Study) -> None:
    paths = sorted(study.cache.glob("*.zarr"))[:3]
    features = colour_features(SlideCache.open(path) for path in paths)
    assert features.shape == (3, 4)
    cache = SlideCache.open(paths[0])
    tissue = cache.tissue_mask
    rows, columns = np.nonzero(tissue.mask)
    for channel in range(3):
        assert features[0, channel] == pytest.approx(cache.thumbnail[rows, columns, channel].mean())
    assert features[0, 3] == pytest.approx(len(rows) * tissue.mpp**2 / 1e6)
    side_mm = cache.size_level0[0] * cache.mpp_level0[0] / 1000
    assert 0.2 * side_mm**2 < features[0, 3] < side_mm**2


@pytest.mark.parametrize(
    ("stain", "collagen", "other"),
    [  # as published by Ruifrok and Johnston, and in Landini's plugin; picrosirius has no such vectors
        ("he", (0.072, 0.990, 0.105), (0.650, 0.704, 0.286)),
        ("trichrome", (0.7995, 0.5914, 0.1053), (0.1000, 0.7374, 0.6680)),
        ("Sirius red", (0.10, 0.85, 0.52), (0.05, 0.20, 0.98)),
    ],
)
def test_collagen_is_what_its_stain_absorbs(
    stain: str, collagen: tuple[float, ...], other: tuple[float, ...]
) -> None:
    """Of any colour: the least squares leave a remainder at right angles to both stains."""
    light = np.random.default_rng(0).integers(20, 256, (500, 3), np.uint8)
    vectors = np.stack([np.array(vector) / np.linalg.norm(vector) for vector in (collagen, other)])
    absorbed = -np.log10((light + 1.0) / 256)
    expected = np.linalg.lstsq(vectors.T, absorbed.T)[0][0]
    assert collagen_density(light, stain) == pytest.approx(expected, abs=0.02)


def test_collagen_of_a_slide_is_a_share_of_its_tissue(study: Study) -> None:
    caches = [SlideCache.open(path) for path in sorted(study.cache.glob("*.zarr"))[:3]]
    features = collagen_features(caches, ["he"] * 3)
    tissue_mm2 = colour_features(caches)[:, 3]
    assert (features[:, 0] > 0).all() and (features[:, 0] <= 1).all()
    assert features[:, 1] == pytest.approx(features[:, 0] * tissue_mm2)
