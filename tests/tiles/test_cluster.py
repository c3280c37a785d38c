"""A real Dask scheduler and real workers, as processes of their own on this machine."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slidetl.cli import main
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import FAILED, USED, Ledger
from slidetl.tiles.run import tile_slides
from slidetl.tiles.store import building_path, cache_path
from slidetl.tiles.tile import SlideSource
from tests.cli.test_tile import Draw, groups
from tests.conftest import PATIENCE_S, PyramidTiff

Start = Callable[..., subprocess.Popen[str]]
TILING = ["--mpp", "0.5", "--tile-size", "32", "--stride", "16"]
SPEC = TileSpec(0.5, 32, stride_px=16)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process whose output goes to a file, and ends it with the test."""
    running: list[subprocess.Popen[str]] = []

    def popen(name: str, *words: object) -> subprocess.Popen[str]:
        with (tmp_path / f"{name}.log").open("w") as log:
            command = [sys.executable, "-m", *map(str, words)]
            running.append(
                subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, text=True)
            )
        return running[-1]

    yield popen
    for process in running:
        process.kill()
        process.wait()


def until(is_so: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def scheduler(start: Start, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """A scheduler on a free port, and its address."""
    file = folder / "scheduler.json"
    words = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", file]
    process = start("scheduler", "distributed.cli.dask_scheduler", *words)

    def address() -> str:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return str(json.loads(file.read_text())["address"])
        return ""

    until(lambda: bool(address()))
    return process, address()


def worker(start: Start, folder: Path, name: str, address: str) -> subprocess.Popen[str]:
    """A worker that the scheduler knows."""
    options = ["--nthreads", "1", "--no-nanny", "--no-dashboard"]
    process = start(name, "distributed.cli.dask_worker", address, *options)
    until(lambda: "Registered to" in (folder / f"{name}.log").read_text())
    return process


def stop_in_mid_slide(worker: subprocess.Popen[str], cache: Path) -> str:
    """Lets a worker run for moments, and leaves it stopped in a slide of which a shard is committed.

    However slow this process is, it looks only while the worker stands still.
    """
    begun: list[Path] = []

    def is_begun() -> bool:
        worker.send_signal(signal.SIGCONT)
        time.sleep(0.02)
        worker.send_signal(signal.SIGSTOP)
        until(lambda: Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        begun[:] = (cache / ".building").glob("*/progress.json")
        return bool(begun)

    until(is_begun)
    return begun[0].parent.name


@pytest.mark.slow
def test_a_worker_killed_in_mid_slide_loses_nothing(
    start: Start, pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    names = ["a", "b", "c"]
    for seed, name in enumerate(names):
        pyramid_tiff(tissue_picture(1024, seed), name=name)
    sources = [SlideSource(name, tmp_path / f"{name}.tiff") for name in names]
    tile_slides(sources, tmp_path / "undisturbed", SPEC, workers=0)

    _, address = scheduler(start, tmp_path)
    victim = worker(start, tmp_path, "victim", address)
    # Relative paths, which mean nothing to a worker elsewhere.
    run = start("run", "slidetl", "tile", ".", "--cache", "cache", *TILING, "--scheduler", address)
    begun = stop_in_mid_slide(victim, tmp_path / "cache")
    assert not cache_path(tmp_path / "cache", begun).exists()
    other = worker(start, tmp_path, "other", address)
    victim.kill()
    victim.wait()
    assert run.wait(timeout=PATIENCE_S) == 0, (tmp_path / "run.log").read_text()
    assert other.poll() is None

    rows = Ledger(tmp_path / "cache" / "ledger.csv").by_slide()
    assert {name: rows[name].status for name in names} == dict.fromkeys(names, USED)
    assert groups(tmp_path / "cache") == groups(tmp_path / "undisturbed")
    log = (tmp_path / "run.log").read_text()
    assert "[3/3]" in log and "3 slides: 3 used, 0 excluded, 0 failed" in log
    assert "Traceback" not in log and "Warning" not in log
    assert "Removing" not in log

    # Again: nothing is left to do, and a slide that is none is told of.
    (tmp_path / "bad.svs").write_text("not a slide")
    again = start("again", "slidetl", "tile", ".", "--cache", "cache", *TILING, "--scheduler", address)
    assert again.wait(timeout=PATIENCE_S) == 1
    assert "failed: bad: " in (tmp_path / "again.log").read_text()
    assert groups(tmp_path / "cache") == groups(tmp_path / "undisturbed")
    coarse = start("coarse", "slidetl", "tile", ".", "--cache", "cache", "--mpp", "1", "--scheduler", address)
    assert coarse.wait(timeout=PATIENCE_S) == 2
    assert "the cache was made with mpp 0.5" in (tmp_path / "coarse.log").read_text()


@pytest.mark.slow
def test_a_slide_whose_workers_die_is_failed_and_the_next_run_goes_on(
    start: Start,
    pyramid_tiff: PyramidTiff,
    tissue_picture: Draw,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slide = pyramid_tiff(tissue_picture(1024))
    tile_slides([SlideSource("slide", slide)], tmp_path / "undisturbed", SPEC, workers=0)
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")
    _, address = scheduler(start, tmp_path)
    victim = worker(start, tmp_path, "worker", address)
    run = start("run", "slidetl", "tile", ".", "--cache", "cache", *TILING, "--scheduler", address)
    assert stop_in_mid_slide(victim, tmp_path / "cache") == "slide"
    victim.kill()
    assert run.wait(timeout=PATIENCE_S) == 1, (tmp_path / "run.log").read_text()
    (row,) = Ledger(tmp_path / "cache" / "ledger.csv").rows()
    assert row.status == FAILED and "on the cluster: KilledWorker: " in row.reason
    progress = building_path(tmp_path / "cache", "slide") / "progress.json"
    assert progress.exists()  # what was begun is kept
    assert main(["tile", str(tmp_path), "--cache", str(tmp_path / "cache"), *TILING, "--workers", "1"]) == 0
    assert groups(tmp_path / "cache") == groups(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_scheduler_that_goes_away_ends_the_run_with_one_line(
    start: Start, pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    pyramid_tiff(tissue_picture(256))
    process, address = scheduler(start, tmp_path)
    run = start("run", "slidetl", "tile", ".", "--cache", "cache", *TILING, "--scheduler", address)
    log = tmp_path / "run.log"
    until(lambda: "has no workers yet" in log.read_text())
    process.kill()
    assert run.wait(timeout=PATIENCE_S) == 2
    lines = log.read_text().splitlines()
    assert [line for line in lines if "warning" not in line] == [
        "slidetl: error: the scheduler went away before slide was done; what was done is kept: start it and "
        "its workers anew, and run the same command again"
    ]


@pytest.mark.slow
def test_a_scheduler_that_is_not_there_is_one_line(
    start: Start, pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    pyramid_tiff(tissue_picture(256))
    words = ["tile", ".", "--cache", "cache", *TILING, "--scheduler", "tcp://127.0.0.1:1"]
    command = [sys.executable, "-m", "slidetl", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--scheduler tcp://127.0.0.1:1: no Dask scheduler answers there (" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_without_the_extra_the_remedy_is_named(
    pyramid_tiff: PyramidTiff,
    tissue_picture: Draw,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pyramid_tiff(tissue_picture(256))
    monkeypatch.setitem(sys.modules, "distributed", None)
    words = ["tile", str(tmp_path), "--cache", str(tmp_path / "c"), *TILING, "--scheduler", "tcp://h:1"]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "slidetl: error: --scheduler needs Dask: pip install 'slidetl[cluster]'\n"
    )
    words[-1] = "host:8786"
    assert main(words) == 2
    assert "expected an address such as tcp://HOST:8786, not 'host:8786'" in capsys.readouterr().err
