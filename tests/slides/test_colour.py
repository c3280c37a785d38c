from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from slidetl.errors import SlideOpenError, SlideReadError
from slidetl.slides import open_slide
from slidetl.slides.base import Slide
from slidetl.slides.colour import SrgbSlide, to_srgb
from slidetl.slides.openslide import OpenSlideSlide
from slidetl.slides.raster import RasterSlide
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import USED
from slidetl.tiles.store import SlideCache, cache_path
from slidetl.tiles.tile import SlideSource, tile_slide
from tests.contracts.slide import Picture, SlideContract
from tests.slides.jpeg_tiff import write_jpeg_tiff
from tests.slides.test_openslide import noise
from tests.slides.vendor_files import write_mirax

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


# Of a made-up scanner: primaries and white as XYZ under D50 (they add up to it), and a gamma.
PRIMARIES = np.array([[0.58, 0.20, 0.1842], [0.30, 0.62, 0.08], [0.02, 0.07, 0.7351]])
GAMMA = 1.8


def scanner_profile() -> bytes:
    """A matrix profile by ICC.1:2001-04: header, table of tags, their data."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values: Sequence[float]) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(map(number, values))

    text = b"made up"
    tags = {
        b"desc": b"desc" + struct.pack(">II", 0, len(text) + 1) + text + bytes(1 + 4 + 4 + 2 + 1 + 67),
        b"cprt": b"text" + bytes(4) + text + b"\0",
        b"wtpt": xyz(PRIMARIES.sum(axis=1).tolist()),
        **{f"{c}XYZ".encode(): xyz(PRIMARIES[:, n].tolist()) for n, c in enumerate("rgb")},
        **{f"{c}TRC".encode(): b"curv" + struct.pack(">IIH", 0, 1, round(GAMMA * 256)) for c in "rgb"},
    }
    table, data = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size = 128 + len(table) + len(data)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, b"mntr", b"RGB ", b"XYZ ").ljust(
        36, b"\0"
    )
    header = (header + b"acsp").ljust(68, b"\0") + b"".join(map(number, PRIMARIES.sum(axis=1).tolist()))
    return header.ljust(128, b"\0") + table + data


def picture() -> Picture:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def image(folder: Path, profile: bytes | None) -> RasterSlide:
    Image.fromarray(picture()).save(folder / "a.png", icc_profile=profile)
    return RasterSlide(folder / "a.png", 1.0)


class TestSrgb(SlideContract):
    @pytest.fixture
    def picture(self) -> Picture:
        return noise(320, 360)

    @pytest.fixture
    def slide(self, picture: Picture, tmp_path: Path) -> Iterator[Slide]:
        Image.fromarray(picture).save(tmp_path / "a.png")
        with SrgbSlide(RasterSlide(tmp_path / "a.png", 0.5), SRGB) as slide:
            yield slide


def test_areas_that_were_not_scanned_are_those_of_the_slide_itself(tmp_path: Path) -> None:
    slide = open_slide(write_mirax(tmp_path / "a.mrxs", noise(384, 512), {(2, 2), (5, 1)}))
    own = slide.missing((512, 384), 0.5)
    with SrgbSlide(slide, SRGB) as converted:
        missing = converted.missing((512, 384), 0.5)
    assert own is not None and missing is not None
    assert own.any() and np.array_equal(missing, own)


def test_srgb_itself_is_left_as_it_is() -> None:
    assert np.abs(to_srgb(picture(), SRGB).astype(int) - picture()).max() <= 1


def test_a_scanner_profile_agrees_with_its_own_matrix_and_gamma() -> None:
    # IEC 61966-2-1 under D50, as the ICC gives it; then its curve.
    srgb = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
    light = (picture() / 255) ** GAMMA @ PRIMARIES.T @ np.linalg.inv(srgb).T
    light = light.clip(0, 1)
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    converted = to_srgb(picture(), scanner_profile())
    assert np.abs(converted - expected).mean() < 0.5 and np.abs(converted - expected).max() < 4
    assert np.abs(converted.astype(int) - picture()).mean() > 5


def test_white_stays_white() -> None:
    white = np.full((4, 4, 3), 255, np.uint8)
    assert to_srgb(white, scanner_profile()).min() >= 254


def test_a_managed_slide_is_the_slide_in_other_colours(tmp_path: Path) -> None:
    profile = scanner_profile()
    with image(tmp_path, profile) as plain:
        assert plain.colour_profile == profile
        pixels = plain.read((5, 6), (20, 30), 1.0)
    with SrgbSlide(image(tmp_path, profile), profile) as managed:
        assert managed.info.size_level0 == (60, 40) and managed.mpp_read(1.0) == (1.0, 1.0)
        assert np.array_equal(managed.read((5, 6), (20, 30), 1.0), to_srgb(pixels, profile))
        tiles = managed.map_tiles(np.copy, np.array([[5, 6], [20, 0]], np.int32), 20, 1.0, first=1)
        (tile,) = tiles
        assert not isinstance(tile, SlideReadError)
        assert np.array_equal(tile, to_srgb(picture()[:20, 20:40], profile))
        assert (managed.read((500, 0), (2, 2), 1.0) == managed.info.background_rgb).all()


def test_damaged_and_foreign_profiles_are_refused_with_the_remedy(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (b"not a profile", SRGB[:200], lab):
        with pytest.raises(SlideOpenError, match="without --icc") as caught:
            SrgbSlide(image(tmp_path, None), profile)
        assert "\n" not in str(caught.value)


def test_an_image_without_a_profile_has_none(tmp_path: Path) -> None:
    with image(tmp_path, None) as slide:
        assert slide.colour_profile is None


def test_a_slide_is_tiled_in_the_colours_that_pillow_makes_of_its_profile(tmp_path: Path) -> None:
    import tifffile

    path = tmp_path / "slide.tiff"
    smooth = np.asarray(Image.fromarray(picture()).resize((600, 400), Image.Resampling.BICUBIC))
    tifffile.imwrite(
        path,
        smooth,
        tile=(64, 64),
        photometric="rgb",
        compression="jpeg",
        resolution=(2e4, 2e4),  # 0.5 um, per centimetre
        resolutionunit="CENTIMETER",
        iccprofile=scanner_profile(),
    )
    caches = {}
    for icc in (False, True):
        # Aligned with the file's own tiles, which may then only be copied where colours stay as they are.
        spec = TileSpec(mpp=0.5, tile_size_px=64, codec="zstd", min_tissue=0, icc=icc)
        folder = tmp_path / f"icc-{icc}"
        assert tile_slide(SlideSource("S", path), folder, spec).status == USED
        caches[icc] = SlideCache.open(cache_path(folder, "S"), spec)
        assert caches[icc].header.spec.icc == icc
    plain, managed = (caches[icc].read(range(len(caches[icc]))) for icc in (False, True))
    source = ImageCms.ImageCmsProfile(io.BytesIO(scanner_profile()))
    for before, after in zip(plain, managed, strict=True):
        wanted = ImageCms.profileToProfile(
            Image.fromarray(before),
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
        assert np.array_equal(after, np.asarray(wanted))
    assert np.abs(managed.astype(int) - plain).mean() > 5


def test_tiles_of_a_managed_slide_are_never_copied(tmp_path: Path) -> None:
    path = write_jpeg_tiff(tmp_path / "slide.tiff", np.zeros((128, 128, 3), np.uint8) + np.uint8(90))
    origins = np.array([[0, 0], [64, 0]], np.int32)
    with open_slide(path) as slide:
        assert isinstance(slide, OpenSlideSlide)
        assert slide.copy_tiles(origins, 64, 0.5) is not None
        with SrgbSlide(slide, scanner_profile()) as managed:
            assert managed.copy_tiles(origins, 64, 0.5) is None
