"""``slidetl tile``: slides to caches."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from slidetl.cli.progress import Progress

if TYPE_CHECKING:
    from slidetl.tiles.ledger import LedgerRow

SUMMARY = "cut slides into tiles and store those with tissue in a cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "manifest",
        type=Path,
        metavar="MANIFEST",
        help="a manifest (CSV), a folder of slides, one of labelled images (LABEL/*.png), or an .npz of them",
    )
    parser.add_argument(
        "--images",
        action="store_true",
        help="the folder holds labelled images, even if TIFFs or slides are among them",
    )
    # SUPPRESS, here and below: else the help of an option without a default says "(default: None)".
    parser.add_argument(
        "--cache",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="folder for the caches and ledger.csv",
    )
    parser.add_argument(
        "--mpp",
        type=float,
        required=True,
        default=argparse.SUPPRESS,
        help="spacing of the tiles, micrometres per pixel",
    )
    parser.add_argument("--tile-size", type=int, default=224, metavar="PX", help="side of a tile, pixels")
    parser.add_argument(
        "--stride",
        type=int,
        default=0,
        metavar="PX",
        help="distance between neighbouring tiles, pixels; 0: the tile size",
    )
    parser.add_argument(
        "--min-tissue", type=float, default=0.25, metavar="SHARE", help="least tissue in a tile, 0 to 1"
    )
    parser.add_argument(
        "--edge",
        choices=["drop", "pad"],
        default="drop",
        help="tiles cut by the right and bottom border: left out, or filled with background",
    )
    parser.add_argument(
        "--max-pen",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="leave out tiles with more ink of a pen, 0 to 1; 1 keeps all",
    )
    parser.add_argument(
        "--max-fold",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="leave out tiles with more folded tissue, 0 to 1; 1 keeps all",
    )
    parser.add_argument(
        "--max-air",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="leave out tiles with more air or fat within the tissue, 0 to 1; 1 keeps all",
    )
    parser.add_argument(
        "--min-focus",
        type=float,
        default=0.0,
        metavar="F",
        help="leave out tiles less sharp than this (0.08: blurred by 2 um); 0 measures none, which is faster",
    )
    parser.add_argument(
        "--icc", action="store_true", help="convert colours to sRGB by the slide's ICC profile, if it has one"
    )
    parser.add_argument(
        "--mpp-override",
        type=float,
        default=argparse.SUPPRESS,
        metavar="UM",
        help="micrometres per level-0 pixel, for slides without mpp in the manifest; replaces what they say",
    )
    parser.add_argument(
        "--mpp-tolerance",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="a pyramid level that is so close to --mpp is read as it is",
    )
    parser.add_argument(
        "--codec",
        choices=["jpeg", "zstd"],
        default="jpeg",
        help="zstd: lossless, and any zarr reader opens it",
    )
    parser.add_argument(
        "--jpeg-quality",
        type=int,
        default=90,
        metavar="Q",
        help="1 to 100; unused where the slide's own JPEG tiles fit the grid and are copied",
    )
    parser.add_argument(
        "--grades",
        type=int,
        default=5,
        metavar="K",
        help="number of grades on the scale: the manifest's must be from 0 to K-1",
    )
    parser.add_argument(
        "--preview",
        action="store_true",
        help="write CACHE/previews/SLIDE.png: tissue, tiles kept, and those left out with the reason",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes, each at a slide of its own",
    )
    parser.add_argument(
        "--scheduler",
        default=argparse.SUPPRESS,
        metavar="tcp://HOST:8786",
        help="tile on the workers of this Dask scheduler instead (needs the extra slidetl[cluster])",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace caches made with other options or from other slides; those that match are kept",
    )


def run(options: argparse.Namespace) -> int:
    """Tiles every slide of the manifest.

    Returns:
        0, or 1 if any slide failed.
    """
    from slidetl.data.manifest import read_manifest
    from slidetl.errors import UsageError
    from slidetl.tiles.grid import TileSpec
    from slidetl.tiles.ledger import EXCLUDED, FAILED, USED
    from slidetl.tiles.run import tile_slides
    from slidetl.tiles.tile import SlideSource

    if options.workers < 1:
        raise UsageError(f"--workers must be at least 1, not {options.workers}")
    if options.grades < 2:
        raise UsageError(f"--grades must be at least 2, not {options.grades}")
    mpp_override = getattr(options, "mpp_override", None)
    spec = TileSpec(
        mpp=options.mpp,
        tile_size_px=options.tile_size,
        stride_px=options.stride,
        min_tissue=options.min_tissue,
        mpp_tolerance=options.mpp_tolerance,
        codec=options.codec,
        jpeg_quality=options.jpeg_quality,
        edge=options.edge,
        icc=options.icc,
        min_focus=options.min_focus,
        max_pen=options.max_pen,
        max_fold=options.max_fold,
        max_air=options.max_air,
    )
    manifest = read_manifest(options.manifest, options.grades, options.images)
    if manifest.grades:
        print(f"labels by folder, in this order: --data.grades='{list(manifest.grades)}'")
    sources = [
        SlideSource(row.slide_id, row.path, row.mpp if row.mpp is not None else mpp_override)
        for row in manifest.rows
    ]
    started = time.monotonic()
    with Progress("slides", len(sources)) as progress:

        def report(row: LedgerRow) -> None:
            progress.advance()
            progress.show(f"{row.slide_id}: {row.status}, {row.tiles} tiles, {row.seconds:.1f} s")

        if "scheduler" in options:
            from slidetl.tiles.cluster import tile_on_cluster

            rows = tile_on_cluster(
                sources,
                options.cache,
                spec,
                options.scheduler,
                options.overwrite,
                options.preview,
                report,
            )
        else:
            rows = tile_slides(
                sources,
                options.cache,
                spec,
                options.workers,
                options.overwrite,
                options.preview,
                report,
            )
    seconds = time.monotonic() - started

    failed = [row for row in rows if row.status == FAILED]
    for row in failed:
        print(f"failed: {row.slide_id}: {row.reason}", file=sys.stderr)
    counts = ", ".join(f"{sum(row.status == s for row in rows)} {s}" for s in (USED, EXCLUDED, FAILED))
    tiles = sum(row.tiles for row in rows)
    print(f"{len(rows)} slides: {counts}; {tiles} tiles in {seconds:.1f} s ({tiles / seconds:.0f} tiles/s)")
    return 1 if failed else 0
