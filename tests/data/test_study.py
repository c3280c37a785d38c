from __future__ import annotations

import csv
import dataclasses
import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from slidetl.cli import main
from slidetl.data import study as data_study
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.manifest import read_manifest
from slidetl.data.study import find_slides, read_study
from slidetl.errors import CacheMismatchError, CacheMissingError, UsageError
from slidetl.slides import Slide, open_slide
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import FAILED, Ledger, LedgerRow
from slidetl.tiles.run import tile_slides
from slidetl.tiles.store import SlideCache, seal_node
from slidetl.tiles.tile import SlideSource
from tests.conftest import Study
from tests.data.test_datamodule import rewrite
from tests.small import small_embed


def test_a_study_is_its_manifest_with_the_tiles_of_each_slide(study: Study) -> None:
    read = read_study(study.manifest, study.cache, 5)
    with study.manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(slide.row.slide_id, str(slide.row.grade)) for slide in read.slides] == [
        (row["slide_id"], row["grade"]) for row in rows
    ]
    assert all(slide.cache.slide_id == slide.row.slide_id for slide in read.slides)
    assert read.folder == study.cache.absolute()


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
    with pytest.raises(CacheMismatchError, match=f"slide '{first.slide_id}'.*the ledger names"):
        read_study(study.manifest, tmp_path / "cache")


def tiled_pictures(folder: Path, *names: str) -> Path:
    """Tiles pictures at 1 um per pixel into the cache beside their folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), len(name), np.uint8)).save(folder / name)
    rows = read_manifest(folder).rows
    cache = folder.parent / "cache"
    spec = TileSpec(mpp=1.0, tile_size_px=32, min_tissue=0)
    tile_slides([SlideSource(row.slide_id, row.path, mpp_replace=1.0) for row in rows], cache, spec, 1)
    return cache


def test_labels_of_folders_are_read_on_the_scale_of_the_study(tmp_path: Path) -> None:
    cache = tiled_pictures(tmp_path / "images", "0/a.png", "4/b.png")
    data = SlideDataModule(str(tmp_path / "images"), str(cache), num_workers=0)
    data.setup("predict")
    assert [slide.row.grade for slide in data.slides["predict"]] == [0, 4]


def test_an_mpp_corrected_after_tiling_is_refused(tmp_path: Path) -> None:
    cache = tiled_pictures(tmp_path / "images", "a.png")
    manifest = tmp_path / "manifest.csv"
    for mpp, is_refused in (("", False), ("1.0", False), ("1.0003", False), ("0.995", False), ("0.5", True)):
        manifest.write_text(f"slide_id,path,patient_id,grade,mpp\na,images/a.png,p,0,{mpp}\n")
        if is_refused:
            with pytest.raises(
                CacheMismatchError, match=r"'a': the manifest's mpp is 0\.5, .* cut with 1 um"
            ):
                read_study(manifest, cache)
        else:
            assert len(read_study(manifest, cache).slides) == 1


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


COMMANDS = (
    *("fit", "find-lr", "validate", "test", "predict"),
    *("fit-features", "compare", "export", "embed", "similarity"),
)


def words(command: str, manifest: Path, cache: Path, trained: Path, folder: Path) -> list[str]:
    """The words of a command on a study."""
    output = ["--output", str(folder / "output")]
    if command in ("fit", "find-lr"):
        return [command, *Study(manifest, cache).options(folder)]
    if command in ("validate", "test", "predict"):
        return [command, *Study(manifest, cache).options(trained)]
    if command == "fit-features":
        return [command, str(manifest), "--cache", str(cache), "--features", "any", *output]
    if command == "compare":
        path = folder / "comparison.yaml"
        arms = {"prior": {"baseline": "prior"}, "site": {"baseline": "site"}}
        protocol = {"outer_folds": 2, "inner_folds": 0}
        config = {
            "manifest": str(manifest),
            "cache": str(cache),
            "protocol": protocol,
            "near_duplicates": 0,
            "arms": arms,
            "primary": {"arm": "site", "against": "prior"},
        }
        path.write_text(yaml.safe_dump(config))
        return [command, "--config", str(path), "--dry-run", *output]
    if command == "export":
        (checkpoint,) = trained.glob("logs/version_0/checkpoints/best.ckpt")
        config = yaml.safe_load((checkpoint.parent.parent / "config.yaml").read_text())
        config["data"] |= {"manifest": str(manifest), "cache": str(cache)}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return [command, str(checkpoint), "--config", str(folder / "config.yaml"), *output]
    if command == "embed":
        return [command, str(cache), *small_embed()]
    networks = ["--before", "pretrained", "--after", "random", *small_embed()]
    return [command, *networks, "--data", str(cache), *output]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_grades_tiles_by_the_label_of_another_slide(
    command: str, study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with study.manifest.open(newline="") as file:
        paths = [str(study.manifest.parent / row["path"]) for row in csv.DictReader(file)]
    manifest, cache = rewrite(study, tmp_path / "m.csv", path=paths[1:] + paths[:1]), study.cache
    if command in ("embed", "similarity"):  # they read no manifest; here the tiles moved
        cache = tmp_path / "cache"
        shutil.copytree(study.cache, cache)
        one, two = sorted(cache.glob("*.zarr"))[:2]
        one.rename(tmp_path / "one")
        two.rename(one)
        (tmp_path / "one").rename(two)
    assert main(words(command, manifest, cache, trained, tmp_path)) == (1 if command == "embed" else 2)
    (line, *others) = [
        line for line in capsys.readouterr().err.splitlines() if "of another file than" in line
    ]
    assert re.search(r"slide 'slide-\d\d': the cache holds the tiles of another file than", line)
    assert bool(others) == (command == "embed")  # which goes on with the next slide
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_that_it_leaves_out_a_slide_that_failed(
    command: str, study: Study, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(study.cache, tmp_path / "cache")
    ledger = Ledger(tmp_path / "cache" / "ledger.csv")
    ledger.record([dataclasses.replace(ledger.rows()[0], status=FAILED, reason="no more")])
    said = f"1 of 20 slides are not in the cache, left out .*: {ledger.rows()[0].slide_id}"
    with pytest.raises(UserWarning, match=said):  # an error in tests, so that nothing is computed
        main(words(command, study.manifest, tmp_path / "cache", trained, tmp_path))


@pytest.mark.filterwarnings("ignore:.*are not in the cache")
def test_a_slide_that_failed_is_not_counted(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(study.cache, tmp_path / "cache")
    ledger = Ledger(tmp_path / "cache" / "ledger.csv")
    ledger.record([dataclasses.replace(ledger.rows()[0], status=FAILED, reason="no more")])
    assert main(words("compare", study.manifest, tmp_path / "cache", tmp_path, tmp_path)) == 0
    assert capsys.readouterr().out.startswith("19 slides")
    assert len(find_slides(tmp_path / "cache")) == 19


def moved(study: Study, folder: Path) -> Study:
    """The study's cache and manifest on another machine, without the slides."""
    (folder / "there").mkdir()
    shutil.copy(study.manifest, folder / "there")
    shutil.copytree(study.cache, folder / "cache")
    return Study(folder / "there" / study.manifest.name, folder / "cache")


def opened_slides(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    opened: list[Path] = []

    def watched(path: Path, **options: Any) -> Slide:
        opened.append(path)
        return open_slide(path, **options)

    monkeypatch.setattr("slidetl.data.study.open_slide", watched)
    return opened


def test_the_cache_is_enough(study: Study, tmp_path: Path) -> None:
    there = moved(study, tmp_path)
    assert len(read_study(there.manifest, there.cache).slides) == 20
    with there.manifest.open(newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    rotated = rewrite(there, there.manifest.with_name("m.csv"), path=paths[1:] + paths[:1])
    with pytest.raises(CacheMismatchError, match=r"nothing shows that the tiles are of .*ledger\.csv has"):
        read_study(rotated, there.cache)
    (there.cache / "ledger.csv").unlink()
    with pytest.raises(CacheMismatchError, match=r"ledger\.csv does not have it"):
        read_study(there.manifest, there.cache)


def test_slides_of_one_file_name_are_told_apart_by_their_folders(study: Study, tmp_path: Path) -> None:
    there = moved(study, tmp_path)
    ledger = Ledger(there.cache / "ledger.csv")
    rows = ledger.rows()
    ledger.record(dataclasses.replace(row, path=f"/scanner/{row.slide_id}/HE.svs") for row in rows)
    paths = [f"/gpu/data/{row.slide_id}/HE.svs" for row in rows]
    kept = rewrite(there, there.manifest.with_name("m.csv"), path=paths)
    assert len(read_study(kept, there.cache).slides) == 20
    with pytest.raises(CacheMismatchError, match="nothing shows"):
        read_study(rewrite(there, there.manifest.with_name("r.csv"), path=paths[1:] + paths[:1]), there.cache)
    with pytest.raises(CacheMismatchError, match="nothing shows"):  # no folder in common, one name for all
        flat = [f"/gpu/{number}/HE.svs" for number in range(20)]
        read_study(rewrite(there, there.manifest.with_name("f.csv"), path=flat), there.cache)


def test_slides_that_were_moved_are_read_only_where_they_look_changed(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = moved(study, tmp_path)
    shutil.copytree(study.manifest.parent / "slides", there.manifest.parent / "slides")  # keeps the times
    opened = opened_slides(monkeypatch)
    read_study(there.manifest, there.cache)
    assert not opened
    monkeypatch.setattr("slidetl.data.study._MUCH", 1000)
    touched, replaced = sorted((there.manifest.parent / "slides").iterdir())[:2]
    os.utime(touched, (1, 1))
    with pytest.warns(UserWarning, match="1 slides moved or changed"):
        read_study(there.manifest, there.cache)
    assert opened == [touched]
    read_study(there.manifest, there.cache)
    assert opened == [touched]  # the ledger knows it now
    shutil.copy(touched, replaced)
    with (
        pytest.warns(UserWarning, match="1 slides moved or changed"),
        pytest.raises(CacheMismatchError, match="the cache holds the tiles of another file"),
    ):
        read_study(there.manifest, there.cache)


def test_slides_that_were_moved_are_read_while_the_ledger_is_open_in_a_spreadsheet(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = moved(study, tmp_path)
    shutil.copytree(study.manifest.parent / "slides", there.manifest.parent / "slides")
    touched = min((there.manifest.parent / "slides").iterdir())
    os.utime(touched, (1, 1))
    opened, replace = opened_slides(monkeypatch), Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).name == "ledger.csv":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return replace(self, target)

    with monkeypatch.context() as held:
        held.setattr(Path, "replace", refuse)
        assert len(read_study(there.manifest, there.cache).slides) == 20
    for _ in range(2):
        read_study(there.manifest, there.cache)
    assert opened == [touched, touched]  # once more, when the ledger is closed


@pytest.mark.slow
def test_a_slide_of_two_patients_is_refused_where_patients_are_divided(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = moved(study, tmp_path)
    ledger = Ledger(there.cache / "ledger.csv")
    one, two = ledger.rows()[:2]
    ledger.record([dataclasses.replace(two, fingerprint=one.fingerprint)])
    attributes = there.cache / f"{two.slide_id}.zarr" / "zarr.json"
    attributes.write_text(attributes.read_text().replace(two.fingerprint, one.fingerprint))
    seal_node(attributes.parent)
    for command in ("fit", "find-lr", "compare", "fit-features"):
        assert main(words(command, there.manifest, there.cache, tmp_path, tmp_path)) == 2
        said = rf"1 pair of slides with the same content.*{one.slide_id} \(.*\) and {two.slide_id} \("
        assert re.search(said, capsys.readouterr().err)


def test_graded_slides_of_which_none_is_tiled_have_no_parts(study: Study) -> None:
    whole = read_study(study.manifest, study.cache)
    ungraded = tuple(
        dataclasses.replace(slide, row=dataclasses.replace(slide.row, grade=None)) for slide in whole.slides
    )
    with pytest.raises(CacheMissingError, match="none of the 20 graded slides of the manifest is here"):
        dataclasses.replace(whole, slides=ungraded).parts(val_fraction=0.15, test_fraction=0.25, seed=0)


def test_a_mix_of_whole_slides_and_regions_is_said(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = data_study.open_listed

    def open_listed(folder: Path, slide_id: str, entry: LedgerRow | None) -> SlideCache:
        cache = opened(folder, slide_id, entry)
        is_confined = slide_id.endswith("00")
        return (
            dataclasses.replace(cache, header=dataclasses.replace(cache.header, regions="ab" * 32))
            if is_confined
            else cache
        )

    monkeypatch.setattr(data_study, "open_listed", open_listed)
    with pytest.warns(UserWarning, match="1 of 20 slides have tiles of --regions only, the others of all"):
        read_study(study.manifest, study.cache)
