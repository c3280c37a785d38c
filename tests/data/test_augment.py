from __future__ import annotations

import colorsys
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageEnhance

from slidetl.data.augment import Augmentation, Pipeline, draw_sheet
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


STAIN = Path(__file__).parents[2] / "configs" / "augmentation" / "stain.yaml"


def shipped() -> Pipeline:
    return Pipeline(yaml.safe_load(STAIN.read_text())["data"]["augmentation"])


def test_a_pipeline_gives_a_tile_the_same_changes_in_any_order_thread_and_process() -> None:
    pipeline, before = shipped(), tiles(6)
    changes = pipeline.draw(6, 3)

    def changed(pipeline: Pipeline, number: int) -> bytes:
        out = np.empty_like(before[number])
        pipeline.apply(before[number], changes[number], out)
        return bytes(out)

    expected = [changed(pipeline, number) for number in range(6)]
    assert len(set(expected)) == 6
    sent = pickle.loads(pickle.dumps(shipped()))
    with ThreadPoolExecutor(2) as pool:
        for other in (pipeline, sent):
            assert (
                list(pool.map(lambda n, other=other: changed(other, n), reversed(range(6)))) == expected[::-1]
            )


def test_a_pipeline_names_the_transforms_that_move_hue() -> None:
    inner = {"class_path": "albumentations.ToGray"}
    nested = {"class_path": "albumentations.OneOf", "init_args": {"transforms": [inner]}}
    assert shipped().moves_hue == ("HEStain",)
    assert Pipeline([nested, {"class_path": "albumentations.D4"}]).moves_hue == ("ToGray",)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ({"class_path": "os.system", "init_args": {"command": "true"}}, "expected a transform such as"),
        ({"class_path": "albumentations.core.composition.os.system"}, "expected a transform such as"),
        ({"class_path": "albumentations.Compose_"}, "expected a transform such as"),
        ({"class_path": "albumentations.GaussianBlur", "init_args": {"sigma_limit": -1}}, "GaussianBlur: "),
        ({"class_path": "albumentations.D4", "init_args": {"sigma": 1}}, "D4: Argument"),
    ],
)
def test_what_is_no_transform_is_refused(transform: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=rf"data\.augmentation: {words}"):
        Pipeline([transform])


def test_a_pipeline_that_resizes_is_refused() -> None:
    crop = Pipeline([{"class_path": "albumentations.RandomCrop", "init_args": {"height": 8, "width": 8}}])
    with pytest.raises(UsageError, match=r"expected tiles \(16, 16, 3\) uint8 back, found \(8, 8, 3\)"):
        crop.apply(tiles()[0], crop.draw(1, 0)[0], np.empty((16, 16, 3), np.uint8))


def test_a_sheet_has_the_tile_itself_first() -> None:
    tile = tiles()[0]
    sheet = draw_sheet(tile, Augmentation(), 2, 3, seed=0)
    assert sheet.shape == (44, 64, 3)
    np.testing.assert_array_equal(sheet[4:20, 4:20], tile)
    assert (sheet[4:20, 24:40] != tile).any() and (sheet[:4, :24] == 0).all()
