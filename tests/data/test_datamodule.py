from __future__ import annotations

import contextlib
import csv
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from slidetl.data.datamodule import SlideDataModule
from slidetl.data.datasets import Bag, BagDataset, EpochBatches, EpochSampler, collate_bags
from slidetl.data.resuming import ResumableLoader
from slidetl.data.sampling import AttentionGuided, Sampling, Uniform
from slidetl.errors import CacheMismatchError, CacheMissingError, UsageError
from slidetl.tiles.grid import TileSpec
from tests.conftest import Study

CPU = torch.device("cpu")


def rewrite(study: Study, target: Path, /, **columns: list[str]) -> Path:
    """The study's manifest with columns replaced or added, and absolute paths."""
    with study.manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["path"] = str(study.manifest.parent / row["path"])
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return target


def test_parts_are_disjoint_by_patient_and_cover_the_study(study: Study) -> None:
    data = SlideDataModule(str(study.manifest), str(study.cache), num_workers=0)
    data.setup("fit")
    assert data.tile_spec == TileSpec(mpp=4, tile_size_px=64)
    patients = {
        part: {slide.row.patient_id for slide in data.slides[part]} for part in ("train", "val", "test")
    }
    assert all(patients.values())
    assert not patients["train"] & patients["val"] | patients["train"] & patients["test"]
    assert (
        sum(len(data.slides[part]) for part in ("train", "val", "test")) == 20 == len(data.slides["predict"])
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["tiles"].shape == (4, 48, 3, 64, 64) and batch["mask"].shape == (4, 48)


def test_workers_read_the_same_bags_as_the_process_itself(study: Study) -> None:
    batches = []
    for workers in (0, 2):
        data = SlideDataModule(str(study.manifest), str(study.cache), num_workers=workers, bag_size=4)
        data.setup("fit")
        batches.append([batch["tiles"] for batch in data.train_dataloader()])
    assert len(batches[0]) == len(batches[1])
    for here, there in zip(*batches, strict=True):
        assert torch.equal(here, there)
        for tiles in (here, there):  # else every step would transpose them
            assert tiles.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_split_column_decides(study: Study, tmp_path: Path) -> None:
    split = ["train"] * 10 + ["val"] * 4 + ["test"] * 6
    data = SlideDataModule(str(rewrite(study, tmp_path / "m.csv", split=split)), str(study.cache))
    data.setup("fit")
    assert [len(data.slides[part]) for part in ("train", "val", "test")] == [10, 4, 6]


@pytest.mark.parametrize(("stain", "warns"), [("trichrome", True), ("Sirius red", True), ("he", False)])
def test_a_pipeline_that_moves_hue_is_warned_of_where_hue_is_the_collagen(
    study: Study, tmp_path: Path, stain: str, warns: bool
) -> None:
    path = rewrite(study, tmp_path / "m.csv", stain=[stain] * 20)
    grey = [{"class_path": "albumentations.ToGray", "init_args": {"p": 1.0}}]
    data = SlideDataModule(str(path), str(study.cache), num_workers=0, bag_size=4, augmentation=grey)
    with pytest.warns(UserWarning, match="ToGray changes hue") if warns else contextlib.nullcontext():
        data.setup("fit")
    if not warns:
        tiles = next(iter(data.train_dataloader()))["tiles"]
        assert torch.equal(tiles[:, :, 0], tiles[:, :, 2])


def test_slides_lost_in_tiling_are_said_and_move_no_other_patient(study: Study, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    names = sorted(path.name for path in study.cache.glob("*.zarr"))
    for name in names[1:]:
        (cache / name).symlink_to(study.cache / name)
    whole = SlideDataModule(str(study.manifest), str(study.cache))
    whole.setup("fit")
    some = SlideDataModule(str(study.manifest), str(cache))
    with pytest.warns(UserWarning, match=f"1 of 20 slides are not in the cache.*{names[0][:-5]}"):
        some.setup("fit")
    for part in ("train", "val", "test"):
        kept = {slide.row.slide_id for slide in whole.slides[part]} - {names[0].removesuffix(".zarr")}
        assert {slide.row.slide_id for slide in some.slides[part]} == kept


def test_slides_without_a_grade_are_left_out_but_predicted(study: Study, tmp_path: Path) -> None:
    grades = ["", ""] + [str(number % 5) for number in range(18)]
    data = SlideDataModule(str(rewrite(study, tmp_path / "m.csv", grade=grades)), str(study.cache))
    with pytest.warns(UserWarning, match="2 of 20 slides have no grade"):
        data.setup("fit")
    assert sum(len(data.slides[part]) for part in ("train", "val", "test")) == 18
    assert len(data.slides["predict"]) == 20


def test_missing_training_grade_is_refused(study: Study, tmp_path: Path) -> None:
    split, grades = ["train"] * 16 + ["val"] * 2 + ["test"] * 2, ["0", "1"] * 10
    manifest = str(rewrite(study, tmp_path / "m.csv", split=split, grade=grades))
    with pytest.raises(UsageError, match=r"no training slide has grade 2, 3, 4.*'split'.*data\.grades"):
        SlideDataModule(manifest, str(study.cache)).setup("fit")
    SlideDataModule(manifest, str(study.cache)).setup("test")  # elsewhere predictions are pooled


def test_a_grade_may_be_missing_from_validation_and_test(study: Study, tmp_path: Path) -> None:
    split = ["train"] * 16 + ["val"] * 2 + ["test"] * 2
    grades = [str(number % 5) for number in range(16)] + ["0"] * 4
    data = SlideDataModule(
        str(rewrite(study, tmp_path / "m.csv", split=split, grade=grades)), str(study.cache)
    )
    data.setup("fit")
    assert {slide.row.grade for slide in data.slides["val"]} == {0}


def test_errors_name_the_remedy(study: Study, tmp_path: Path) -> None:
    with pytest.raises(CacheMissingError, match="run 'slidetl tile' first"):
        SlideDataModule(str(study.manifest), str(tmp_path)).setup("fit")
    with pytest.raises(UsageError, match=r"data\.bag_size must be at least 1, not 0"):
        SlideDataModule("m", "c", bag_size=0)
    with pytest.raises(UsageError, match="two different names"):
        SlideDataModule("m", "c", grades=["a", "a"])
    empty_part = rewrite(study, tmp_path / "m.csv", split=["train"] * 20)
    with pytest.raises(UsageError, match="the val part has no slide"):
        SlideDataModule(str(empty_part), str(study.cache)).setup("fit")


@pytest.mark.slow
def test_slides_tiled_differently_are_refused(study: Study, tmp_path: Path) -> None:
    from slidetl.cli import main

    names = sorted(path.name for path in study.cache.glob("*.zarr"))
    for name in names[1:]:
        (tmp_path / name).symlink_to(study.cache / name)
    lone = tmp_path / "slides"
    lone.mkdir()
    slide = study.manifest.parent / "slides" / names[0].replace(".zarr", ".tiff")
    (lone / slide.name).symlink_to(slide)
    assert main(["tile", str(lone), "--cache", str(tmp_path), "--mpp", "8", "--tile-size", "32"]) == 0
    with pytest.raises(CacheMismatchError, match=r"tiled in 2 different ways \(mpp \[4.0, 8.0\]"):
        SlideDataModule(str(study.manifest), str(tmp_path)).setup("fit")


def test_tiles_of_another_slide_under_the_same_name_are_refused(study: Study, tmp_path: Path) -> None:
    with study.manifest.open(newline="") as file:
        paths = [str(study.manifest.parent / row["path"]) for row in csv.DictReader(file)]
    moved = rewrite(study, tmp_path / "m.csv", path=paths[1:] + paths[:1])
    with pytest.raises(CacheMismatchError, match="the cache holds the tiles of another file"):
        SlideDataModule(str(moved), str(study.cache)).setup("fit")


def test_a_study_that_was_moved_is_known_by_its_content(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.manifest.parent, tmp_path / "data")
    data = SlideDataModule(str(tmp_path / "data" / "manifest.csv"), str(study.cache))
    data.setup("fit")
    assert len(data.slides["predict"]) == 20


def test_slides_that_failed_when_tiled_again_are_left_out(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.cache, tmp_path / "cache")
    ledger = tmp_path / "cache" / "ledger.csv"
    header, first, *others = ledger.read_text().splitlines()
    ledger.write_text("\n".join([header, first.replace(",used,", ",failed,"), *others]) + "\n")
    data = SlideDataModule(str(study.manifest), str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="1 of 20 slides are not in the cache"):
        data.setup("fit")


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_processes_share_out_whole_slides(study: Study, n_ranks: int) -> None:
    seen = []
    for rank in range(n_ranks):
        data = SlideDataModule(str(study.manifest), str(study.cache), num_workers=0)
        data.trainer = SimpleNamespace(  # type: ignore[assignment] # what a process of a DDP run is told
            global_rank=rank,
            world_size=n_ranks,
            strategy=SimpleNamespace(root_device=SimpleNamespace(type="cpu")),
        )
        data.setup("test")
        seen.append([chunk["slide_id"] for chunk in data.test_dataloader()])
    assert len({len(slides) for slides in seen}) == 1  # no process waits for another
    assert set().union(*seen) == {slide.row.slide_id for slide in data.slides["test"]}


def test_a_resumed_training_has_its_slides_in_the_order_of_then(study: Study, tmp_path: Path) -> None:
    """Draws, and the kept attention, go by the place of a slide; before, a sorted manifest moved them."""
    begun, resumed = (
        SlideDataModule(str(manifest), str(study.cache), num_workers=0)
        for manifest in (study.manifest, tmp_path / "sorted.csv")
    )
    with rewrite(study, tmp_path / "sorted.csv").open() as file:
        header, *rows = file.readlines()
    (tmp_path / "sorted.csv").write_text("".join([header, *rows[::-1]]))
    begun.setup("fit")
    resumed.past = begun.record
    resumed.setup("fit")
    for part in ("train", "val", "test"):
        then, now = ([slide.row.slide_id for slide in data.slides[part]] for data in (begun, resumed))
        assert then == now
    assert resumed.record == begun.record  # for the next time


def loaded(study: Study, workers: int) -> ResumableLoader[Bag]:
    """A loader that reads ahead over three epochs."""
    data = SlideDataModule(str(study.manifest), str(study.cache), bag_size=2, num_workers=0)
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    assert isinstance(dataset, BagDataset)
    batches = EpochBatches(EpochSampler(len(dataset), seed=0), 4, stop=3)
    options = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": collate_bags}
    return ResumableLoader(dataset, batches, **options)


def epoch_of(loader: ResumableLoader[Bag], epoch: int) -> list[torch.Tensor]:
    loader.batch_sampler.sampler.set_epoch(epoch)
    return [batch["tiles"] for batch in loader]


def test_reading_ahead_changes_no_batch_and_no_resumed_epoch(study: Study) -> None:
    one_by_one = [epoch_of(loaded(study, 0), epoch) for epoch in range(3)]
    assert not torch.equal(one_by_one[0][0], one_by_one[1][0])
    loader = loaded(study, 1)
    for epoch in (0, 1, 2, 1):  # the last is out of turn
        for ours, theirs in zip(epoch_of(loader, epoch), one_by_one[epoch], strict=True):
            assert torch.equal(ours, theirs)
    begun = iter(loader)
    loader.batch_sampler.sampler.set_epoch(2)
    next(begun), next(begun)
    state = loader.state_dict()
    assert state == {"epoch": 2, "batches": 2}
    resumed = loaded(study, 1)
    resumed.load_state_dict(state)
    for ours, theirs in zip(epoch_of(resumed, 2), one_by_one[2][2:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("sampling", "ahead"), [(Uniform(), True), (AttentionGuided(), False)])
def test_the_next_epoch_is_read_before_the_last_step_of_this_one(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: Sampling, ahead: bool
) -> None:
    notes, read = tmp_path / "notes", BagDataset.__getitem__

    def noted(self: BagDataset, index: tuple[int, int]) -> Bag:
        with notes.open("a") as file:  # by a worker, which is forked
            file.write(f"{index[0]}")
        return read(self, index)

    def read_of(epoch: int) -> int:
        return notes.read_text().count(str(epoch)) if notes.exists() else 0

    monkeypatch.setattr(BagDataset, "__getitem__", noted)
    data = SlideDataModule(
        str(study.manifest), str(study.cache), bag_size=2, batch_size=2, num_workers=1, sampling=sampling
    )
    data.setup("fit")
    data.trainer = SimpleNamespace(  # type: ignore[assignment] # what a training is told
        global_rank=0, world_size=1, max_epochs=2, strategy=SimpleNamespace(root_device=CPU), num_devices=1
    )
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    batches = iter(loader)
    for _ in range(len(loader) - 1):
        next(batches)
    deadline = time.monotonic() + (60 if ahead else 0.5)
    while read_of(1) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (read_of(1) >= 2) == ahead
    next(batches)
    loader.batch_sampler.sampler.set_epoch(1)
    assert len(list(loader)) == len(loader)
    assert read_of(0) == read_of(1) == len(data.slides["train"]) and not read_of(2)  # each once, none beyond


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_begun_early_gives_the_same_batches_and_draws(study: Study, workers: int) -> None:
    expected = [epoch_of(loaded(study, 0), epoch) for epoch in (1, 2)]
    loader = loaded(study, workers)
    loader.batch_sampler.sampler.set_epoch(1)
    state = torch.get_rng_state()
    loader.read_ahead()
    assert torch.equal(torch.get_rng_state(), state)
    begun = loader._live
    for number, epoch in enumerate((1, 2)):
        for ours, theirs in zip(epoch_of(loader, epoch), expected[number], strict=True):
            assert torch.equal(ours, theirs)
    assert not workers or loader._live is begun


def test_workers_are_chosen_by_the_machine(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16))
    data = SlideDataModule(str(study.manifest), str(study.cache))
    assert data._workers == 2
    for name, devices, cores, workers in (
        ("cpu", 1, None, 2),
        ("cuda", 1, None, 14),
        ("cuda", 2, None, 6),
        ("cuda", 16, None, 1),
        ("cpu", 1, 4, 2),
        ("cuda", 1, 4, 2),
    ):
        data.cores = cores
        data.trainer = SimpleNamespace(  # type: ignore[assignment] # what a training is told
            strategy=SimpleNamespace(root_device=torch.device(name)), num_devices=devices
        )
        assert data._workers == workers
