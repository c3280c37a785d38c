from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from slidetl.errors import CacheCorruptError
from slidetl.slides.tiff import JpegTiles, is_damaged_jpeg, read_jpeg_level
from slidetl.tiles.codec import decode_jpeg
from tests.conftest import Picture
from tests.slides.jpeg_tiff import encode, write_jpeg_tiff


def texture(height: int, width: int, seed: int = 0) -> Picture:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 226, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
    return np.repeat(np.repeat(coarse, 4, axis=0), 4, axis=1)[:height, :width]


def assert_as_openslide(path: Path, expect_levels: int) -> None:
    """Every tile that lies whole on its level, decoded by itself, is what OpenSlide shows there."""
    with openslide.OpenSlide(path) as slide, path.open("rb", buffering=0) as file:
        assert slide.level_count == expect_levels
        for number, size in enumerate(slide.level_dimensions):
            of = f"openslide.level[{number}].tile-"
            tile_px = (int(slide.properties[f"{of}width"]), int(slide.properties[f"{of}height"]))
            level = read_jpeg_level(file, size, tile_px)
            assert level is not None
            rows, columns = np.mgrid[: size[1] // tile_px[1], : size[0] // tile_px[0]]
            jpegs = JpegTiles(file, level).read(rows.ravel(), columns.ravel())
            assert jpegs
            for row, column, jpeg in zip(rows.ravel(), columns.ravel(), jpegs, strict=True):
                assert jpeg is not None
                scale = round(slide.level_downsamples[number])
                corner = (int(column) * tile_px[0] * scale, int(row) * tile_px[1] * scale)
                wanted = np.asarray(slide.read_region(corner, number, tile_px).convert("RGB"))
                assert np.array_equal(decode_jpeg(jpeg.data), wanted)
                # Nor need a reader know anything of TIFF.
                assert np.array_equal(np.asarray(Image.open(io.BytesIO(jpeg.data))), wanted)


@pytest.mark.parametrize("subsampling", ["rgb", "444", "422", "420"])
@pytest.mark.parametrize("shared_tables", [False, True])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_tiles_stand_alone_as_openslide_shows_them(
    tmp_path: Path, subsampling: str, shared_tables: bool, bigtiff: bool
) -> None:
    path = write_jpeg_tiff(
        tmp_path / "slide.tiff",
        texture(320, 384),
        subsampling=subsampling,
        is_rgb=subsampling == "rgb",
        shared_tables=shared_tables,
        bigtiff=bigtiff,
        byteorder=">" if shared_tables and bigtiff else "<",  # OpenSlide refuses the classic one
        factors=(2,),
    )
    assert_as_openslide(path, 2)


def test_a_real_slide(test_data: Path) -> None:
    assert_as_openslide(test_data / "slides" / "CMU-1-Small-Region.svs", 1)


def test_what_is_not_plain_is_left_to_openslide(tmp_path: Path) -> None:
    import tifffile

    picture = texture(128, 128)

    def level_of(path: Path, size: tuple[int, int] = (128, 128)) -> object:
        with path.open("rb", buffering=0) as file:
            return read_jpeg_level(file, size, (64, 64))

    plain = write_jpeg_tiff(tmp_path / "plain.tiff", picture)
    assert level_of(plain) is not None
    assert level_of(plain, (128, 127)) is None
    other = tmp_path / "other.tiff"
    for options in (
        {"compression": "deflate", "photometric": "rgb", "tile": (64, 64)},
        {"compression": "jpeg", "photometric": "minisblack", "tile": (64, 64)},
        {"compression": "jpeg", "photometric": "rgb", "rowsperstrip": 64},
    ):
        image = picture[..., 0] if options["photometric"] == "minisblack" else picture
        tifffile.imwrite(other, image, **options)
        assert level_of(other) is None
    with tifffile.TiffWriter(other) as file:  # which of the two would OpenSlide show?
        for _ in range(2):
            file.write(picture, tile=(64, 64), photometric="rgb", compression="jpeg")
    assert level_of(other) is None
    other.write_bytes(b"II*\0")
    assert level_of(other) is None


def test_single_tiles_that_are_not_plain_are_left_to_openslide(tmp_path: Path) -> None:
    import tifffile

    tile = texture(64, 64)
    plain = encode(tile, 64, "420", False, 90)
    progressive = io.BytesIO()
    Image.fromarray(tile).save(progressive, "JPEG", progressive=True)
    odd = [
        b"",  # a tile that is not there
        progressive.getvalue(),
        encode(tile[:32, :32], 32, "420", False, 90),
        encode(tile, 64, "411", False, 90),
        plain[:-2],
        plain.replace(b"\xff\xc4", b"\xff\xc9", 1),
        bytes(500),
    ]
    path = tmp_path / "slide.tiff"
    with tifffile.TiffWriter(path) as file:
        file.write(
            iter([plain, *odd]),
            shape=(64, 64 * (len(odd) + 1), 3),
            dtype=np.uint8,
            tile=(64, 64),
            photometric="ycbcr",
            compression="jpeg",
            subsampling=(2, 2),
        )
    with path.open("rb", buffering=0) as opened:
        level = read_jpeg_level(opened, (64 * (len(odd) + 1), 64), (64, 64))
        assert level is not None
        columns = np.arange(len(odd) + 1)
        jpegs = JpegTiles(opened, level).read(np.zeros_like(columns), columns)
    assert [jpeg is None for jpeg in jpegs] == [False] + [True] * len(odd)


def test_zeros_in_a_jpeg_are_a_hole_unless_they_encode_blank_blocks() -> None:
    sound = encode(texture(64, 64), 64, "420", False, 90)
    middle = (sound.index(b"\xff\xda") + len(sound)) // 2
    assert not is_damaged_jpeg(sound)
    for size in (40, 200):
        assert is_damaged_jpeg(sound[:middle] + bytes(size) + sound[middle + size :])
    blank = io.BytesIO()
    Image.new("RGB", (256, 256), (240, 240, 240)).save(blank, "JPEG", optimize=True)
    assert bytes(32) in blank.getvalue()
    assert not is_damaged_jpeg(blank.getvalue())
    assert not is_damaged_jpeg(sound + bytes(64))  # what follows it is no part of it


@given(data=st.data())
def test_no_structure_makes_it_fail_or_read_beyond_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    base = tmp_path_factory.getbasetemp() / "base.tiff"
    if not base.exists():
        write_jpeg_tiff(base, texture(128, 192), shared_tables=True, bigtiff=True, factors=(2,))
    content = bytearray(base.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = base.with_name("mutant.tiff")
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with path.open("rb", buffering=0) as file:
        level = read_jpeg_level(file, (192, 128), (64, 64))
        if level is None:
            return
        assert level.offsets.shape == (2, 3)
        assert (level.offsets + level.byte_counts <= path.stat().st_size).all()
        rows, columns = np.mgrid[:2, :3]
        for jpeg in JpegTiles(file, level).read(rows.ravel(), columns.ravel()):
            if jpeg is not None:
                with contextlib.suppress(
                    CacheCorruptError
                ):  # what is compressed is damaged: the decoder says so
                    assert decode_jpeg(jpeg.data).shape == (64, 64, 3)
