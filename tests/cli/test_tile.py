from __future__ import annotations

import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slidetl.cli import main
from slidetl.tiles.ledger import FAILED, USED, Ledger
from slidetl.tiles.lock import slide_lock
from slidetl.tiles.store import SlideCache, cache_path
from tests.conftest import PATIENCE_S, Picture, PyramidTiff
from tests.tiles.conftest import tree

Draw = Callable[..., Picture]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "slidetl", "tile", *map(str, words)]


def write_manifest(path: Path, slides: dict[str, Path], mpp: dict[str, float] | None = None) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "path", "patient_id", "grade", "mpp"])
        for name, slide in slides.items():
            writer.writerow([name, slide, f"P-{name}", 1, (mpp or {}).get(name, "")])
    return path


def groups(cache: Path) -> dict[str, dict[str, bytes]]:
    return {path.name: tree(path) for path in sorted(cache.glob("*.zarr"))}


@pytest.mark.slow
def test_a_run_with_one_bad_slide_does_the_others_and_exits_with_1(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.svs").write_text("not a slide")
    slides = {
        "good": pyramid_tiff(tissue_picture(512), name="good"),
        "bad": tmp_path / "bad.svs",
        "scaled": pyramid_tiff(tissue_picture(512), mpp=None, name="scaled"),
    }
    manifest = write_manifest(tmp_path / "manifest.csv", slides, {"scaled": 0.25})
    words = ["tile", str(manifest), "--cache", str(tmp_path / "cache"), "--mpp", "1", "--tile-size", "32"]
    assert main(words) == 1
    out, err = capfd.readouterr()
    assert "3 slides: 2 used, 0 excluded, 1 failed; " in out
    assert "failed: bad: " in err and "not a slide" in err
    assert err.count("[3/3]") == 1
    rows = Ledger(tmp_path / "cache" / "ledger.csv").by_slide()
    assert [rows[name].status for name in slides] == [USED, FAILED, USED]
    # The manifest's spacing makes that slide half as wide.
    assert rows["good"].tiles == 48 and rows["scaled"].tiles == 12
    (tmp_path / "bad.svs").unlink()
    write_manifest(manifest, {"good": slides["good"]})
    assert main(words) == 0


@pytest.mark.slow
def test_every_option_reaches_the_specification(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    pyramid_tiff(tissue_picture(512), mpp=None)
    options = (
        "--mpp 1 --tile-size 40 --stride 20 --min-tissue 0.5 --mpp-override 0.495 --mpp-tolerance 0.02 "
        "--codec zstd --jpeg-quality 80 --edge pad --icc --min-focus 0.01 --max-pen 0.9 --max-fold 0.8 "
        "--max-air 0.7 --channels 2,1,0 --workers 1"
    )
    assert main(["tile", str(tmp_path), "--cache", str(tmp_path / "cache"), *options.split()]) == 0
    cache = SlideCache.open(cache_path(tmp_path / "cache", "slide"))
    assert cache.mpp_level0 == (0.495, 0.495)
    assert cache.spec.to_dict() == {
        "mpp": 1.0,
        "tile_size_px": 40,
        "stride_px": 20,
        "min_tissue": 0.5,
        "mpp_tolerance": 0.02,
        "codec": "zstd",
        "jpeg_quality": 80,
        "edge": "pad",
        "icc": True,
        "min_focus": 0.01,
        "max_pen": 0.9,
        "max_fold": 0.8,
        "max_air": 0.7,
        "channels": "2,1,0",
    }


def area_means(
    picture: Picture, corner: tuple[float, float], step: tuple[float, float], side: int
) -> Picture:
    """Exact means over fractional rectangles: differences of the interpolated integral of the picture."""
    integral = np.zeros((picture.shape[0] + 1, picture.shape[1] + 1, 3))
    integral[1:, 1:] = picture.astype(float).cumsum(axis=0).cumsum(axis=1)
    for axis in (0, 1):
        edges = corner[1 - axis] + np.arange(side + 1) * step[1 - axis]
        whole = np.minimum(edges.astype(int), integral.shape[axis] - 2)
        low, high = (integral.take(whole + n, axis) for n in (0, 1))
        share = (edges - whole).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        integral = np.diff(low + (high - low) * share, axis=axis)
    means: Picture = np.round(integral / (step[0] * step[1])).astype(np.uint8)
    return means


@pytest.mark.slow
@pytest.mark.parametrize("slide_mpp", [(0.2527, 0.2527), (0.25, 0.2305)])
def test_a_fraction_of_a_pixel_is_not_lost(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path, slide_mpp: tuple[float, float]
) -> None:
    picture = tissue_picture(600)
    pyramid_tiff(picture, mpp=slide_mpp)
    words = f"--cache {tmp_path / 'cache'} --mpp 0.5 --tile-size 32 --codec zstd --workers 1"
    assert main(["tile", str(tmp_path), *words.split()]) == 0
    cache = SlideCache.open(cache_path(tmp_path / "cache", "slide"))
    assert cache.mpp_level0 == pytest.approx(slide_mpp, rel=1e-6)
    assert cache.mpp_read == (0.5, 0.5)
    step = (0.5 / cache.mpp_level0[0], 0.5 / cache.mpp_level0[1])
    assert cache.extent_level0 == pytest.approx((32 * step[0], 32 * step[1]))
    (row,) = Ledger(tmp_path / "cache" / "ledger.csv").rows()
    assert (row.mpp_x, row.mpp_y, row.tiles) == (0.5, 0.5, len(cache))
    corners = cache.origins_level0.tolist()
    assert max(x for x, _ in corners) > 300  # far enough for a lost fraction to show
    for (x, y), tile in zip(corners, cache.read(range(len(cache))), strict=True):
        wanted = area_means(picture, (x, y), step, 32)
        assert np.abs(tile.astype(int) - wanted).max() <= 1


@pytest.mark.slow
def test_a_level_close_to_the_spacing_is_read_as_it_is(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    picture = tissue_picture(512)
    (tmp_path / "slides").mkdir()
    pyramid_tiff(picture, mpp=0.4962, name="slides/slide")
    words = ["tile", str(tmp_path / "slides"), "--mpp=0.5", "--tile-size=32", "--codec=zstd", "--workers=1"]
    assert main([*words, f"--cache={tmp_path / 'near'}"]) == 0
    near = SlideCache.open(cache_path(tmp_path / "near", "slide"))
    assert near.mpp_read == pytest.approx((0.4962, 0.4962), rel=1e-5)  # what is stored is what it really is
    assert near.extent_level0 == pytest.approx((32, 32))
    for (x, y), tile in zip(near.origins_level0.tolist(), near.read(range(len(near))), strict=True):
        assert np.array_equal(tile, picture[y : y + 32, x : x + 32])
    assert main([*words, f"--cache={tmp_path / 'far'}", "--mpp-tolerance=0.005"]) == 0
    far = SlideCache.open(cache_path(tmp_path / "far", "slide"))
    assert far.mpp_read == (0.5, 0.5)
    assert far.extent_level0[0] == pytest.approx(32 * 0.5 / 0.4962, rel=1e-5)


@pytest.mark.slow
def test_a_slide_without_spacing_fails_with_the_remedy_and_the_remedies_work(
    test_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slide = tmp_path / "S1.svs"
    content = (test_data / "slides" / "CMU-1-Small-Region.svs").read_bytes()
    slide.write_bytes(content.replace(b"MPP = 0.4990", b"XPP = 0.4990"))
    plain = write_manifest(tmp_path / "plain.csv", {"S1": slide})
    with_mpp = write_manifest(tmp_path / "with_mpp.csv", {"S1": slide}, {"S1": 0.499})
    words = [f"--cache={tmp_path / 'cache'}", "--mpp=2", "--tile-size=128", "--workers=1"]
    assert main(["tile", str(plain), *words]) == 1
    failed = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("failed: S1: "))
    for part in ("--mpp-override", "manifest's mpp column", "objective power is 20"):
        assert part in failed
    (row,) = Ledger(tmp_path / "cache" / "ledger.csv").rows()
    assert row.status == FAILED and row.reason in failed
    assert main(["tile", str(with_mpp), *words]) == 0
    assert SlideCache.open(cache_path(tmp_path / "cache", "S1")).mpp_level0 == (0.499, 0.499)
    assert main(["tile", str(plain), *words, "--mpp-override=0.499"]) == 0
    assert main(["tile", str(with_mpp), *words, "--mpp-override=0.25"]) == 0  # the manifest knows better
    assert SlideCache.open(cache_path(tmp_path / "cache", "S1")).mpp_level0 == (0.499, 0.499)


@pytest.mark.slow
def test_mistakes_end_with_one_line_and_2(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pyramid_tiff(tissue_picture(512))
    words = ["tile", str(tmp_path), "--cache", str(tmp_path / "cache"), "--mpp"]
    assert main([*words, "1"]) == 0
    capfd.readouterr()
    for more, says in [
        (["2"], "--overwrite"),
        (["-1"], "mpp must be a positive number"),
        (["1", "--workers", "0"], "--workers must be at least 1"),
    ]:
        assert main([*words, *more]) == 2
        err = capfd.readouterr().err
        assert says in err and err.count("\n") == 1
    assert main([*words, "2", "--overwrite"]) == 0


@pytest.mark.slow
def test_a_grade_off_the_scale_is_found_before_the_work(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest.csv"
    slide = pyramid_tiff(tissue_picture(256))
    manifest.write_text(f"slide_id,path,patient_id,grade\nS,{slide},P,7\n")
    words = ["tile", str(manifest), "--cache", str(tmp_path / "cache"), "--mpp", "1", "--tile-size", "32"]
    words += ["--workers", "1"]
    assert main(words) == 2
    assert "line 2: grade must be a whole number from 0 to 4" in capfd.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert main([*words, "--grades", "1"]) == 2
    assert "--grades must be at least 2" in capfd.readouterr().err
    assert main([*words, "--grades", "8"]) == 0


def test_missing_files_cost_their_slides_and_are_one_line(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slides = {f"gone{number}": tmp_path / f"{number}.svs" for number in range(20)}
    slides["患者1"] = pyramid_tiff(tissue_picture(256))
    manifest, cache = write_manifest(tmp_path / "m.csv", slides), tmp_path / "cache"
    words = ["tile", str(manifest), "--cache", str(cache), "--mpp", "1", "--tile-size", "32"]
    assert main([*words, "--workers", "1"]) == 1
    out, err = capfd.readouterr()
    assert "21 slides: 1 used, 0 excluded, 20 failed" in out
    failed = [line for line in err.splitlines() if line.startswith("failed")]
    assert failed == [f"failed: gone0, gone1, gone2, ... (20 in all): {tmp_path / '0.svs'}: no such file"]
    rows = Ledger(cache / "ledger.csv").by_slide()
    assert rows["gone7"].status == FAILED and rows["gone7"].reason.endswith("7.svs: no such file")
    assert rows["患者1"].status == USED and SlideCache.open(cache_path(cache, "患者1")).slide_id == "患者1"


@pytest.mark.slow
def test_a_terminal_without_the_letters_shows_their_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for label in ("да", "нет"):
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.new("RGB", (32, 32), (200, 90, 160)).save(tmp_path / "images" / label / f"{label}.png")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", terminal)
    words = ["tile", str(tmp_path / "images"), "--cache", str(tmp_path / "cache"), "--mpp", "1"]
    assert main([*words, "--mpp-override", "1", "--tile-size", "32", "--min-tissue", "0"]) == 0
    terminal.flush()
    said = rb"labels by folder: \u0434\u0430, \u043d\u0435\u0442; give them to --data.grades, lowest first"
    assert said in terminal.buffer.getvalue()
    assert {row.slide_id for row in Ledger(tmp_path / "cache" / "ledger.csv").rows()} == {"да", "нет"}


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    slides = {f"S{n}": pyramid_tiff(tissue_picture(768, n), name=f"s{n}") for n in range(2)}
    manifest = write_manifest(tmp_path / "manifest.csv", slides)
    options = [
        "--mpp",
        0.5,
        "--tile-size",
        24,
        "--workers",
        2,
    ]
    started = time.monotonic()
    subprocess.run(command(manifest, "--cache", tmp_path / "calm", *options), check=True, capture_output=True)
    needed = time.monotonic() - started
    chance = random.Random(0)
    kills = 0
    while kills < 4:
        process = subprocess.Popen(
            command(manifest, "--cache", tmp_path / "stormy", *options),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(chance.uniform(0.3, 0.7) * needed)
            # Done before it was killed: another time, on a machine that is busy now and then.
            shutil.rmtree(tmp_path / "stormy")
            needed *= 0.8
        except subprocess.TimeoutExpired:
            kills += 1
        process.kill()
        process.wait()
    subprocess.run(
        command(manifest, "--cache", tmp_path / "stormy", *options), check=True, capture_output=True
    )
    assert groups(tmp_path / "stormy") == groups(tmp_path / "calm")
    assert len(groups(tmp_path / "calm")) == 2
    assert list((tmp_path / "stormy" / ".building").iterdir()) == []
    assert {row.status for row in Ledger(tmp_path / "stormy" / "ledger.csv").rows()} == {USED}


@pytest.mark.slow
def test_workers_die_with_a_run_that_is_killed(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    pyramid_tiff(tissue_picture(512))
    cache = tmp_path / "cache"
    with slide_lock(cache, "slide"):  # keeps the worker waiting
        run = subprocess.Popen(
            command(tmp_path, "--cache", cache, "--mpp", 1),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        worker = _wait_for(lambda: _one_that_waits())
        run.send_signal(signal.SIGKILL)
        run.wait()
        _wait_for(lambda: not Path(f"/proc/{worker}").exists())


def _one_that_waits() -> int:
    """The process that sleeps until our lock is free, by the kernel's own list; 0 if none does."""
    lines = Path("/proc/locks").read_text().splitlines()
    held = {line.split()[0] for line in lines if "->" not in line and f" {os.getpid()} " in line}
    waiting = [line.split() for line in lines if "->" in line]
    return next((int(words[5]) for words in waiting if words[0] in held), 0)


def _wait_for(condition: Callable[[], int | bool]) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.05)
    return int(value)


def test_help_answers_at_once_with_units_and_defaults() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command("--help"), check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.5
    text = " ".join(done.stdout.split())
    for words in (
        "micrometres per pixel",
        "0 is 224, for patches 64",
        "(default: 0.25)",
        "(default: jpeg)",
        "--overwrite",
    ):
        assert words in text


@pytest.mark.slow
def test_what_is_doubtful_is_said_once_with_the_option(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture = tissue_picture(512)
    slides = {
        name: pyramid_tiff(picture, mpp=mpp, name=name)
        for name, mpp in (
            *(("fine", 0.25), ("coarse", 0.5), ("other", 0.5)),
            *(("tenfold", 0.025), ("odd", 0.08), ("without", None)),
        )
    }
    manifest = write_manifest(tmp_path / "manifest.csv", slides)
    words = f"tile {manifest} --cache {tmp_path / 'cache'} --mpp 0.5 --tile-size 32 --workers 1".split()

    def warnings(*more: str) -> list[str]:
        assert main([*words, *more]) == 0
        err = capfd.readouterr().err.splitlines()
        return [line.removeprefix("slidetl: warning: ") for line in err if "warning" in line]

    for _ in range(2):  # the second run keeps the caches and says the same
        said = warnings("--mpp-override=0.5")
        (line,) = [line for line in said if line.endswith(": tenfold")]
        assert "0.025 um per pixel is finer than" in line and "--mpp-replace" in line
        assert any("far from the median of 0.375" in line and line.endswith(": odd") for line in said)
        assert any(line.startswith("3 slides: the file's own spacing is kept") for line in said)
    said = warnings("--overwrite", "--mpp-replace=0.5")
    replaced = "3 slides: the spacing given, 0.5 um per pixel, replaces the file's own"
    assert said[0] == f"{replaced}: fine, tenfold, odd"
    caches = (SlideCache.open(cache_path(tmp_path / "cache", name)) for name in slides)
    assert {cache.mpp_level0 for cache in caches} == {(0.5, 0.5)}


@pytest.mark.slow
def test_regions_drawn_in_qupath(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slide's tissue goes out, comes back unedited with the same tiles, and edited with fewer."""
    slides = {name: pyramid_tiff(tissue_picture(512), name=name) for name in ("A", "B")}
    manifest = write_manifest(tmp_path / "m.csv", slides)
    words = ["tile", str(manifest), "--mpp", "1", "--tile-size", "32", "--workers", "1", "--cache"]
    cache, again, tissue = (str(tmp_path / name) for name in ("cache", "again", "tissue"))
    assert main([*words, cache]) == 0
    assert main(["cache", "tissue", cache, "--export", tissue]) == 0
    assert "2 slides, 2 pieces of tissue" in capsys.readouterr().out
    assert main([*words, again, "--regions", tissue]) == 0
    one, other = (SlideCache.open(cache_path(Path(folder), "A")) for folder in (cache, again))
    assert np.array_equal(one.origins_level0, other.origins_level0) and len(one) == 48
    assert other.header.regions and Ledger(Path(again) / "ledger.csv").rows()[0].regions.startswith(
        "A.geojson "
    )

    edited = json.loads(Path(tissue, "A.geojson").read_text())
    ring = [[0, 0], [512, 0], [512, 256], [0, 256], [0, 0]]
    edited["features"][0]["geometry"]["coordinates"] = [ring]
    Path(tissue, "A.geojson").write_text(json.dumps(edited))
    assert main([*words, again, "--regions", tissue, "--overwrite"]) == 0
    assert len(SlideCache.open(cache_path(Path(again), "A"))) == 24

    Path(tissue, "B.geojson").unlink()
    capsys.readouterr()
    assert main([*words, again, "--regions", tissue]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("slidetl: error: --regions ")
        and "1 of 2 slides have no file of annotations: B;" in said
    )
    assert main([*words, str(tmp_path / "none"), "--regions-share", "0.5"]) == 2
    assert "would have no effect without --regions DIR" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
