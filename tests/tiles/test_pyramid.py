# ruff: noqa: F811  # fixtures of the reports are used here too
from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from slidetl.slides import Slide, open_slide
from slidetl.tiles.plan import TilePlan, plan_tiles
from slidetl.tiles.pyramid import TILE_PX, Canvas, Pyramid, build_pyramid
from tests.conftest import Picture, PyramidTiff
from tests.grading.report.conftest import SPEC, Graded, graded, slide_picture  # noqa: F401  # fixtures


def pyramid_of(slide: Slide, plan: TilePlan, budget_bytes: int = 10**9, threads: int = 1) -> Pyramid:
    """The pyramid of a slide whose tiles all count alike."""
    attention = np.ones(len(plan), np.float32)
    return build_pyramid(slide, Canvas.of_plan(plan), plan.origins_level0, attention, budget_bytes, threads)


def mosaic(pyramid: Pyramid, level: int) -> Picture:
    """The tiles of a level side by side, as a viewer would lay them; black where there is none."""
    halvings = len(pyramid.levels) - 1 - level
    width, height = (math.ceil(size / 2**halvings) for size in pyramid.size_px)
    rows, columns = math.ceil(height / TILE_PX), math.ceil(width / TILE_PX)
    picture = np.zeros((rows * TILE_PX, columns * TILE_PX, 3), np.uint8)
    for (column, row), jpeg in pyramid.levels[level].items():
        with Image.open(io.BytesIO(jpeg)) as tile:
            y, x = row * TILE_PX, column * TILE_PX
            picture[y : y + TILE_PX, x : x + TILE_PX] = np.asarray(tile)
    return picture[:height, :width]


def test_every_level_shows_the_slide(graded: Graded, slide_picture: Picture) -> None:
    plan = graded().plan
    with open_slide(plan.info.path) as slide:
        pyramid = pyramid_of(slide, plan)
        assert (pyramid.size_px, pyramid.mpp, pyramid.mpp_slide) == ((1400, 1100), 0.5, 0.5)
        assert [len(level) for level in pyramid.levels] == [1, 4, 9]
        assert pyramid.unreadable == 0
        for level in range(3):
            shown = mosaic(pyramid, level)
            height, width = shown.shape[:2]
            expected = slide.read((0, 0), (width, height), 0.5 * 2 ** (2 - level))
            assert np.abs(luma(shown) - luma(expected)).mean() < 4
    assert np.abs(luma(mosaic(pyramid, 2)) - luma(slide_picture)).mean() < 4


def luma(rgb: Picture) -> NDArray[np.float64]:
    """Brightness as JPEG keeps it: colours are halved in resolution, and these change from pixel to pixel."""
    return np.asarray(rgb @ np.array([0.299, 0.587, 0.114]))


def test_the_finest_level_follows_from_the_budget(graded: Graded) -> None:
    plan = graded().plan
    with open_slide(plan.info.path) as slide:
        whole = pyramid_of(slide, plan)
        sizes = [sum(map(len, level.values())) for level in whole.levels]
        fits = pyramid_of(slide, plan, whole.bytes)
        less = pyramid_of(slide, plan, sum(sizes[:2]))
        least = pyramid_of(slide, plan, 1)
    assert fits.levels == whole.levels and fits.mpp_everywhere == 0.5
    assert less.levels == whole.levels[:2]
    assert (less.bytes, less.mpp, less.size_px) == (sum(sizes[:2]), 1.0, (700, 550))
    assert (len(least.levels), least.mpp, least.size_px) == (1, 2.0, (350, 275))
    assert least.mpp_slide == 0.5


def test_what_counted_most_is_finer_where_not_all_fits(graded: Graded) -> None:
    plan = graded().plan
    middles = plan.origins_level0 + np.asarray(plan.extent_level0) / 2
    is_hot = (middles >= 512).all(1) & (middles < 1024).all(1)  # the middle one of the nine finest tiles
    attention = np.where(is_hot, 1.0, 0.01).astype(np.float32)
    with open_slide(plan.info.path) as slide:
        whole = pyramid_of(slide, plan)
        finest = whole.levels[-1]
        budget = whole.bytes - sum(map(len, finest.values())) + 3 * max(map(len, finest.values()))
        part = build_pyramid(slide, Canvas.of_plan(plan), plan.origins_level0, attention, budget)
    assert part.levels[:-1] == whole.levels[:-1]
    assert (1, 1) in part.levels[-1] and 1 <= len(part.levels[-1]) < 9
    assert part.levels[-1].items() <= finest.items()
    assert part.bytes <= budget
    assert (part.mpp, part.mpp_everywhere) == (0.5, 1.0)


def test_fine_levels_have_tissue_only(pyramid_tiff: PyramidTiff, slide_picture: Picture) -> None:
    picture = np.full((2100, 4200, 3), 255, np.uint8)
    picture[:1100, :1400] = slide_picture
    with open_slide(pyramid_tiff(picture, mpp=0.5, factors=(4,))) as slide:
        pyramid = pyramid_of(slide, plan_tiles(slide, SPEC))
    finest = pyramid.levels[-1]
    assert {(0, 0), (1, 1)} <= finest.keys()
    assert max(column for column, _ in finest) <= 2 and max(row for _, row in finest) <= 2
    assert (mosaic(pyramid, 0)[:, -20:] > 250).all()  # from afar the glass is there


def test_pixels_are_square_whatever_the_slide_s_are(
    pyramid_tiff: PyramidTiff, slide_picture: Picture
) -> None:
    with open_slide(pyramid_tiff(slide_picture, mpp=(0.5, 0.25))) as slide:
        pyramid = pyramid_of(slide, plan_tiles(slide, SPEC))
    assert (pyramid.size_px, pyramid.mpp) == ((1400, 550), 0.5)


def test_a_slide_of_one_tile_and_no_tissue(pyramid_tiff: PyramidTiff) -> None:
    picture = np.full((100, 200, 3), 255, np.uint8)
    with open_slide(pyramid_tiff(picture, mpp=0.5)) as slide:
        pyramid = pyramid_of(slide, plan_tiles(slide, SPEC))
    assert pyramid.size_px == (200, 100) and len(pyramid.levels) == 1


def test_what_cannot_be_read_is_left_out_and_counted(graded: Graded) -> None:
    plan = graded().plan
    path = plan.info.path
    damage(path, 5)
    with open_slide(path) as slide:
        pyramid = pyramid_of(slide, dataclasses.replace(plan, info=slide.info))
    assert pyramid.unreadable >= 1
    assert 4 <= len(pyramid.levels[-1]) < 9


def damage(path: Path, tile: int) -> None:
    """Overwrites a tile of the finest level."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, size = page.dataoffsets[tile], page.databytecounts[tile]
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = b"\xff" * size
    path.write_bytes(content)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(graded: Graded, threads: int) -> None:
    plan = graded().plan
    with open_slide(plan.info.path) as slide:
        assert pyramid_of(slide, plan, threads=threads).bytes == pyramid_of(slide, plan).bytes
