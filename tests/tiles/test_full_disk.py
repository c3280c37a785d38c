from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slidetl.tiles.grid import TileSpec
from slidetl.tiles.run import tile_slides
from slidetl.tiles.store import cache_path
from slidetl.tiles.tile import SlideSource
from slidetl.tiles.verify import verify_cache
from tests.conftest import Picture, PyramidTiff

# Runs in name spaces of its own, where a small disk can be mounted without any rights outside.
SCRIPT = """
import shutil, subprocess, sys
from pathlib import Path
from slidetl.tiles.ledger import Ledger
from slidetl.tiles.run import tile_slides
from slidetl.tiles.tile import SlideSource
from slidetl.errors import CacheError
from slidetl.tiles.grid import TileSpec
disk, out = Path(sys.argv[1]), Path(sys.argv[3])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], check=True)
source, spec = SlideSource("S1", Path(sys.argv[2])), TileSpec(mpp=0.5, tile_size_px=32, codec="zstd")
for size in ("2m", "3m", "64m"):
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
    try:
        (row,) = tile_slides([source], disk / "cache", spec, workers=0)
        print(row.status, row.reason)
    except CacheError as error:
        print("ledger", error)
    print(sorted(p.parent.name for p in (disk / "cache").glob("*.zarr/zarr.json")))
    print(sorted(p.name for p in (disk / "cache" / ".building").glob("*/.*.partial")))
    print(len(list((disk / "cache" / ".building").glob("S1/group/tiles/c/*"))))
shutil.copytree(disk / "cache" / "S1.zarr", out)
"""


@pytest.mark.slow
def test_a_full_disk_ends_clearly_and_is_continued_after_space_is_made(
    pyramid_tiff: PyramidTiff, tissue_picture: Callable[..., Picture], tmp_path: Path
) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = subprocess.run([*alone, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"this machine lets nobody mount a disk of their own: {probe.stderr.strip()}")
    picture = tissue_picture(1536)
    # Noise, which zstd cannot shrink much.
    picture[:, :1152] -= np.random.default_rng(0).integers(0, 50, (1536, 1152, 3), dtype=np.uint8)
    slide = pyramid_tiff(picture)
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        [*alone, sys.executable, "-c", SCRIPT, disk, slide, tmp_path / "S1.zarr"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    for attempt in (lines[0:4], lines[4:8]):
        assert attempt[0].startswith("failed ") and "the disk is full" in attempt[0], done.stdout
        assert f"{disk}/cache" in attempt[0] and "make space and run again" in attempt[0]
        assert attempt[1:3] == ["[]", "[]"]
    assert int(lines[7]) > int(lines[3]) > 0  # each continues where the one before stopped
    assert lines[8:10] == ["used ", "['S1.zarr']"]
    assert verify_cache(tmp_path / "S1.zarr").is_sound
    spec = TileSpec(mpp=0.5, tile_size_px=32, codec="zstd")
    tile_slides([SlideSource("S1", slide)], tmp_path / "calm", spec, workers=0)
    calm = cache_path(tmp_path / "calm", "S1")
    files = {p.relative_to(calm): p.read_bytes() for p in calm.rglob("*") if p.is_file()}
    mended = tmp_path / "S1.zarr"
    assert files == {p.relative_to(mended): p.read_bytes() for p in mended.rglob("*") if p.is_file()}
