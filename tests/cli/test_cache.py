from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slidetl.cli import main
from slidetl.errors import CacheCorruptError
from slidetl.slides import open_slide
from slidetl.slides.tiff import read_jpeg_level
from slidetl.tiles.cut import stream_tiles
from slidetl.tiles.features import FeatureSource, read_features, write_features
from slidetl.tiles.ledger import Ledger
from slidetl.tiles.plan import plan_tiles
from slidetl.tiles.store import SlideCache, shard_path
from tests.conftest import Picture, Study
from tests.slides.jpeg_tiff import write_jpeg_tiff


@pytest.fixture
def cache(study: Study, tmp_path: Path) -> Path:
    """Three slides of the study, with its ledger."""
    folder = tmp_path / "cache"
    folder.mkdir()
    lines = (study.cache / "ledger.csv").read_text().splitlines(keepends=True)
    (folder / "ledger.csv").write_text("".join(lines[:4]))
    for line in lines[1:4]:
        name = line.split(",")[0]
        shutil.copytree(study.cache / f"{name}.zarr", folder / f"{name}.zarr")
    return folder


def slides(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.zarr"))


def flip(path: Path, place: int) -> bytes:
    before = path.read_bytes()
    data = bytearray(before)
    data[place] ^= 64
    path.write_bytes(data)
    return before


def test_a_sound_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "verify", str(cache)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 slides, ") and out.endswith("tiles: all sound\n")


def test_damage_is_printed_and_mended(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = slides(cache)
    shard = flip(shard_path(first, 0), 5)
    about = flip(second / "zarr.json", 300)
    assert main(["cache", "verify", str(cache)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{first.stem}: tiles/c/0/0/0/0: tile 0 fails its checksum"
    assert lines[1] == f"{second.stem}: zarr.json: it fails its checksum"
    assert lines[2].endswith("tiles: 2 damaged") and len(lines) == 3
    assert main(["cache", "verify", str(cache), "--repair"]) == 0
    assert capsys.readouterr().out.count("mended") == 2
    assert shard_path(first, 0).read_bytes() == shard
    assert (second / "zarr.json").read_bytes() == about


def test_a_repair_needs_no_hard_links_and_an_error_of_the_disk_costs_its_slide_alone(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = [SlideCache.open(path) for path in slides(cache)[:2]]
    source = FeatureSource("x", "", "0" * 64, (0.5,) * 3, (0.5,) * 3)
    rows = [np.random.default_rng(0).random((len(each), 4)).astype(np.float16) for each in opened]
    for each, values in zip(opened, rows, strict=True):
        write_features(each, {"x": (source, values)})
        flip(shard_path(each.path, 0), 5)
    copied: list[object] = []

    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def copy(*paths: Path) -> None:  # the disk fails under the first
        copied.append(paths)
        if len(copied) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        shutil.copyfile(*paths)

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(shutil, "copy2", copy)
    assert main(["cache", "verify", str(cache), "--repair"]) == 1
    out = capsys.readouterr().out
    assert f"{opened[0].slide_id}: [Errno 5]" in out and f"{opened[1].slide_id}: mended" in out
    assert "1 damaged" in out
    assert main(["cache", "verify", str(cache), "--repair"]) == 0
    for each, values in zip(opened, rows, strict=True):
        np.testing.assert_array_equal(read_features(each, "x"), values)


def test_slides_that_moved_are_named(
    cache: Path, study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = shard_path(slides(cache)[0], 0)
    before = flip(shard, 5)
    ledger = cache / "ledger.csv"
    ledger.write_text(ledger.read_text().replace(str(study.manifest.parent), str(tmp_path / "gone")))
    assert main(["cache", "verify", str(cache), "--repair"]) == 1
    assert "no such file" in capsys.readouterr().out
    assert main(["cache", "verify", str(cache), "--repair", "--slides", str(study.manifest)]) == 0
    assert shard.read_bytes() == before


def test_a_lost_slide_is_found_by_the_ledger(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = slides(cache)[1]
    shutil.rmtree(lost)
    assert main(["cache", "verify", str(cache)]) == 1
    assert f"{lost.stem}: missing: in the ledger as used" in capsys.readouterr().out


def test_a_slide_that_cannot_be_opened_does_not_hide_the_others(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, _ = slides(cache)
    (first / "zarr.json").write_text("{")
    (first / "tiles" / "zarr.json").write_text("{")
    flip(shard_path(second, 0), 5)
    assert main(["cache", "verify", str(cache), "--repair"]) == 1
    out = capsys.readouterr().out
    assert "both copies of its description are damaged" in out
    assert f"{second.stem}: mended" in out


def test_what_cannot_be_meant(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "verify", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["cache", "verify", str(cache), "--slides", str(tmp_path)]) == 2
    assert "give both, or neither" in capsys.readouterr().err


@pytest.mark.slow
def test_tiles_copied_from_a_damaged_slide_are_found_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tissue_picture: Callable[[int], Picture]
) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    slide = write_jpeg_tiff(slides / "S1.tiff", tissue_picture(512))
    sound = slide.read_bytes()
    damage_inside(slide, level_px=512, row=2, column=3)
    assert slide.read_bytes() != sound
    cache = tmp_path / "cache"
    tiling = ["tile", str(slides), f"--cache={cache}", "--mpp=0.5", "--tile-size=64", "--workers=1"]
    assert main(tiling) == 0
    (row,) = Ledger(cache / "ledger.csv").rows()
    assert (row.tiles, row.tiles_unreadable) == (48, 0)  # it was copied, not decoded
    with pytest.raises(CacheCorruptError, match=r"tile 15 of S1 .*cache verify --decode --repair"):
        SlideCache.open(cache / "S1.zarr").read(range(48))

    capsys.readouterr()
    assert main(["cache", "verify", str(cache)]) == 0  # every byte is what was written
    assert main(["cache", "verify", str(cache), "--decode"]) == 1
    assert "S1: tiles/c/0/0/0/0: tile 15 cannot be decoded: the slide is damaged there" in (
        capsys.readouterr().out
    )
    assert main(["cache", "verify", str(cache), "--decode", "--repair"]) == 0
    assert "S1: 1 tiles left out, which the slide cannot give" in capsys.readouterr().out
    (row,) = Ledger(cache / "ledger.csv").rows()
    assert (row.status, row.tiles, row.tiles_unreadable) == ("used", 47, 1)
    assert main(["cache", "verify", str(cache), "--decode"]) == 0
    mended = SlideCache.open(cache / "S1.zarr")
    assert [192, 128] not in mended.origins_level0.tolist()
    assert main(tiling) == 0  # and kept so
    assert len(SlideCache.open(cache / "S1.zarr")) == 47
    with open_slide(slide) as opened:  # who grades the slide without a cache sees the same tiles
        batches = list(stream_tiles(opened, plan_tiles(opened, mended.spec)))
    assert np.array_equal(np.concatenate([batch.pixels for batch in batches]), mended.read(range(47)))


@pytest.mark.slow
def test_a_slide_damaged_all_over_is_not_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tissue_picture: Callable[[int], Picture]
) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    slide = write_jpeg_tiff(slides / "S1.tiff", tissue_picture(512))
    for row in range(1, 7):
        damage_inside(slide, level_px=512, row=row, column=2)
    cache = tmp_path / "cache"
    assert main(["tile", str(slides), f"--cache={cache}", "--mpp=0.5", "--tile-size=64", "--workers=1"]) == 0
    assert main(["cache", "verify", str(cache), "--decode", "--repair"]) == 1
    assert "more than 10% of the 48 tiles wanted cannot be read" in capsys.readouterr().out


def damage_inside(slide: Path, level_px: int, row: int, column: int) -> None:
    """Damages the compressed data of one tile so that only decoding it can tell."""
    with slide.open("rb", buffering=0) as file:
        level = read_jpeg_level(file, (level_px, level_px), (64, 64))
        assert level is not None
        begin, size = int(level.offsets[row, column]), int(level.byte_counts[row, column])
    data = bytearray(slide.read_bytes())
    middle = begin + size * 3 // 4
    # A pattern without 0xFF, which no Huffman code of the tile follows for long.
    data[middle : middle + 40] = b"\xfe\xfd" * 20
    slide.write_bytes(data)


def test_info_lists_what_is_there(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / ".building" / "S99").mkdir(parents=True)
    first = slides(cache)[0]
    (first / "zarr.json").write_text("{")
    assert main(["cache", "info", str(cache), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert [slide["slide_id"] for slide in info["slides"]] == [path.stem for path in slides(cache)]
    assert "not JSON" in info["slides"][0]["problem"] and info["slides"][0]["spec"] == -1
    assert info["slides"][1]["tiles"] > 0 and info["slides"][1]["mpp_read"] == [4.0, 4.0]
    assert [spec["tile_size_px"] for spec in info["specs"]] == [64]
    assert info["unfinished"] == ["S99"] and info["stale_leases"] == []
    assert info["bytes"] == sum(p.stat().st_size for z in slides(cache) for p in z.rglob("*") if p.is_file())
    assert main(["cache", "info", str(cache)]) == 0
    out = capsys.readouterr().out
    assert all(path.stem in out for path in slides(cache))
    assert "unfinished: S99" in out and "[0] mpp 4.0, tile_size_px 64" in out
    assert f"3 slides, {info['tiles']} tiles" in out
