"""Exchanges stored features with other tools: CLAM, TRIDENT, STAMP and AnnData."""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slidetl.cli.progress import Progress
from slidetl.text import one_line

if TYPE_CHECKING:
    from slidetl.data.manifest import ManifestRow
    from slidetl.tiles.ledger import LedgerRow


def export(
    cache: Path,
    output: Path,
    *,
    features: str,
    to: Literal["hdf5", "anndata"] = "hdf5",
    slides: tuple[str, ...] = (),
    overwrite: bool = False,
) -> int:
    """Writes stored features, one file for each slide, for another tool to read.

    Files that are there already are kept. Exit code 1 if any slide failed.

    Args:
        cache: folder of 'slidetl tile' and 'slidetl embed'.
        output: folder for the files.
        features: name of the stored features; 'slidetl cache info' lists them.
        to: hdf5 is TRIDENT's layout, read by CLAM and STAMP-like tools too; anndata is .h5ad.
        slides: identifiers of slides, instead of all in the cache.
        overwrite: replace files with other content.
    """
    from slidetl.data.study import find_slides, open_listed
    from slidetl.errors import CacheError, OutputError
    from slidetl.files import full_disk
    from slidetl.tiles.exchange import SUFFIXES, export_features

    found = find_slides(cache, slides)
    written = failed = 0
    with Progress("slides", len(found)) as progress:
        for slide_id, entry in found.items():
            try:
                path = output / f"{slide_id}{SUFFIXES[to]}"
                is_new = export_features(
                    open_listed(cache, slide_id, entry), features, path, to, overwrite=overwrite
                )
                written += is_new
                state = "written" if is_new else "there already"
            except (CacheError, OutputError) as error:
                if full_disk(error):
                    raise
                failed += 1
                state = str(error)
                print(one_line(f"failed: {slide_id}: {error}"), file=sys.stderr)
            progress.advance()
            progress.show(f"{slide_id}: {state}")
    kept = len(found) - written - failed
    print(f"{len(found)} slides: {written} written to {output}, {kept} there already, {failed} failed")
    return 1 if failed else 0


def import_(
    files: tuple[Path, ...],
    cache: Path,
    *,
    name: str,
    slides: Path | None = None,
    backbone: str = "",
    overwrite: bool = False,
) -> int:
    """Stores features that TRIDENT, CLAM or STAMP wrote (HDF5), or 'slidetl features export'.

    The cache then serves 'fit-features', and with a frozen backbone 'fit', 'test' and 'compare'. It has no
    tiles. Features that are there already are kept. Exit code 1 if any file failed.

    Args:
        files: HDF5 files, or folders of them; the name of a file is that of its slide.
        cache: folder to store them in; a new one, or one with the same tiles.
        name: name for the features.
        slides: manifest (CSV) or folder of the slides. It gives identifiers and paths: a file has the name
            of its slide_id, or of the slide's own file. Of a slide that is on this machine, content and
            spacing are recorded, and coordinates compared with its size. Without it, the path in a manifest
            is that of the HDF5 file.
        backbone: the network of files that do not state it, as CLAM's.
        overwrite: replace other features of this name.
    """
    from slidetl.errors import SlidetlError
    from slidetl.files import full_disk
    from slidetl.text import listed
    from slidetl.tiles.features import NOT_STATED, feature_name
    from slidetl.tiles.importing import import_features
    from slidetl.tiles.ledger import Ledger

    feature_name(name)
    jobs = _match(_hdf5_files(files), slides)
    rows: list[LedgerRow] = []
    ledger = Ledger(cache / "ledger.csv")
    known = set(ledger.by_slide())
    unknown, failed, new = set[str](), 0, 0
    told: dict[str, list[str]] = defaultdict(list)
    with Progress("files", len(jobs)) as progress, contextlib.ExitStack() as stack:
        stack.callback(lambda: ledger.record(rows) if rows else None)
        for slide_id, (file, slide, mpp) in jobs.items():
            try:
                done = import_features(
                    *(file, cache, slide_id, name),
                    slide=slide,
                    mpp=mpp,
                    backbone=backbone,
                    overwrite=overwrite,
                )
                # A further network's file does not stand for the slide in the place of the first.
                if done.row is not None and (slide is not None or slide_id not in known):
                    rows.append(done.row)
                new += done.is_new
                state = f"{done.tiles} tiles" + ("" if done.is_new else ", there already")
                for note in done.notes:
                    told[note].append(slide_id)
                if done.source.backbone == NOT_STATED:
                    unknown.add(slide_id)
            except (SlidetlError, OSError) as error:
                if full_disk(error):
                    raise
                failed += 1
                state = str(error)
                print(one_line(f"failed: {slide_id}: {error}"), file=sys.stderr)
            progress.advance()
            progress.show(f"{slide_id}: {state}")
    for note, names in told.items():
        print(one_line(f"{listed(names, 3)}: {note}"), file=sys.stderr)
    if unknown:
        print(
            f"{len(unknown)} files do not state their network: nothing would notice files of two networks in "
            "one folder; state it with --backbone",
            file=sys.stderr,
        )
    kept = len(jobs) - new - failed
    print(f"{len(jobs)} slides: {new} stored in {cache}, {kept} there already, {failed} failed")
    return 1 if failed else 0


def _hdf5_files(paths: tuple[Path, ...]) -> list[Path]:
    """Lists the HDF5 files among paths and below folders."""
    from slidetl.data.folder import find_files
    from slidetl.errors import UsageError
    from slidetl.tiles.foreign import SUFFIXES

    found = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        if not path.is_dir():
            found.append(path)
            continue
        listed = find_files(path)
        files = listed.slides(frozenset(SUFFIXES))
        if not files:
            pickles = sum(file.suffix.lower() == ".pt" for file in listed.paths)
            raise UsageError(
                f"{path}: no .h5 files here"
                + (f", and {pickles} .pt, which are pickles and not read; see --help" if pickles else "")
            )
        listed.warn_of_rest(files)
        found += files
    return found


def _match(files: list[Path], slides: Path | None) -> dict[str, tuple[Path, Path | None, float | None]]:
    """Assigns files to slides, by the name of the file: identifier, file, path of the slide, its spacing.

    It is the slide's identifier, or the name of its own file; a file that could be of two slides is refused.
    """
    from slidetl.data.manifest import read_manifest
    from slidetl.errors import UsageError
    from slidetl.text import listed
    from slidetl.tiles.identifier import safe_slide_id

    named: dict[str, Path] = {}
    for file in files:
        stem = safe_slide_id(file.stem)
        if not stem or stem in named:
            other = f" as {named[stem]}" if stem else ""
            raise UsageError(f"{file}: its name gives the slide {stem!r}{other}; import one folder at a time")
        named[stem] = file.absolute()
    if slides is None:
        return {stem: (file, None, None) for stem, file in named.items()}
    rows = read_manifest(slides).rows
    by_id = {row.slide_id: row for row in rows}
    by_path: dict[str, list[ManifestRow]] = defaultdict(list)
    for row in rows:
        for stem in {row.path.stem, row.path.stem.removesuffix(".ome")}:
            by_path[safe_slide_id(stem)].append(row)
    matched: dict[str, tuple[Path, Path | None, float | None]] = {}
    strangers, doubtful = [], []
    for name, file in named.items():
        own, others = by_id.get(name), by_path[name]
        if own is None or own in others:  # slides of the same file name may have files by their slide_id
            others = [row for row in others if row.slide_id not in named]
        claims = [*([own] if own else []), *(row for row in others if row is not own)]
        if len(claims) > 1 or any(row.slide_id in matched for row in claims):
            doubtful.append(f"{file} of {' or '.join(f'{row.slide_id} ({row.path})' for row in claims)}")
        elif claims:
            matched[claims[0].slide_id] = (file, claims[0].path, claims[0].mpp)
        else:
            strangers.append(name)
    if doubtful:
        raise UsageError(
            f"{slides}: {len(doubtful)} files could be of another slide, or of one that has a file: "
            f"{listed(doubtful)}; name each by its slide_id, and no slide_id as the file of another slide"
        )
    missing = [row.slide_id for row in rows if row.slide_id not in matched]
    for what, left in (("slides without a file", missing), ("files of no slide", strangers)):
        if left:
            print(one_line(f"{len(left)} {what}, left out: {listed(left)}"), file=sys.stderr)
    if not matched:
        raise UsageError(f"{slides}: no file has the name of one of its slides")
    return matched


COMMANDS = {"export": export, "import": import_}
