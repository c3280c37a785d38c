from __future__ import annotations

import colorsys

import numpy as np

from slidetl.data.augment import Augmentation


def tiles(n: int = 4) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3)).astype(np.uint8)


def test_same_seed_same_tiles() -> None:
    augmentation = Augmentation()
    first = augmentation(tiles(), 7)
    assert first.shape == (4, 16, 16, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, augmentation(tiles(), 7))
    np.testing.assert_array_equal(first, Augmentation()(tiles(), 7))
    assert (first != augmentation(tiles(), 8)).any()
    assert (first != tiles()).any()


def test_flips_alone_only_move_pixels() -> None:
    augmented = Augmentation(brightness=0, contrast=0, saturation=0)(tiles(8), 1)
    moved = 0
    for before, after in zip(tiles(8), augmented, strict=True):
        symmetries = [np.rot90(side, turns) for side in (before, before[:, ::-1]) for turns in range(4)]
        assert any(np.array_equal(after, symmetry) for symmetry in symmetries)
        moved += not np.array_equal(before, after)
    assert moved


def test_hue_stays() -> None:
    blue = np.full((1, 8, 8, 3), (40, 60, 160), np.uint8)
    hue = colorsys.rgb_to_hsv(40, 60, 160)[0]
    for seed in range(20):
        red, green, blue_value = Augmentation()(blue, seed)[0, 0, 0].tolist()
        assert abs(colorsys.rgb_to_hsv(red, green, blue_value)[0] - hue) < 0.02
