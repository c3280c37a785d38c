from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidetl.errors import UsageError
from slidetl.tiles.grid import TileGrid, TileSpec

spacings = st.floats(0.1, 4.0)


@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.tuples(spacings, spacings),
    st.floats(1.0, 20.0),
    st.integers(1, 300),
    st.integers(0, 400),
)
def test_the_grid_holds_exactly_the_whole_tiles(
    size: tuple[int, int], mpp_level0: tuple[float, float], scale: float, tile_px: int, stride_px: int
) -> None:
    mpp = scale * max(mpp_level0)
    spec = TileSpec(mpp=mpp, tile_size_px=tile_px, stride_px=stride_px)
    grid = TileGrid.over(size, mpp_level0, (mpp, mpp), spec)
    origins = grid.origins_level0()
    assert origins.shape == (len(grid), 2)
    for axis, count in enumerate((grid.columns, grid.rows)):
        extent, stride = tile_px * mpp / mpp_level0[axis], spec.stride_px * mpp / mpp_level0[axis]
        fits = [n for n in range(count + 2) if n * stride + extent <= size[axis] + 1e-6]
        assert count == len(fits)
        other = (grid.rows, grid.columns)[axis]
        places = np.round(np.arange(count if other else 0) * stride)
        assert np.array_equal(np.unique(origins[:, axis]), np.unique(places))


@given(
    st.tuples(st.integers(1, 600), st.integers(1, 600)),
    st.tuples(spacings, spacings),
    st.floats(1.0, 20.0),
    st.integers(1, 300),
    st.floats(0.1, 1.0),
)
def test_padding_covers_the_whole_slide_with_no_tile_to_spare(
    size: tuple[int, int], mpp_level0: tuple[float, float], scale: float, tile_px: int, overlap: float
) -> None:
    mpp = scale * max(mpp_level0)
    stride_px = max(1, int(tile_px * overlap))
    dropped = TileSpec(mpp=mpp, tile_size_px=tile_px, stride_px=stride_px)
    padded = dataclasses.replace(dropped, edge="pad")
    whole = TileGrid.over(size, mpp_level0, (mpp, mpp), dropped)
    grid = TileGrid.over(size, mpp_level0, (mpp, mpp), padded)
    assert (grid.stride_level0, grid.extent_level0) == (whole.stride_level0, whole.extent_level0)
    origins = grid.origins_level0()
    assert len(np.unique(origins, axis=0)) == len(origins) == len(grid)
    for axis, (count, count_whole) in enumerate([(grid.columns, whole.columns), (grid.rows, whole.rows)]):
        stride, extent = grid.stride_level0[axis], grid.extent_level0[axis]
        assert count >= 1 and count_whole <= count <= count_whole + max(1, -(-tile_px // stride_px))
        last = (count - 1) * stride
        assert last + extent >= size[axis] - 0.5
        assert count == 1 or last - stride + extent < size[axis]
        assert origins[:, axis].min() >= 0 and origins[:, axis].max() < size[axis]


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 900))
def test_padded_tiles_begin_inside_even_with_gaps(size: int, tile_px: int, stride_px: int) -> None:
    spec = TileSpec(mpp=1, tile_size_px=tile_px, stride_px=stride_px, edge="pad")
    grid = TileGrid.over((size, size), (1, 1), (1, 1), spec)
    starts = [x for x in range(0, size, stride_px) if x == 0 or x - stride_px + tile_px < size]
    assert np.unique(grid.origins_level0()[:, 0]).tolist() == starts


def test_tiles_lie_by_physical_spacing_whatever_the_pixels() -> None:
    spec = TileSpec(mpp=0.5, tile_size_px=224)
    fine = TileGrid.over((8960, 8960), (0.25, 0.25), (0.5, 0.5), spec)
    coarse = TileGrid.over((4480, 4480), (0.5, 0.5), (0.5, 0.5), spec)
    assert fine.extent_level0 == pytest.approx((448, 448))  # 112 um
    assert np.array_equal(fine.origins_level0() * 0.25, coarse.origins_level0() * 0.5)
    assert len(fine) == len(coarse) == 400


def test_origins_run_row_by_row() -> None:
    grid = TileGrid.over((30, 20), (1, 1), (1, 1), TileSpec(mpp=1, tile_size_px=10))
    assert grid.origins_level0().tolist() == [[0, 0], [10, 0], [20, 0], [0, 10], [10, 10], [20, 10]]


def test_stride_overlaps_or_leaves_gaps() -> None:
    assert len(TileGrid.over((30, 10), (1, 1), (1, 1), TileSpec(mpp=1, tile_size_px=10, stride_px=5))) == 5
    assert len(TileGrid.over((30, 10), (1, 1), (1, 1), TileSpec(mpp=1, tile_size_px=10, stride_px=20))) == 2


def test_a_slide_smaller_than_a_tile_has_none() -> None:
    grid = TileGrid.over((100, 9), (1, 1), (1, 1), TileSpec(mpp=1, tile_size_px=10))
    assert len(grid) == 0
    assert grid.origins_level0().shape == (0, 2)


def test_specification_round_trips_and_fills_in_the_stride() -> None:
    spec = TileSpec(
        mpp=0.5, tile_size_px=224, min_tissue=0.5, codec="zstd", edge="pad", icc=True, max_air=0.5
    )
    assert spec.stride_px == 224
    assert TileSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(UsageError, match="not a tile specification"):
        TileSpec.from_dict({"mpp": 0.5, "colour": "blue"})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("mpp", 0, "mpp must be a positive"),
        ("mpp", float("nan"), "mpp must be a positive"),
        ("tile_size_px", -1, "tile size"),
        ("stride_px", -1, "stride"),
        ("min_tissue", 1.1, "share from 0 to 1"),
        ("mpp_tolerance", 0.5, "tolerance"),
        ("codec", "png", "'jpeg' or 'zstd', not 'png'"),
        ("jpeg_quality", 0, "quality"),
        ("edge", "mirror", "'drop' or 'pad', not 'mirror'"),
        ("min_focus", -0.1, "least focus"),
        ("min_focus", float("nan"), "least focus"),
        ("max_pen", 1.5, "share of pen must be from 0 to 1"),
        ("max_fold", -0.5, "share of fold"),
        ("max_air", float("nan"), "share of air"),
    ],
)
def test_senseless_values_are_refused_by_name(name: str, value: float | str, says: str) -> None:
    values: dict[str, float | str] = {"mpp": 0.5, "tile_size_px": 224, name: value}
    with pytest.raises(UsageError, match=says):
        TileSpec.from_dict(values)


@pytest.mark.parametrize(
    ("size", "mpp_level0", "mpp", "tile_px", "count"),
    [
        (10, 1.0, 1.0, 10, 1),
        (30, 1.0, 1.0, 10, 3),
        (29, 1.0, 1.0, 10, 2),
        (245, 0.2527, 1.2635, 7, 7),  # the division gives 5.999999999999999 strides beside the first tile
        (50, 0.2527, 1.2635, 10, 1),  # the tile is 50.00000000000001 pixels wide
    ],
)
def test_the_last_tile_may_end_exactly_on_the_border(
    size: int, mpp_level0: float, mpp: float, tile_px: int, count: int
) -> None:
    spec = TileSpec(mpp=mpp, tile_size_px=tile_px)
    grid = TileGrid.over((size, size), (mpp_level0, mpp_level0), (mpp, mpp), spec)
    assert (grid.columns, grid.rows) == (count, count)
