"""Inspects, verifies and repairs a tile cache, and exports its tissue."""

from __future__ import annotations

import dataclasses
import sys
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from slidetl.cli.progress import Progress
from slidetl.processor import usable_cores
from slidetl.text import one_line

if TYPE_CHECKING:
    from slidetl.tiles.ledger import Ledger, LedgerRow
    from slidetl.tiles.verify import Verification


def verify(cache: Path, *, repair: bool = False, decode: bool = False, slides: Path | None = None) -> int:
    """Reads a whole cache and prints one line for each damage found.

    Exit code 1 if anything is damaged and was not repaired.

    Args:
        cache: folder of 'slidetl tile'.
        repair: write damaged parts again, from the slides in the ledger.
        decode: also decode every tile, to find copies from a damaged slide; with ``repair`` they are left out
            and counted as unreadable.
        slides: a manifest (CSV) or folder with the present paths of the slides, for ``repair``.
    """
    from slidetl.errors import CacheError, SlideError, UsageError
    from slidetl.tiles.ledger import USED, Ledger
    from slidetl.tiles.store import groups
    from slidetl.tiles.verify import repair_cache, verify_cache

    paths = groups(cache)
    ledger = Ledger(cache / "ledger.csv")
    rows = ledger.by_slide()
    sources = {slide_id: Path(row.path) for slide_id, row in rows.items()}
    if slides is not None:
        if not repair:
            raise UsageError("--slides says where --repair finds the slides; give both, or neither")
        sources.update(_slide_paths(slides))
    damaged = tiles = 0
    threads = usable_cores()
    with Progress("verifying", len(paths)) as progress:
        for path in paths:
            slide_id = path.name.removesuffix(".zarr")
            try:
                found = verify_cache(path, rows.get(slide_id), decode, threads)
                _print_findings(slide_id, found)
                tiles += found.tiles
                if repair and not found.is_sound:
                    if slide_id not in sources:
                        raise UsageError(f"{path}: its slide is not in the ledger; say where it is: --slides")
                    found = repair_cache(found, sources[slide_id])
                    print(one_line(f"{slide_id}: {'mended' if found.is_sound else 'still damaged'}"))
                    _record(ledger, rows.get(slide_id), found)
                damaged += not found.is_sound
            except (CacheError, SlideError, UsageError, OSError) as error:  # OSError: of a disk or a share
                print(one_line(f"{slide_id}: {error}"))
                damaged += 1
            progress.advance()
        for slide_id in sorted(rows):
            if rows[slide_id].status == USED and not (cache / f"{slide_id}.zarr").exists():
                print(f"{slide_id}: missing: in the ledger as used, but there is no cache; tile it again")
                damaged += 1
    print(f"{len(paths)} slides, {tiles} tiles: {f'{damaged} damaged' if damaged else 'all sound'}")
    return 1 if damaged else 0


def _record(ledger: Ledger, row: LedgerRow | None, found: Verification) -> None:
    """Records the tiles left out by a repair."""
    if row is None or found.header is None:
        return
    lost = found.header.tiles_unreadable - row.tiles_unreadable
    if lost:
        print(f"{row.slide_id}: {lost} tiles left out, which the slide cannot give")
        ledger.record(
            [dataclasses.replace(row, tiles=found.tiles, tiles_unreadable=found.header.tiles_unreadable)]
        )


def _print_findings(slide_id: str, found: Verification) -> None:
    for finding in found.findings:
        print(one_line(f"{slide_id}: {finding}"))


def _slide_paths(manifest: Path) -> dict[str, Path]:
    from slidetl.data.manifest import read_manifest

    return {row.slide_id: row.path for row in read_manifest(manifest).rows}


def info(cache: Path, *, json: bool = False) -> int:
    """Lists the slides of a cache, their tiles and stored features.

    Args:
        cache: folder of 'slidetl tile'.
        json: print one JSON object on stdout, instead of a table.
    """
    from slidetl.tiles.info import cache_info

    found = cache_info(cache)
    if json:
        print(dumps(dataclasses.asdict(found), indent=2))
        return 0

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("slide", no_wrap=True)
    table.add_column("tiles", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("mpp", no_wrap=True)
    table.add_column("tiled as")
    table.add_column("features")
    for slide in found.slides:
        spacing = ""
        if slide.mpp_read is not None:
            x, y = slide.mpp_read
            spacing = f"{x:.4g} x {y:.4g}" if x and y else "not stated"
        cells = (
            slide.slide_id,
            str(slide.tiles),
            f"{slide.bytes / 1e6:.1f}",
            spacing,
            slide.problem or f"[{slide.spec}]",
            ", ".join(slide.features),
        )
        table.add_row(*map(one_line, cells))
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    console.print(table)
    for number, spec in enumerate(found.specs):
        if spec.get("foreign"):  # the rest says how slidetl would cut tiles
            known = ("foreign", "mpp", "tile_size_px", "stride_px")
            spec = {name: spec[name] or "not stated" for name in known}
        print(f"[{number}] " + ", ".join(f"{name} {value}" for name, value in spec.items()))
    if len(found.specs) > 1:
        print(f"warning: {len(found.specs)} ways of tiling in one cache; a training takes only one")
    for building in found.unfinished:
        print(one_line(f"unfinished: {building}; 'slidetl tile' continues it"))
    for lease in found.stale_leases:
        print(one_line(f"left by a killed run: the lease on {lease}; it is in nobody's way"))
    print(f"{len(found.slides)} slides, {found.tiles} tiles, {found.bytes / 1e6:.1f} MB")
    return 0


def tissue(cache: Path, *, export: Path) -> int:
    """Writes the tissue of each slide as GeoJSON for QuPath; edited there, it comes back by 'tile --regions'.

    Args:
        cache: folder of 'slidetl tile'.
        export: folder for SLIDE.geojson, annotations of class Tissue; existing files are replaced.
    """
    from slidetl.tiles.geojson import write_tissue
    from slidetl.tiles.store import SlideCache, groups

    paths, pieces, written = groups(cache), 0, 0
    with Progress("writing", len(paths)) as progress:
        for path in paths:
            opened = SlideCache.open(path)
            if not opened.header.imported:
                pieces += write_tissue(opened, export / f"{opened.slide_id}.geojson")
                written += 1
            progress.advance()
    left = f"; {len(paths) - written} slides of imported features have none" if written < len(paths) else ""
    print(f"{written} slides, {pieces} pieces of tissue: {export}{left}")
    return 0


COMMANDS = {"info": info, "tissue": tissue, "verify": verify}
