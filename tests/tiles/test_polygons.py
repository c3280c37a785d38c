from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
import shapely
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from shapely.geometry import Polygon as Shape

from slidetl.errors import AnnotationError
from slidetl.tiles import polygons
from slidetl.tiles.polygons import Layer, Polygon, coverage, outlines


def cover(
    inside: Sequence[Polygon],
    without: Sequence[Polygon],
    size_px: tuple[int, int],
    pixels_per_unit: tuple[float, float],
) -> NDArray[np.float32]:
    return coverage([Layer(inside)], [Layer(without)], size_px, pixels_per_unit)


def ring(*points: tuple[float, float]) -> NDArray[np.float64]:
    return np.array(points, float)


def box(x: float, y: float, width: float, height: float) -> NDArray[np.float64]:
    return ring((x, y), (x + width, y), (x + width, y + height), (x, y + height))


@st.composite
def stars(draw: st.DrawFn) -> NDArray[np.float64]:
    """Draws a simple polygon: places at growing angles around a centre."""
    angles = sorted(draw(st.sets(st.integers(0, 35), min_size=3, max_size=9)))
    radii = draw(st.lists(st.integers(1, 24), min_size=len(angles), max_size=len(angles)))
    turns = np.array(angles) * np.pi / 18
    centre = np.array([draw(st.integers(-4, 20)), draw(st.integers(-4, 20))])
    star: NDArray[np.float64] = centre + np.array(radii)[:, None] / 2 * (
        np.stack([np.cos(turns), np.sin(turns)], 1)
    )
    assume(Shape(star).is_valid)
    return star


@settings(max_examples=40)
@given(st.lists(stars(), min_size=1, max_size=3), st.lists(stars(), max_size=2))
def test_shares_agree_with_a_count_of_many_points(
    inside: list[NDArray[np.float64]], without: list[NDArray[np.float64]]
) -> None:
    """Against shapely, an independent implementation, at 24 by 24 points of each pixel."""
    found = cover([(one,) for one in inside], [(one,) for one in without], (8, 6), (0.5, 0.4))
    x, y = (np.arange(0, size, 1 / 24) + 1 / 48 for size in (8, 6))
    points = np.meshgrid(x / 0.5, y / 0.4)
    expected = shapely.contains_xy(shapely.union_all([Shape(one) for one in inside]), *points)
    for one in without:
        expected &= ~shapely.contains_xy(Shape(one), *points)
    share = expected.reshape(6, 24, 8, 24).mean((1, 3))
    assert np.abs(found - share).max() < 0.15  # a flat side lies anywhere between two of eight lines
    assert abs(found.mean() - share.mean()) < 0.01


def test_sides_along_whole_pixels_are_exact() -> None:
    donut = (box(1, 1, 4, 4), box(2, 2, 2, 2))
    expected = np.zeros((6, 7))
    expected[1:5, 1:5] = 1
    expected[2:4, 2:4] = 0
    assert np.array_equal(cover([donut], [], (7, 6), (1, 1)), expected)
    closed = tuple(np.vstack([one, one[:1]]) for one in donut)
    assert np.array_equal(cover([closed, closed], [], (7, 6), (1, 1)), expected)  # twice is not nothing
    filled = cover([donut, (box(2, 2, 2, 2),)], [], (7, 6), (1, 1))
    assert filled[1:5, 1:5].all() and filled.sum() == 16
    assert cover([donut], [(box(-5, -5, 20, 20),)], (7, 6), (1, 1)).sum() == 0
    assert cover([], [donut], (7, 6), (1, 1)).sum() == 0


def test_a_hole_is_cut_out_of_its_layer_alone() -> None:
    wide, left, middle = (box(0, 0, 6, 6),), (box(0, 0, 3, 6),), (box(2, 2, 2, 2),)
    holed, plain = Layer([wide], [middle]), Layer([left])
    for layers in ([holed, plain], [plain, holed]):
        assert coverage(layers, [], (6, 6), (1, 1)).sum() == 36 - 2
        assert coverage(layers, [Layer([middle])], (6, 6), (1, 1)).sum() == 36 - 4
        assert coverage(layers, [plain], (6, 6), (1, 1)).sum() == 18 - 2
        assert coverage(layers, [holed], (6, 6), (1, 1)).sum() == 2


def test_parts_of_pixels_and_what_lies_beyond_the_border() -> None:
    found = cover([(box(0.25, -9, 1, 9.5),)], [], (2, 2), (1, 1))
    assert found == pytest.approx(np.array([[0.375, 0.125], [0, 0]]))
    assert cover([(box(-9, -9, 99, 99),)], [], (3, 2), (1, 1)).min() == 1


def test_both_lobes_of_a_bow_tie_count() -> None:
    found = cover([(ring((0, 0), (8, 8), (8, 0), (0, 8)),)], [], (8, 8), (1, 1))
    assert found.sum() == pytest.approx(32, rel=0.02)
    assert found[4, 0] == found[4, 7] == 1 and found[0, 4] == 0


def test_twenty_thousand_cells_take_a_moment() -> None:
    angle = np.linspace(0, 2 * np.pi, 21)
    centres = np.random.default_rng(0).uniform(0, 90_000, (20_000, 1, 2))
    cells = [(cell,) for cell in centres + 30 * np.stack([np.cos(angle), np.sin(angle)], 1)]
    started = time.process_time()
    found = cover(cells, [], (1400, 1400), (1 / 64, 1 / 64))
    assert time.process_time() - started < 3
    one = 0.5 * 20 * 30**2 * np.sin(2 * np.pi / 20)
    # Overlapping cells count once.
    assert found.sum() * 64**2 / 90_000**2 == pytest.approx(1 - np.exp(-one * 20_000 / 90_000**2), rel=0.02)


def test_edges_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    comb = ring(*((x, y) for x in range(100) for y in (0.0, 100.0)))
    assert cover([(comb,)], [], (100, 100), (1, 1)).any()
    monkeypatch.setattr(polygons, "_MOST_CROSSINGS", 25_000)
    assert cover([(comb,)], [], (100, 100), (1, 1)).any()  # with fewer lines
    monkeypatch.setattr(polygons, "_MOST_CROSSINGS", 5000)
    with pytest.raises(AnnotationError, match="cross 20000 lines of pixels, more than 5000"):
        cover([(comb,)], [], (100, 100), (1, 1))


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_outlines_are_valid_and_fill_the_mask_again(mask: NDArray[np.bool_]) -> None:
    found = outlines(mask)
    shapes = [Shape(polygon[0], list(polygon[1:])) for polygon in found]
    assert all(shape.is_valid for shape in shapes)
    assert sum(shape.area for shape in shapes) == mask.sum()
    assert np.array_equal(cover(found, [], mask.shape[::-1], (1, 1)), mask)
