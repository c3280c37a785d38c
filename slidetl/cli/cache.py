"""``slidetl cache``: what a tile cache holds, and whether every byte of it is what was written."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from slidetl.cli.progress import Progress

if TYPE_CHECKING:
    from slidetl.tiles.ledger import Ledger, LedgerRow
    from slidetl.tiles.verify import Verification

SUMMARY = "look into a tile cache, verify it, or mend it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the two subcommands."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="subcommand")
    info = commands.add_parser("info", help="list what is there", description="List what a cache holds.")
    info.add_argument("cache", type=Path, metavar="CACHE", help="the folder that 'slidetl tile' wrote")
    info.add_argument("--json", action="store_true", help="one JSON object on stdout, instead of a table")
    verify = commands.add_parser(
        "verify",
        help="find damage, and mend it on request",
        description="Read a whole cache and print one line for each thing that is wrong with it. "
        "Exit code 1 if anything is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    verify.add_argument("cache", type=Path, metavar="CACHE", help="the folder that 'slidetl tile' wrote")
    verify.add_argument(
        "--repair", action="store_true", help="make what is damaged again, from the slides in the ledger"
    )
    verify.add_argument(
        "--decode",
        action="store_true",
        help="also decode every tile: of a damaged slide, some may have been copied that cannot be; with "
        "--repair these are left out and counted as unreadable",
    )
    # SUPPRESS: else the help of an option without a default says "(default: None)".
    verify.add_argument(
        "--slides",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="MANIFEST",
        help="a manifest (CSV) or folder that says where the slides lie now, for --repair",
    )


def run(options: argparse.Namespace) -> int:
    """Runs one of the two.

    Returns:
        0, or 1 if anything is damaged and was not mended.
    """
    return _info(options) if options.subcommand == "info" else _verify(options)


def _verify(options: argparse.Namespace) -> int:
    from slidetl.errors import CacheError, SlideError, UsageError
    from slidetl.tiles.ledger import USED, Ledger
    from slidetl.tiles.store import groups
    from slidetl.tiles.verify import repair_cache, verify_cache

    paths = groups(options.cache)
    ledger = Ledger(options.cache / "ledger.csv")
    rows = {row.slide_id: row for row in ledger.rows()}
    slides = {slide_id: Path(row.path) for slide_id, row in rows.items()}
    if hasattr(options, "slides"):
        if not options.repair:
            raise UsageError("--slides says where --repair finds the slides; give both, or neither")
        slides.update(_slide_paths(options.slides))
    damaged = tiles = 0
    threads = len(os.sched_getaffinity(0))
    with Progress("verifying", len(paths)) as progress:
        for path in paths:
            slide_id = path.name.removesuffix(".zarr")
            try:
                found = verify_cache(path, rows.get(slide_id), options.decode, threads)
                _print_findings(slide_id, found)
                tiles += found.tiles
                if options.repair and not found.is_sound:
                    if slide_id not in slides:
                        raise UsageError(f"{path}: its slide is not in the ledger; say where it is: --slides")
                    found = repair_cache(found, slides[slide_id])
                    print(f"{slide_id}: {'mended' if found.is_sound else 'still damaged'}")
                    _record(ledger, rows.get(slide_id), found)
                damaged += not found.is_sound
            except (CacheError, SlideError, UsageError) as error:
                print(f"{slide_id}: {error}")
                damaged += 1
            progress.advance()
        for slide_id in sorted(rows):
            if rows[slide_id].status == USED and not (options.cache / f"{slide_id}.zarr").exists():
                print(f"{slide_id}: missing: in the ledger as used, but there is no cache; tile it again")
                damaged += 1
    print(f"{len(paths)} slides, {tiles} tiles: {f'{damaged} damaged' if damaged else 'all sound'}")
    return 1 if damaged else 0


def _record(ledger: Ledger, row: LedgerRow | None, found: Verification) -> None:
    """Counts the tiles that a repair had to leave out."""
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
        print(f"{slide_id}: {finding}")


def _slide_paths(manifest: Path) -> dict[str, Path]:
    from slidetl.data.manifest import read_manifest

    return {row.slide_id: row.path for row in read_manifest(manifest).rows}


def _info(options: argparse.Namespace) -> int:
    from slidetl.tiles.info import cache_info

    info = cache_info(options.cache)
    if options.json:
        print(json.dumps(dataclasses.asdict(info), indent=2))
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
    for slide in info.slides:
        spacing = f"{slide.mpp_read[0]:.4g} x {slide.mpp_read[1]:.4g}" if slide.mpp_read else ""
        table.add_row(
            slide.slide_id,
            str(slide.tiles),
            f"{slide.bytes / 1e6:.1f}",
            spacing,
            slide.problem or f"[{slide.spec}]",
            ", ".join(slide.features),
        )
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    console.print(table)
    for number, spec in enumerate(info.specs):
        print(f"[{number}] " + ", ".join(f"{name} {value}" for name, value in spec.items()))
    if len(info.specs) > 1:
        print(f"warning: {len(info.specs)} ways of tiling in one cache; a training takes only one")
    for building in info.unfinished:
        print(f"unfinished: {building}; 'slidetl tile' continues it")
    for lease in info.stale_leases:
        print(f"left by a killed run: the lease on {lease}; it is in nobody's way")
    print(f"{len(info.slides)} slides, {info.tiles} tiles, {info.bytes / 1e6:.1f} MB")
    return 0
