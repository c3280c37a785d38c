from __future__ import annotations

import numpy as np
import tifffile

from slidetl.slides import open_slide
from slidetl.tiles.grid import TileSpec
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


def test_what_is_missing_in_the_file_is_counted_as_without_data(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw
) -> None:
    path = pyramid_tiff(tissue_picture(1024), mpp=4.0, tile_px=128)
    with tifffile.TiffFile(path, mode="r+") as file:
        for name in ("TileByteCounts", "TileOffsets"):
            tag = file.pages.first.tags[name]
            tag.overwrite([0] * 16 + list(tag.value[16:]))  # the upper quarter
    with open_slide(path) as slide:
        plan = plan_tiles(slide, TileSpec(4.0, 64))
    assert plan.left_out["tiles_without_data"] == 64
    assert plan.left_out["tiles_without_tissue"] == 64 + 48  # and glass on the right
    assert plan.origins_level0[:, 1].min() == 256


def test_a_slide_that_is_all_tissue_is_said(pyramid_tiff: PyramidTiff, tissue_picture: Draw) -> None:
    picture, spec = tissue_picture(512), TileSpec(4.0, 64)
    with open_slide(pyramid_tiff(picture, mpp=4.0)) as slide:
        assert plan_tiles(slide, spec).notes == ()
    with open_slide(pyramid_tiff(picture[:, :320], mpp=4.0, name="full")) as slide:
        (note,) = plan_tiles(slide, spec).notes
    assert "nearly all of it counts as tissue" in note and "--preview" in note
