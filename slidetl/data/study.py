"""Reads a study: its manifest, ledger and tile caches, joined and checked."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidetl.data.manifest import SPLITS, ManifestRow, read_manifest
from slidetl.data.splits import split_patients
from slidetl.data.tasks import LabelledPoints, Task, read_points
from slidetl.errors import (
    CacheError,
    CacheMismatchError,
    CacheMissingError,
    FileHeldError,
    ManifestError,
    UsageError,
)
from slidetl.slides import open_slide
from slidetl.slides.base import WHOLE_BYTES
from slidetl.slides.spacing import differ
from slidetl.text import listed
from slidetl.tiles.annotations import is_annotation_file
from slidetl.tiles.foreign import SUFFIXES as FEATURE_SUFFIXES
from slidetl.tiles.foreign import read_foreign
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import USED, Ledger, LedgerRow, file_state
from slidetl.tiles.regions import label_tiles
from slidetl.tiles.store import SlideCache, cache_path
from slidetl.volumes import open_series

_MUCH = 2**30  # bytes, slow enough to read for a warning
_CLOCK_S = 2.0  # rounding of modification times by file systems: FAT, on many USB disks


@dataclass(frozen=True, eq=False)
class CachedSlide:
    """A slide of the manifest with tiles in the cache.

    Attributes:
        row: its line of the manifest.
        cache: its tiles.
        labels: labels by task name, -1 or (of a number) NaN for none: of the slide, or ``[N] int64`` of its
            tiles.
    """

    row: ManifestRow
    cache: SlideCache
    labels: Mapping[str, int | float | NDArray[np.int64]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Study:
    """The slides of a manifest, with their tiles.

    Attributes:
        manifest: every line of the manifest, slides without tiles included.
        slides: the slides with tiles, in the order of the manifest.
        folder: the cache written by ``slidetl tile``, absolute.
    """

    manifest: tuple[ManifestRow, ...]
    slides: tuple[CachedSlide, ...]
    folder: Path

    @property
    def rows(self) -> tuple[ManifestRow, ...]:
        """The lines of the manifest of :attr:`slides`."""
        return tuple(slide.row for slide in self.slides)

    @property
    def caches(self) -> tuple[SlideCache, ...]:
        """The tiles of :attr:`slides`."""
        return tuple(slide.cache for slide in self.slides)

    @property
    def graded(self) -> tuple[CachedSlide, ...]:
        """The slides with a grade."""
        return tuple(slide for slide in self.slides if slide.row.grade is not None)

    def parts(
        self, *, val_fraction: float, test_fraction: float, seed: int
    ) -> dict[str, tuple[CachedSlide, ...]]:
        """Divides the graded slides into ``train``, ``val`` and ``test``.

        The manifest's ``split`` column decides. Without it, :func:`~slidetl.data.splits.split_patients`
        divides the whole manifest, so a slide without tiles moves no other patient.

        Args:
            val_fraction: share of the slides for validation, 0..0.5.
            test_fraction: share of the slides for the test, 0..0.5.
            seed: seed of the division.

        Raises:
            CacheMissingError: the manifest has graded slides, and none is in the cache.
            UsageError: a fraction is out of range, patients are too few, or two share a slide's content.
        """
        graded = self.graded
        if not graded and (count := sum(row.grade is not None for row in self.manifest)):
            raise CacheMissingError(
                f"{self.folder}: none of the {count} graded slides of the manifest is here; run 'slidetl "
                "tile' first"
            )
        check_duplicates(graded)
        if any(slide.row.split for slide in graded):
            split = {slide.row.slide_id: slide.row.split for slide in graded}
        else:
            split = split_patients(
                [row for row in self.manifest if row.grade is not None],
                val_fraction=val_fraction,
                test_fraction=test_fraction,
                seed=seed,
            )
        return self.divided(split)

    def divided(self, part_of: Mapping[str, str]) -> dict[str, tuple[CachedSlide, ...]]:
        """Divides the graded slides by the part of each ``slide_id``."""
        if len(self.graded) < len(self.slides):
            left_out = len(self.slides) - len(self.graded)
            warnings.warn(f"{left_out} of {len(self.slides)} slides have no grade, left out", stacklevel=3)
        return {
            part: tuple(slide for slide in self.graded if part_of[slide.row.slide_id] == part)
            for part in SPLITS
        }


def read_study(
    manifest: str | Path,
    cache: str | Path,
    n_grades: Sequence[str] | int | None = None,
    tasks: Sequence[Task] = (),
) -> Study:
    """Reads a manifest, opens the tiles of its slides, and checks their identity.

    The cache suffices: an existing slide file is read only if the ledger does not know its path below a
    folder, size and modification time. Failed or excluded slides of the ledger, and slides without a
    finished cache, are left out with a warning.

    Args:
        manifest: the CSV of the study, or a folder of slides.
        cache: the folder written by ``slidetl tile``.
        n_grades: number of grades K, or their names, lowest first; None accepts any whole number.
        tasks: label scales to read beside the grade.

    Raises:
        ManifestError: the manifest or a table of tile labels has faults.
        AnnotationError: a file of annotations has.
        CacheMissingError: no slide of the manifest is in the cache.
        CacheMismatchError: a cache holds the tiles of another slide, or of another spacing of level 0 than
            the manifest's, or slides were tiled differently.
    """
    folder = Path(cache).absolute()
    rows = read_manifest(Path(manifest), n_grades, tasks=tasks).rows
    ledger = _read_ledger(folder)
    slides, lost = [], []
    labels = _Labels(rows, tasks)
    for row in rows:
        try:
            opened = open_listed(folder, row.slide_id, ledger.get(row.slide_id))
        except CacheMissingError:
            lost.append(row.slide_id)
            continue
        if opened.header.location_mm != row.location_mm:
            raise CacheMismatchError(
                f"slide {row.slide_id!r}: the manifest's location is {row.location_mm}, its cache is of "
                f"{opened.header.location_mm} (None: the whole series); tile it again with --overwrite"
            )
        header = opened.header
        is_cut_here = header.frame is None and not header.imported  # else nothing was cut by this spacing
        if is_cut_here and row.mpp is not None and differ(header.mpp_level0, (row.mpp, row.mpp)):
            found = " x ".join(f"{mpp:.6g}" for mpp in sorted(set(header.mpp_level0)))
            raise CacheMismatchError(
                f"slide {row.slide_id!r}: the manifest's mpp is {row.mpp:.6g}, its tiles were cut with "
                f"{found} um per pixel of level 0; tile it again with --overwrite, or correct the manifest"
            )
        slides.append(CachedSlide(row, opened, labels.of(row, opened)))
    if not slides:
        raise CacheMissingError(
            f"{cache}: none of the {len(rows)} slides of {manifest} is here; run 'slidetl tile' first"
        )
    _warn_of_lost(lost, len(rows))
    labels.warn()
    _check_files(folder, slides, ledger)
    study = Study(rows, tuple(slides), folder)
    common_spec(study.caches)
    confined = sum(bool(opened.header.regions) for opened in study.caches)
    if 0 < confined < len(slides):
        warnings.warn(
            f"{confined} of {len(slides)} slides have tiles of --regions only, the others of all tissue",
            stacklevel=2,
        )
    return study


def check_duplicates(slides: Sequence[CachedSlide]) -> None:
    """Refuses the same content under two patients: it would leak between parts.

    Raises:
        UsageError: two patients share content; the message names the pairs of slides.
    """
    first: dict[str, ManifestRow] = {}
    pairs = []
    for slide in slides:
        row, other = slide.row, first.setdefault(slide.cache.fingerprint, slide.row)
        if other.patient_id != row.patient_id:
            pairs.append(f"{other.slide_id} ({other.patient_id}) and {row.slide_id} ({row.patient_id})")
    if pairs:
        raise UsageError(
            f"{len(pairs)} pair{'s' * (len(pairs) > 1)} of slides with the same content, of different "
            f"patients: {listed(pairs)}; remove one of each, or give both one patient_id"
        )


def warn_of_unused(path: Path, slide_ids: Iterable[str], takers: Iterable[str]) -> None:
    """Warns of slides in a table of labels that are none of those that take labels from it."""
    if unused := sorted(set(slide_ids) - {"", *takers}):
        warnings.warn(
            f"{path}: labels of {len(unused)} slides have no effect, since no line of the manifest with such "
            f"a slide_id takes them: {listed(unused)}",
            stacklevel=3,
        )


def find_slides(cache: Path, slide_ids: Sequence[str] = ()) -> dict[str, LedgerRow | None]:
    """Lists the slides of a cache without a manifest, by identifier, each with its row of the ledger.

    Failed or excluded slides of the ledger are left out with a warning.

    Args:
        cache: the folder written by ``slidetl tile``.
        slide_ids: slides to list; empty for all.

    Raises:
        CacheMissingError: there are none.
        UsageError: a named slide is missing.
    """
    names = sorted(path.stem for path in cache.glob("*.zarr"))
    if not names:
        raise CacheMissingError(f"{cache}: no tile cache here; make one with 'slidetl tile'")
    if unknown := sorted(set(slide_ids) - set(names)):
        raise UsageError(f"--slides: not in {cache}: {', '.join(unknown)}")
    ledger = _read_ledger(cache)
    wanted = [name for name in names if not slide_ids or name in slide_ids]
    used = {name: entry for name in wanted if (entry := ledger.get(name)) is None or entry.status == USED}
    _warn_of_lost([name for name in wanted if name not in used], len(wanted))
    if not used:
        raise CacheMissingError(f"{cache}: ledger.csv has no slide as used; tile them again")
    return used


def open_listed(folder: Path, slide_id: str, entry: LedgerRow | None) -> SlideCache:
    """Opens the tiles of a slide, and compares them with the ledger.

    Raises:
        CacheMissingError: there is no finished cache, or the ledger lists the slide as failed or excluded.
        CacheMismatchError: the tiles are of another slide.
    """
    if entry is not None and entry.status != USED:
        raise CacheMissingError(entry.reason)
    cache = SlideCache.open(cache_path(folder, slide_id))
    known = entry.fingerprint if entry is not None else ""  # a ledger of an older release has none
    check_identity(cache, slide_id, known or cache.fingerprint, "the ledger names")
    return cache


def common_spec(caches: Sequence[SlideCache]) -> TileSpec:
    """Returns the tiling of slides; raises a CacheMismatchError if it differs between them."""
    specs = {cache.spec for cache in caches}
    if len(specs) > 1:
        raise CacheMismatchError(
            f"{caches[0].path.parent}: the slides were tiled in {len(specs)} different ways "
            f"(mpp {sorted({spec.mpp for spec in specs})}, "
            f"tile size {sorted({spec.tile_size_px for spec in specs})}); tile them all alike"
        )
    return specs.pop()


def check_identity(cache: SlideCache, slide_id: str, fingerprint: str, source: str) -> None:
    """Refuses tiles of one slide under the name, and so with the grade, of another.

    Args:
        cache: the tiles.
        slide_id: identifier of the expected slide.
        fingerprint: SHA-256 of its content.
        source: source of the fingerprint, for the message.

    Raises:
        CacheMismatchError: the header of the cache names another slide, or other content.
    """
    if cache.slide_id != slide_id or cache.fingerprint != fingerprint:
        raise CacheMismatchError(
            f"slide {slide_id!r}: the cache holds the tiles of another file than {source}; "
            "tile the manifest into a cache of its own, or again with --overwrite"
        )


def _check_files(folder: Path, slides: Sequence[CachedSlide], ledger: Mapping[str, LedgerRow]) -> None:
    """Refuses tiles under the path of another slide; reads files unknown to the ledger."""
    # Locations in one CT series share its path.
    endings = Counter(
        end for path in {entry.path for entry in ledger.values()} for end in _endings(Path(path))
    )
    states = {path: file_state(path) for path in {slide.row.path for slide in slides}}
    unknown = []
    for slide in slides:
        row, entry = slide.row, ledger.get(slide.row.slide_id)
        state = states[row.path]
        # Moved with its folder: the end of its path still identifies this slide alone.
        shared = set(_endings(row.path)) & set(_endings(Path(entry.path))) if entry is not None else ()
        is_named = any(endings[end] == 1 for end in shared)
        is_same = entry is not None and entry.path == str(row.path)
        if state is None and not is_named:
            raise CacheMismatchError(
                f"slide {row.slide_id!r}: nothing shows that the tiles are of {row.path}, which is not here: "
                + (f"ledger.csv has {entry.path}" if entry is not None else "ledger.csv does not have it")
                + "; name the file that was tiled, or bring ledger.csv or the slide"
            )
        if state is not None and not (
            is_named and entry is not None and _is_unchanged(entry, state, is_same)
        ):
            unknown.append((slide, entry, state))
    if not unknown:
        return
    to_read = sum(
        min(size, WHOLE_BYTES) for size in {s.row.path: size for s, _, (size, _) in unknown}.values()
    )
    if to_read > _MUCH:
        warnings.warn(
            f"{len(unknown)} slides moved or changed since they were tiled: reading {to_read / 1e9:.1f} GB "
            "to compare them with their tiles",
            stacklevel=3,
        )
    found = []
    fingerprints: dict[Path, str] = {}
    for slide, entry, (size, modified) in unknown:
        row, cache = slide.row, slide.cache
        if row.path not in fingerprints:
            fingerprints[row.path] = _fingerprint(row.path, cache)
        check_identity(cache, row.slide_id, fingerprints[row.path], str(row.path))
        if entry is not None:
            found.append(replace(entry, path=str(row.path), bytes=size, modified=modified))
    with contextlib.suppress(CacheError, FileHeldError):  # read-only, or open: they are read again next time
        Ledger(folder / "ledger.csv").record(found)


def _fingerprint(path: Path, cache: SlideCache) -> str:
    """Computes the fingerprint of a slide's file, or of the file of imported features in its place."""
    if cache.header.imported and path.suffix.lower() in FEATURE_SUFFIXES:
        return read_foreign(path).fingerprint
    if cache.header.frame is not None:
        return open_series(path).fingerprint
    mpp = cache.mpp_level0 if all(cache.mpp_level0) else 1.0  # any spacing: no pixel is read
    with open_slide(path, mpp_replace=mpp, channels=cache.spec.channels or "0") as opened:
        return opened.info.fingerprint


def _endings(path: Path) -> Iterator[tuple[str, ...]]:
    """Yields the last 1, 2, ... parts of a path."""
    parts = path.parts
    return (parts[-n:] for n in range(1, len(parts) + 1))


def _is_unchanged(entry: LedgerRow, state: tuple[int, float], is_same: bool) -> bool:
    if not entry.bytes:  # a ledger of an older release
        return is_same
    return entry.bytes == state[0] and abs(entry.modified - state[1]) <= _CLOCK_S


def _read_ledger(folder: Path) -> dict[str, LedgerRow]:
    return Ledger(folder / "ledger.csv").by_slide()


def _warn_of_lost(lost: Sequence[str], n_slides: int) -> None:
    if lost:
        warnings.warn(
            f"{len(lost)} of {n_slides} slides are not in the cache, left out (ledger.csv says why): "
            + listed(lost),
            stacklevel=3,
        )


class _Labels:
    """Reads the labels of slides and of their tiles, each table once."""

    def __init__(self, rows: Sequence[ManifestRow], tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._rows = rows
        self._named = [Counter(labels) for labels in zip(*(row.labels for row in rows), strict=True)]
        self._tables: dict[tuple[Path, int], dict[str, LabelledPoints]] = {}
        self._others: dict[str, set[str]] = defaultdict(set)
        self._missed: dict[Path, list[str]] = defaultdict(list)

    def of(self, row: ManifestRow, cache: SlideCache) -> dict[str, int | float | NDArray[np.int64]]:
        """Returns the label of each task, of the slide or of its tiles, -1 or NaN if none."""
        found: dict[str, int | float | NDArray[np.int64]] = {}
        for task, label, named in zip(self._tasks, row.labels, self._named, strict=True):
            if isinstance(label, Path):
                found[task.name] = self._of_tiles(row, cache, task, label, named[label] > 1)
            elif task.of_tiles:
                found[task.name] = np.full(len(cache), -1 if label is None else label)
            else:
                nothing = np.nan if task.numeric else -1
                found[task.name] = nothing if label is None else label
        return found

    def warn(self) -> None:
        """Warns of labels without effect."""
        for name, classes in self._others.items():
            warnings.warn(
                f"task {name}: annotations of class {listed(sorted(classes))} are no label, not in its "
                "grades",
                stacklevel=3,
            )
        for (path, _), table in self._tables.items():
            warn_of_unused(path, table, (row.slide_id for row in self._rows if path in row.labels))
        for path, slides in self._missed.items():
            warnings.warn(
                f"{path}: no point of {listed(slides)} lies in a tile of the cache; expected level-0 pixels",
                stacklevel=3,
            )

    def _of_tiles(
        self, row: ManifestRow, cache: SlideCache, task: Task, path: Path, is_shared: bool
    ) -> NDArray[np.int64]:
        if cache.spec.is_volume:
            raise UsageError(f"{path}: labels of tiles are in pixels of a slide, {row.slide_id} is a volume")
        table = None if is_annotation_file(path) else self._table(path, len(task.grades))
        if is_shared and (table is None or "" in table):
            raise ManifestError(
                f"{path}: its labels are of one slide, and several lines of the manifest name it in "
                f"{task.column}; give each slide its own file, or a table with a column slide_id"
            )
        if table is None:
            labels, unknown = label_tiles(
                path,
                task.grades,
                task.least_share,
                cache.header.viewer,
                cache.header.vendor,
                cache.origins_level0,
                cache.extent_level0,
                cache.mpp_level0,
                cache.thumbnail_mpp,
            )
            self._others[task.name].update(unknown)
            return labels
        points = table.get(row.slide_id) or table.get("")
        if points is None:
            return np.full(len(cache), -1)
        of_tiles = points.of_tiles(cache.origins_level0, cache.extent_level0)
        if np.isnan(of_tiles).all():
            self._missed[path].append(row.slide_id)
        return np.nan_to_num(of_tiles, nan=-1).astype(np.int64)

    def _table(self, path: Path, n_labels: int) -> Mapping[str, LabelledPoints]:
        key = path, n_labels
        if key not in self._tables:
            self._tables[key] = read_points(path, n_labels)
        return self._tables[key]
