from __future__ import annotations

import numpy as np
import pytest

from slidetl.cache.store import SlideCache
from slidetl.experiments.colour import colour_features
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
