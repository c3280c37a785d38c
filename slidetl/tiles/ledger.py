"""The outcome of every slide: one CSV beside the caches, one row per input slide."""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from slidetl.errors import CacheError, FileHeldError
from slidetl.files import write_whole
from slidetl.slides.ngff import metadata_file
from slidetl.slides.npz import NpzItem
from slidetl.slides.spacing import REMEDY, cohort_notes
from slidetl.text import csv_cell, listed, plain_cell
from slidetl.tiles.lock import kernel_lock
from slidetl.tiles.store import describe_write_error

USED, EXCLUDED, FAILED = "used", "excluded", "failed"

_NAMED = 5  # slides that a line on the screen names; the ledger names all
_LINES = 12


@dataclass(frozen=True)
class LedgerRow:
    """The outcome of one slide.

    Attributes:
        slide_id: its identifier.
        path: its file, as given.
        status: ``used`` (its tiles are in the cache), ``excluded`` (intact, but without usable tiles) or
            ``failed``.
        reason: of any other status than used, one line.
        tiles: tiles in the cache.
        tiles_without_tissue: places on the grid left out for having too little tissue.
        tiles_without_data: of these, places on areas without data: not scanned, missing in the file, or of
            one colour.
        tiles_outside_regions: tiles with tissue left out for lying outside the regions.
        tiles_pen: tiles left out for ink of a pen.
        tiles_fold: for folded tissue.
        tiles_air: for air or fat.
        tiles_out_of_focus: for lack of sharpness.
        tiles_unreadable: tiles lost because the slide is damaged there.
        mpp_x: spacing of the tiles along x, micrometres per pixel; 0 if not known.
        mpp_y: along y.
        mpp_level0: spacing of the slide's level 0; of CT series, 1000 um per millimetre of a slice.
        vendor: of the scanner, as the reader calls it.
        width: of the slide, level-0 pixels; 0 if not known.
        height: of the slide.
        fingerprint: SHA-256 of its content.
        note: doubts about the slide and changes to its pixels, separated by semicolons.
        regions: file of the regions that the tiles lie in, and the first digits of their digest; empty if the
            whole slide was tiled.
        bytes, modified: size of its file and time of its last change (seconds since 1970), when it was tiled.
        seconds: duration of the last run.
        host: the machine of the last run.
        finished_at: UTC, ISO 8601.
    """

    slide_id: str
    path: str
    status: str
    reason: str = ""
    tiles: int = 0
    tiles_without_tissue: int = 0
    tiles_without_data: int = 0
    tiles_outside_regions: int = 0
    tiles_pen: int = 0
    tiles_fold: int = 0
    tiles_air: int = 0
    tiles_out_of_focus: int = 0
    tiles_unreadable: int = 0
    mpp_x: float = 0.0
    mpp_y: float = 0.0
    mpp_level0: float = 0.0
    vendor: str = ""
    width: int = 0
    height: int = 0
    fingerprint: str = ""
    note: str = ""
    regions: str = ""
    bytes: int = 0
    modified: float = 0.0
    seconds: float = 0.0
    host: str = ""
    finished_at: str = ""

    def to_cells(self) -> dict[str, str]:
        """Returns cells of one line each, with formulas made inert for spreadsheets."""
        return {name: csv_cell(str(value)) for name, value in asdict(self).items()}

    @classmethod
    def from_cells(cls, cells: dict[str, str]) -> Self:
        """Inverts :meth:`to_cells`, except for line breaks.

        Raises:
            CacheError: a column is missing or not a number.
        """
        try:
            known = [f for f in fields(cls) if f.name in cells]  # an older ledger lacks the newest columns
            return cls(**{f.name: _PARSE[str(f.type)](plain_cell(cells[f.name])) for f in known})
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(f"not a row of a ledger: {cells} ({error}); move the ledger away") from error


def file_state(path: Path) -> tuple[int, float] | None:
    """Returns size (bytes) and time of change (seconds since 1970) of a slide's file, None if it is gone."""
    item = NpzItem.of(path)
    try:
        file = item.file if item else metadata_file(path) if path.is_dir() else path
        # Of a DICOM series, all that lies in its folder.
        found = (
            [entry.stat() for entry in os.scandir(file) if entry.is_file()]
            if file.is_dir()
            else [file.stat()]
        )
    except (OSError, ValueError):  # ValueError: it cannot be a path
        return None
    if not found:
        return None
    return sum(one.st_size for one in found), round(max(one.st_mtime for one in found), 3)


class Ledger:
    """``ledger.csv`` in a cache folder, existing or not. Rows of slides not recorded again stay unchanged."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def rows(self) -> list[LedgerRow]:
        """Reads all rows, in the order of the slides' first appearance.

        Raises:
            CacheError: the file is not a ledger.
        """
        if not self._path.exists():
            return []
        try:
            with self._path.open(newline="", encoding="utf-8") as file:
                return [LedgerRow.from_cells(cells) for cells in csv.DictReader(file)]
        except (UnicodeDecodeError, csv.Error) as error:
            raise CacheError(f"{self._path}: not a ledger ({error}); move it away") from error

    def by_slide(self) -> dict[str, LedgerRow]:
        """Reads :meth:`rows`, by the slide's identifier."""
        return {row.slide_id: row for row in self.rows()}

    def record(self, new: Iterable[LedgerRow]) -> None:
        """Adds rows, or replaces those of the same slide, and replaces the file atomically.

        Raises:
            CacheError: the file is not a ledger, or cannot be written.
            FileHeldError: another program has it open.
        """
        try:
            # No lease: a full disk has no space for it. Without kernel locks, the last of two simultaneous
            # writes wins.
            with kernel_lock(self._path.parent / ".locks" / f"{self._path.name}.lock"):
                rows = self.by_slide()
                rows.update((row.slide_id, row) for row in new)
                self._write(rows.values())
        except (CacheError, FileHeldError):
            raise
        except OSError as error:
            why = describe_write_error(error, self._path.parent)
            raise CacheError(f"{self._path}: the ledger cannot be written: {why}") from error

    def _write(self, rows: Iterable[LedgerRow]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [f.name for f in fields(LedgerRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.to_cells() for row in rows)
        write_whole(self._path, text.getvalue())


def summarise_notes(rows: Sequence[LedgerRow]) -> list[str]:
    """Groups the notes on slides: one line for each note, with its slides."""
    slides: dict[str, list[str]] = defaultdict(list)
    lost = [row for row in rows if row.tiles_unreadable]
    if lost:  # first, since lines beyond some are left out
        slides["tiles that cannot be read are left out, and tried again by the next run"] = [
            f"{row.slide_id} ({row.tiles_unreadable} of {row.tiles + row.tiles_unreadable})" for row in lost
        ]
    far = cohort_notes({row.slide_id: row.mpp_level0 for row in rows})
    for row in rows:
        notes = row.note.split("; ") if row.note else []
        if row.slide_id in far and row.status == USED and REMEDY not in row.note:
            notes.append(far[row.slide_id])
        for note in notes:
            slides[note].append(row.slide_id)
    lines = [
        f"{len(names)} slide{'s' * (len(names) > 1)}: {note}: {listed(names, _NAMED)}"
        for note, names in slides.items()
    ]
    more = len(lines) - _LINES
    return [*lines[:_LINES], f"{more} more, in the column note of ledger.csv"] if more > 0 else lines


_PARSE = {"str": str, "int": int, "float": float}
