from __future__ import annotations

import numpy as np

from slidetl.slides import open_slide
from slidetl.tiles.mosaic import Mosaic
from slidetl.tiles.pyramid import Canvas, build_pyramid
from slidetl.tiles.store import SlideCache
from tests.conftest import Study


def opened(study: Study) -> SlideCache:
    return SlideCache.open(sorted(study.cache.glob("*.zarr"))[0])


def test_tiles_lie_where_they_were_cut(study: Study) -> None:
    cache = opened(study)
    size = cache.spec.tile_size_px
    for tile in (0, len(cache) // 2, len(cache) - 1):
        origin = cache.origins_level0[tile]
        drawn = Mosaic(cache).read(tuple(origin.tolist()), (size, size), cache.mpp_read[0])
        np.testing.assert_array_equal(drawn, cache.read([tile])[0])


def test_an_area_is_the_slide_with_the_thumbnail_between_tiles_and_white_outside(study: Study) -> None:
    cache = opened(study)
    path = study.manifest.parent / "slides" / f"{cache.slide_id}.tiff"
    mpp, extent = cache.mpp_read[0], np.asarray(cache.extent_level0)
    size = tuple(
        np.ceil(np.asarray(cache.size_level0) / extent * cache.spec.tile_size_px).astype(int).tolist()
    )
    drawn = Mosaic(cache).read((0, 0), size, mpp).astype(float)
    with open_slide(path) as slide:
        true = slide.read((0, 0), size, mpp).astype(float)
    assert np.abs(drawn - true).mean() < 6
    outside = Mosaic(cache).read(tuple((-extent).tolist()), (cache.spec.tile_size_px,) * 2, mpp)
    assert (outside == 255).all()


def test_a_pyramid_of_the_cache_ends_at_its_budget_and_at_the_spacing_of_tiles(study: Study) -> None:
    cache = opened(study)
    canvas = Canvas.of_cache(cache)
    even = np.ones(len(cache), np.float32)
    whole = build_pyramid(Mosaic(cache), canvas, cache.origins_level0, even, 10**8)
    assert whole.mpp_slide == whole.mpp == max(cache.mpp_read)
    assert whole.unreadable == 0
    part = build_pyramid(Mosaic(cache), canvas, cache.origins_level0, even, 1)
    assert len(part.levels) == 1
