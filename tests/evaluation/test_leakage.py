from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
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


def test_pairs_come_most_alike_first() -> None:
    picture = tissue(0)
    found = near_duplicates([picture, tissue(1), scanned_again(picture), picture])
    assert found[0][:2] == (0, 3)
    assert found[0][2] == pytest.approx(1)
    assert {pair[:2] for pair in found[1:]} == {(0, 2), (2, 3)}


def test_pictures_of_one_colour_are_like_nothing() -> None:
    white = np.full((40, 50, 3), 255, np.uint8)
    assert near_duplicates([white, white, tissue(0)]) == []
    assert near_duplicates([white]) == []


def test_the_threshold_is_a_correlation() -> None:
    with pytest.raises(UsageError, match="above 0 and up to 1, not 0"):
        near_duplicates([], 0)
