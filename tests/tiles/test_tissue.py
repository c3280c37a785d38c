from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from slidetl.synthetic.section import STAINS as SYNTHETIC_STAINS
from slidetl.synthetic.section import LungSection, SiteAppearance, SyntheticSlide
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.tissue import TissueMask, blank_fill, find_tissue, thumbnail_mpp

WHITE = (255, 255, 255)
# What each stain leaves of the light, from the field's usual look: nuclei or fibres, and the pale ground.
STAINS = {
    "he": [(110, 60, 140), (235, 190, 215)],
    "trichrome": [(60, 90, 160), (215, 150, 160)],
    "sirius": [(190, 40, 60), (245, 225, 170)],
    "pale": [(225, 205, 225), (240, 226, 236)],
}


def blob(side: int, centre: tuple[float, float], radius: float) -> NDArray[np.bool_]:
    y, x = np.mgrid[:side, :side]
    return np.asarray((x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2)


def painted(
    mask: NDArray[np.bool_], stain: str, glass: tuple[int, int, int], seed: int = 0
) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    dark, pale = np.array(STAINS[stain], float)
    share = rng.random((*mask.shape, 1)) * 0.8
    tissue = dark * share + pale * (1 - share)
    light = np.where(mask[..., None], tissue / 255, 1.0) * np.array(glass, float)
    image = light + rng.normal(0, 1.5, (*mask.shape, 3))
    return np.asarray(np.clip(np.round(image), 0, 255), dtype=np.uint8)


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


@given(st.integers(0, 1000), st.floats(0.3, 4.0), st.floats(0.3, 4.0), st.floats(3.0, 16.0), st.floats(5, 90))
def test_fraction_is_the_mean_of_the_mask_over_the_tile(
    seed: int, mpp_x: float, mpp_y: float, mpp: float, extent: float
) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((12, 9)) < 0.5
    origins = rng.integers(-20, 120, (5, 2)).astype(np.int32)
    got = TissueMask(mask, mpp).fraction(origins, (extent, extent / 2), (mpp_x, mpp_y))
    assert got.dtype == np.float32
    for (x, y), value in zip(origins, got, strict=True):
        total = 0.0
        for row, column in np.argwhere(mask):
            wide = min((x + extent) * mpp_x, (column + 1) * mpp) - max(x * mpp_x, column * mpp)
            high = min((y + extent / 2) * mpp_y, (row + 1) * mpp) - max(y * mpp_y, row * mpp)
            total += max(wide, 0) * max(high, 0)
        assert value == pytest.approx(total / (extent * mpp_x * extent / 2 * mpp_y), abs=1e-5)


@pytest.mark.parametrize("stain", STAINS)
@pytest.mark.parametrize("glass", [(255, 255, 255), (240, 238, 242), (225, 228, 226)])
def test_stained_and_pale_tissue_is_found_on_any_glass(stain: str, glass: tuple[int, int, int]) -> None:
    truth = blob(300, (120, 150), 90)
    found = find_tissue(painted(truth, stain, glass), 16.0, WHITE)
    assert found.mpp == 16.0
    assert overlap(found.mask, truth) > 0.95


@pytest.mark.parametrize("stain", STAINS)
def test_an_image_full_of_tissue_is_not_cut_in_two(stain: str) -> None:
    everything = np.ones((200, 200), bool)
    assert find_tissue(painted(everything, stain, WHITE), 16.0, WHITE).mask.mean() > 0.99


@pytest.mark.parametrize("glass", [(255, 255, 255), (235, 235, 238)])
def test_a_blank_slide_has_no_tissue(glass: tuple[int, int, int]) -> None:
    nothing = np.zeros((200, 200), bool)
    assert not find_tissue(painted(nothing, "he", glass), 16.0, WHITE).mask.any()
    assert not find_tissue(np.full((50, 60, 3), 255, np.uint8), 16.0, WHITE).mask.any()


def test_unscanned_white_around_scanned_glass_does_not_turn_the_glass_into_tissue() -> None:
    truth = blob(300, (150, 150), 60)
    image = painted(truth, "he", (238, 237, 240))
    scanned = blob(300, (150, 150), 110)
    image[~scanned] = 255
    assert overlap(find_tissue(image, 16.0, WHITE).mask, truth) > 0.9


@pytest.mark.parametrize("mpp", [4.0, 16.0])
def test_lung_is_one_tissue_with_its_air(mpp: float) -> None:
    side = int(4800 / mpp)
    y, x = np.mgrid[:side, :side] * mpp
    septa = (x % 220 < 16) | (y % 220 < 16)  # alveoli 200 um wide
    truth = (np.abs(x - 2400) < 1600) & (np.abs(y - 2400) < 1600)
    found = find_tissue(painted(septa & truth, "he", WHITE), mpp, WHITE)
    assert overlap(found.mask, truth) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("stain", SYNTHETIC_STAINS)
@pytest.mark.parametrize(("share", "seed"), [(0.0, 2), (0.4, 3)])
def test_overlap_with_the_known_tissue_of_synthetic_slides(stain: str, share: float, seed: int) -> None:
    slide = SyntheticSlide(share, seed, SiteAppearance.of(seed, seed), stain, (1536, 1536), 4.0)
    drawn = LungSection(slide)
    pixels = drawn.draw((0, 0), slide.size_px).reshape(384, 4, 384, 4, 3).mean(axis=(1, 3))
    found = find_tissue((pixels + 0.5).astype(np.uint8), 16.0, WHITE)
    truth = drawn.truth().tissue_fraction.astype(float)  # cells of 64 um, 16 pixels of level 0
    cells = np.stack(np.meshgrid(*(np.arange(n) * 16 for n in truth.shape[::-1])), axis=-1)
    shares = found.fraction(cells.reshape(-1, 2).astype(np.int32), (16, 16), (4, 4)).reshape(truth.shape)
    assert np.minimum(shares, truth).sum() / np.maximum(shares, truth).sum() >= 0.95


def test_a_wide_airway_stays_open_and_dust_is_dropped() -> None:
    truth = blob(300, (150, 150), 90) & ~blob(300, (150, 150), 25)  # a lumen of 800 um
    dust = blob(300, (20, 20), 3) | blob(300, (280, 30), 2)  # up to 100 um
    found = find_tissue(painted(truth | dust, "he", WHITE), 16.0, WHITE).mask
    assert not found[150, 150]
    assert not found[:50, :50].any() and not found[:60, 250:].any()
    assert overlap(found, truth) > 0.9


def test_tissue_near_the_border_does_not_grow_to_it() -> None:
    truth = np.zeros((100, 100), bool)
    truth[4:60, 4:60] = True
    found = find_tissue(painted(truth, "he", WHITE), 16.0, WHITE).mask
    assert not found[:2].any() and not found[:, :2].any()


def test_light_on_a_dark_ground_is_tissue_too() -> None:
    rng = np.random.default_rng(0)
    truth = blob(200, (100, 100), 50)
    image = np.zeros((200, 200, 3), np.uint8)
    image[..., 2] = np.where(truth, 90, 4) + rng.integers(0, 3, truth.shape)
    assert overlap(find_tissue(image, 16.0, WHITE).mask, truth) > 0.9
    assert not find_tissue(np.zeros((60, 60, 3), np.uint8), 16.0, WHITE).mask.any()


def test_spacing_of_the_thumbnail() -> None:
    spec = TileSpec(mpp=0.5, tile_size_px=224)
    assert thumbnail_mpp((40_000, 30_000), (0.5, 0.5), spec) == 16.0
    small = TileSpec(mpp=0.5, tile_size_px=64)  # 32 um a tile: four pixels of 8
    assert thumbnail_mpp((40_000, 30_000), (0.5, 0.5), small) == 8.0
    assert thumbnail_mpp((400_000, 30_000), (0.5, 0.5), spec) == pytest.approx(200_000 / 4096)
    assert thumbnail_mpp((1152, 700), (28.9, 29.0), spec) == 29.0


@pytest.mark.parametrize(
    "fill", [(0, 0, 0), (3, 2, 3), (128, 128, 128), (205, 205, 205), (200, 30, 150), (0, 0, 255), WHITE]
)
@pytest.mark.parametrize("border", [40, 70])
def test_fill_of_one_colour_is_no_tissue(fill: tuple[int, int, int], border: int) -> None:
    """Converted slides are black, or of another grey, where nothing was scanned; also most of them."""
    tissue = blob(256, (128, 128), 30)
    whole = painted(tissue, "he", (243, 242, 244))
    filled = whole.copy()
    inside = np.zeros((256, 256), bool)
    inside[border:-border, border:-border] = True
    filled[~inside] = fill
    seen, ground, without_data = blank_fill(filled, 16.0, WHITE)
    wanted = find_tissue(whole, 16.0, WHITE).mask
    assert overlap(find_tissue(seen, 16.0, ground).mask, wanted) > 0.98
    assert overlap(without_data, ~inside) > 0.95
    assert not without_data[tissue].any()


def test_a_tile_that_is_missing_within_the_tissue_is_found() -> None:
    image = painted(blob(256, (128, 128), 100), "he", (243, 242, 244))
    image[100:104, 120:124] = 0
    _, _, without_data = blank_fill(image, 16.0, WHITE)
    assert without_data[100:104, 120:124].all() and without_data.sum() <= 64


@pytest.mark.parametrize("stain", [*STAINS])
def test_slides_without_fill_are_taken_as_they_are(stain: str) -> None:
    image = painted(blob(256, (128, 128), 100), stain, (243, 242, 244))
    image[20:40, 20:40] = (243, 242, 244)  # very clean glass
    seen, ground, without_data = blank_fill(image, 16.0, WHITE)
    assert seen is image and ground == WHITE and not without_data.any()


@pytest.mark.parametrize("unscanned", [None, WHITE])
def test_the_ground_of_fluorescence_is_no_fill(unscanned: tuple[int, int, int] | None) -> None:
    y, x = np.mgrid[:256, :256]
    glow = np.exp(-((x - 128) ** 2 + (y - 128) ** 2) / 2 / 25**2) * 220
    image = np.zeros((256, 256, 3), np.uint8)
    image[..., 2] = glow
    if unscanned:
        image[:, :200] = np.where(x[:, :200, None] < 60, 255, image[:, :200])
        image[230:] = 255
    seen, ground, without_data = blank_fill(image, 16.0, WHITE)
    assert without_data.mean() == (0 if unscanned is None else np.mean(image.min(2) == 255))
    mask = find_tissue(seen, 16.0, ground).mask
    assert mask[128, 128] and not mask[5, 128] and not mask[:, :60].any() and mask.mean() < 0.4


def test_of_white_glass_only_the_reader_knows_what_was_not_scanned() -> None:
    image = painted(blob(256, (128, 128), 60), "he", WHITE)
    image[~blob(256, (128, 128), 60)] = 255  # saturated
    unscanned = np.zeros((256, 256), bool)
    unscanned[:40] = True
    assert not blank_fill(image, 16.0, WHITE)[2].any()
    seen, _, without_data = blank_fill(image, 16.0, WHITE, lambda: unscanned)
    assert seen is image and np.array_equal(without_data, unscanned)
