from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from slidetl.slides import open_slide
from slidetl.synthetic.section import STAINS, LungSection, SiteAppearance, SyntheticSlide
from slidetl.tiles.quality import focus_of, measure_quality
from slidetl.tiles.tissue import TissueMask, find_tissue

WHITE = (255, 255, 255)
MPP = 16.0
INKS = {
    "blue": (40, 60, 160),
    "light blue": (60, 90, 190),
    "green": (30, 130, 70),
    "black": (35, 35, 40),
    "red": (190, 30, 40),
}

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def section(stain: str, seed: int = 1, mpp: float = 4.0) -> LungSection:
    side = round(6144 / mpp)
    return LungSection(SyntheticSlide(0.3, seed, SiteAppearance.of(seed, seed), stain, (side, side), mpp))


def from_afar(drawn: LungSection) -> Picture:
    width, height = drawn.slide.size_px
    pixels = drawn.draw((0, 0), (width, height)).reshape(height // 4, 4, width // 4, 4, 3)
    return np.asarray(pixels.mean(axis=(1, 3)) + 0.5, np.float64).astype(np.uint8)


@pytest.fixture(scope="module", params=STAINS)
def thumbnail(request: pytest.FixtureRequest) -> Picture:
    return from_afar(section(request.param))


def measure(image: Picture, mpp: float = MPP) -> tuple[dict[str, TissueMask], Mask]:
    mask = find_tissue(image, mpp, WHITE).mask
    return measure_quality(image, mpp, mask, WHITE), mask


def band(shape: tuple[int, ...], width_um: float, slope: float) -> Mask:
    y, x = np.mgrid[: shape[0], : shape[1]] * MPP
    return np.asarray(np.abs(y - shape[0] * MPP / 2 + slope * (x - shape[1] * MPP / 2)) < width_um / 2)


def opaque(image: Picture, stroke: Mask, ink: tuple[int, int, int]) -> Picture:
    """Ink that lets a seventh of what lies under it through."""
    image = image.copy()
    image[stroke] = np.array(ink) * (0.85 + 0.15 * image[stroke] / 255)
    return image


def translucent(image: Picture, stroke: Mask, ink: tuple[int, int, int]) -> Picture:
    """Ink that takes its share of the light that the tissue leaves, streaky, and soft at its edge."""
    streaks = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=stroke.shape), 3)
    film = (1 + 0.08 * streaks / streaks.std()) * ndimage.gaussian_filter(stroke.astype(float), 1)
    return np.asarray(image * (np.array(ink) / 255) ** film[..., None], np.float64).astype(np.uint8)


def test_a_clean_slide_of_any_stain_raises_no_alarm(thumbnail: Picture) -> None:
    maps, mask = measure(thumbnail)
    assert maps["pen"].mask.mean() < 0.001
    assert (maps["fold"].mask & mask).sum() < 0.001 * mask.sum()


@pytest.mark.parametrize("pen", [opaque, translucent])
@pytest.mark.parametrize("ink", INKS)
def test_pen_strokes_are_found_over_tissue_and_glass(
    thumbnail: Picture, ink: str, pen: Callable[[Picture, Mask, tuple[int, int, int]], Picture]
) -> None:
    stroke = band(thumbnail.shape, 300, 0.4)
    maps, _ = measure(pen(thumbnail, stroke, INKS[ink]))
    assert (maps["pen"].mask & stroke).sum() > 0.95 * stroke.sum()
    beside = ~ndimage.binary_dilation(stroke, iterations=4)
    assert (maps["pen"].mask & beside).sum() < 0.01 * beside.sum()
    assert not (maps["pen"].mask & (maps["fold"].mask | maps["air"].mask)).any()


def test_pen_is_followed_over_a_picture_of_many_bands() -> None:
    image = np.full((1600, 200, 3), 245, np.uint8)
    image[:, 60:] = (200, 130, 170)
    stroke = np.zeros(image.shape[:2], bool)
    stroke[20:1580, 40:70] = True
    maps, _ = measure(translucent(image, stroke, INKS["green"]))
    assert (maps["pen"].mask & stroke).sum() > 0.95 * stroke.sum()


def picture(path: Path) -> Picture:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("mpp", [1.0, 4.0, 16.0])
def test_real_green_ink_over_real_tissue_is_found(test_data: Path, mpp: float) -> None:
    image = picture(test_data / "pen" / "pen-tcga-green-pen.png")
    # The middle of the stroke and its edges, drawn by hand on the picture.
    left = [(338, 0), (262, 175), (205, 300), (160, 400), (172, 631)]
    right = [(305, 631), (332, 480), (335, 340), (425, 170), (490, 0)]
    drawn = Image.new("1", image.shape[1::-1])
    ImageDraw.Draw(drawn).polygon(left + right, fill=1)
    stroke = np.asarray(drawn)
    maps, _ = measure(image, mpp)
    assert (maps["pen"].mask & stroke).sum() > 0.88 * stroke.sum()
    beside = ~ndimage.binary_dilation(stroke, iterations=15 + round(60 / mpp))  # its blurred edge
    assert (maps["pen"].mask & beside).sum() < 0.003 * beside.sum()


@pytest.mark.parametrize("mpp", [4.0, 16.0, 60.0])
def test_real_pale_blue_ink_is_found(test_data: Path, mpp: float) -> None:
    image = picture(test_data / "pen" / "pen-wsi-blue-pen.png")
    stroke = (image[..., 2] > image[..., 1] + 20.0) & (image[..., 1] > image[..., 0] + 10.0)
    assert 0.02 < stroke.mean() < 0.04
    maps, _ = measure(image, mpp)
    assert (maps["pen"].mask & stroke).sum() > 0.9 * stroke.sum()
    beside = ~ndimage.binary_dilation(stroke, iterations=4 + round(60 / mpp))
    assert (maps["pen"].mask & beside).sum() < 0.001 * beside.sum()


@pytest.mark.slow
def test_real_tissue_without_ink_raises_no_alarm(test_data: Path) -> None:
    """H&E, a lymph node full of haematoxylin, haematoxylin with DAB, stroma of a hundred tiles."""
    with open_slide(test_data / "slides" / "gcp-camelyon-jpeg.dcm") as slide:
        node = slide.read((0, 0), slide.info.size_level0, slide.info.mpp_level0[0], 0.0)
    with open_slide(test_data / "slides" / "petebankhead-OS-2-ndpi.ome.tif") as slide:
        immuno = slide.read((0, 0), (62, 62), 8.0)
    paths = sorted((test_data / "patches" / "crc5_112" / "test" / "S").iterdir())[:100]
    stroma = np.concatenate([picture(path)[:56, :56] for path in paths])
    clean = picture(test_data / "pen" / "clean-lung.png")
    for image, mpp in ((node, 29.0), (immuno, 8.0), (stroma, 1.0), (stroma, 8.0), (clean, 0.5), (clean, 4.0)):
        assert not measure(image, mpp)[0]["pen"].mask.any()


def test_tissue_that_lies_double_is_a_fold(thumbnail: Picture) -> None:
    _, mask = measure(thumbnail)
    crease = band(thumbnail.shape, 130, 0.7) & mask
    image = thumbnail.copy()
    image[crease] = (image[crease].astype(float) ** 2 / 240).clip(0, 255)
    maps, _ = measure(image)
    is_tissue = crease & (thumbnail.min(axis=2) < 200)  # half of a fold of lung is air, which stays clear
    assert (maps["fold"].mask & is_tissue).sum() > 0.6 * is_tissue.sum()
    assert not (maps["pen"].mask & crease).any()
    beside = mask & ~ndimage.binary_dilation(crease, iterations=3)
    assert (maps["fold"].mask & beside).sum() < 0.001 * beside.sum()


def test_holes_in_the_tissue_are_air() -> None:
    image = np.full((200, 200, 3), 243, np.uint8)
    image[40:160, 40:160] = (200, 130, 170)
    image[60:70, 60:70] = 242  # 160 um across
    maps, mask = measure(image)
    assert mask[65, 65]
    expected = np.zeros_like(mask)
    expected[60:70, 60:70] = True
    assert np.array_equal(maps["air"].mask, expected)


def test_air_of_lung_is_measured_and_glass_is_none(thumbnail: Picture) -> None:
    maps, mask = measure(thumbnail)
    assert not (maps["air"].mask & ~mask).any()
    assert 0.1 < maps["air"].mask.sum() / mask.sum() < 0.6


def test_on_a_dark_ground_and_without_tissue_nothing_is_measured() -> None:
    dark = np.zeros((60, 60, 3), np.uint8)
    dark[20:40, 20:40, 2] = 90
    for image in (dark, np.full((60, 60, 3), 250, np.uint8)):
        maps, _ = measure(image)
        assert not (maps["pen"].mask | maps["fold"].mask | maps["air"].mask).any()


def test_fractions_are_shares_of_the_tile() -> None:
    pen = np.zeros((10, 10), bool)
    pen[:5] = True
    nothing = np.zeros_like(pen)
    masks = {"pen": pen, "fold": nothing, "air": ~nothing}
    origins = np.array([[0, 0], [0, 64], [0, 140]], np.int32)
    shares = {
        name: TissueMask(mask, 16.0).fraction(origins, (32.0, 32.0), (1.0, 1.0))
        for name, mask in masks.items()
    }
    assert shares["pen"].tolist() == pytest.approx([1, 0.5, 0])
    assert shares["fold"].tolist() == [0, 0, 0]
    assert shares["air"].tolist() == pytest.approx([1, 1, 20 / 32])


def blurred(tile: Picture, sigma_px: float) -> Picture:
    return np.asarray(ndimage.gaussian_filter(tile, (sigma_px, sigma_px, 0)))


@pytest.mark.parametrize("stain", STAINS)
@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_focus_falls_with_blur_whatever_the_stain_and_the_spacing(stain: str, mpp: float) -> None:
    drawn = section(stain, mpp=mpp)
    centre = drawn.slide.size_px[0] // 2
    tile = drawn.draw((centre, centre), (224, 224))
    values = [focus_of(blurred(tile, blur_um / mpp), mpp) for blur_um in (0, 1, 2, 4)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.1 > 0.08 > values[2]


def test_focus_does_not_depend_on_the_strength_of_the_stain() -> None:
    noise = np.random.default_rng(0).standard_normal((224, 224, 1))
    texture = ndimage.gaussian_filter(noise, (1.5, 1.5, 0)).repeat(3, axis=2)
    strong, weak = ((160 + texture / texture.std() * s).clip(0, 255).astype(np.uint8) for s in (40, 15))
    assert focus_of(weak, 0.5) == pytest.approx(focus_of(strong, 0.5), rel=0.05)


def test_noise_on_glass_is_not_taken_for_detail() -> None:
    noise = np.random.default_rng(0).normal(240, 2, (224, 224, 3)).astype(np.uint8)
    assert focus_of(noise, 0.5) < 0.05
    assert focus_of(np.full((224, 224, 3), 240, np.uint8), 0.5) == 0
    assert focus_of(np.zeros((7, 7, 3), np.uint8), 1.0) == 0


def test_focus_on_a_real_slide(test_data: Path) -> None:
    with open_slide(test_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        tile = slide.read((800, 900), (224, 224), 0.499)
    assert focus_of(tile, 0.499) > 0.15
    assert focus_of(blurred(tile, 4), 0.499) < 0.08
