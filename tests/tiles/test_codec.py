from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from zarr.registry import get_codec_class

from slidetl.errors import CacheCorruptError, UsageError
from slidetl.tiles.codec import JpegCodec, decode_jpeg, encode_jpeg, tile_codec
from slidetl.tiles.grid import Codec, TileSpec


def smooth(side: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return np.kron(rng.integers(0, 256, (side // 8, side // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)


def test_pillow_reads_what_we_write_and_we_what_pillow_writes() -> None:
    rgb = smooth(64)
    data = encode_jpeg(rgb, 90)
    seen = Image.open(io.BytesIO(data))
    assert (seen.format, seen.size, seen.mode) == ("JPEG", (64, 64), "RGB")
    assert np.array_equal(np.asarray(seen), decode_jpeg(data))
    for subsampling in (0, 1, 2):
        buffer = io.BytesIO()
        Image.fromarray(rgb).save(buffer, "JPEG", quality=85, subsampling=subsampling)
        again = np.asarray(Image.open(buffer))
        assert np.array_equal(decode_jpeg(buffer.getvalue()), again)


def test_colour_is_kept_at_full_resolution() -> None:
    rgb = np.zeros((32, 32, 3), np.uint8)
    rgb[:, ::2] = (200, 60, 60)
    rgb[:, 1::2] = (60, 110, 200)  # of the same luminance, so that only chroma tells them apart
    assert np.abs(decode_jpeg(encode_jpeg(rgb, 95)).astype(int) - rgb).mean() < 4


@given(st.integers(0, 100), st.integers(1, 100))
def test_equal_pixels_give_equal_bytes(seed: int, quality: int) -> None:
    rgb = smooth(16, seed)
    assert encode_jpeg(rgb, quality) == encode_jpeg(np.asfortranarray(rgb), quality)


@pytest.mark.parametrize("codec", ["jpeg", "zstd"])
def test_tile_codecs_round_trip_and_refuse_rubbish(codec: Codec) -> None:
    rgb = smooth(64)
    tiles = tile_codec(TileSpec(mpp=1, tile_size_px=64, codec=codec, jpeg_quality=95))
    again = tiles.decode(tiles.encode(rgb))
    assert again.shape == rgb.shape and again.dtype == np.uint8
    assert np.abs(again.astype(int) - rgb).mean() <= (0 if codec == "zstd" else 3)
    batch = np.zeros((3, *rgb.shape), np.uint8)
    np.testing.assert_array_equal(tiles.decode(tiles.encode(rgb), batch[1]), again)
    np.testing.assert_array_equal(batch[1], again)
    assert not batch[[0, 2]].any()
    with pytest.raises(CacheCorruptError, match="decoder says"):
        tiles.decode(b"rubbish")


def test_zarr_finds_the_codec_by_its_name_and_it_round_trips() -> None:
    assert get_codec_class("slidetl.jpeg") is JpegCodec
    assert JpegCodec.from_dict(JpegCodec(75).to_dict()) == JpegCodec(75)
    with pytest.raises(UsageError, match="1 to 100, not 0"):
        JpegCodec(0)


def test_the_codec_holds_tiles_only() -> None:
    import zarr

    for shape, dtype in [((4, 8, 8, 3), "uint16"), ((4, 8, 8, 1), "uint8"), ((8, 8, 3), "uint8")]:
        with pytest.raises(UsageError, match="holds arrays"):
            zarr.create_array({}, shape=shape, dtype=dtype, chunks=(1, *shape[1:]), serializer=JpegCodec())
