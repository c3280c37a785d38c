"""``slidetl tile``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from slidetl.cli.progress import Progress
from slidetl.processor import usable_cores
from slidetl.text import listed, one_line
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.regions import RegionOptions, find_regions

if TYPE_CHECKING:
    from slidetl.tiles.ledger import LedgerRow

_CORES = usable_cores()


def tile(
    manifest: Path,
    *,
    cache: Path,
    spec: TileSpec,
    regions: RegionOptions,
    images: bool = False,
    mpp_override: float | None = None,
    mpp_replace: float | None = None,
    grades: int = 5,
    preview: bool = False,
    workers: int = _CORES,
    scheduler: str | None = None,
    overwrite: bool = False,
) -> int:
    """Cuts slides into tiles and stores those with tissue in a cache. Exit code 1 if any slide failed.

    With --spacing-mm, cuts CT series into patches instead: folders of DICOM series, NIfTI or MetaImage.

    Args:
        manifest: a manifest (CSV), a folder of slides, one of labelled images (LABEL/*.png), or an .npz of
            them.
        cache: folder for the caches and ledger.csv.
        spec: the tiles, and the conditions to keep them.
        regions: annotated regions that the tiles must lie in.
        images: read a folder as labelled images, even if TIFFs or slides are among them.
        mpp_override: spacing of level 0, micrometres per pixel, of slides without one in the manifest or
            their metadata; fills gaps only.
        mpp_replace: spacing of level 0 in place of the metadata's, of all slides without mpp in the manifest
            (the manifest's mpp replaces it, too).
        grades: number K of grades on the scale; the manifest's must be from 0 to K-1.
        preview: write CACHE/previews/SLIDE.png: tissue, tiles kept, and tiles left out with the reason.
        workers: processes, each at one slide.
        scheduler: address of a Dask scheduler, tcp://HOST:PORT; its workers tile instead (needs the extra
            slidetl[cluster]).
        overwrite: replace caches made with other options or from other slides; those that match are kept.
    """
    from slidetl.data.manifest import read_manifest
    from slidetl.errors import UsageError, refuse_unused
    from slidetl.slides.spacing import check_given
    from slidetl.tiles.ledger import EXCLUDED, FAILED, USED, summarise_notes
    from slidetl.tiles.tile import SlideSource

    if workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")
    if scheduler is not None:
        refuse_unused(tile, {"workers": workers}, "with --scheduler, whose workers tile instead")
    if grades < 2:
        raise UsageError(f"--grades must be at least 2, not {grades}")
    check_given("--mpp-override", mpp_override)
    check_given("--mpp-replace", mpp_replace)
    found = read_manifest(manifest, grades, images)
    if found.labels:
        print(f"labels by folder: {', '.join(found.labels)}; give them to --data.grades, lowest first")
    annotated = find_regions(regions, [(row.slide_id, row.path) for row in found.rows])
    sources = [
        SlideSource(
            row.slide_id,
            row.path,
            mpp_override,
            mpp_replace if row.mpp is None else row.mpp,
            annotated.get(row.slide_id),
            row.location_mm,
        )
        for row in found.rows
    ]
    started = time.monotonic()
    with Progress("slides", len(sources), stage="tiling") as progress:

        def report(row: LedgerRow) -> None:
            progress.advance()
            progress.show(f"{row.slide_id}: {row.status}, {row.tiles} tiles, {row.seconds:.1f} s")

        if scheduler is not None:
            from slidetl.tiles.cluster import tile_on_cluster

            rows = tile_on_cluster(sources, cache, spec, scheduler, overwrite, preview, report)
        else:
            from slidetl.tiles.run import tile_slides

            rows = tile_slides(sources, cache, spec, workers, overwrite, preview, report)
    seconds = time.monotonic() - started

    failed = [row for row in rows if row.status == FAILED]
    for line in _failures(failed):
        print(one_line(f"failed: {line}"), file=sys.stderr)
    for line in summarise_notes(rows):
        print(one_line(f"slidetl: warning: {line}"), file=sys.stderr)
    counts = ", ".join(f"{sum(row.status == s for row in rows)} {s}" for s in (USED, EXCLUDED, FAILED))
    tiles = sum(row.tiles for row in rows)
    print(f"{len(rows)} slides: {counts}; {tiles} tiles in {seconds:.1f} s ({tiles / seconds:.0f} tiles/s)")
    return 1 if failed else 0


def _failures(rows: list[LedgerRow]) -> list[str]:
    """Describes failed slides, many of the same reason together."""
    alike: dict[str, list[LedgerRow]] = {}
    for row in rows:
        alike.setdefault(row.reason.replace(row.path, ""), []).append(row)
    lines = []
    for group in alike.values():
        if len(group) <= 3:
            lines += [f"{row.slide_id}: {row.reason}" for row in group]
        else:
            first = listed([row.slide_id for row in group], 3)
            lines.append(f"{first} ({len(group)} in all): {group[0].reason}")
    return lines
