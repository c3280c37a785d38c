from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slidetl.cache.store import shard_path
from slidetl.cli import main
from tests.conftest import Study


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
