"""The fast paths beside the plain one: the same tiles, whatever is shared, reduced or copied."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from slidetl.errors import SlideReadError
from slidetl.slides import decoding
from slidetl.slides import openslide as reader
from slidetl.slides.decoding import JpegCutter, Placement, map_in_order, reduction_for
from slidetl.slides.openslide import OpenSlideSlide
from slidetl.slides.tiff import Jpeg
from slidetl.tiles.grid import Edge, TileGrid, TileSpec
from tests.conftest import Picture, PyramidTiff
from tests.slides.jpeg_tiff import encode, write_jpeg_tiff
from tests.slides.test_openslide import noise


def origins(size: int, stride: float, extent: float) -> NDArray[np.int32]:
    at = np.round(np.arange(int((size - extent) // stride) + 1) * stride)
    y, x = np.meshgrid(at, at, indexing="ij")
    return np.stack([x, y], -1).reshape(-1, 2).astype(np.int32)


def mapped(
    slide: OpenSlideSlide, at: NDArray[np.int32], side: int, mpp: float, first: int = 0, threads: int = 1
) -> list[Picture]:
    tiles = list(slide.map_tiles(lambda rgb: rgb, at, side, mpp, first=first, threads=threads))
    found = [tile for tile in tiles if not isinstance(tile, SlideReadError)]
    assert len(found) == len(tiles) == len(at) - first
    return found


def singly(slide: OpenSlideSlide, at: NDArray[np.int32], side: int, mpp: float) -> list[Picture]:
    return [slide.read((x, y), (side, side), mpp) for x, y in at.tolist()]


def refuse_openslide(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("read through OpenSlide, not by the fast path")

    monkeypatch.setattr(reader, "_read_run", refuse)


@pytest.mark.parametrize("subsampling", ["rgb", "444", "422", "420"])
@pytest.mark.parametrize("side", [64, 50])
def test_what_is_not_resampled_is_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subsampling: str, side: int
) -> None:
    path = write_jpeg_tiff(
        tmp_path / "slide.tiff", noise(330, 330), subsampling=subsampling, is_rgb=subsampling == "rgb"
    )
    refuse_openslide(monkeypatch)
    with OpenSlideSlide(path) as slide:
        at = origins(330, side, side)
        for found, wanted in zip(mapped(slide, at, side, 0.5), singly(slide, at, side, 0.5), strict=True):
            assert np.array_equal(found, wanted)


@pytest.mark.parametrize("subsampling", ["rgb", "444", "422", "420"])
@pytest.mark.parametrize(("mpp", "slide_mpp"), [(1.0, 0.5), (2.0, 0.5), (1.0, 0.2527), (0.5, 0.2527)])
def test_what_is_resampled_is_nearly_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subsampling: str, mpp: float, slide_mpp: float
) -> None:
    path = write_jpeg_tiff(
        tmp_path / "slide.tiff",
        noise(640, 640),
        subsampling=subsampling,
        is_rgb=subsampling == "rgb",
        mpp=slide_mpp,
    )
    refuse_openslide(monkeypatch)
    side = 24
    with OpenSlideSlide(path) as slide:
        at = origins(640, side * mpp / slide_mpp, side * mpp / slide_mpp)
        found, wanted = (np.stack(f(slide, at, side, mpp)).astype(float) for f in (mapped, singly))
    errors = np.abs(found - wanted).mean(axis=(1, 2, 3))
    assert errors.mean() <= 1.5
    assert errors.max() <= 3


@pytest.mark.parametrize("mpp", [1.5, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("edge", ["drop", "pad"])
def test_a_real_slide_at_spacings_that_are_no_multiple_of_its_own(
    test_data: Path, mpp: float, edge: Edge
) -> None:
    with OpenSlideSlide(test_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        info = slide.info
        spec = TileSpec(mpp=mpp, tile_size_px=64, edge=edge)
        grid = TileGrid.over(info.size_level0, info.mpp_level0, slide.mpp_read(mpp), spec)
        at = grid.origins_level0()
        found, wanted = (np.stack(f(slide, at, 64, mpp)).astype(float) for f in (mapped, singly))
    errors = np.abs(found - wanted).mean(axis=(1, 2, 3))
    assert errors.mean() <= 1.5
    assert errors.max() <= 3


def test_pixels_that_the_decoder_cannot_reduce_well_are_decoded_in_full(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (256, 256, 3)).astype(np.uint8)
    path = write_jpeg_tiff(tmp_path / "slide.tiff", picture, quality=98)
    with OpenSlideSlide(path) as slide:
        at = origins(256, 64, 64)
        for found, wanted in zip(mapped(slide, at, 32, 1.0), singly(slide, at, 32, 1.0), strict=True):
            assert np.array_equal(found, wanted)


@pytest.mark.parametrize("subsampling", ["444", "420"])
@pytest.mark.parametrize("mpp", [1.0, 2.0, 1.9])
@pytest.mark.parametrize("axis", [0, 1])
def test_nothing_shifts(tmp_path: Path, subsampling: str, mpp: float, axis: int) -> None:
    # A grating of 24 pixels: a shift by a tenth of a pixel turns its phase by 1.5 degrees.
    wave = 127 + 100 * np.sin(2 * np.pi * (np.arange(512) + 0.5) / 24)
    grating = np.broadcast_to(wave[:, None] if axis == 0 else wave[None, :], (512, 512))
    picture = np.repeat(grating[..., None], 3, axis=2).astype(np.uint8)
    path = write_jpeg_tiff(tmp_path / "slide.tiff", picture, subsampling=subsampling, quality=98)
    side, step = 60, mpp / 0.5
    with OpenSlideSlide(path) as slide:
        (tile,) = mapped(slide, np.array([[64, 64]], np.int32), side, mpp)
    along = tile.astype(float).mean(axis=(1 - axis, 2))
    centre = 64 + (np.arange(side) + 0.5) * step
    whole = int(24 * (side * step // 24) / step)
    phase = np.angle(np.sum((along - along.mean())[:whole] * np.exp(-2j * np.pi * centre[:whole] / 24)))
    assert abs(np.degrees(phase) + 90) < 1.0


def test_neither_threads_nor_the_beginning_change_a_tile(tmp_path: Path) -> None:
    path = write_jpeg_tiff(tmp_path / "slide.tiff", noise(640, 640), factors=(4,))
    with OpenSlideSlide(path) as slide:
        at = origins(640, 2 * 37, 2 * 37)
        whole = mapped(slide, at, 37, 1.0)
        for first, threads in ((0, 3), (11, 1), (len(at) - 1, 2), (len(at), 2)):
            again = mapped(slide, at, 37, 1.0, first, threads)
            assert all(np.array_equal(a, b) for a, b in zip(again, whole[first:], strict=True))


def test_a_jpeg_is_decoded_once_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jpeg_tiff(tmp_path / "slide.tiff", noise(640, 640))
    cutters: list[JpegCutter] = []
    decoded: list[object] = []
    real_init, real_decode = JpegCutter.__init__, JpegCutter._decode

    def init(self: JpegCutter, *args: object) -> None:
        real_init(self, *args)  # type: ignore[arg-type]
        if len(args) == 4:
            cutters.append(self)

    def decode(self: JpegCutter, jpeg: object) -> object:
        if cutters:
            decoded.append(jpeg)
        return real_decode(self, jpeg)  # type: ignore[arg-type]

    monkeypatch.setattr(JpegCutter, "__init__", init)
    monkeypatch.setattr(JpegCutter, "_decode", decode)
    with OpenSlideSlide(path) as slide:
        mapped(slide, origins(640, 80, 80), 40, 1.0, threads=2)
    assert len(decoded) == 100
    assert not cutters[0]._kept


@pytest.mark.parametrize("mpp", [0.5, 1.0, 0.7])
@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_read_together_are_as_read_alone(
    pyramid_tiff: PyramidTiff, mpp: float, threads: int
) -> None:
    with OpenSlideSlide(pyramid_tiff(noise(500, 500))) as slide:
        at = origins(500, 40 * mpp / 0.5, 40 * mpp / 0.5)
        at = np.concatenate([at, [[480, 480], [-7, 90]]]).astype(np.int32)  # over the border
        found = mapped(slide, at, 40, mpp, threads=threads)
        assert all(np.array_equal(a, b) for a, b in zip(found, singly(slide, at, 40, mpp), strict=True))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_damage_costs_its_tiles_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, threads: int
) -> None:
    picture = noise(640, 640)
    whole = write_jpeg_tiff(tmp_path / "whole.tiff", picture)
    content = bytearray(whole.read_bytes())
    heads = [n for n in range(len(content) - 2) if content[n : n + 3] == b"\xff\xd8\xff"]
    content[heads[33] : heads[33] + 40] = bytes(40)
    damaged = tmp_path / "damaged.tiff"
    damaged.write_bytes(content)
    if not fast:
        monkeypatch.setattr(reader, "PLAIN_TIFFS", ())
    at = origins(640, 40, 40)
    with OpenSlideSlide(damaged) as slide, OpenSlideSlide(whole) as intact:
        found = list(slide.map_tiles(lambda rgb: rgb, at, 40, 0.5, threads=threads))
        wanted = singly(intact, at, 40, 0.5)
    x, y = 33 % 10 * 64, 33 // 10 * 64
    for (left, top), tile, sound in zip(at.tolist(), found, wanted, strict=True):
        touched = left < x + 64 and left + 40 > x and top < y + 64 and top + 40 > y
        if touched:
            assert isinstance(tile, SlideReadError)
        else:
            assert np.array_equal(np.asarray(tile), sound)


def spoilt(whole: Path, tile: int, hole: bytes) -> Path:
    """Overwrites the middle of a JPEG."""
    content = bytearray(whole.read_bytes())
    with tifffile.TiffFile(whole) as file:
        page = file.pages.first
        middle = page.dataoffsets[tile] + 2 * page.databytecounts[tile] // 3
    content[middle : middle + len(hole)] = hole
    path = whole.with_name("spoilt.tiff")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("hole_bytes", [200, 20])
@pytest.mark.parametrize("shared_tables", [False, True])
def test_a_jpeg_that_openslide_would_make_up_in_part_is_refused_by_every_way(
    tmp_path: Path, hole_bytes: int, shared_tables: bool
) -> None:
    picture = np.random.default_rng(0).integers(60, 200, (320, 320, 3)).astype(np.uint8)
    whole = write_jpeg_tiff(tmp_path / "whole.tiff", picture, shared_tables=shared_tables)
    path = spoilt(whole, 6, bytes(hole_bytes))
    with openslide.OpenSlide(path) as shown, openslide.OpenSlide(whole) as meant:
        places = ((64, 64), 0, (64, 64))
        assert shown.read_region(*places).tobytes() != meant.read_region(*places).tobytes()
    at = origins(320, 64, 64)
    with OpenSlideSlide(path) as slide:
        for side, mpp in ((64, 0.5), (32, 1.0)):
            found = list(slide.map_tiles(lambda rgb: rgb, at, side, mpp))
            assert [n for n, tile in enumerate(found) if isinstance(tile, SlideReadError)] == [6]
        with pytest.raises(SlideReadError, match="a JPEG of the file is damaged there; copy it again"):
            slide.read((60, 60), (8, 8), 0.5)
        # Nothing to be compared with OpenSlide is sound, so all is read through it.
        (tile,) = slide.map_tiles(lambda rgb: rgb, at[6:7], 64, 0.5)
        assert isinstance(tile, SlideReadError)


def test_a_habit_of_an_encoder_is_no_damage(tmp_path: Path) -> None:
    picture = noise(128, 128)
    jpegs = [encode(picture[y : y + 64, x : x + 64], 64, "420", False, 90) for y in (0, 64) for x in (0, 64)]
    path = tmp_path / "slide.tiff"
    tifffile.imwrite(
        path,
        iter(jpeg[:-2] + bytes(16) + jpeg[-2:] for jpeg in jpegs),
        shape=picture.shape,
        dtype=np.uint8,
        tile=(64, 64),
        photometric="ycbcr",
        compression="jpeg",
        subsampling=(2, 2),
        resolution=(2e4, 2e4),
        resolutionunit="CENTIMETER",
        metadata=None,
    )
    with OpenSlideSlide(path) as slide, openslide.OpenSlide(path) as shown:
        wanted = np.asarray(shown.read_region((0, 0), 0, (128, 128)).convert("RGB"))
        assert np.array_equal(slide.read((0, 0), (128, 128), 0.5), wanted)


def test_copies_are_what_is_read_and_only_where_tiles_coincide(tmp_path: Path) -> None:
    from slidetl.tiles.codec import decode_jpeg

    path = write_jpeg_tiff(tmp_path / "slide.tiff", noise(330, 330), factors=(2,))
    with OpenSlideSlide(path) as slide:
        for mpp, size in ((0.5, 330), (1.0, 165)):
            scale = round(mpp / 0.5)
            at = origins(size, 64, 1) * scale
            copies = slide.copy_tiles(at, 64, mpp)
            assert copies is not None
            kinds = []
            for copy, wanted in zip(list(copies), singly(slide, at, 64, mpp), strict=True):
                kinds.append(copy is None)
                if copy is not None:
                    assert np.array_equal(decode_jpeg(copy), wanted)
            whole = (at + 64 * scale <= size * scale).all(axis=1)
            assert kinds == (~whole).tolist()
            later = slide.copy_tiles(at, 64, mpp, first=5)
            assert later is not None
            assert len(list(later)) == len(at) - 5
        at = origins(330, 64, 64)
        assert slide.copy_tiles(at + 1, 64, 0.5) is None
        assert slide.copy_tiles(at, 32, 0.5) is None
        assert slide.copy_tiles(at, 64, 0.6) is None


def test_tiles_that_openslide_shows_otherwise_are_not_taken_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jpeg_tiff(tmp_path / "slide.tiff", noise(320, 320))
    at = origins(320, 64, 64)
    real = reader._Regions.read_level

    def other(*args: object) -> object:
        image, corner = real(*args)  # type: ignore[arg-type]
        return 255 - image, corner

    with OpenSlideSlide(path) as slide:
        assert slide.copy_tiles(at, 64, 0.5) is not None
        monkeypatch.setattr(reader._Regions, "read_level", other)
        assert slide.copy_tiles(at, 64, 0.5) is None
        assert np.array_equal(mapped(slide, at, 64, 0.5)[3], slide.read((192, 0), (64, 64), 0.5))


@given(
    start=st.lists(st.integers(0, 64), min_size=2, max_size=2),
    step=st.floats(1, 40),
    tile_px=st.sampled_from([(256, 256), (240, 240), (252, 100)]),
)
def test_the_decoder_never_reduces_beyond_the_spacing(
    start: list[int], step: float, tile_px: tuple[int, int]
) -> None:
    placement = Placement(np.array([start], np.float64), (step, step), 10)
    reduction = reduction_for(placement, tile_px)
    assert reduction in (1, 2, 4, 8)
    assert reduction <= step
    assert tile_px[0] % reduction == tile_px[1] % reduction == 0


def test_results_come_in_order_and_threads_work_ahead() -> None:
    seen: set[int] = set()

    def work(item: int) -> int:
        seen.add(threading.get_ident())
        return item * item

    for threads in (1, 3):
        assert list(map_in_order(work, range(100), threads)) == [n * n for n in range(100)]
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("step", "start", "tile_px", "reduction"),
    [
        (1.9, 0, 256, 1),
        (2.0, 0, 256, 2),  # every pixel ends with one of the decoder's
        (2.0, 1, 256, 1),  # not so
        (2.5, 0, 256, 1),
        (4.9, 0, 256, 1),  # 2.45 of the decoder's pixels to one of the tile's
        (5.0, 1, 256, 2),
        (9.9, 0, 256, 2),
        (10.0, 0, 256, 4),
        (20.0, 3, 256, 8),
        (20.0, 3, 252, 4),  # 8 does not divide the JPEG
        (20.0, 3, 255, 1),
        (40.0, 0, 256, 8),
    ],
)
def test_the_decoder_reduces_only_where_nothing_blurs(
    step: float, start: int, tile_px: int, reduction: int
) -> None:
    for steps in ((step, step), (step, 2 * step), (2 * step, step)):  # the finer axis decides
        placement = Placement(np.array([[start, start]], np.float64), steps, 10)
        assert reduction_for(placement, (tile_px, tile_px)) == reduction


def test_decoded_jpegs_are_kept_within_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jpeg_tiff(tmp_path / "slide.tiff", noise(640, 640))
    assert decoding._KEPT_BYTES == 96 * 2**20
    at = origins(640, 80, 80)
    with OpenSlideSlide(path) as slide:
        unbounded = mapped(slide, at, 80, 0.5)
    jpeg_bytes = 64 * 64 * 3
    monkeypatch.setattr(decoding, "_KEPT_BYTES", 3 * jpeg_bytes + jpeg_bytes // 2)
    kept: list[int] = []
    real_decode = JpegCutter._decode

    def decode(self: JpegCutter, jpeg: Jpeg) -> Picture | None:
        kept.append(len(self._kept))
        return real_decode(self, jpeg)

    monkeypatch.setattr(JpegCutter, "_decode", decode)
    with OpenSlideSlide(path) as slide:
        bounded = mapped(slide, at, 80, 0.5)
    assert max(kept) == 3
    assert len(kept) > 100  # what did not fit was decoded again
    assert all(np.array_equal(a, b) for a, b in zip(bounded, unbounded, strict=True))
