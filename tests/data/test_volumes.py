"""Volumes as training data: bags, augmentation, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from slidetl.data.augment import Augmentation, VolumeAugmentation, fit_augmentation
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.datasets import BagDataset, ChunkDataset, collate_bags
from slidetl.data.study import read_study
from slidetl.data.tasks import Task
from slidetl.errors import ManifestError, UsageError
from tests.volumes.studies import VolumeStudy, source_rows, write_study

TASKS = (
    Task("malignancy", "malignancy", ("1", "2", "3", "4", "5"), readers=True),
    Task("diameter", "diameter_mm", numeric=True),
)
PATCH = np.random.default_rng(0).integers(-1000, 400, (6, 6, 6)).astype(np.int16)


def changed(augmentation: VolumeAugmentation, change: np.ndarray) -> np.ndarray:
    out = np.empty_like(PATCH)
    augmentation.apply(PATCH, change, out)
    return out


def test_bags_are_volumes_of_the_window_from_zero_to_one(nodules: VolumeStudy) -> None:
    slides = read_study(nodules.manifest, nodules.cache, 2, TASKS).slides
    bags = BagDataset(slides, 2, None, seed=0)
    bag = bags[(0, 1)]
    hu = slides[1].cache.read([0])[0]
    assert bag["tiles"].shape == (2, 1, 16, 16, 16) and bag["tiles"].dtype == torch.float32
    expected = torch.from_numpy((hu.clip(-1000, 400) + 1000) / 1400).float()
    torch.testing.assert_close(bag["tiles"][0, 0], expected)
    assert bag["mask"].tolist() == [True, False] and torch.equal(bag["tiles"][1], bag["tiles"][0])
    assert bag["labels"]["malignancy"] == 1 and bag["labels"]["diameter"] == 6.0
    assert bag["votes"]["malignancy"].tolist() == [1, 1]
    batch = collate_bags([bags[(0, 0)], bag])
    assert batch["tiles"].shape == (2, 2, 1, 16, 16, 16) and batch["labels"]["diameter"].isnan().tolist() == [
        True,
        False,
    ]
    assert batch["votes"]["malignancy"].tolist() == [[-1, -1], [1, 1]]
    chunk = ChunkDataset(slides, 4)[1]
    assert torch.equal(chunk["tiles"][0], bag["tiles"][0]) and chunk["labels"]["diameter"] == 6.0


def test_whole_series_are_evaluated_a_few_patches_at_a_time(scans: VolumeStudy) -> None:
    data = SlideDataModule(str(scans.manifest), str(scans.cache), ["no", "yes"], num_workers=0)
    data.setup("test")
    assert data.test_dataloader().dataset.chunk_size == 32  # type: ignore[attr-defined] # of ChunkDataset


def test_seed_and_epoch_alone_decide_the_changes(nodules: VolumeStudy) -> None:
    slides = read_study(nodules.manifest, nodules.cache, 2, TASKS).slides
    bags = BagDataset(slides, 1, VolumeAugmentation(), seed=1)
    again = BagDataset(slides, 1, VolumeAugmentation(), seed=1, threads=2)
    assert torch.equal(bags[(3, 1)]["tiles"], again[(3, 1)]["tiles"])
    assert not torch.equal(bags[(3, 1)]["tiles"], bags[(4, 1)]["tiles"])


@pytest.mark.parametrize(("symmetries", "count"), [("axial", 16), ("cube", 48), ("none", 1)])
def test_symmetries_are_those_of_the_cube_that_are_asked_for(symmetries: str, count: int) -> None:
    augmentation = VolumeAugmentation(symmetries, 0, 0, 0)  # type: ignore[arg-type] # one of its words
    changes = augmentation.draw(2000, seed=0)
    assert set(changes[:, 0]) == set(range(count))
    found = {
        changed(augmentation, change).tobytes(): changed(augmentation, change) for change in changes[:800]
    }
    assert len(found) == count
    corners = np.indices((2, 2, 2)).reshape(3, -1).T * 5
    distances = np.sort(PATCH[tuple(corners.T)])
    slices = {tuple(np.sort(plane.ravel())) for plane in PATCH}
    for patch in found.values():  # a symmetry keeps the corners; an axial one the axial slices too
        assert np.array_equal(np.sort(patch[tuple(corners.T)]), distances)
        is_axial = {tuple(np.sort(plane.ravel())) for plane in patch} == slices
        assert is_axial or symmetries == "cube"


def test_intensities_move_within_their_bounds() -> None:
    still = VolumeAugmentation("none", shift_hu=30, scale=0.1, noise_hu=0)
    changes = still.draw(500, seed=2)
    assert 0.1 < (changes[:, 1] == 0).mean() < 0.3  # a fifth keeps its intensities
    for change in changes[:50]:
        moved = changed(still, change).astype(float)
        expected = (PATCH + 1000.0) * (1 + change[2]) - 1000 + change[1]
        assert abs(moved - expected).max() <= 0.51 and abs(change[1]) <= 30 and abs(change[2]) <= 0.1
    noisy = VolumeAugmentation("none", shift_hu=0, scale=0, noise_hu=50)
    change = np.array([0, 0, 0, 50.0, 7])
    noise = changed(noisy, change) - PATCH.astype(float)
    assert 40 < noise.std() < 60 and np.array_equal(changed(noisy, change), changed(noisy, change))
    for wrong in ({"scale": 1.0}, {"shift_hu": -1}, {"noise_hu": float("nan")}):
        with pytest.raises(UsageError, match="augmentation"):
            VolumeAugmentation(**wrong)


def test_augmentation_of_tiles_is_not_for_volumes() -> None:
    assert fit_augmentation(None, is_volume=True) == VolumeAugmentation()
    assert fit_augmentation(None, is_volume=False) == Augmentation()
    with pytest.raises(
        UsageError, match=r"data\.augmentation is Augmentation, but the cache has volumes; give"
    ):
        fit_augmentation(Augmentation(flips=False), is_volume=True)
    with pytest.raises(UsageError, match="VolumeAugmentation, but the cache has tiles of slides"):
        fit_augmentation(VolumeAugmentation(), is_volume=False)


def test_readers_and_numbers_are_checked(nodules: VolumeStudy, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="task x: of_tiles, readers and numeric exclude each other"):
        Task("x", "x", readers=True, numeric=True)
    with pytest.raises(UsageError, match="task x: a number has no grades"):
        Task("x", "x", ("0", "1"), numeric=True)
    text = nodules.manifest.read_text()
    broken = tmp_path / "broken.csv"
    broken.write_text(text.replace("6.0", "six", 1))
    with pytest.raises(ManifestError, match=r"diameter_mm must be a finite number .* found 'six'"):
        read_study(broken, nodules.cache, 2, TASKS)
    rows = [{k: v for k, v in row.items() if "_reader" not in k} for row in source_rows(4)]
    alone = write_study(tmp_path, "alone", rows)
    data = SlideDataModule(str(alone.manifest), str(alone.cache), ["no", "yes"], tasks=list(TASKS))
    with pytest.raises(
        UsageError, match="task malignancy takes the readers' labels, and no training slide has"
    ):
        data.setup("fit")
