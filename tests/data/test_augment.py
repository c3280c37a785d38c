from __future__ import annotations

import colorsys

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from slidetl.data.augment import Augmentation
from slidetl.errors import UsageError


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
    augmented = Augmentation(brightness=0, contrast=0, saturation=0)(tiles(64), 1)
    seen = set()
    for before, after in zip(tiles(64), augmented, strict=True):
        symmetries = [np.rot90(side, turns) for side in (before, before[:, ::-1]) for turns in range(4)]
        seen.add([np.array_equal(after, symmetry) for symmetry in symmetries].index(True))
    assert seen == set(range(8))


def test_colours_change_as_pillow_changes_them() -> None:
    before = np.random.default_rng(1).integers(60, 180, (12, 16, 16, 3)).astype(np.uint8)
    augmentation = Augmentation(flips=False, brightness=0.2, contrast=0.2, saturation=0.2)
    changes = augmentation.draw(len(before), 5)
    assert (changes[:, 1:] == 1).all(1).any() and (changes[:, 1:] != 1).all(1).sum() > 6
    for tile, change, after in zip(before, changes, augmentation(before, 5), strict=True):
        image = Image.fromarray(tile)
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for kind, factor in zip(kinds, change[1:], strict=True):
            image = kind(image).enhance(factor)
        assert np.abs(np.asarray(image).astype(int) - after).max() <= 3  # Pillow rounds after each


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(UsageError, match=r"augmentation\.contrast must be from 0 to below 1, not 1"):
        Augmentation(contrast=1)


def test_hue_stays() -> None:
    blue = np.full((1, 8, 8, 3), (40, 60, 160), np.uint8)
    hue = colorsys.rgb_to_hsv(40, 60, 160)[0]
    for seed in range(20):
        red, green, blue_value = Augmentation()(blue, seed)[0, 0, 0].tolist()
        assert abs(colorsys.rgb_to_hsv(red, green, blue_value)[0] - hue) < 0.02
