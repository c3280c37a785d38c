"""A study with features that know the stain of a drawn pattern, and nothing of the slide."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from slidetl.atlas.collection import Collection, open_collection
from slidetl.atlas.options import Selection
from slidetl.data.manifest import read_manifest
from slidetl.tiles.features import FeatureSource, write_features
from slidetl.tiles.store import SlideCache, cache_path
from tests.conftest import Study

SOURCE = FeatureSource("net", "", "a" * 64, (0, 0, 0), (1, 1, 1))
DIRECTIONS = np.eye(8)[:4]


def pattern_of(cache: SlideCache, grade: int) -> NDArray[np.int64]:
    """Patterns 0 to 2 by column of tiles; the last tiles of higher grades have pattern 3."""
    pattern: NDArray[np.int64] = (
        cache.origins_level0[:, 0].astype(np.int64) // round(cache.extent_level0[0]) % 3
    )
    pattern[len(pattern) - grade * len(pattern) // 8 :] = 3
    return pattern


def patterns(collection: Collection) -> NDArray[np.int64]:
    return np.concatenate([pattern_of(slide.cache, slide.row.grade or 0) for slide in collection.slides])


@pytest.fixture(scope="session")
def patterned(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The study with features ``told`` of four drawn patterns."""
    folder: Path = tmp_path_factory.mktemp("patterned") / "cache"
    shutil.copytree(study.cache, folder)
    rng = np.random.default_rng(0)
    for row in read_manifest(study.manifest).rows:
        cache = SlideCache.open(cache_path(folder, row.slide_id))
        values = DIRECTIONS[pattern_of(cache, row.grade or 0)] + 0.05 * rng.normal(size=(len(cache), 8))
        write_features(cache, {"told": (SOURCE, values.astype(np.float16))})
    return Study(study.manifest, folder)


@pytest.fixture
def collection(patterned: Study) -> Collection:
    return open_collection(Selection(patterned.cache, "told", patterned.manifest))
