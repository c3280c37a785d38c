from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from slidetl.errors import SlideOpenError, SlideReadError, SpacingError
from slidetl.slides import open_slide
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


def test_what_is_not_grey_or_rgb_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "deep.tif", noise(20, 20).astype(np.uint32), photometric="rgb")
    tifffile.imwrite(tmp_path / "real.tif", noise(64, 64) / 255, photometric="rgb", tile=(32, 32))
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((5, 20, 20), np.uint8), photometric="minisblack")
    Image.new("CMYK", (20, 20)).save(tmp_path / "ink.jpg")
    np.savez(
        tmp_path / "a.npz", train_images=np.zeros((2, 8, 8, 3), np.float32), train_labels=np.zeros(2, int)
    )
    np.savez(tmp_path / "b.npz", train_images=np.zeros((2, 8, 8, 7), np.uint8), train_labels=np.zeros(2, int))
    for name, says in {
        "deep.tif": "expected grey or RGB of 8 to 16 bits, found 3 samples of uint32",
        "real.tif": "expected grey or RGB of 8 to 16 bits, found 3 samples of float64",
        "stack.tif": "found 5 channels .*choose one, or three .* with --channels",
        "ink.jpg": "found JPEG CMYK",
        "a.npz#train/0": "uint8, not",
        "b.npz#train/0": "expected a grey or RGB image",
    }.items():
        with pytest.raises(SlideOpenError, match=says):
            RasterSlide(tmp_path / name, 1.0)


@pytest.mark.parametrize("kind", ["EPS", "GIF", "TIFF"])
def test_other_formats_named_like_images_are_not_opened(tmp_path: Path, kind: str) -> None:
    """Pillow would hand PostScript over to Ghostscript."""
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.png", format=kind)
    with pytest.raises(
        SlideOpenError, match=r"a\.png: .*: expected a PNG, JPEG or BMP, found another format"
    ):
        RasterSlide(tmp_path / "a.png", 1.0)


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


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("pieces", [{"tile": (64, 64)}, {"rowsperstrip": 48}])
def test_jpegs_are_decoded_as_tifffile_decodes_them(
    tmp_path: Path, subsampling: tuple[int, int], pieces: dict[str, Any]
) -> None:
    path = tmp_path / "a.ome.tif"
    kind: dict[str, Any] = {"photometric": "ycbcr", "compression": "jpeg", "subsampling": subsampling}
    tifffile.imwrite(path, noise(150, 170), metadata={"axes": "YXS"}, **pieces, **kind)
    with RasterSlide(path, 0.5) as slide:
        assert np.array_equal(slide.read((0, 0), (170, 150), 0.5), tifffile.imread(path))


@pytest.mark.parametrize("form", ["tiles", "strips", "grey", "jpeg", "jpeg2000"])
def test_damage_that_decoders_show_is_refused(tmp_path: Path, form: str) -> None:
    picture = np.kron(noise(52, 52), np.ones((5, 5, 1), np.uint8))[:256, :256]
    stored = picture[..., 0] if form == "grey" else picture
    path = tmp_path / ("a.jpg" if form == "jpeg" else "a.ome.tif")
    if form == "jpeg":
        Image.fromarray(picture).save(path, quality=90)
        places = [(0, path.stat().st_size)]
    else:
        pieces = {"rowsperstrip": 64} if form == "strips" else {"tile": (64, 64)}
        kind: dict[str, Any] = {"photometric": "rgb", "compression": "jpeg2000"}
        if form != "jpeg2000":
            kind = {"photometric": "minisblack" if form == "grey" else "ycbcr", "compression": "jpeg"}
        about = {"axes": "YX" if form == "grey" else "YXS"}
        tifffile.imwrite(path, stored, metadata=about, **pieces, **kind)
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    with open_slide(path, 0.5) as slide:
        assert slide.read((0, 0), (256, 256), 0.5).shape == (256, 256, 3)
    at, count = places[0]
    data = bytearray(path.read_bytes())
    data[at + count // 2 : at + count // 2 + 300] = bytes(300)
    if form == "jpeg2000":
        data[at + count // 2 : at + count] = bytes(count - count // 2)
    path.write_bytes(data)
    expected = pytest.raises((SlideOpenError, SlideReadError), match=r"damaged|not decode completely")
    with expected, open_slide(path, 0.5) as slide:
        slide.read((0, 0), (256, 256), 0.5)


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


def write_deep(path: Path, samples: NDArray[Any], **options: Any) -> None:
    if path.suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(samples))
    else:
        tifffile.imwrite(path, samples, photometric="rgb", metadata=None, **options)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_bits_of_a_camera_are_scaled_to_8(tmp_path: Path, suffix: str, bits: int) -> None:
    picture = np.maximum(noise(96, 80), 3)
    picture[:40] = 244  # glass
    deep = (picture.astype(np.uint16) << (bits - 8)) | (picture >> (16 - bits)) if bits > 8 else picture
    deep = deep.astype(np.uint16)
    deep[50, 50] = 65535  # a hot pixel
    path = tmp_path / f"a.{suffix}"
    write_deep(path, deep, compression="zlib", tile=(32, 32)) if suffix == "tif" else write_deep(path, deep)
    with open_slide(path, 0.5) as slide:
        assert slide.info.notes == (f"samples of 16 bits hold {bits}, and are scaled to 8",)
        read = slide.read((0, 0), (80, 96), 0.5).astype(int)
    read[50, 50] = picture[50, 50]
    assert np.abs(read - picture).max() <= 1


def test_dim_samples_are_scaled_by_the_highest(tmp_path: Path) -> None:
    picture = noise(64, 64).astype(np.uint16) * 100
    write_deep(tmp_path / "a.tif", picture)
    with open_slide(tmp_path / "a.tif", 0.5) as slide:
        assert slide.info.notes == ("samples of 16 bits go up to 25500, and are scaled to 8 bits",)
        assert np.abs(slide.read((0, 0), (64, 64), 0.5).astype(int) - noise(64, 64)).max() <= 1


def test_alpha_of_16_bits_has_a_scale_of_its_own(tmp_path: Path) -> None:
    picture = noise(64, 64)
    alpha = np.full((64, 64, 1), 65535, np.uint16)
    alpha[:, 32:] = 0
    rgba = np.concatenate([picture.astype(np.uint16) << 4, alpha], 2)
    write_deep(tmp_path / "a.tif", rgba, extrasamples=["unassalpha"], tile=(32, 32))
    with open_slide(tmp_path / "a.tif", 0.5) as slide:
        read = slide.read((0, 0), (64, 64), 0.5)
    assert np.abs(read[:, :32].astype(int) - picture[:, :32]).max() <= 1 and (read[:, 32:] == 255).all()


@pytest.mark.parametrize("compression", ["webp", "jpeg2000", "lzma", "png", "zstd", "lzw"])
def test_tiles_that_openslide_cannot_decompress_are_read(tmp_path: Path, compression: str) -> None:
    picture = noise(96, 80)
    lossless: dict[str, Any] = {"lossless": True} if compression == "webp" else {}
    options: dict[str, Any] = {"compression": compression, "compressionargs": lossless, "tile": (32, 32)}
    flat(tmp_path / "a.tif", picture, resolution=(20000, 20000), resolutionunit="CENTIMETER", **options)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.info.mpp_level0 == (0.5, 0.5)
        assert np.array_equal(slide.read((0, 0), (80, 96), 0.5), picture)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "tiled.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    picture = np.kron(noise(5, 7), np.ones((16, 16, 1), np.uint8))
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[0x0112] = orientation
    if suffix.endswith("tif"):
        resolution: dict[str, Any] = {"resolution": (20000, 10000), "resolutionunit": "CENTIMETER"}
        tile = (32, 32) if suffix == "tiled.tif" else None
        flat(path, picture, tile=tile, extratags=[(274, 3, 1, orientation, True)], **resolution)
    else:
        image.save(path, exif=exif, quality=100, subsampling=0)
    image.info["exif"] = exif.tobytes()
    shown = np.asarray(ImageOps.exif_transpose(image))
    with open_slide(path, None if suffix.endswith("tif") else 0.5) as slide:
        size = (shown.shape[1], shown.shape[0])
        assert slide.info.size_level0 == size
        turned = f"turned as its orientation {orientation} says"
        assert (turned in slide.info.notes) == (orientation != 1)
        if suffix.endswith("tif"):
            mpp = slide.info.mpp_level0
            assert mpp == ((0.5, 1.0) if orientation < 5 else (1.0, 0.5))
            step = [round(1 / m) for m in mpp]
            read = slide.read((0, 0), (size[0] // step[0], size[1] // step[1]), 1.0)
            assert np.array_equal(read, shown[:: step[1], :: step[0]])
        else:
            assert np.abs(slide.read((0, 0), size, 0.5).astype(int) - shown).max() <= 4
            assert np.abs(slide.read((9, 5), (30, 40), 0.5).astype(int) - shown[5:45, 9:39]).max() <= 4


def test_missing_pieces_are_bright_whatever_is_white(tmp_path: Path) -> None:
    for photometric in ("minisblack", "miniswhite"):
        path = tmp_path / f"{photometric}.tif"
        tifffile.imwrite(
            path, noise(64, 64)[..., 0], photometric=photometric, tile=(32, 32), compression="lzma"
        )
        with tifffile.TiffFile(path, mode="r+") as file:
            file.pages.first.tags["TileByteCounts"].overwrite([0, *file.pages.first.databytecounts[1:]])
        with RasterSlide(path, 0.5) as slide:
            assert (slide.read((0, 0), (32, 32), 0.5) == 255).all()
            assert (slide.read((32, 0), (32, 32), 0.5) != 255).any()
            missing = slide.missing((16, 16), 2.0)
            assert missing is not None and missing[:8, :8].all() and missing.mean() == 0.25


def test_a_truncated_uncompressed_tiff_is_refused(tmp_path: Path) -> None:
    flat(tmp_path / "a.tif", noise(64, 64))
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[: len(data) // 2])
    with pytest.raises(SlideOpenError, match=r"a\.tif: not a slide or image that can be read"):
        open_slide(tmp_path / "a.tif", 0.5)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", ["tiles", "strips", "deep", "pyramid", "ome"])
def test_a_truncated_tiff_is_refused_and_never_glass(tmp_path: Path, kind: str, kept: float) -> None:
    picture, path = noise(320, 320), tmp_path / "a.tif"
    if kind == "ome":
        pyramid(path, picture)
    elif kind == "pyramid":
        with tifffile.TiffWriter(path) as file:
            for level in range(3):
                part = picture[:: 2**level, :: 2**level]
                options: dict[str, Any] = {"subfiletype": int(level > 0), "metadata": None}
                file.write(part, photometric="rgb", compression="jpeg", tile=(64, 64), **options)
    elif kind == "strips":
        flat(path, picture, compression="lzw", rowsperstrip=8)
    else:
        stored: NDArray[Any] = picture.astype(np.uint16) * 257 if kind == "deep" else picture
        write_deep(path, stored, compression="deflate", tile=(64, 64))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(SlideOpenError, match=r"a\.tif: it ends early.*; copy it again"):
        RasterSlide(path, 0.5)


def test_a_piece_that_is_read_in_part_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    flat(path, noise(256, 256), compression="deflate", tile=(64, 64))
    with RasterSlide(path, 0.5) as slide:
        path.write_bytes(path.read_bytes()[:20_000])  # as while a share is copied again
        with pytest.raises(SlideReadError, match="the file ends early"):
            slide.read((192, 192), (64, 64), 0.5)


@pytest.mark.parametrize("options", [{"compression": "deflate", "rowsperstrip": 16}, {"tile": (32, 32)}])
def test_a_preview_before_the_slide_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    picture = noise(256, 256)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for part in (picture[::4, ::4], picture):
            file.write(np.ascontiguousarray(part), photometric="rgb", metadata=None, **options)
    with pytest.raises(SlideOpenError, match=r"one of 64 x 64 pixels before one of 256 x 256; write the one"):
        open_slide(tmp_path / "a.tif", 2.0)


@pytest.mark.parametrize("options", [{"compression": "deflate", "rowsperstrip": 16}, {"tile": (32, 32)}])
def test_further_pictures_of_similar_size_are_noted(tmp_path: Path, options: dict[str, Any]) -> None:
    picture = noise(256, 256)
    level_and_label = ((picture[:200, :200], 1), (picture[:64, :64], 0))
    for others, notes in (
        (level_and_label, ()),
        ((*level_and_label, (picture[56:, 6:], 0)), ("of 2 pictures in it the first alone is read",)),
    ):
        with tifffile.TiffWriter(tmp_path / "a.tif") as file:
            for part, kind in ((picture, 0), *others):
                shared: dict[str, Any] = {"photometric": "rgb", "metadata": None, "subfiletype": kind}
                file.write(np.ascontiguousarray(part), **shared, **options)
        with open_slide(tmp_path / "a.tif", 2.0) as slide:
            assert slide.info.notes == notes
            assert np.array_equal(slide.read((0, 0), (256, 256), 2.0), picture)


def planes(path: Path, picture: NDArray[Any], names: list[str], **about: Any) -> Path:
    """One directory for each channel, in tiles, as raw2ometiff writes."""
    metadata = {
        "axes": "CYX",
        "PhysicalSizeX": 0.5,
        "PhysicalSizeY": 0.5,
        "Channel": {"Name": names},
        **about,
    }
    tifffile.imwrite(
        path,
        np.ascontiguousarray(np.moveaxis(picture, 2, 0)),
        photometric="minisblack",
        tile=(32, 32),
        compression="zlib",
        ome=True,
        metadata=metadata,
    )
    return path


@pytest.mark.parametrize("is_deep", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_rgb_in_planes_is_rgb(tmp_path: Path, order: tuple[int, ...], is_deep: bool) -> None:
    picture = noise(96, 80)
    stored = picture[..., list(order)]
    deep = {"SignificantBits": 12} if is_deep else {}
    samples = (stored.astype(np.uint16) << 4).astype(np.uint16) if is_deep else stored
    path = planes(tmp_path / "a.ome.tif", samples, [("Red", "Green", "Blue")[n] for n in order], **deep)
    with open_slide(path) as slide:
        assert slide.info.mpp_level0 == (0.5, 0.5) and slide.info.vendor == "ome-tiff"
        read = slide.read((0, 0), (80, 96), 0.5).astype(int)
        assert np.abs(read - picture).max() <= is_deep
        assert slide.info.notes == (("samples of 12 bits are scaled to 8",) if is_deep else ())


def test_channels_are_chosen_or_refused(tmp_path: Path) -> None:
    picture = noise(96, 80)
    path = planes(tmp_path / "a.ome.tif", picture, ["DAPI", "CD3", "CD8"])
    listed = r"found 3 channels \(0 DAPI, 1 CD3, 2 CD8\); choose one, or three .* with --channels"
    with pytest.raises(SlideOpenError, match=listed):
        open_slide(path)
    with pytest.raises(SlideOpenError, match=r"no channel 'CD9'; there are 0 DAPI, 1 CD3, 2 CD8"):
        open_slide(path, channels="CD9")
    for channels, wanted in {
        "1": picture[..., [1, 1, 1]],
        "cd8": picture[..., [2, 2, 2]],
        "CD8, 1,DAPI": picture[..., [2, 1, 0]],
    }.items():
        with open_slide(path, channels=channels) as slide:
            assert np.array_equal(slide.read((0, 0), (80, 96), 0.5), wanted)
    flat(tmp_path / "rgb.tif", picture)
    with open_slide(tmp_path / "rgb.tif", 0.5, channels="CD8") as slide:  # has no channels to choose from
        assert np.array_equal(slide.read((0, 0), (80, 96), 0.5), picture)


def test_planes_without_ome_are_not_one_picture(tmp_path: Path) -> None:
    picture = noise(96, 80)
    stack = np.ascontiguousarray(np.moveaxis(picture, 2, 0))
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", tile=(32, 32), metadata=None)
    with pytest.raises(SlideOpenError, match="3 channels"):
        open_slide(tmp_path / "a.tif", 0.5)
    with open_slide(tmp_path / "a.tif", 0.5, channels="0,1,2") as slide:
        assert np.array_equal(slide.read((0, 0), (80, 96), 0.5), picture)


@pytest.mark.parametrize("resolution", [{}, {"resolution": (72, 72), "resolutionunit": "INCH"}])
def test_ome_decides_before_openslide(tmp_path: Path, resolution: dict[str, Any]) -> None:
    picture = noise(320, 352)
    about = {"axes": "YXS", "PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        shared: dict[str, Any] = {"tile": (64, 48), "photometric": "rgb", "compression": "zlib", **resolution}
        file.write(picture, subifds=2, metadata=about, **shared)
        for factor in (2, 4):
            file.write(block_means(picture, factor), subfiletype=1, **shared)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert slide.info.mpp_levels == (0.5, 1.0, 2.0)
        assert np.array_equal(slide.read((0, 0), (88, 80), 2.0), block_means(picture, 4))


def test_three_planes_have_levels_too(tmp_path: Path) -> None:
    picture = noise(96, 80)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        about = {
            "axes": "CYX",
            "Channel": {"Name": ["R", "G", "B"]},
            "PhysicalSizeX": 0.5,
            "PhysicalSizeY": 0.5,
        }
        shared: dict[str, Any] = {"tile": (32, 32), "photometric": "minisblack", "compression": "zlib"}
        file.write(np.moveaxis(picture, 2, 0), subifds=1, metadata=about, **shared)
        file.write(np.moveaxis(block_means(picture, 2), 2, 0), subfiletype=1, **shared)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert slide.info.mpp_levels == (0.5, 1.0)
        assert np.array_equal(slide.read((0, 0), (40, 48), 1.0), block_means(picture, 2))


@pytest.mark.parametrize("layout", ["contig", "separate"])
def test_channels_may_be_samples_of_one_page(tmp_path: Path, layout: str) -> None:
    picture = noise(96, 80)
    stored = picture if layout == "contig" else np.ascontiguousarray(np.moveaxis(picture, 2, 0))
    shared: dict[str, Any] = {"tile": (32, 32), "metadata": None, "planarconfig": layout}
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", **shared)
    with pytest.raises(SlideOpenError, match="3 channels"):
        open_slide(tmp_path / "a.tif", 0.5)
    with open_slide(tmp_path / "a.tif", 0.5, channels="2,1,0") as slide:
        assert np.array_equal(slide.read((0, 0), (80, 96), 0.5), picture[..., ::-1])


def test_samples_beyond_rgb_that_are_no_alpha_are_left(tmp_path: Path) -> None:
    picture = noise(96, 80)
    for extra in (np.zeros((96, 80, 1), np.uint8), noise(96, 80, 1)[..., :2]):
        more = np.concatenate([picture, extra], 2)
        kinds = ["unspecified"] * extra.shape[2]
        flat(tmp_path / "a.tif", more, tile=(32, 32), extrasamples=kinds, metadata=None)
        with open_slide(tmp_path / "a.tif", 0.5) as slide:
            assert np.array_equal(slide.read((0, 0), (80, 96), 0.5), picture)


@pytest.mark.parametrize("compression", ["webp", "zlib"])
def test_an_svs_that_openslide_does_not_show_is_read_at_its_spacing(tmp_path: Path, compression: str) -> None:
    picture = noise(96, 80)
    text = "Aperio Image Library v1\r\n80x96 [0,0 80x96] (32x32) |AppMag = 20|MPP = 0,4990"
    lossless: dict[str, Any] = {"lossless": True} if compression == "webp" else {}
    samples = picture if compression == "webp" else (picture.astype(np.uint16) << 4).astype(np.uint16)
    shared: dict[str, Any] = {"compression": compression, "compressionargs": lossless, "tile": (32, 32)}
    tifffile.imwrite(
        tmp_path / "a.svs", samples, photometric="rgb", description=text, metadata=None, **shared
    )
    with open_slide(tmp_path / "a.svs") as slide:
        assert slide.info.mpp_level0 == (0.499, 0.499) and slide.info.objective_power == 20
        assert np.abs(slide.read((0, 0), (80, 96), 0.499).astype(int) - picture).max() <= 1


def test_no_room_is_made_for_samples_that_are_not_there(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", noise(64, 64)[..., 0].astype(np.uint16), tile=(32, 32), metadata=None
    )
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages.first.tags["SamplesPerPixel"].overwrite(65000)
    with pytest.raises(SlideOpenError, match=r"a\.tif: "):
        open_slide(tmp_path / "a.tif", 0.5, channels="0")
