"""Slides built from labelled tiles: their shares, their two sides, and the pixels that the tiler reads."""

from __future__ import annotations

import csv
import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slidetl.tiles.grid import TileSpec
from slidetl.tiles.store import SlideCache, cache_path
from slidetl.tiles.tile import SlideSource, tile_slide

CLASSES = {"a": (200, 40, 40), "b": (40, 200, 40), "c": (40, 40, 200)}
SIDE = 48
SMALL = ["--train", "10", "--test", "5", "--external-slides", "5", "--tiles-per-slide", "10"]
SMALL += ["--train-tiles", "12", "--test-tiles", "10"]


tool: Any = importlib.import_module("tools.make_collage")


def draw_tiles(folder: Path, seed: int, n: int = 22) -> Path:
    """Draws tiles of three classes: a colour each, with smooth noise of their own."""
    rng = np.random.default_rng(seed)
    for name, colour in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for number in range(n):
            coarse = rng.integers(0, 256, (6, 6), np.uint8)
            noise = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), float)
            tile = np.clip(np.array(colour) + (noise[..., None] - 128) * 0.3, 0, 255).astype(np.uint8)
            Image.fromarray(tile).save(folder / name / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiles")
    return draw_tiles(folder / "home", 0), draw_tiles(folder / "other", 1, n=12)


@pytest.fixture(scope="module")
def built(tiles: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tiles, tmp_path_factory.mktemp("built") / "out")


def build(tiles: tuple[Path, Path], out: Path, *more: str) -> Path:
    words = [str(tiles[0]), str(out), "--external", str(tiles[1]), "--target", "b", *SMALL, *more]
    assert tool.main(words) == 0
    return out


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_grade_is_the_exact_share_of_the_target(built: Path) -> None:
    counts = Counter(row["slide_id"] for row in table(built / "tiles.csv") if row["class"] == "b")
    rows = table(built / "manifest.csv")
    assert [counts[row["slide_id"]] for row in rows] == [int(row["grade"]) for row in rows]
    assert Counter((row["split"], row["site"]) for row in rows) == {
        ("train", "home"): 10,
        ("test", "home"): 5,
        ("test", "external"): 5,
    }
    assert {row["grade"] for row in rows[:5]} == set("01234")
    assert all(row["patient_id"] == row["slide_id"] for row in rows)


def test_no_tile_is_in_training_and_in_test_slides(built: Path) -> None:
    used: dict[str, set[str]] = {"train": set(), "test": set(), "external": set()}
    for row in table(built / "tiles.csv"):
        used[row["slide_id"].partition("-")[0]].add(row["tile"])
    assert not used["train"] & used["test"]
    per_slide = Counter((row["slide_id"], row["tile"]) for row in table(built / "tiles.csv"))
    assert set(per_slide.values()) == {1}


def test_the_tiler_cuts_the_very_tiles_at_the_spacing_of_the_slide(
    built: Path, tiles: tuple[Path, Path], tmp_path: Path
) -> None:
    path = built / "slides" / "train-0003.tif"
    row = tile_slide(
        SlideSource("train-0003", path), tmp_path, TileSpec(mpp=1, tile_size_px=SIDE, min_tissue=0)
    )
    assert row.tiles == 10
    cut = SlideCache.open(cache_path(tmp_path, "train-0003")).read(np.arange(10)).astype(float)
    places = [row for row in table(built / "tiles.csv") if row["slide_id"] == "train-0003"]
    for place, pixels in zip(places, cut, strict=True):
        source = np.asarray(Image.open(tiles[0] / place["tile"]), float)
        assert abs(pixels - source).mean() < 6  # JPEG; another tile differs by far more


def test_a_redraw_repeats_itself_and_differs_from_others(
    built: Path, tiles: tuple[Path, Path], tmp_path: Path
) -> None:
    again, other = build(tiles, tmp_path / "again"), build(tiles, tmp_path / "other", "--redraw", "1")
    for name in ("tiles.csv", "manifest.csv", "slides/test-0001.tif"):
        assert (again / name).read_bytes() == (built / name).read_bytes()
    assert (other / "tiles.csv").read_bytes() != (built / "tiles.csv").read_bytes()

    def training_tiles(folder: Path) -> set[str]:
        return {row["tile"] for row in table(folder / "tiles.csv") if row["slide_id"].startswith("train")}

    assert training_tiles(other) != training_tiles(built)


def test_copies_of_a_tile_stay_on_the_side_of_training(tiles: tuple[Path, Path], tmp_path: Path) -> None:
    home, other = draw_tiles(tmp_path / "home", 0), draw_tiles(tmp_path / "other", 1, n=12)
    picture = Image.open(home / "a" / "00.png")
    picture.transpose(Image.Transpose.ROTATE_90).save(home / "a" / "01.png")
    picture.save(other / "c" / "05.png")
    for redraw in range(3):
        out = build((home, other), tmp_path / str(redraw), "--redraw", str(redraw))
        rows = table(out / "tiles.csv")
        tested = {row["tile"] for row in rows if row["slide_id"].startswith("test")}
        assert not tested & {"a/00.png", "a/01.png"}
        external = {row["tile"] for row in rows if row["slide_id"].startswith("external")}
        assert "c/05.png" not in external


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "z"], "there is no class 'z'"),
        (["--target", "b", "--shares", "0", "0.33"], "no whole number of tiles"),
        (["--target", "b", "--shares", "0.2", "0.1"], "each above the last"),
        (["--target", "b", "--train-tiles", "30"], "class 'a' has 22 tiles"),
        (["--target", "b", "--tiles-per-slide", "20"], "build slides of 20 tiles from"),
        (["--target", "b", "--mpp", "0"], "--mpp"),
        (["--target", "b", "--redraw", "-1"], "a redraw from 0"),
    ],
)
def test_a_wrong_option_is_one_line(
    tiles: tuple[Path, Path],
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert tool.main([str(tiles[0]), str(out), *SMALL, *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (out / "manifest.csv").exists()


def test_a_folder_that_is_no_set_of_tiles_is_refused(
    tiles: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for break_it, message in (
        (
            lambda folder: Image.new("RGB", (SIDE, 20)).save(folder / "a" / "x.png"),
            "expected a square RGB tile",
        ),
        (lambda folder: Image.new("RGB", (20, 20)).save(folder / "c" / "x.png"), "like the first tile"),
        (lambda folder: (folder / "b" / "x.png").write_bytes(b"\x89PNG"), "not a picture, or damaged"),
    ):
        folder = draw_tiles(tmp_path / message[:9], 0, n=2)
        break_it(folder)
        assert tool.main([str(folder), str(tmp_path / "out"), "--target", "a"]) == 1
        assert message in capsys.readouterr().err
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    assert tool.main([str(tiles[0]), str(full), "--target", "a"]) == 1
    assert "not an empty folder" in capsys.readouterr().err
