from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from slidetl.errors import UsageError
from slidetl.evaluation.leakage import near_duplicates

Picture = NDArray[np.uint8]


def tissue(seed: int, side_px: int = 96, disc: bool = False) -> Picture:
    """Blobs of stain; each seed another section, in a round field of view if wanted."""
    rng = np.random.default_rng(seed)
    blobs = gaussian_filter(rng.normal(size=(side_px, side_px)), side_px / 12)
    grey = 170 + 60 * blobs / abs(blobs).max()
    if disc:
        y, x = np.mgrid[-1 : 1 : side_px * 1j, -1 : 1 : side_px * 1j]
        grey[x**2 + y**2 > 0.9] = 0
    return np.asarray(np.clip(np.stack([grey, grey * 0.7, grey * 0.9], axis=2), 0, 255), np.uint8)


def scanned_again(picture: Picture) -> Picture:
    """Turned, mirrored, darker, noisier and larger."""
    rng = np.random.default_rng(9)
    turned = np.rot90(picture)[:, ::-1].astype(np.float64)
    larger = turned.repeat(2, axis=0).repeat(2, axis=1)
    return np.clip(larger * 0.8 + 10 + rng.normal(0, 6, larger.shape), 0, 255).astype(np.uint8)


# Three discs are left out: so few pictures do not tell what all of them have in common.
@pytest.mark.parametrize(("disc", "n"), [(False, 3), (False, 30), (True, 30)])
def test_a_section_scanned_again_is_found_and_nothing_else(disc: bool, n: int) -> None:
    pictures = [tissue(seed, disc=disc) for seed in range(n)]
    pictures.append(scanned_again(pictures[1]))
    ((first, second, correlation),) = near_duplicates(pictures)
    assert (first, second) == (1, n)
    assert 0.95 <= correlation <= 1


def section(seed: int, side_px: int = 320, glass: bool = False) -> Picture:
    """Strips of tissue with holes on glass, and perhaps glass around them: no two seeds alike."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(3, side_px, side_px))
    sigmas = (side_px / 10, side_px / 45, side_px / 130)
    shape, holes, nuclei = (gaussian_filter(of, sigma) for of, sigma in zip(noise, sigmas, strict=True))
    inside = (shape > 0) & (holes < 1.2 * holes.std())
    if glass:
        y, x = np.mgrid[-1 : 1 : side_px * 1j, -1 : 1 : side_px * 1j]
        along, across = rng.uniform(0.6, 0.95, 2)
        inside &= (x / along) ** 2 + (y / across) ** 2 < 1
    grey = np.where(inside, 160 + 12 * nuclei / nuclei.std(), 245)
    return np.asarray(np.clip(np.stack([grey, grey * 0.8, grey * 0.9], axis=2), 0, 255), np.uint8)


def cropped(picture: Picture, left: float, right: float, top: float, bottom: float, zoom: float) -> Picture:
    """Without some of each side, turned, paler, noisier, and at another spacing."""
    height, width = picture.shape[:2]
    rows = slice(round(top * height), round((1 - bottom) * height))
    part = picture[rows, round(left * width) : round((1 - right) * width)]
    size = (round(part.shape[1] * zoom), round(part.shape[0] * zoom))
    again = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BOX), np.float64)
    again = np.rot90(again * 0.85 + 20 + np.random.default_rng(1).normal(0, 4, again.shape))
    return np.clip(again, 0, 255).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 30])  # the mean of many is taken out, spectra are compared first
@pytest.mark.parametrize("sides", [(0.1, 0, 0.1, 0), (0, 0.1, 0.05, 0.1), (0.02, 0.02, 0.02, 0.02)])
def test_a_section_in_another_frame_is_found_and_nothing_else(
    n: int, sides: tuple[float, float, float, float]
) -> None:
    pictures = [section(seed) for seed in range(n)]
    pictures.append(cropped(pictures[1], *sides, zoom=0.8))
    pictures.append(cropped(pictures[2], *sides, zoom=1.0)[:, ::-1])
    found = near_duplicates(pictures, [1.0] * n + [1 / 0.8, 1.0])
    assert {(first, second) for first, second, _ in found} == {(1, n), (2, n + 1)}
    assert all(0.65 <= likeness <= 1 for _, _, likeness in found)


@pytest.mark.slow
def test_a_wider_scan_of_the_same_section_is_found() -> None:
    """More glass around it, at the same spacing."""
    pictures = [section(seed, glass=True) for seed in range(25)]
    wider = np.full((400, 420, 3), 245, np.uint8)
    wider[50:370, 70:390] = pictures[3]
    ((first, second, _),) = near_duplicates([*pictures, wider])
    assert (first, second) == (3, 25)


def test_spacings_must_fit() -> None:
    for mpp in ([1.0], [1.0, 0.0]):
        with pytest.raises(UsageError, match="a spacing above 0 for each"):
            near_duplicates([section(0), section(1)], mpp)


def test_pairs_come_most_alike_first() -> None:
    picture = tissue(0)
    found = near_duplicates([picture, tissue(1), scanned_again(picture), picture])
    assert found[0][:2] == (0, 3)
    assert found[0][2] == pytest.approx(1)
    assert {pair[:2] for pair in found[1:]} == {(0, 2), (2, 3)}


def test_few_pictures_are_held_at_a_time() -> None:
    pictures = [tissue(seed) for seed in range(12)]
    pictures.append(scanned_again(pictures[1]))
    held, most = weakref.WeakValueDictionary[int, Picture](), 0

    class Read:
        def __iter__(self) -> Iterator[Picture]:
            nonlocal most
            for number in range(len(pictures)):
                picture = pictures[number].copy()
                held[id(picture)] = picture
                most = max(most, len(held))
                yield picture

    assert near_duplicates(Read()) == near_duplicates(pictures) != []
    assert 1 <= most <= 4  # loops keep the one before


def test_pictures_of_one_colour_are_like_nothing() -> None:
    white = np.full((40, 50, 3), 255, np.uint8)
    assert near_duplicates([white, white, tissue(0)]) == []
    assert near_duplicates([white]) == []


def test_the_threshold_is_a_correlation() -> None:
    with pytest.raises(UsageError, match="above 0 and up to 1, not 0"):
        near_duplicates([], threshold=0)
