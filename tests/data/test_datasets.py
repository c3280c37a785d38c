from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slidetl.data.augment import Augmentation
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.datasets import BagDataset, ChunkDataset, EpochSampler
from slidetl.data.manifest import read_manifest
from slidetl.data.study import CachedSlide
from slidetl.errors import CacheCorruptError, CacheMismatchError
from slidetl.tiles.features import FeatureSource, write_features
from slidetl.tiles.store import SlideCache
from tests.conftest import Study


def slides(study: Study, n: int = 3) -> list[CachedSlide]:
    rows = read_manifest(study.manifest).rows[:n]
    return [CachedSlide(row, SlideCache.open(study.cache / f"{row.slide_id}.zarr")) for row in rows]


def test_bags_depend_on_seed_and_epoch_alone(study: Study) -> None:
    dataset = BagDataset(slides(study), 8, Augmentation(), seed=1)
    bag = dataset[(0, 2)]
    assert bag["tiles"].shape == (8, 3, 64, 64) and bag["tiles"].dtype == torch.uint8
    assert bag["mask"].all() and bag["grade"] == dataset.slides[2].row.grade
    again = BagDataset(slides(study), 8, Augmentation(), seed=1)[(0, 2)]
    assert torch.equal(bag["tiles"], again["tiles"])
    assert not torch.equal(bag["tiles"], dataset[(1, 2)]["tiles"])
    assert not torch.equal(
        bag["tiles"], BagDataset(slides(study), 8, Augmentation(), seed=2)[(0, 2)]["tiles"]
    )


def test_bag_draws_without_replacement_and_pads(study: Study) -> None:
    (slide,) = slides(study, 1)
    n = len(slide.cache)
    bag = BagDataset([slide], n + 5, None, seed=0)[(0, 0)]
    assert bag["mask"].tolist() == [True] * n + [False] * 5
    every = slide.cache.read(np.arange(n))
    np.testing.assert_array_equal(bag["tiles"][:n].permute(0, 2, 3, 1).numpy(), every)
    np.testing.assert_array_equal(bag["tiles"][n:], bag["tiles"][:5])


@pytest.mark.parametrize("augmentation", [None, Augmentation()])
def test_padding_leaves_the_statistics_of_a_batch_alone(
    study: Study, augmentation: Augmentation | None
) -> None:
    """Filled up with black, two thirds of what batch norm counted were no tissue."""
    (slide,) = slides(study, 1)
    n = len(slide.cache)
    norms = []
    for size in (n, 3 * n):
        bag = BagDataset([slide], size, augmentation, seed=0)[(0, 0)]
        norm = nn.BatchNorm2d(3, momentum=None).double()
        norm(bag["tiles"].double())
        norms.append(norm)
    assert norms[0].running_mean is not None and norms[1].running_mean is not None
    torch.testing.assert_close(norms[1].running_mean, norms[0].running_mean)
    torch.testing.assert_close(norms[1].running_var, norms[0].running_var, rtol=1e-3, atol=0)


def test_threads_read_the_same_bags(study: Study) -> None:
    for size in (1, 8, 60):
        alone, shared = (
            BagDataset(slides(study), size, Augmentation(), seed=1, threads=threads)[(3, 1)]
            for threads in (1, 3)
        )
        assert torch.equal(alone["tiles"], shared["tiles"])
        assert torch.equal(alone["mask"], shared["mask"])


def test_a_damaged_tile_is_an_error_of_its_thread_too(study: Study, tmp_path: Path) -> None:
    (slide,) = slides(study, 1)
    shutil.copytree(slide.cache.path, tmp_path / slide.cache.path.name)
    for shard in tmp_path.glob("*.zarr/tiles/c/*/*/*/*"):
        content = bytearray(shard.read_bytes())
        content[50] ^= 0xFF
        shard.write_bytes(content)
    damaged = CachedSlide(slide.row, SlideCache.open(tmp_path / slide.cache.path.name))
    with pytest.raises(CacheCorruptError, match="is damaged"):
        BagDataset([damaged], 60, None, seed=0, threads=2)[(0, 0)]


def test_chunks_cover_each_slide_once_in_order(study: Study) -> None:
    chosen = slides(study)
    dataset = ChunkDataset(chosen, 7)
    seen: dict[str, list[torch.Tensor]] = {}
    ended: list[str] = []
    for index in range(len(dataset)):
        chunk = dataset[index]
        assert chunk["slide_id"] not in ended
        seen.setdefault(chunk["slide_id"], []).append(chunk["tiles"])
        if chunk["last"]:
            ended.append(chunk["slide_id"])
    assert ended == [slide.row.slide_id for slide in chosen]
    for slide in chosen:
        tiles = torch.cat(seen[slide.row.slide_id]).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(tiles, slide.cache.read(np.arange(len(slide.cache))))


def test_sampler_shuffles_each_epoch_and_shares_among_ranks() -> None:
    sampler = EpochSampler(10, seed=0)
    first = list(sampler)
    assert sorted(first) == [(0, number) for number in range(10)]
    sampler.set_epoch(1)
    assert [number for _, number in sampler] != [number for _, number in first]
    ranks = [list(EpochSampler(10, 0, rank, 3)) for rank in range(3)]
    assert [len(rank) for rank in ranks] == [3, 3, 3] == [len(EpochSampler(10, 0, 0, 3))] * 3
    assert len({number for rank in ranks for _, number in rank}) == 9


@pytest.mark.parametrize("made", [True, False], ids=["made", "imported"])
def test_features_of_another_network_in_the_middle_of_a_training_are_refused(
    made: bool, study: Study, tmp_path: Path
) -> None:
    shutil.copytree(study.cache, tmp_path / "cache")
    few = slides(Study(study.manifest, tmp_path / "cache"))

    def store(network: str) -> None:
        sha256 = network * 64 if made else ""
        source = FeatureSource(network, "", sha256, (0.5,) * 3, (0.5,) * 3)
        for slide in few:
            write_features(slide.cache, {"own": (source, np.zeros((len(slide.cache), 4), np.float16))})

    store("a")
    data = SlideDataModule.from_slides(few, few, features="own", bag_size=0, num_workers=0, every_grade=False)
    data.setup("fit")
    loaders = data.train_dataloader(), data.val_dataloader()
    assert all(next(iter(loader))["stored"].shape[-1] == 4 for loader in loaders)
    store("b")
    for loader in loaders:
        with pytest.raises(CacheMismatchError, match="store them under another --name"):
            next(iter(loader))
