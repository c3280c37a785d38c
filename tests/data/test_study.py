from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path

import pytest

from slidetl.data.datamodule import SlideDataModule
from slidetl.data.study import read_study
from slidetl.errors import CacheMismatchError, UsageError
from slidetl.tiles.ledger import Ledger
from tests.conftest import Study
from tests.data.test_datamodule import rewrite


def test_a_study_is_its_manifest_with_the_tiles_of_each_slide(study: Study) -> None:
    read = read_study(study.manifest, study.cache, 5)
    with study.manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(slide.row.slide_id, str(slide.row.grade)) for slide in read.slides] == [
        (row["slide_id"], row["grade"]) for row in rows
    ]
    assert all(slide.cache.slide_id == slide.row.slide_id for slide in read.slides)
    assert read.cache.is_absolute() and read.spec == read.slides[0].cache.spec


def test_tiles_under_the_name_of_another_slide_are_refused(study: Study, tmp_path: Path) -> None:
    """The folder of one slide's tiles was renamed: its header still has the true name."""
    shutil.copytree(study.cache, tmp_path / "cache")
    one, two = sorted((tmp_path / "cache").glob("*.zarr"))[:2]
    shutil.rmtree(one)
    shutil.copytree(two, one)
    with pytest.raises(CacheMismatchError, match=f"slide '{one.stem}': the cache holds the tiles of another"):
        read_study(study.manifest, tmp_path / "cache")


def test_tiles_of_another_content_than_the_ledger_has_are_refused(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.cache, tmp_path / "cache")
    ledger = Ledger(tmp_path / "cache" / "ledger.csv")
    first = ledger.rows()[0]
    ledger.record([dataclasses.replace(first, fingerprint="0" * 64)])
    with pytest.raises(CacheMismatchError, match=f"slide '{first.slide_id}'.*as the ledger has it"):
        read_study(study.manifest, tmp_path / "cache")


def test_slides_can_be_given_directly(study: Study, tmp_path: Path) -> None:
    graded = read_study(study.manifest, study.cache, 5).graded
    data = SlideDataModule.from_slides(graded[:12], graded[12:16], graded[16:], num_workers=0, bag_size=4)
    data.setup("fit")
    assert data.tile_spec == graded[0].cache.spec
    assert sum(len(batch["tiles"]) for batch in data.train_dataloader()) == 12
    assert {chunk["slide_id"] for chunk in data.val_dataloader()} == {s.row.slide_id for s in graded[12:16]}
    split = ["train"] * 12 + ["val"] * 4 + ["test"] * 4
    parsed = SlideDataModule(
        str(rewrite(study, tmp_path / "m.csv", split=split)), str(study.cache), num_workers=0, bag_size=4
    )
    parsed.setup("fit")
    for one, other in zip(data.train_dataloader(), parsed.train_dataloader(), strict=True):
        assert one["tiles"].equal(other["tiles"]) and one["grade"].equal(other["grade"])
    with pytest.raises(UsageError, match="the val part has no slide"):
        SlideDataModule.from_slides(graded).setup("fit")
