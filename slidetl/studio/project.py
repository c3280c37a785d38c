"""A project: a folder with the slides' list, their labels, and all that is made from them."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import secrets
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from slidetl.data.folder import SLIDE_SUFFIXES
from slidetl.data.manifest import (
    FIVE_GRADES,
    OPTIONAL,
    REQUIRED,
    check_scale,
    is_missing,
    parse_table,
    read_manifest,
)
from slidetl.data.spreadsheet import Table, read_table
from slidetl.errors import CacheError, ManifestError
from slidetl.files import csv_rows, csv_text, write_csv, write_whole
from slidetl.slides.raster import IMAGE_SUFFIXES
from slidetl.studio.paths import Refused, Root, check_name, is_text
from slidetl.studio.texts import say
from slidetl.text import listed, one_line, plain_cell, spelling
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.identifier import safe_slide_id
from slidetl.tiles.ledger import FAILED, Ledger, LedgerRow, file_state

COLUMNS = (*REQUIRED, *OPTIONAL)
EDITED = ("patient_id", "grade", "site")
_JUDGED = ("patient_id", "grade")  # of the results of a training
_TAKEN = (*EDITED, "scanner", "stain", "block", "mpp", "split")  # from a table
_ASIDE = "aside"  # a column of labels.csv alone, "yes" for a slide that is not there now
SUFFIXES = SLIDE_SUFFIXES | IMAGE_SUFFIXES
MOST_SLIDES = 5000
_MOST_CELL = 200
_MOST_FAULTS = 5  # of a table, in a message

_changes = threading.Lock()  # labels are read, changed and written by one request at a time
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
    grades: tuple[str, ...] = FIVE_GRADES
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

    @property
    def takes_numbers(self) -> bool:
        """True if a number names a grade, counted from 0: no name has a digit, which it could mean."""
        return not any(letter.isnumeric() for name in self.grades for letter in name)

    @property
    def numbered(self) -> str:
        """The grades with the numbers that name them, too, in words."""
        return ", ".join(f"{number} = {name}" for number, name in enumerate(self.grades))

    def grade(self, text: str) -> str:
        """Returns the name of the grade that a cell means; a text that means none stays."""
        if text in self.grades:
            return text
        meant = spelling(text)
        found = [name for name in self.grades if spelling(name) == meant]
        if len(found) == 1:
            return found[0]
        return self.numbered_grade(text) if self.takes_numbers else text

    def numbered_grade(self, text: str) -> str:
        """Returns the name of the grade of a number, counted from 0; another text stays."""
        number = spelling(text)
        is_one = number.isdecimal() and int(number) < len(self.grades)
        return self.grades[int(number)] if is_one else text

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Inverts ``asdict``."""
        return cls(**{**values, "grades": tuple(values["grades"])})


@dataclass(frozen=True)
class Checked:
    """The labels of a project, with their faults.

    Attributes:
        rows: cells by column, in the order of the file; grades by name, faulty ones as typed.
        faults: by index of the row.
        general: faults of no row.
        doubts: warnings.
        graded: number of slides with a grade.
        aside: number of labelled slides that are not there now.
    """

    rows: tuple[dict[str, str], ...]
    faults: dict[int, list[str]] = field(default_factory=dict)
    general: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    graded: int = 0
    aside: int = 0

    @property
    def is_valid(self) -> bool:
        """True if commands may use them."""
        return bool(self.rows) and not self.faults and not self.general


def row_key(row: Mapping[str, str]) -> str:
    """Names a row by its slide's file: rows may move, and slides be named anew, while a page is open."""
    return hashlib.sha256(row["path"].encode()).hexdigest()[:16]


def row_state(row: Mapping[str, str]) -> str:
    """Names the content of a row's cells, as far as pages change them."""
    return hashlib.sha256("\0".join(row[column] for column in EDITED).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LabelForm:
    """The rows that a page has changed.

    Attributes:
        rows: by :func:`row_key`, with the cells of the page.
        clashes: keys of those that someone else has changed too.
        strange: cells of rows that are of no slide now.
    """

    rows: Mapping[str, Mapping[str, str]]
    clashes: frozenset[str]
    strange: tuple[str, ...]


def read_form(rows: Sequence[Mapping[str, str]], cells: Mapping[str, Mapping[str, str]]) -> LabelForm:
    """Compares the cells of a page with the rows of now, and with those that the page was opened with."""
    by_key = {row_key(row): row for row in rows}
    changed: dict[str, Mapping[str, str]] = {}
    clashes, strange = set(), []
    for key, given in cells.items():
        row = by_key.get(key, _EMPTY)
        new = {**row, **{name: given[name] for name in EDITED if name in given}}
        was = given.get("was", row_state(row))
        if row_state(new) == was:
            continue
        if key not in by_key:
            strange.append(", ".join(new[name] for name in EDITED if new[name]))
            continue
        changed[key] = new
        if row_state(row) not in (was, row_state(new)):
            clashes.add(key)
    return LabelForm(changed, frozenset(clashes), tuple(strange))


class Project:
    """A folder of the studio.

    Args:
        root: the folder that may be read.
        home: the folder of all projects.
        name: of the project.

    Attributes:
        folder: of the project.
        cache: of its tiles.
        id: random, as another project may get its name; empty in one of an older studio.

    Raises:
        Refused: there is no such project.
    """

    def __init__(self, root: Root, home: Path, name: str) -> None:
        self.root, self.name = root, check_name(name, say("name.project"))
        self.folder = root.find(home / name)
        self.cache = self.folder / "cache"
        try:
            values = json.loads((self.folder / "project.json").read_text(encoding="utf-8"))
            self.id = str(values.pop("id", ""))
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
        _write_settings(folder, secrets.token_hex(8), settings)
        return cls(root, home, name)

    @property
    def labels(self) -> Path:
        """The labels as they were last typed, with faults or without, also of slides that are away now."""
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
        """Takes the slides of a folder below the root.

        Labels stay with their files: those of slides that are not there are set aside until they are again.

        Returns:
            What was left out or set aside, in words.

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
        notes = [one_line(str(warning.message)) for warning in said]
        if len(inside) < len(found):
            notes.append(say("slides.outside", n=len(found) - len(inside)))
        fresh = {self._place(row.path): row for row in inside}
        fresh = {place: row for place, row in fresh.items() if one_line(place) == place}  # as in a table
        if len(fresh) < len(inside):
            notes.append(say("slides.unwritable", n=len(inside) - len(fresh)))
        if not fresh:
            raise Refused(say("slides.none"))
        if len(fresh) > MOST_SLIDES:
            raise Refused(say("slides.too_many", n=len(fresh), most=MOST_SLIDES))
        with _changes:
            here, aside = self._read()
            before = {row["path"]: row for row in (*aside, *here)}
            rows = [
                {**_EMPTY, **before.pop(place, {"patient_id": row.patient_id})}
                | {"path": place, "slide_id": row.slide_id}
                for place, row in fresh.items()
            ]
            away = [row for row in before.values() if _is_labelled(row)]
            leaving = [row["slide_id"] for row in here if row["path"] in before and _is_labelled(row)]
            if leaving:
                notes.append(say("slides.aside", n=len(leaving), names=listed(leaving)))
            self.settings = Settings.of({**asdict(self.settings), "slides": self.root.show(folder)})
            _write_settings(self.folder, self.id, self.settings)
            self._save(rows, away)
        return notes

    def check(self) -> Checked:
        """Checks the labels by the manifest's own rules, and that every slide lies in the root."""
        rows, aside = self._read()
        if not rows:
            return Checked((), aside=len(aside))
        faults: dict[int, list[str]] = defaultdict(list)
        general: list[str] = []
        plain = self._for_commands(rows)
        table = Table(
            COLUMNS, tuple((line, tuple(row[name] for name in COLUMNS)) for line, row in enumerate(plain, 2))
        )
        with _warnings, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                parse_table(table, self.manifest, len(self.settings.grades))
            except ManifestError as error:
                for line, text in error.faults:
                    faults[line - 2].append(text)
                if not error.faults:
                    general.append(str(error))
        for index, row in enumerate(rows):
            if row["grade"] not in self.settings.grades and not is_missing(row["grade"]):
                names = ", ".join(self.settings.grades)
                faults[index].append(say("labels.bad_grade", grades=names, found=repr(row["grade"])))
            if not self.root.holds(self.folder / row["path"]):
                faults[index].append(say("labels.outside"))
        doubts = tuple(str(warning.message).removeprefix(f"{self.manifest}: ") for warning in said)
        graded = sum(bool(row["grade"]) for row in plain)
        return Checked(tuple(rows), dict(faults), tuple(general), doubts, graded, len(aside))

    def edit(self, cells: Mapping[str, Mapping[str, str]]) -> Checked:
        """Changes cells, by :func:`row_key` and column.

        With ``was``, the row's :func:`row_state` on the page, only rows that the page changed are.

        Raises:
            Refused: a row is of no slide of this project, or was changed by someone else too; nothing is.
        """
        with _changes:
            rows, aside = self._read()
            if not cells.keys() <= {row_key(row) for row in rows}:
                raise Refused(say("labels.other_slides"), 409)
            typed = {
                key: {
                    name: self._typed(name, text) if name in EDITED else text for name, text in given.items()
                }
                for key, given in cells.items()
            }
            form = read_form(rows, typed)
            if form.clashes:
                names = [row["slide_id"] for row in rows if row_key(row) in form.clashes]
                raise Refused(say("labels.clash", names=listed(names)), 409)
            for row in rows:
                row.update(form.rows.get(row_key(row), {}))
            return self._save(rows, aside)

    def bring(self, content: bytes) -> tuple[Checked, list[str]]:
        """Takes labels from a table: CSV, or what a spreadsheet exports as such.

        Slides are found by ``slide_id``, which may be the file's name or path, with or without its suffix.

        Returns:
            The labels, and what was not understood, in words.

        Raises:
            ManifestError: it is no table, lacks the column, or says of a slide two things; nothing is taken.
        """
        with _changes:
            table, notes = self._read_table(content)
            rows, aside = self._read()
            strange: list[str] = []
            faults: list[str] = []
            taken: dict[str, tuple[int, dict[str, str]]] = {}  # by the slide's file
            for line, cells in table.rows:
                if len(cells) != len(table.header):
                    faults.append(say("labels.ragged", line=line, wanted=len(table.header), found=len(cells)))
                    continue
                values = dict(zip(table.header, cells, strict=True))
                name = values["slide_id"]
                found = _named(rows, name)
                if not found:
                    strange.append(f"{name} ({line})")
                elif len(found) > 1:
                    names = listed([row["slide_id"] for row in found])
                    faults.append(say("labels.ambiguous", line=line, name=name, names=names))
                else:
                    new = {key: self._typed(key, values[key]) for key in _TAKEN if key in values}
                    first, said = taken.setdefault(found[0]["path"], (line, new))
                    if new != said:
                        faults.append(say("labels.twice", first=first, line=line, name=found[0]["slide_id"]))
            if faults:
                more = f"; ... ({len(faults)} in all)" if len(faults) > _MOST_FAULTS else ""
                raise ManifestError(say("labels.refused", faults="; ".join(faults[:_MOST_FAULTS]) + more))
            changed = [(row, taken[row["path"]][1]) for row in rows if row["path"] in taken]
            emptied = [
                row["slide_id"]
                for row, new in changed
                if any(row[name] and not text for name, text in new.items())
            ]
            for row, new in changed:
                row.update(new)
            ignored = [name for name in table.header if name not in (*_TAKEN, "slide_id", "path")]
            if self.settings.takes_numbers and any(
                spelling(cells[table.header.index("grade")]).isdecimal()
                for _, cells in table.rows
                if "grade" in table.header
            ):
                notes.append(say("labels.numbers", grades=self.settings.numbered))
            if ignored:
                notes.append(say("labels.ignored", names=", ".join(ignored)))
            if strange:
                notes.append(say("labels.strange", n=len(strange), names=listed(strange)))
            if emptied:
                notes.append(say("labels.emptied", n=len(emptied), names=listed(emptied)))
            return self._save(rows, aside), notes

    def table(self, aside: bool) -> str:
        """Returns the labels as a CSV for a spreadsheet, grades by name; or those that are set aside."""
        return csv_text(COLUMNS, self._read()[aside])

    def ledger(self) -> dict[str, LedgerRow]:
        """Reads the outcome of tiling of the slides of now, by slide; one of another file has failed."""
        try:
            entries = Ledger(self.cache / "ledger.csv").by_slide()
        except CacheError:
            return {}
        found = {}
        for row in self._read()[0]:
            if entry := entries.get(row["slide_id"]):
                path = Path(os.path.normpath(self.folder / row["path"]))
                # Elsewhere by its path where the root or the slides have moved.
                is_same = entry.path == str(path) or file_state(path) == (entry.bytes, entry.modified)
                other = LedgerRow(entry.slide_id, entry.path, FAILED, say("slides.other_file"))
                found[entry.slide_id] = entry if is_same else other
        return found

    def write_manifest(self, place: str, checked: Checked) -> None:
        """Writes labels as a manifest of one training, which later changes do not reach."""
        path = self.folder / place
        rows = (
            {**row, "path": self._place(self.folder / row["path"], path.parent)}
            for row in self._for_commands(checked.rows)
        )
        write_csv(path, COLUMNS, rows)

    def relabelled(self, table: Path) -> list[str]:
        """Names slides whose patient or grade differs now from a manifest or predictions of a training.

        Raises:
            Refused: the table cannot be read.
        """
        # As such a table has them, so that cells compare as texts.
        rows = csv_rows(csv_text(COLUMNS, self._for_commands(self._read()[0])).split("\n"))
        now = {row[name]: row for row in rows for name in ("slide_id", "path")}
        found = []
        try:
            with table.open(newline="", encoding="utf-8") as file:
                for row in csv_rows(file):
                    place = self._place(table.parent / row["path"]) if "path" in row else ""
                    mine = now.get(place) or now.get(row["slide_id"])  # it may be named anew
                    if row["grade"] and mine and any(row[name] != mine[name] for name in _JUDGED):
                        found.append(row["slide_id"])
        except (OSError, KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
            raise Refused(say("labels.unreadable")) from error
        return found

    def copies(self) -> list[str]:
        """Names slides of the same content under different patients; known once they are tiled."""
        patients = {row["slide_id"]: row["patient_id"] for row in self._read()[0]}
        alike: dict[str, list[str]] = defaultdict(list)
        for slide_id, entry in self.ledger().items():
            if entry.fingerprint and slide_id in patients:
                alike[entry.fingerprint].append(slide_id)
        groups = (names for names in alike.values() if len({patients[name] for name in names}) > 1)
        return [", ".join(f"{name} ({patients[name]})" for name in names) for names in groups]

    def free_name(self, prefix: str, targets: Iterable[str]) -> str:
        """Returns a name that nothing has: its files may be deleted, and what others made of it not.

        Args:
            prefix: of the name.
            targets: of the jobs of this project.
        """
        paths = (path for part in ("runs", "models", "grades") for path in (self.folder / part).glob("*"))
        taken = {*targets, *(path.stem for path in paths)}
        return next(name for n in range(1, 10_000) if (name := f"{prefix}-{n}") not in taken)

    def _place(self, path: Path, start: Path | None = None) -> str:
        """Returns the path of a slide as tables have it: from the project, as both may move with the root.

        Args:
            path: of the slide.
            start: folder of the table; None for the project's.
        """
        is_inside = path.is_relative_to(self.root.folder)
        return os.path.relpath(path, start or self.folder) if is_inside else str(path)

    def _meant(self, column: str, text: str) -> str:
        """Returns what a cell means: the same, if it is asked of that again."""
        return self.settings.grade(_cell(text)) if column == "grade" else _cell(text)

    def _typed(self, column: str, text: str) -> str:
        """Returns what is kept of a cell; raises Refused if it is too long."""
        text = self._meant(column, text)
        if len(text) > _MOST_CELL:
            raise Refused(say("labels.long", most=_MOST_CELL, found=text[:40]))
        return text

    def _read_table(self, content: bytes) -> tuple[Table, list[str]]:
        """Reads a table that was brought; returns doubts, too."""
        brought = self.folder / ".table.csv"
        write_whole(brought, content)
        try:
            with _warnings, warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                table = read_table(brought, ("slide_id",), COLUMNS)
        except ManifestError as error:
            raise ManifestError(str(error).replace(str(brought), say("labels.table"))) from error
        finally:
            brought.unlink(missing_ok=True)
        return table, [str(warning.message).replace(str(brought), say("labels.table")) for warning in said]

    def _read(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Reads the labels of the slides, and those that are set aside."""
        found: tuple[list[dict[str, str]], list[dict[str, str]]] = [], []
        try:
            with self.labels.open(newline="", encoding="utf-8") as file:
                for cells in csv_rows(file):
                    row = {name: cells.get(name) or "" for name in COLUMNS}
                    if _ASIDE not in cells:  # in an older file numbers count from 0, under any names
                        row["grade"] = self.settings.numbered_grade(row["grade"])
                    row |= {name: self._meant(name, row[name]) for name in _TAKEN}
                    row["path"] = self._place(self.folder / row["path"])
                    found[bool(cells.get(_ASIDE))].append(row)
        except FileNotFoundError:
            return [], []
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise Refused(say("labels.unreadable")) from error
        return found

    def _for_commands(self, rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """Turns grades into the numbers of a manifest; a text that names none is left out."""
        numbers = {name: str(number) for number, name in enumerate(self.settings.grades)}
        return [{**row, "grade": numbers.get(row["grade"], "")} for row in rows]

    def _save(self, rows: Sequence[Mapping[str, str]], aside: Sequence[Mapping[str, str]]) -> Checked:
        """Keeps what was typed; commands get it only without faults."""
        write_csv(self.labels, (*COLUMNS, _ASIDE), [*rows, *({**row, _ASIDE: "yes"} for row in aside)])
        checked = self.check()
        if checked.is_valid:
            write_csv(self.manifest, COLUMNS, self._for_commands(rows))
        return checked


_EMPTY = dict.fromkeys(COLUMNS, "")


def _write_settings(folder: Path, project_id: str, settings: Settings) -> None:
    write_whole(folder / "project.json", json.dumps({"id": project_id, **asdict(settings)}))


def list_projects(root: Root, home: Path) -> list[str]:
    """Lists the projects by name."""
    return sorted(path.parent.name for path in home.glob("*/project.json") if root.holds(path))


def list_folder(root: Root, text: str) -> tuple[str, list[tuple[str, str, int]], list[tuple[str, str]], int]:
    """Lists a folder below the root.

    Returns:
        The folder; its folders with their number of slides; its slides; each as name and path below the
        root; and the number of names left out, as they are not UTF-8.
    """
    folder = root.find(text)
    if not folder.is_dir():
        raise Refused(say("slides.no_folder"), 404)
    folders, slides, unnamed = [], [], 0
    for path in sorted(folder.iterdir(), key=lambda path: path.name.casefold()):
        if path.name.startswith(".") or not root.holds(path) or path.suffix == ".zarr":
            continue
        if not is_text(path):
            unnamed += 1
            continue
        try:
            if path.is_dir():
                count = sum(each.suffix.lower() in SUFFIXES for each in path.iterdir())
                folders.append((path.name, root.show(folder / path.name), count))
            elif path.suffix.lower() in SUFFIXES and path.is_file():
                slides.append((path.name, root.show(folder / path.name)))
        except OSError:  # it may not be read
            continue
    return ("" if folder == root.folder else root.show(folder)), folders, slides, unnamed


def check_upload(name: str) -> str:
    """Returns the name of a file to be uploaded; raises Refused unless it is that of a slide."""
    stem, dot, suffix = name.rpartition(".")
    if not stem or f"{dot}{suffix}".lower() not in SUFFIXES or safe_slide_id(name) != name or len(name) > 120:
        raise Refused(say("upload.name", suffixes=" ".join(sorted(SUFFIXES))))
    return name


def _cell(text: str) -> str:
    """Returns a cell as it was typed: in one line, without a spreadsheet's mark of text."""
    return plain_cell(re.sub(r"\s+", " ", text).strip())


def _is_labelled(row: Mapping[str, str]) -> bool:
    """Tells if anything was typed into a row."""
    return row["patient_id"] not in ("", row["slide_id"]) or any(row[name] for name in _TAKEN[1:])


def _named(rows: Sequence[dict[str, str]], name: str) -> list[dict[str, str]]:
    """Finds the rows of a slide by its identifier or its file's name or path, with its suffix or without."""
    for text in (name, re.split(r"[/\\]", name)[-1]):
        stem, dot, suffix = text.rpartition(".")
        plain = stem if f"{dot}{suffix}".lower() in SUFFIXES else text
        for column, wanted in (
            ("slide_id", text),
            ("path", text),
            ("slide_id", safe_slide_id(text)),
            ("slide_id", safe_slide_id(plain)),
        ):
            found = [row for row in rows if Path(row[column]).name == wanted]
            if found:
                return found
    return []
