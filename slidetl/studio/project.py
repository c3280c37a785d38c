"""A project: a folder with the slides' list, their labels, and all that is made from them."""

from __future__ import annotations

import csv
import json
import re
import threading
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from slidetl.data.folder import SLIDE_SUFFIXES
from slidetl.data.manifest import OPTIONAL, REQUIRED, check_scale, read_manifest
from slidetl.data.spreadsheet import read_table
from slidetl.errors import CacheError, ManifestError
from slidetl.files import write_csv, write_whole
from slidetl.slides.raster import IMAGE_SUFFIXES
from slidetl.studio.paths import Refused, Root, check_name
from slidetl.studio.texts import say
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.identifier import safe_slide_id
from slidetl.tiles.ledger import Ledger, LedgerRow

COLUMNS = (*REQUIRED, *OPTIONAL)
EDITED = ("patient_id", "grade", "site")
SUFFIXES = SLIDE_SUFFIXES | IMAGE_SUFFIXES
MOST_SLIDES = 5000
_MOST_CELL = 200

_warnings = threading.Lock()  # catching them changes the whole process


@dataclass(frozen=True)
class Settings:
    """The choices that a project begins with.

    Attributes:
        slides: folder of the slides, relative to the root; empty before it is chosen.
        grades: names, lowest first.
        mpp: spacing of the tiles, micrometres per pixel.
        tile_size_px: side of a tile.
    """

    slides: str = ""
    grades: tuple[str, ...] = ("0", "1", "2", "3", "4")
    mpp: float = 1.0
    tile_size_px: int = 224

    def __post_init__(self) -> None:
        check_scale(self.grades)
        # A name that begins with - would be an option of a command.
        plain = all(
            name[:1] not in ("", "-") and len(name) <= 40 and name.isprintable() for name in self.grades
        )
        if not plain or len(self.grades) > 20:
            raise Refused(say("home.bad_grades"))
        TileSpec(self.mpp, self.tile_size_px)  # raises if they are invalid

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Inverts ``asdict``."""
        return cls(**{**values, "grades": tuple(values["grades"])})


@dataclass(frozen=True)
class Checked:
    """The labels of a project, with their faults.

    Attributes:
        rows: cells by column, in the order of the file.
        faults: by index of the row.
        general: faults of no row.
        doubts: warnings.
    """

    rows: tuple[dict[str, str], ...]
    faults: dict[int, list[str]] = field(default_factory=dict)
    general: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def is_valid(self) -> bool:
        """True if commands may use them."""
        return bool(self.rows) and not self.faults and not self.general

    @property
    def graded(self) -> int:
        """Number of slides with a grade."""
        return sum(bool(row["grade"]) for row in self.rows)


class Project:
    """A folder of the studio.

    Args:
        root: the folder that may be read.
        home: the folder of all projects.
        name: of the project.

    Attributes:
        folder: of the project.
        cache: of its tiles.

    Raises:
        Refused: there is no such project.
    """

    def __init__(self, root: Root, home: Path, name: str) -> None:
        self.root, self.name = root, check_name(name, say("name.project"))
        self.folder = root.find(home / name)
        self.cache = self.folder / "cache"
        try:
            values = json.loads((self.folder / "project.json").read_text(encoding="utf-8"))
            self.settings = Settings.of(values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise Refused(say("project.none"), 404) from error

    @classmethod
    def create(cls, root: Root, home: Path, name: str, settings: Settings) -> Self:
        """Makes a new project.

        Raises:
            Refused: there is one of this name.
        """
        folder = root.find(home / check_name(name, say("name.project")))
        if folder.exists():
            raise Refused(say("project.exists"), 409)
        write_whole(folder / "project.json", json.dumps(asdict(settings)))
        return cls(root, home, name)

    @property
    def labels(self) -> Path:
        """The labels as they were last typed, with faults or without."""
        return self.folder / "labels.csv"

    @property
    def manifest(self) -> Path:
        """The labels that commands use: the last ones without faults."""
        return self.folder / "manifest.csv"

    @property
    def uploads(self) -> Path:
        """The folder of uploaded slides."""
        return self.folder / "slides"

    def choose(self, text: str) -> list[str]:
        """Takes the slides of a folder below the root; labels of slides that stay are kept.

        Returns:
            What was left out, in words.

        Raises:
            Refused: the folder is outside, empty, or of too many slides.
            ManifestError: it has no slides.
        """
        folder = self.root.find(text)
        if not folder.is_dir():
            raise Refused(say("slides.no_folder"))
        with _warnings, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = read_manifest(folder).rows
        inside = [row for row in found if self.root.holds(row.path)]
        notes = [str(warning.message) for warning in said]
        if len(inside) < len(found):
            notes.append(say("slides.outside", n=len(found) - len(inside)))
        if not inside:
            raise Refused(say("slides.none"))
        if len(inside) > MOST_SLIDES:
            raise Refused(say("slides.too_many", n=len(inside), most=MOST_SLIDES))
        before = {row["path"]: row for row in self._read_rows()}
        rows = [
            {**_EMPTY, **before.get(str(row.path), {"patient_id": row.patient_id}), "path": str(row.path)}
            | {"slide_id": row.slide_id}
            for row in inside
        ]
        self.settings = Settings.of({**asdict(self.settings), "slides": self.root.show(folder)})
        write_whole(self.folder / "project.json", json.dumps(asdict(self.settings)))
        self._save(rows)
        return notes

    def check(self) -> Checked:
        """Checks the labels by the manifest's own rules, and that every slide lies in the root."""
        rows = self._read_rows()
        if not rows:
            return Checked(())
        faults: dict[int, list[str]] = defaultdict(list)
        general: list[str] = []
        with _warnings, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                read_manifest(self.labels, len(self.settings.grades))
            except ManifestError as error:
                for line, text in error.faults:
                    faults[line - 2].append(text)
                if not error.faults:
                    general.append(str(error))
        for index, row in enumerate(rows):
            if not self.root.holds(Path(row["path"])):
                faults[index].append(say("labels.outside"))
        doubts = [str(warning.message).partition(": ")[2] for warning in said]
        return Checked(tuple(rows), dict(faults), tuple(general), tuple(doubts))

    def edit(self, cells: Mapping[tuple[str, int], str]) -> Checked:
        """Changes cells by column and row; grades may be given by name."""
        rows = self._read_rows()
        for (column, index), text in cells.items():
            if column in EDITED and 0 <= index < len(rows):
                rows[index][column] = self._grade(text) if column == "grade" else _cell(text)
        return self._save(rows)

    def bring(self, content: bytes) -> tuple[Checked, list[str]]:
        """Takes labels from a table: CSV, or what a spreadsheet exports as such.

        Slides are found by ``slide_id``, which may be the file's name with or without its suffix.

        Returns:
            The labels, and what was not understood, in words.

        Raises:
            ManifestError: it is no table, or lacks the column.
        """
        taken = self.folder / ".table.csv"
        write_whole(taken, content)
        try:
            with _warnings, warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                table = read_table(taken, ("slide_id",), COLUMNS)
        except ManifestError as error:
            raise ManifestError(str(error).replace(str(taken), say("labels.table"))) from error
        finally:
            taken.unlink(missing_ok=True)
        rows = self._read_rows()
        by_name = {name: row for row in rows for name in (row["slide_id"], Path(row["path"]).name)}
        notes = [str(warning.message).replace(str(taken), say("labels.table")) for warning in said]
        strange: list[str] = []
        for line, cells in table.rows:
            values = dict(zip(table.header, cells, strict=False))
            name = values["slide_id"]
            row = (
                by_name.get(name)
                or by_name.get(safe_slide_id(name))
                or by_name.get(safe_slide_id(Path(name).stem))
            )
            if row is None:
                strange.append(f"{name} ({line})")
                continue
            for column in (*EDITED, "scanner", "stain", "block", "mpp", "split"):
                if column in values:
                    row[column] = self._grade(values[column]) if column == "grade" else _cell(values[column])
        if strange:
            notes.append(say("labels.strange", n=len(strange), names=", ".join(strange[:5])))
        return self._save(rows), notes

    def ledger(self) -> dict[str, LedgerRow]:
        """Reads the outcome of tiling, by slide; empty before it."""
        try:
            return {row.slide_id: row for row in Ledger(self.cache / "ledger.csv").rows()}
        except CacheError:
            return {}

    def copies(self) -> list[str]:
        """Names slides of the same content under different patients; known once they are tiled."""
        patients = {row["slide_id"]: row["patient_id"] for row in self._read_rows()}
        alike: dict[str, list[str]] = defaultdict(list)
        for slide_id, entry in self.ledger().items():
            if entry.fingerprint and slide_id in patients:
                alike[entry.fingerprint].append(slide_id)
        groups = (names for names in alike.values() if len({patients[name] for name in names}) > 1)
        return [", ".join(f"{name} ({patients[name]})" for name in names) for names in groups]

    def free_run(self, preset: str) -> str:
        """Returns an unused name for a run."""
        taken = {path.name for path in (self.folder / "runs").glob("*")}
        return next(name for n in range(1, 10_000) if (name := f"{preset}-{n}") not in taken)

    def _grade(self, text: str) -> str:
        text = _cell(text)
        names = {name.casefold(): str(index) for index, name in enumerate(self.settings.grades)}
        return names.get(text.casefold(), text)

    def _read_rows(self) -> list[dict[str, str]]:
        try:
            with self.labels.open(newline="", encoding="utf-8") as file:
                return [{name: row.get(name) or "" for name in COLUMNS} for row in csv.DictReader(file)]
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise Refused(say("labels.unreadable")) from error

    def _save(self, rows: Sequence[Mapping[str, str]]) -> Checked:
        """Keeps what was typed; commands get it only without faults."""
        write_csv(self.labels, COLUMNS, rows)
        checked = self.check()
        if checked.is_valid:
            write_whole(self.manifest, self.labels.read_bytes())
        return checked


_EMPTY = dict.fromkeys(COLUMNS, "")


def list_projects(root: Root, home: Path) -> list[str]:
    """Lists the projects by name."""
    return sorted(path.parent.name for path in home.glob("*/project.json") if root.holds(path))


def list_folder(root: Root, text: str) -> tuple[str, list[tuple[str, str, int]], list[tuple[str, str]]]:
    """Lists a folder below the root.

    Returns:
        The folder; its folders with their number of slides; its slides; each as name and path below the root.
    """
    folder = root.find(text)
    if not folder.is_dir():
        raise Refused(say("slides.no_folder"), 404)
    folders, slides = [], []
    for path in sorted(folder.iterdir(), key=lambda path: path.name.casefold()):
        if path.name.startswith(".") or not root.holds(path) or path.suffix == ".zarr":
            continue
        try:
            if path.is_dir():
                count = sum(each.suffix.lower() in SUFFIXES for each in path.iterdir())
                folders.append((path.name, root.show(folder / path.name), count))
            elif path.suffix.lower() in SUFFIXES and path.is_file():
                slides.append((path.name, root.show(folder / path.name)))
        except OSError:  # it may not be read
            continue
    return ("" if folder == root.folder else root.show(folder)), folders, slides


def check_upload(name: str) -> str:
    """Returns the name of a file to be uploaded; raises Refused unless it is that of a slide."""
    stem, dot, suffix = name.rpartition(".")
    if not stem or f"{dot}{suffix}".lower() not in SUFFIXES or safe_slide_id(name) != name or len(name) > 120:
        raise Refused(say("upload.name", suffixes=" ".join(sorted(SUFFIXES))))
    return name


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()[:_MOST_CELL]
