from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slidetl.errors import CacheCorruptError, SlideReadError
from slidetl.slides import open_slide
from slidetl.tiles.codec import tile_codec
from slidetl.tiles.cut import encode_tile, encode_tiles, stream_tiles
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.plan import plan_tiles
from slidetl.tiles.store import SlideCache, cache_path
from slidetl.tiles.tile import SlideSource, tile_slide
from tests.conftest import PyramidTiff
from tests.slides.jpeg_tiff import write_jpeg_tiff
from tests.slides.test_openslide import noise
from tests.tiles.conftest import SPEC, Draw, damaged


def test_what_is_streamed_is_what_is_cached(source: SlideSource, tmp_path: Path) -> None:
    spec = TileSpec(mpp=1.3, tile_size_px=48, jpeg_quality=70)
    tile_slide(source, tmp_path, spec)
    cache = SlideCache.open(cache_path(tmp_path, "S1"))
    with open_slide(source.path) as slide:
        batches = list(stream_tiles(slide, plan_tiles(slide, spec), batch_size=20))
    assert max(len(batch.pixels) for batch in batches) == 20
    assert np.array_equal(np.concatenate([b.pixels for b in batches]), cache.read(range(len(cache))))
    assert np.array_equal(np.concatenate([b.origins_level0 for b in batches]), cache.origins_level0)
    assert np.array_equal(np.concatenate([b.tissue_fraction for b in batches]), cache.tissue_fraction)


def test_too_many_unreadable_tiles_end_the_reading_early(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    path = pyramid_tiff(tissue_picture(1024), mpp=1.0, jpeg=True, tile_px=64)
    with open_slide(path) as slide:
        plan = plan_tiles(slide, SPEC)
    with open_slide(damaged(path, slice(5, None, 2))) as slide:
        seen: list[bytes | None] = []
        with pytest.raises(SlideReadError, match=f"more than 10% of the {len(plan)} tiles"):
            seen.extend(payload for _, payload in encode_tiles(slide, plan))
        assert len(seen) < len(plan) / 2


def test_a_jpeg_that_the_decoder_refuses_is_made_up_by_no_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(60, 200, (320, 320, 3)).astype(np.uint8)
    path = write_jpeg_tiff(tmp_path / "slide.tiff", picture, mpp=1.0)
    data = bytearray(path.read_bytes())
    starts = [n for n in range(len(data) - 2) if data[n : n + 3] == b"\xff\xd8\xff"]
    ends = [data.index(b"\xff\xd9", start) for start in starts]
    data[ends[3] - 900 : ends[3] - 880] = bytes(20)  # OpenSlide shows it all
    data[ends[10] - 100 : ends[10] - 98] = b"\xff\xd3"  # it ends too early even for OpenSlide
    path.write_bytes(data)
    spec = TileSpec(mpp=1.0, tile_size_px=64, min_tissue=0)
    decode = tile_codec(spec).decode
    with open_slide(path) as slide:
        plan = plan_tiles(slide, spec)
        copied = dict(encode_tiles(slide, plan))
        for tile in (3, 10):
            with pytest.raises(CacheCorruptError):
                decode(copied[tile] or b"")
            with pytest.raises(SlideReadError, match="cannot be read"):
                encode_tile(slide, plan, tile)
        (batch,) = stream_tiles(slide, plan)
    kept = [tile for tile in range(25) if tile not in (3, 10)]
    assert np.array_equal(batch.origins_level0, plan.origins_level0[kept])
    assert np.array_equal(batch.pixels[2], decode(copied[2] or b""))


def test_damage_within_jpegs_is_bounded_as_any_other(tmp_path: Path) -> None:
    path = write_jpeg_tiff(tmp_path / "slide.tiff", noise(256, 256), mpp=1.0)
    with open_slide(path) as slide:
        plan = plan_tiles(slide, TileSpec(mpp=1.0, tile_size_px=64, min_tissue=0))
    data = bytearray(path.read_bytes())
    starts = [n for n in range(len(data) - 2) if data[n : n + 3] == b"\xff\xd8\xff"]
    for start in starts[4:6]:
        end = data.index(b"\xff\xd9", start)
        data[end - 100 : end - 98] = b"\xff\xd3"
    path.write_bytes(data)
    with open_slide(path) as slide, pytest.raises(SlideReadError, match="more than 10% of the 16 tiles"):
        list(stream_tiles(slide, plan))
