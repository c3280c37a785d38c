from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import threading
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slidetl.errors import CacheError, CacheMismatchError, FileHeldError, UsageError
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import FAILED, USED, Ledger, LedgerRow
from slidetl.tiles.lock import slide_lock
from slidetl.tiles.run import _in_processes, tile_slides
from slidetl.tiles.store import SlideCache, cache_path
from slidetl.tiles.tile import SlideSource, tile_slide
from tests.conftest import PATIENCE_S, PyramidTiff
from tests.tiles.conftest import SPEC, Draw, tree


def test_another_specification_is_refused_before_any_work(source: SlideSource, tmp_path: Path) -> None:
    tile_slides([source], tmp_path, SPEC, workers=0)
    other = TileSpec(mpp=2.0, tile_size_px=32, codec="zstd")
    new = SlideSource("S2", source.path)
    with pytest.raises(CacheMismatchError, match=r"mpp 1.0 \(wanted: 2.0\); .*--cache.*--overwrite"):
        tile_slides([new, source], tmp_path, other, workers=0)
    assert not cache_path(tmp_path, "S2").exists()
    assert SlideCache.open(cache_path(tmp_path, "S1")).spec == SPEC
    rows = tile_slides([source], tmp_path, other, workers=0, overwrite=True)
    assert rows[0].status == USED
    assert SlideCache.open(cache_path(tmp_path, "S1")).spec == other


@pytest.mark.parametrize("node", [".", "origin_level0"])
@pytest.mark.parametrize("content", ["{", '{"attributes": {"complete": true}}'])
def test_a_damaged_cache_costs_its_slide_only(
    source: SlideSource, tmp_path: Path, node: str, content: str
) -> None:
    spec = TileSpec(mpp=1.0, tile_size_px=24, codec="zstd")  # tiles in more than one shard
    tile_slides([source], tmp_path, spec, workers=0)
    before = tree(cache_path(tmp_path, "S1"))
    (cache_path(tmp_path, "S1") / node / "zarr.json").write_text(content)
    sources = [source, SlideSource("S2", source.path)]
    rows = tile_slides(sources, tmp_path, spec, workers=0)
    assert [row.status for row in rows] == [FAILED, USED]
    assert "--overwrite" in rows[0].reason and "\n" not in rows[0].reason
    rows = tile_slides(sources, tmp_path, spec, workers=0, overwrite=True)
    assert [row.status for row in rows] == [USED, USED]
    assert tree(cache_path(tmp_path, "S1")) == before


def test_the_ledger_tells_that_a_cache_is_no_longer_of_its_slide(source: SlideSource, tmp_path: Path) -> None:
    assert tile_slides([source], tmp_path / "cache", SPEC, workers=0)[0].status == USED
    before = tree(cache_path(tmp_path / "cache", "S1"))
    source.path.write_text("junk")
    assert tile_slides([source], tmp_path / "cache", SPEC, workers=0)[0].status == FAILED
    (row,) = Ledger(tmp_path / "cache" / "ledger.csv").rows()
    assert (row.slide_id, row.path, row.status, row.fingerprint) == ("S1", str(source.path), FAILED, "")
    assert tree(cache_path(tmp_path / "cache", "S1")) == before


@pytest.mark.slow
def test_processes_give_the_same_bytes_and_the_ledger_all_rows(
    source: SlideSource, pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    others = [SlideSource(f"T{n}", pyramid_tiff(tissue_picture(512, n), name=f"t{n}")) for n in range(3)]
    sources = [source, SlideSource("gone", tmp_path / "gone.svs"), *others]
    done: list[LedgerRow] = []
    rows = tile_slides(sources, tmp_path / "many", SPEC, workers=2, on_done=done.append)
    assert [row.slide_id for row in rows] == ["S1", "gone", "T0", "T1", "T2"]
    assert [row.status for row in rows] == [USED, FAILED, USED, USED, USED]
    assert sorted(row.slide_id for row in done) == sorted(row.slide_id for row in rows)
    ledger = Ledger(tmp_path / "many" / "ledger.csv").rows()
    assert {r.slide_id: r for r in ledger} == {r.slide_id: r for r in rows}
    tile_slides(sources, tmp_path / "one", SPEC, workers=0)
    for name in ("S1", "T0", "T1", "T2"):
        assert tree(cache_path(tmp_path / "many", name)) == tree(cache_path(tmp_path / "one", name))


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the errors of the next renames onto a ledger that is there; each write of the run is due."""
    numbers: list[int] = []
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).name == "ledger.csv" and Path(target).exists() and numbers:
            number = numbers.pop(0)
            raise OSError(number, os.strerror(number))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr("slidetl.files._LEAST_SECONDS", 0)
    monkeypatch.setattr("slidetl.files._LEAST_DURATIONS", 0)
    return numbers


def test_a_ledger_that_is_open_in_a_spreadsheet_is_written_once_it_is_closed(
    source: SlideSource, tmp_path: Path, refusals: list[int]
) -> None:
    refusals += [errno.EACCES, errno.EBUSY]
    sources = [source, *(SlideSource(f"T{n}", source.path) for n in range(3))]
    with pytest.warns(UserWarning, match=r"ledger\.csv: .* open in another program\? .*tries again"):
        rows = tile_slides(sources, tmp_path, SPEC, workers=0)
    assert not refusals and [row.status for row in rows] == [USED] * 4
    assert Ledger(tmp_path / "ledger.csv").rows() == rows


@pytest.mark.parametrize(
    ("number", "error", "done"), [(errno.EACCES, FileHeldError, 3), (errno.ENOSPC, CacheError, 2)]
)
def test_a_ledger_that_stays_open_costs_no_slide_and_a_full_disk_ends_the_run(
    source: SlideSource,
    tmp_path: Path,
    refusals: list[int],
    number: int,
    error: type[Exception],
    done: int,
) -> None:
    refusals += [number] * 9
    sources = [source, *(SlideSource(f"T{n}", source.path) for n in range(2))]
    with warnings.catch_warnings(), pytest.raises(error):
        warnings.simplefilter("ignore")
        tile_slides(sources, tmp_path, SPEC, workers=0)
    assert len(list(tmp_path.glob("*.zarr"))) == done
    refusals.clear()
    rows = tile_slides(sources, tmp_path, SPEC, workers=0)  # finds them finished
    assert Ledger(tmp_path / "ledger.csv").rows() == rows and len(rows) == 3


@pytest.mark.parametrize(
    ("number", "ends"), [(errno.ENOSYS, False), (errno.EIO, False), (errno.EDQUOT, True)]
)
def test_a_file_system_without_a_sync_of_its_own_loses_no_summary(
    source: SlideSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, ends: bool
) -> None:
    def syncfs(descriptor: int) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(syncfs=syncfs))
    if ends:
        with pytest.raises(CacheError, match="the disk is full"):
            tile_slides([source], tmp_path, SPEC, workers=0)
    else:
        with pytest.warns(UserWarning, match=rf"cannot be made durable \({os.strerror(number)}\)"):
            (row,) = tile_slides([source], tmp_path, SPEC, workers=0)
        assert row.status == USED


def waits_for_lock(pid: int | None) -> bool:
    """Whether a process sleeps until a file is unlocked, by the kernel's own list."""
    return any(f" {pid} " in line for line in Path("/proc/locks").read_text().splitlines() if "->" in line)


def kill_the_one_that_waits() -> None:
    """Kills the first process that waits for a lock."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for process in multiprocessing.active_children():
            if waits_for_lock(process.pid):
                process.kill()
                process.join()
                return
        time.sleep(0.05)


@pytest.mark.slow
def test_a_process_that_dies_costs_its_slide_only(source: SlideSource, tmp_path: Path) -> None:
    killer = threading.Thread(target=kill_the_one_that_waits)
    with slide_lock(tmp_path, "S1"):
        killer.start()
        rows = tile_slides([source, SlideSource("S2", source.path)], tmp_path, SPEC, workers=1)
    killer.join()
    assert [row.status for row in rows] == [FAILED, USED]
    assert "ended by SIGKILL" in rows[0].reason


@pytest.mark.slow
def test_a_process_that_dies_beside_others_leaves_its_slide_to_the_end(
    source: SlideSource, tmp_path: Path
) -> None:
    """The kernel ends one of several processes where memory is short; alone, its slide has room."""
    lock = contextlib.ExitStack()
    lock.enter_context(slide_lock(tmp_path, "S1"))

    def kill() -> None:
        kill_the_one_that_waits()
        lock.close()

    killer = threading.Thread(target=kill)
    killer.start()
    rows = tile_slides([source, SlideSource("S2", source.path)], tmp_path, SPEC, workers=2)
    killer.join()
    assert [row.status for row in rows] == [USED, USED]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory: use fewer --workers, or a machine with more"),
        (
            RuntimeError("can't start new thread"),
            "out of memory: use fewer --workers, or a machine with more (can't start new thread)",
        ),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_a_slide_raises_costs_it_alone(
    source: SlideSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def tile(source: SlideSource, **options: Any) -> LedgerRow:
        if source.slide_id == "S1":
            raise error
        return tile_slide(source, **options)

    monkeypatch.setattr("slidetl.tiles.run.tile_slide", tile)
    rows = tile_slides([source, SlideSource("S2", source.path)], tmp_path, SPEC, workers=0)
    assert [(row.status, row.reason) for row in rows] == [(FAILED, reason), (USED, "")]


def test_a_process_that_ends_itself_is_told_without_blame(source: SlideSource, tmp_path: Path) -> None:
    tile = partial(end_at_once, cache_dir=tmp_path)
    (row,) = _in_processes([[source]], tile, 1)
    assert row.status == FAILED and row.reason == (
        "the process that tiled it ended itself, as libraries do that cannot go on (code 1); if memory is "
        "short, use fewer --workers, or a machine with more"
    )


def test_a_process_that_ends_within_a_job_costs_one_of_it(tmp_path: Path) -> None:
    job = [
        SlideSource(name, tmp_path / "s", location_mm=(0.0, 0.0, float(n))) for n, name in enumerate("abc")
    ]
    rows = list(_in_processes([job], partial(end_at_b), 1))
    assert [(row.slide_id, row.status) for row in rows] == [("a", USED), ("b", FAILED), ("c", USED)]


def end_at_once(source: SlideSource, **_: Any) -> LedgerRow:
    os._exit(1)


def end_at_b(source: SlideSource, **_: Any) -> LedgerRow:
    if source.slide_id == "b":
        os._exit(1)
    return LedgerRow(source.slide_id, str(source.path), USED)


def test_tiles_of_a_slide_whose_file_is_gone_are_kept(source: SlideSource, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (before,) = tile_slides([source], cache, SPEC, workers=0)
    tiles = tree(cache_path(cache, "S1"))
    source.path.rename(source.path.with_name("archived.tiff"))
    with pytest.warns(UserWarning, match="1 slides are not where they were; their tiles are kept: S1"):
        assert tile_slides([source], cache, SPEC, workers=0) == [before]
    assert Ledger(cache / "ledger.csv").rows() == [before] and tree(cache_path(cache, "S1")) == tiles
    # Tiles of another path may be another slide's: it fails, and takes nothing from the first.
    (row,) = tile_slides([SlideSource("S1", tmp_path / "other.tiff")], cache, SPEC, workers=0)
    assert row.status == FAILED and "no such file; the tiles of" in row.reason
    assert Ledger(cache / "ledger.csv").rows() == [before]


def test_a_failure_that_says_nothing_against_finished_tiles_leaves_them_in_use(
    source: SlideSource,
    pyramid_tiff: PyramidTiff,
    tissue_picture: Draw,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, other = tmp_path / "cache", pyramid_tiff(tissue_picture(512, 1), name="other")
    (before,) = tile_slides([source], cache, SPEC, workers=0)
    (row,) = tile_slides([replace(source, path=other)], cache, SPEC, workers=0)  # of another study
    assert row.status == FAILED and "made from another slide" in row.reason
    assert row.reason.endswith(f"the tiles of {source.path} are kept, and stay in use")

    def fail(*_: Any, **__: Any) -> LedgerRow:
        raise MemoryError

    monkeypatch.setattr("slidetl.tiles.run.tile_slide", fail)
    (row,) = tile_slides([source], cache, SPEC, workers=0)
    assert row.status == FAILED and row.reason.startswith("out of memory") and "stay in use" in row.reason
    assert Ledger(cache / "ledger.csv").rows() == [before]
    os.utime(source.path, (1, 1))  # it may be another file by now
    (row,) = tile_slides([source], cache, SPEC, workers=0)
    assert row.status == FAILED and "stay in use" not in row.reason
    assert Ledger(cache / "ledger.csv").rows() == [row]


def test_identifiers_must_differ_and_do_as_folder_names(source: SlideSource, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="case ignored; clashing: S1, s1"):
        tile_slides([source, SlideSource("s1", source.path)], tmp_path, SPEC)
    for name in ("", "..", ".hidden", "a/b", "/etc"):
        with pytest.raises(UsageError, match="name of a folder"):
            SlideSource(name, source.path)


def test_a_foreign_ledger_is_found_before_the_work(source: SlideSource, tmp_path: Path) -> None:
    (tmp_path / "ledger.csv").write_text("something,else\n1,2\n")
    with pytest.raises(CacheError, match="not a row of a ledger"):
        tile_slides([source], tmp_path, SPEC, workers=0)
    assert not cache_path(tmp_path, "S1").exists()
