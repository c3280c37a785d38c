from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray

from slidetl.errors import SlideOpenError, SlideReadError, SpacingError
from slidetl.slides import levels, open_slide
from slidetl.slides.base import Slide
from slidetl.slides.levels import is_same_picture
from slidetl.slides.openslide import _corner, composite
from tests.conftest import Picture, PyramidTiff
from tests.contracts.slide import SlideContract
from tests.slides.vendor_files import (
    CZI_JPEG,
    CZI_JPEG_XR,
    CZI_PLAIN,
    CZI_ZSTD,
    FILL,
    write_czi,
    write_mirax,
    write_philips,
)


def noise(height: int, width: int, seed: int = 0) -> Picture:
    """Smooth noise: every place looks different, and neighbours are alike, as in a real image."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3)).astype(float)
    y, x = np.arange(height) / 8, np.arange(width) / 8
    rows = (
        coarse[y.astype(int)] * (1 - y % 1)[:, None, None]
        + coarse[y.astype(int) + 1] * (y % 1)[:, None, None]
    )
    both = rows[:, x.astype(int)] * (1 - x % 1)[:, None] + rows[:, x.astype(int) + 1] * (x % 1)[:, None]
    return np.asarray(both, dtype=np.float64).astype(np.uint8)


def area_means(
    picture: Picture, start: tuple[float, float], step: tuple[float, float]
) -> NDArray[np.float64]:
    """Means over rectangles, by an integral image: another way than the reader's."""
    integral = np.zeros((picture.shape[0] + 1, picture.shape[1] + 1, 3))
    integral[1:, 1:] = picture.astype(float).cumsum(0).cumsum(1)
    x = np.arange(start[0], picture.shape[1] + 1e-9, step[0])
    y = np.arange(start[1], picture.shape[0] + 1e-9, step[1])
    places = np.arange(integral.shape[0]), np.arange(integral.shape[1])
    rows = np.stack(
        [
            np.stack([np.interp(y, places[0], integral[:, i, c]) for i in range(integral.shape[1])], 1)
            for c in range(3)
        ],
        -1,
    )
    both = np.stack(
        [np.stack([np.interp(x, places[1], rows[j, :, c]) for j in range(len(y))], 0) for c in range(3)], -1
    )
    return np.asarray(np.diff(np.diff(both, axis=0), axis=1) / (step[0] * step[1]))


class TestWithPyramid(SlideContract):
    @pytest.fixture
    def picture(self) -> Picture:
        return noise(640, 820)

    @pytest.fixture
    def slide(self, picture: Picture, pyramid_tiff: PyramidTiff) -> Iterator[Slide]:
        with open_slide(pyramid_tiff(picture, factors=(2, 4))) as slide:
            yield slide


class TestWithoutPyramid(SlideContract):
    mpp = 0.25

    @pytest.fixture
    def picture(self) -> Picture:
        return noise(300, 404, seed=1)

    @pytest.fixture
    def slide(self, picture: Picture, pyramid_tiff: PyramidTiff) -> Iterator[Slide]:
        with open_slide(pyramid_tiff(picture, mpp=None), mpp_override=0.25) as slide:
            yield slide


@pytest.mark.parametrize("mpp", [(0.2527, 0.2527), (0.25, 0.2305)])
def test_fractional_reduction_averages_exactly_the_area(
    pyramid_tiff: PyramidTiff, mpp: tuple[float, float]
) -> None:
    picture = noise(400, 420)
    with open_slide(pyramid_tiff(picture, mpp=mpp)) as slide:
        own = slide.info.mpp_level0
        assert own == pytest.approx(mpp, rel=1e-6)
        tile = slide.read((13, 7), (150, 160), 0.5)
    wanted = area_means(picture, (13, 7), (0.5 / own[0], 0.5 / own[1]))[:160, :150]
    assert np.abs(tile - wanted).max() <= 0.51


def test_the_coarsest_level_that_is_fine_enough_is_read(pyramid_tiff: PyramidTiff) -> None:
    dark, light = np.zeros((512, 512, 3), np.uint8), np.full((256, 256, 3), 200, np.uint8)
    import tifffile

    path = pyramid_tiff(dark, mpp=0.25)
    with tifffile.TiffWriter(path) as file:  # levels that differ, to tell which was read
        for image, mpp in ((dark, 0.25), (light, 0.5)):
            file.write(
                image,
                tile=(256, 256),
                photometric="rgb",
                subfiletype=int(mpp > 0.25),
                resolution=(1e4 / mpp, 1e4 / mpp),
                resolutionunit="CENTIMETER",
            )
    with open_slide(path) as slide:
        for mpp, value in [(0.25, 0), (0.49, 0), (0.496, 200), (0.5, 200), (0.505, 200), (2.0, 200)]:
            assert (slide.read((0, 0), (10, 10), mpp) == value).all(), mpp
        assert slide.mpp_read(0.496) == (0.5, 0.5)
        assert slide.mpp_read(0.49) == (0.49, 0.49)


@pytest.mark.slow
def test_levels_whose_odd_remainder_was_dropped_keep_their_place(pyramid_tiff: PyramidTiff) -> None:
    picture = noise(1003, 1001)  # the level has 501 x 500 pixels, each still two wide
    with open_slide(pyramid_tiff(picture, factors=(2,))) as slide:
        assert slide.info.mpp_levels == pytest.approx((0.5, 1.0))
        for x, y in [(0, 0), (300, 400), (800, 796)]:
            tile = slide.read((x, y), (49, 49), 2.0).astype(float)
            # OpenSlide itself interpolates here by a fraction of a pixel: a blur, but no shift.
            error = {
                shift: np.abs(tile - area_means(picture, (x + shift, y), (4.0, 4.0))[:49, :49]).mean()
                for shift in (0.0, 0.3, -0.3)
                if x + shift >= 0
            }
            assert error[0.0] == min(error.values())
            assert error[0.0] < 3


def test_bands_bound_memory_and_leave_no_seam(
    pyramid_tiff: PyramidTiff, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pyramid_tiff(noise(600, 700))
    with open_slide(path) as slide:
        whole = slide.read((3, 5), (150, 140), 2.1)
        for limit in (4000, 200):
            monkeypatch.setattr(levels, "MAX_SOURCE_PX", limit)
            assert np.array_equal(slide.read((3, 5), (150, 140), 2.1), whole)


def test_the_same_picture_at_two_spacings_gives_the_same_tiles_by_place(pyramid_tiff: PyramidTiff) -> None:
    fine = np.kron(noise(300, 300), np.ones((2, 2, 1))).astype(np.uint8)
    coarse = noise(300, 300)
    with (
        open_slide(pyramid_tiff(fine, mpp=0.25, factors=(4,), name="fine")) as a,
        open_slide(pyramid_tiff(coarse, mpp=0.5, name="coarse")) as b,
    ):
        for origin in [(0, 0), (40, 100)]:
            from_fine = a.read((2 * origin[0], 2 * origin[1]), (64, 64), 0.5)
            assert np.array_equal(from_fine, b.read(origin, (64, 64), 0.5))


def test_transparent_becomes_background_not_black() -> None:
    # Opaque; clear; a fifth of (100, 0, 50), multiplied as OpenSlide does; white of any alpha stays in range.
    bgra = np.array([[[30, 20, 10, 255], [0, 0, 0, 0], [10, 0, 20, 51], [51, 51, 51, 51]]], np.uint8)
    wanted = [[10, 20, 30], [250, 240, 230], [220, 192, 194], [251, 243, 235]]
    assert composite(bgra, (250, 240, 230)).tolist() == [wanted]
    alpha = np.arange(256, dtype=np.uint8)
    white = np.repeat(alpha[:, None], 4, axis=1)[None]
    assert (composite(white, (255, 255, 255)) == 255).all()


def test_a_slide_without_its_companions_says_which_are_missing(tmp_path: Path) -> None:
    (tmp_path / "case.mrxs").write_bytes(b"\xff\xd8\xff\xe0" + bytes(2000))
    with pytest.raises(SlideOpenError, match="its pixels are missing, the folder case beside it"):
        open_slide(tmp_path / "case.mrxs")
    (tmp_path / "case.vms").write_text(
        "[Virtual Microscope Specimen]\nNoLayers=1\nImageFile=case(0,0).jpg\nNoJpegColumns=1\nNoJpegRows=1\n"
        "MapFile=case_map.jpg\nMacroImage=m.jpg\n"
    )
    with pytest.raises(SlideOpenError, match=r"case_map\.jpg: No such file"):
        open_slide(tmp_path / "case.vms")


def test_what_is_not_a_slide_says_so(tmp_path: Path) -> None:
    with pytest.raises(SlideOpenError, match="no such file"):
        open_slide(tmp_path / "missing.svs")
    with pytest.raises(SlideOpenError, match="not a file"):
        open_slide(tmp_path)
    (tmp_path / "linked.svs").symlink_to("/archive/a.svs")
    with pytest.raises(SlideOpenError, match=r"a link to /archive/a\.svs, which is not there"):
        open_slide(tmp_path / "linked.svs")
    (tmp_path / "text.svs").write_text("not a slide")
    with pytest.raises(SlideOpenError, match="not a slide in a format that OpenSlide reads"):
        open_slide(tmp_path / "text.svs")


@pytest.mark.parametrize("vendor", ["generic-tiff", "aperio"])
def test_a_tiled_overview_is_no_level(tmp_path: Path, vendor: str) -> None:
    text = "Aperio Image Library v11\r\n640x320 (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
    shared: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb", "compression": "jpeg", "metadata": None}
    slide, overview = noise(320, 640), np.zeros((70, 120, 3), np.uint8)
    path = tmp_path / "a.tiff"
    with tifffile.TiffWriter(path) as file:
        for picture, is_reduced in ((slide, 0), (slide[::4, ::4], 1), (overview, 1)):
            file.write(
                picture,
                **shared,
                subfiletype=is_reduced if vendor != "aperio" else 0,
                description=text if vendor == "aperio" else None,
                resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER",
            )
    with openslide.OpenSlide(path) as shown:
        assert (120, 70) in shown.level_dimensions
    with open_slide(path) as opened:
        assert opened.info.vendor == vendor
        assert opened.info.mpp_levels == (0.5, 2.0)
        (note,) = opened.info.notes
        assert note == "a picture of 120 x 70 pixels in it is no level of the slide, and is not read"
        assert opened.read((0, 0), (100, 50), 3.0).mean() > 64  # not black, as the overview is


@pytest.mark.parametrize(
    ("size", "is_level"),
    [((156, 781), True), ((157, 782), True), ((156, 768), False), ((781, 156), False), ((256, 1024), False)],
)
def test_rounding_along_the_longer_side_is_no_other_picture(size: tuple[int, int], is_level: bool) -> None:
    assert is_same_picture((10007, 50021), size) == is_level
    assert is_same_picture((50021, 10007), (size[1], size[0])) == is_level


def test_a_slide_without_spacing_names_the_remedies(pyramid_tiff: PyramidTiff) -> None:
    path = pyramid_tiff(noise(300, 300), mpp=None)
    with pytest.raises(SpacingError, match=r"--mpp-override or in the manifest's mpp column"):
        open_slide(path)
    with open_slide(path, mpp_override=0.31) as slide:
        assert slide.info.mpp_level0 == (0.31, 0.31)
    for senseless in (0.0, -1.0, float("nan")):
        with pytest.raises(SpacingError, match=r"must be from 0\.01"):
            open_slide(path, mpp_override=senseless)


def test_objective_power_is_a_hint_and_never_a_guess(test_data: Path, tmp_path: Path) -> None:
    slide = (test_data / "slides" / "CMU-1-Small-Region.svs").read_bytes()
    path = tmp_path / "no-spacing.svs"
    path.write_bytes(slide.replace(b"MPP = 0.4990", b"XPP = 0.4990"))
    with pytest.raises(SpacingError, match="objective power is 20"):
        open_slide(path)


def test_damage_costs_its_region_and_the_rest_still_reads(test_data: Path, tmp_path: Path) -> None:
    whole = test_data / "slides" / "CMU-1-Small-Region.svs"
    data = bytearray(whole.read_bytes())
    middle = data.index(b"\xff\xd8", 600_000) + 4  # the head of some JPEG tile
    data[middle : middle + 3000] = bytes(3000)
    path = tmp_path / "damaged.svs"
    path.write_bytes(data)
    good = bad = 0
    with open_slide(path) as slide, open_slide(whole) as intact:
        for y in range(0, 2880, 240):
            for x in range(0, 2160, 240):
                try:
                    tile = slide.read((x, y), (240, 240), 0.499)
                except SlideReadError as error:
                    assert "cannot be read" in str(error)
                    bad += 1
                else:
                    good += int(np.array_equal(tile, intact.read((x, y), (240, 240), 0.499)))
        with pytest.raises(SlideReadError, match="closed"):
            slide.close()
            slide.read((0, 0), (8, 8), 0.499)
    assert 1 <= bad <= 4
    assert good >= 9 * 12 - 8


def test_all_instances_of_a_dicom_series_count(test_data: Path, tmp_path: Path) -> None:
    names = ["openslide-python-boxes_0.dcm", "openslide-python-boxes_1.dcm"]
    for name in names:
        (tmp_path / name).write_bytes((test_data / "slides" / name).read_bytes())
    (tmp_path / "other.dcm").write_bytes((test_data / "slides" / "gcp-camelyon-jpeg.dcm").read_bytes())
    prints = [open_slide(tmp_path / name).info.fingerprint for name in names]
    assert prints[0] == prints[1]
    (tmp_path / "other.dcm").unlink()
    assert open_slide(tmp_path / names[0]).info.fingerprint == prints[0]
    (tmp_path / names[1]).unlink()
    assert open_slide(tmp_path / names[0]).info.fingerprint != prints[0]


class TestCzi(SlideContract):
    @pytest.fixture
    def picture(self) -> Picture:
        return noise(320, 360)

    @pytest.fixture(params=[CZI_PLAIN, CZI_ZSTD])
    def slide(self, picture: Picture, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Slide]:
        with open_slide(write_czi(tmp_path / "a.czi", picture, compression=request.param)) as slide:
            assert (slide.info.vendor, slide.info.objective_power) == ("zeiss", 20)
            assert len(slide.info.mpp_levels) == 2
            yield slide


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compression": CZI_JPEG}, "JPEG compression is not supported"),
        ({"compression": CZI_JPEG_XR}, "JPEG XR compression is not supported"),
        ({"is_grey": True}, "Pixel type GRAY8 is not supported"),
    ],
)
def test_a_czi_that_openslide_does_not_read_names_a_converter(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    path = write_czi(tmp_path / "a.czi", noise(64, 64), **options)
    with pytest.raises(SlideOpenError, match=rf"{said}; this kind of Zeiss CZI .* bfconvert"):
        open_slide(path)


class TestMirax(SlideContract):
    glass_rgb = FILL

    @pytest.fixture
    def picture(self) -> Picture:
        return noise(384, 512)

    @pytest.fixture
    def slide(self, picture: Picture, tmp_path: Path) -> Iterator[Slide]:
        with open_slide(write_mirax(tmp_path / "slide.mrxs", picture)) as slide:
            yield slide


def test_regions_of_a_mirax_slide_keep_their_place_and_holes_are_glass(tmp_path: Path) -> None:
    picture = noise(384, 512)
    # Two regions, one of them with a hole; between them, and before the first, nothing was scanned.
    absent = {(0, row) for row in range(6)} | {(4, row) for row in range(6)} | {(2, 2)}
    with open_slide(write_mirax(tmp_path / "slide.mrxs", picture, absent)) as slide:
        assert (slide.info.vendor, slide.info.objective_power) == ("mirax", 20)
        assert slide.info.size_level0 == (512, 384) and slide.info.mpp_levels == (0.5, 1.0)
        for mpp in (0.5, 0.7, 1.0, 2.0):  # level 0, between the levels, level 1, below it
            seen = slide.read((0, 0), (int(512 * 0.5 / mpp), int(384 * 0.5 / mpp)), mpp).astype(int)
            filled = picture.copy()
            for column, row in absent:
                filled[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64] = FILL
            wanted = area_means(filled, (0, 0), (mpp / 0.5, mpp / 0.5))[: seen.shape[0], : seen.shape[1]]
            assert np.abs(seen - wanted).max() <= 1.01
        origins = np.array([[64 * column, 64 * row] for row in range(6) for column in range(8)], np.int32)
        for threads in (1, 2):
            tiles = slide.map_tiles(np.copy, origins, 64, 0.5, threads=threads)
            for (x, y), tile in zip(origins.tolist(), tiles, strict=True):
                assert not isinstance(tile, SlideReadError)
                assert np.array_equal(tile, filled[y : y + 64, x : x + 64])


def test_a_mirax_slide_is_all_of_its_files(tmp_path: Path) -> None:
    picture = noise(128, 128)
    paths = [write_mirax(tmp_path / f"{name}.mrxs", picture) for name in "ab"]
    paths.append(write_mirax(tmp_path / "c.mrxs", picture, {(1, 1)}))
    prints = [open_slide(path).info.fingerprint for path in paths]
    assert prints[0] == prints[1] != prints[2]
    (tmp_path / "b" / "@eaDir").mkdir()
    for name in (".DS_Store", "._Index.dat", "Thumbs.db", "@eaDir/Index.dat"):
        (tmp_path / "b" / name).write_bytes(b"x")
    assert open_slide(paths[1]).info.fingerprint == prints[0]
    (tmp_path / "a" / "Index.dat").unlink()
    with pytest.raises(SlideOpenError, match=r"a\.mrxs: the slide cannot be opened; OpenSlide says: .*Index"):
        open_slide(paths[0])


def test_a_philips_slide_is_read_at_the_spacing_of_its_xml(tmp_path: Path) -> None:
    picture = noise(500, 600)
    with open_slide(write_philips(tmp_path / "slide.tiff", picture, mpp=(0.25, 0.26))) as slide:
        assert slide.info.vendor == "philips"
        assert slide.info.mpp_level0 == pytest.approx((0.25, 0.26))
        assert slide.mpp_read(0.255, 0.03) == slide.info.mpp_level0
        assert np.array_equal(slide.read((30, 40), (100, 90), 0.255, 0.03), picture[40:130, 30:130])
        tile = slide.read((0, 0), (120, 110), 0.45)
        assert (
            np.abs(tile - area_means(picture, (0, 0), (0.45 / 0.25, 0.45 / 0.26))[:110, :120]).max() <= 1.01
        )


@pytest.mark.parametrize("mpp", [0.25, 0.4, 0.5, 0.8])  # the second level is 2.0005 times as coarse
def test_jpeg_2000_read_together_is_what_it_is_read_alone(test_data: Path, mpp: float) -> None:
    with open_slide(test_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs", mpp_override=0.25) as slide:
        assert slide.info.vendor == "aperio" and slide.info.objective_power is None
        step = int(200 * mpp / 0.25)
        origins = np.array([[x, 901 + y] for y in (0, step) for x in range(801, 2800, step)], np.int32)
        tiles = slide.map_tiles(np.copy, origins, 200, mpp, threads=2)
        for (x, y), tile in zip(origins.tolist(), tiles, strict=True):
            assert not isinstance(tile, SlideReadError)
            assert np.array_equal(tile, slide.read((x, y), (200, 200), mpp))


def test_only_all_four_bounds_move_the_corner(tmp_path: Path) -> None:
    path = write_mirax(tmp_path / "a.mrxs", noise(128, 192), absent=[(0, 0), (0, 1)])
    with open_slide(path) as slide:
        with openslide.OpenSlide(path) as handle:
            bounds = [int(handle.properties[f"openslide.bounds-{axis}"]) for axis in "xy"]
        assert list(slide.info.corner_level0) == bounds == [64, 0]
    assert _corner({"openslide.bounds-x": "5", "openslide.bounds-y": "7"}) == (0, 0)


def test_a_pipe_beside_a_slide_is_refused(tmp_path: Path) -> None:
    path = write_mirax(tmp_path / "a.mrxs", noise(128, 192))
    os.mkfifo(tmp_path / "a" / "Extra.dat")
    with pytest.raises(SlideOpenError, match=r"Extra\.dat beside it is no regular file"):
        open_slide(path)
    os.mkfifo(tmp_path / "pipe.svs")
    with pytest.raises(SlideOpenError, match="not a file"):
        open_slide(tmp_path / "pipe.svs")


def test_the_orientation_of_a_scanners_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    text = "Aperio Image Library v1\r\n64x64 [0,0 64x64] (32x32) |AppMag = 20|MPP = 0.5"
    tags = [(274, 3, 1, 6, True)]
    shared: dict[str, Any] = {"tile": (32, 32), "description": text, "extratags": tags, "metadata": None}
    tifffile.imwrite(path, noise(64, 64), photometric="rgb", compression="jpeg", **shared)
    with open_slide(path) as slide:
        assert slide.info.size_level0 == (64, 64)
        assert "orientation 6, which its TIFF tag says, is not applied" in slide.info.notes[0]
    tifffile.imwrite(path, noise(64, 64), photometric="rgb", compression="lzw", **shared)
    with open_slide(path) as slide:  # libtiff would turn each tile by itself
        assert slide.info.notes == ("turned as its orientation 6 says",)
        assert np.array_equal(slide.read((0, 0), (64, 64), 0.5), np.rot90(noise(64, 64), -1))


def test_a_slide_names_no_file_outside_its_folder(tmp_path: Path) -> None:
    path = write_mirax(tmp_path / "a.mrxs", noise(128, 192))
    (tmp_path / "a" / "Data0000.dat").rename(tmp_path / "Data0000.dat")
    index = tmp_path / "a" / "Slidedat.ini"
    index.write_text(index.read_text().replace("Data0000.dat", "../Data0000.dat"))
    with pytest.raises(SlideOpenError, match=r"another folder, '\.\./Data0000\.dat'"):
        open_slide(path)


def test_what_was_not_scanned_is_known(tmp_path: Path) -> None:
    picture = noise(256, 256)
    path = write_mirax(tmp_path / "a.mrxs", picture, absent=[(c, r) for c in (0, 1) for r in (0, 1)])
    with open_slide(path) as slide:
        for mpp, side in ((0.5, 256), (1.0, 128), (4.0, 32)):
            missing = slide.missing((side, side), mpp)
            assert missing is not None
            assert missing[: side // 2, : side // 2].all() and missing.mean() == 0.25
