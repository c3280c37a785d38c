from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetl.errors import UsageError
from slidetl.synthetic.section import (
    GRADES,
    SHARE_PER_GRADE,
    STAINS,
    LungSection,
    SiteAppearance,
    SyntheticSlide,
    grade_of_share,
)

SITE = SiteAppearance.of(0, 1000)


def slide(fibrotic_share: float = 0.24, seed: int = 1000, **changes: object) -> SyntheticSlide:
    base = SyntheticSlide(fibrotic_share, seed, SITE, "he", (1024, 1024), 4.0)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def fibrotic_share(section: LungSection) -> float:
    truth = section.truth()
    return float(truth.collagen_fraction.sum(dtype=float) / truth.tissue_fraction.sum(dtype=float))


def lesion_share(section: LungSection) -> float:
    truth = section.truth()
    return float(truth.lesion_fraction.sum(dtype=float) / truth.tissue_fraction.sum(dtype=float))


def test_grades_have_even_shares_with_borders_halfway() -> None:
    assert [grade_of_share(k * SHARE_PER_GRADE) for k in range(GRADES)] == [0, 1, 2, 3, 4]
    assert [grade_of_share(share) for share in (0.0599, 0.0601, 0.4199, 0.4201, 0.55)] == [0, 1, 3, 4, 4]


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(share=st.floats(0, 0.55), seed=st.integers(0, 2**32 - 1))
def test_truth_adds_up_to_the_share_that_was_asked_for(share: float, seed: int) -> None:
    section = LungSection(slide(share, seed))
    truth = section.truth()
    assert fibrotic_share(section) == pytest.approx(share, abs=0.012)
    assert truth.collagen_fraction.shape == (64, 64)  # 4096 micrometres in cells of 64
    assert (truth.collagen_fraction <= truth.lesion_fraction + 2e-3).all()
    assert (truth.lesion_fraction <= truth.tissue_fraction + 2e-3).all()
    assert 0.35 < truth.tissue_fraction.mean(dtype=float) < 0.8


def test_no_fibrosis_means_none_at_all() -> None:
    assert LungSection(slide(0.0)).truth().collagen_fraction.max() == 0


@pytest.mark.slow
def test_lesion_area_is_independent_of_the_fibrotic_share() -> None:
    shares = np.tile(np.linspace(0, 0.5, 5), 12)
    seeds = 1000 + np.arange(len(shares))
    lesions = [lesion_share(LungSection(slide(a, int(b)))) for a, b in zip(shares, seeds, strict=True)]
    # 0.33 is the two-sided 1 % point of a correlation of 60 pairs without any.
    assert abs(np.corrcoef(shares, lesions)[0, 1]) < 0.33
    assert lesion_share(LungSection(slide(0.0))) == pytest.approx(lesion_share(LungSection(slide(0.5))))


@pytest.mark.slow
@pytest.mark.parametrize("stain", STAINS)
def test_fibrosis_hardly_moves_colour_and_area_but_changes_the_picture(stain: str) -> None:
    size = (1024, 1024)
    healthy, fibrotic = (
        LungSection(slide(share, stain=stain)).draw((0, 0), size).astype(float) for share in (0.0, 0.5)
    )
    between_slides = [
        LungSection(slide(0.0, seed, stain=stain)).draw((0, 0), size).mean(axis=(0, 1))
        for seed in range(1001, 1006)
    ]
    shift = np.abs(healthy.mean(axis=(0, 1)) - fibrotic.mean(axis=(0, 1)))
    assert (shift < 0.8 * np.ptp(between_slides, axis=0)).all()
    assert (np.abs(healthy - fibrotic).max(axis=2) > 40).mean() > 0.05


@pytest.mark.slow
def test_fibrotic_tissue_is_oriented_and_inflamed_tissue_is_not() -> None:
    truth = LungSection(slide(0.3, mpp=2.0, size_px=(2048, 2048))).truth()
    image = LungSection(slide(0.3, mpp=2.0, size_px=(2048, 2048))).draw((0, 0), (2048, 2048))
    dy, dx = np.gradient(image.astype(float).mean(axis=2))

    def cells(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> list[float]:
        means: list[float] = values.reshape(64, 32, 64, 32).mean(axis=(1, 3)).ravel().tolist()
        return means

    xx, yy, xy = (np.array(cells(product)) for product in (dx * dx, dy * dy, dx * dy))
    coherence = np.hypot(xx - yy, 2 * xy) / (xx + yy)  # of the structure tensor, 0..1
    collagen, lesion = truth.collagen_fraction.ravel(), truth.lesion_fraction.ravel()
    solid = np.array(cells((image.max(axis=2) < 235).astype(float))) > 0.98
    fibrotic, inflamed = solid & (collagen > 0.95), solid & (lesion > 0.95) & (collagen < 0.05)
    assert min(fibrotic.sum(), inflamed.sum()) > 30
    assert np.median(coherence[fibrotic]) > np.quantile(coherence[inflamed], 0.95)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    mpp=st.sampled_from([0.5, 0.73, 2.0, 5.0]),
    stain=st.sampled_from(STAINS),
    x=st.integers(0, 600),
    y=st.integers(0, 600),
    width=st.integers(1, 300),
    height=st.integers(1, 300),
)
def test_a_part_drawn_alone_equals_that_part_of_the_whole(
    mpp: float, stain: str, x: int, y: int, width: int, height: int
) -> None:
    section = LungSection(slide(mpp=mpp, stain=stain, size_px=(900, 900)))
    whole = section.draw((0, 0), (900, 900))
    part = section.draw((x, y), (width, height))
    # A rounding of the last bit may differ with the place of a pixel in a vector instruction.
    assert np.abs(part.astype(int) - whole[y : y + height, x : x + width]).max(initial=0) <= 1


@pytest.mark.slow
def test_a_coarse_slide_shows_the_same_tissue_as_a_fine_one() -> None:
    fine = LungSection(slide(mpp=0.5, size_px=(3072, 3072))).draw((0, 0), (3072, 3072))
    coarse = LungSection(slide(mpp=2.0, size_px=(768, 768))).draw((0, 0), (768, 768)).astype(float)
    reduced = fine.reshape(768, 4, 768, 4, 3).mean(axis=(1, 3))
    assert np.corrcoef(reduced.ravel(), coarse.ravel())[0, 1] > 0.93
    assert reduced.mean(axis=(0, 1)) == pytest.approx(coarse.mean(axis=(0, 1)), abs=3)


def test_drawing_is_repeatable_and_depends_on_the_seed() -> None:
    first, again, other = (LungSection(slide(0.2, seed)).draw((0, 0), (512, 512)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.3


def test_corners_are_glass_of_the_sites_colour() -> None:
    image = LungSection(slide()).draw((0, 0), (64, 64))
    assert image.mean(axis=(0, 1)) == pytest.approx(SITE.white_rgb, abs=0.3)


@pytest.mark.slow
def test_a_band_of_the_largest_slide_fits_in_memory() -> None:
    tracemalloc.start()
    try:
        section = LungSection(slide(size_px=(50_000, 50_000), mpp=0.5))
        section.draw((0, 25_000), (50_000, 64))
        # What grows with the slide besides the band itself, which is 77 MB at its full 512 rows.
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fibrotic_share": 0.6}, "fibrotic share"),
        ({"fibrotic_share": float("nan")}, "fibrotic share"),
        ({"stain": "giemsa"}, "he, trichrome, sirius, not 'giemsa'"),
        ({"size_px": (511, 2000)}, "at least 512"),
        ({"mpp": 0.0}, "0.1 to 8"),
    ],
)
def test_values_that_cannot_be_meant(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        slide(**changes)  # type: ignore[arg-type]
