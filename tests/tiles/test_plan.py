from __future__ import annotations

import numpy as np

from slidetl.slides import open_slide
from slidetl.tiles.plan import plan_tiles
from tests.conftest import PyramidTiff
from tests.tiles.conftest import SPEC, Draw, damaged


def test_what_cannot_be_read_never_passes_for_glass(pyramid_tiff: PyramidTiff, tissue_picture: Draw) -> None:
    path = pyramid_tiff(tissue_picture(1024), mpp=1.0, jpeg=True, tile_px=64)
    glass = 3 * 16 + 14  # a tile of the file, by rows of 16; the glass begins at the twelfth column
    with open_slide(path) as slide:
        intact = plan_tiles(slide, SPEC)
    with open_slide(damaged(path, [glass])) as slide:
        plan = plan_tiles(slide, SPEC)
    before, now = ({(x, y) for x, y in p.origins_level0.tolist()} for p in (intact, plan))
    assert now - before >= {(896, 192), (928, 192), (896, 224), (928, 224)}
    assert before <= now
    assert np.array_equal(plan.tissue_mask.mask & intact.tissue_mask.mask, intact.tissue_mask.mask)
