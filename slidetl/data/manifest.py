"""The manifest of a study: its slides, their patients and their grades."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slidetl.data.folder import SLIDE_SUFFIXES, find_files
from slidetl.data.spreadsheet import Table, is_error, read_table
from slidetl.data.tasks import Task
from slidetl.errors import ManifestError, SlideOpenError, UsageError
from slidetl.slides.dicom import is_localizer, series_instance_uid
from slidetl.slides.ngff import is_ngff
from slidetl.slides.npz import NpzItem, read_labels
from slidetl.slides.raster import IMAGE_SUFFIXES, TIFF_SUFFIXES
from slidetl.text import distinct, listed, spelled_twice, spelling
from slidetl.tiles.identifier import clash_key, safe_slide_id, short_digest
from slidetl.volumes import is_volume_file

SPLITS = ("train", "val", "test")
_TRAINING = frozenset(["train", "training"])
_SPLIT_NAMES = frozenset([*SPLITS, *_TRAINING, "valid", "validation", "testing"])
REQUIRED = ("slide_id", "path", "patient_id", "grade")
FIVE_GRADES = ("0", "1", "2", "3", "4")  # the default scale
LOCATION = ("x_mm", "y_mm", "z_mm")
_TEXTS = ("site", "scanner", "stain", "block")
OPTIONAL = (*_TEXTS, "mpp", "split", *LOCATION)
_MOST_READERS = 100
# Cells without a value, as written by R, pandas, and spreadsheets in several languages.
_MISSING = frozenset(
    ["na", "n/a", "nan", "<na>", "null", "#n/a", "#nv", "#n/d", "#n/d!", "#n/b", "#i/t", "#н/д"]
)
# A long number cut to a few digits by a spreadsheet: it would merge many patients.
_ROUNDED = re.compile(r"\d[.,]?\d*[Ee]\+\d+")
# The first that is found in a lower-case name counts: a trichrome has haematoxylin too.
_STAINS: dict[str, re.Pattern[str]] = {
    "sirius": re.compile(r"sirius|\bpsr\b"),
    "trichrome": re.compile(r"tri(ch|c|k)r[oó]m|masson"),
    "he": re.compile(r"\bh\W*e\b|eosin"),
}
# Names that count as one only if spelled alike, unlike kinds of stains.
_SPELLED = {"patient_id": "patients", "site": "sites", "scanner": "scanners", "block": "blocks"}
_FAULTS_EACH = 3  # faults of one kind listed one by one; more are counted


def stain_kind(stain: str) -> str:
    """Returns ``he``, ``trichrome`` or ``sirius`` for a manifest's ``stain``, empty for an unknown one."""
    return next((kind for kind, names in _STAINS.items() if names.search(stain.casefold())), "")


@dataclass(frozen=True)
class ManifestRow:
    """One slide.

    Attributes:
        line: line in the CSV, 1 for the header; 0 for a slide found in a folder.
        slide_id: identifier, safe as a folder name.
        path: the slide's file, absolute; of an image in an ``.npz``, ``FILE.npz#SPLIT/INDEX``.
        patient_id: identifier of the patient; equal to ``slide_id`` if unknown.
        grade: 0..K-1, or None if not graded.
        site, scanner, stain, block: from the manifest, or empty.
        reader_grades: each reader's grade, in the order of their numbers.
        mpp: spacing of level 0 in micrometres per pixel, overriding the slide's metadata.
        split: ``train``, ``val`` or ``test``; empty if a seed decides.
        labels: label of each task: 0..K-1, a number, the path of a table or of annotations with tile labels,
            or None.
        location_mm: patient coordinates ``(x, y, z)`` in a CT series, as in DICOM (LPS); the unit is then the
            patch around it, and other lines may have the same path.
        votes: readers' labels of each task, in the order of their numbers; empty for tasks without readers.
        readers: numbers of the readers of :attr:`reader_grades`, as in the names of their columns.
    """

    line: int
    slide_id: str
    path: Path
    patient_id: str
    grade: int | None = None
    site: str = ""
    scanner: str = ""
    stain: str = ""
    block: str = ""
    reader_grades: tuple[int | None, ...] = ()
    mpp: float | None = None
    split: str = ""
    labels: tuple[int | float | Path | None, ...] = ()
    location_mm: tuple[float, float, float] | None = None
    votes: tuple[tuple[int | None, ...], ...] = ()
    readers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """All slides of a study, checked.

    Attributes:
        rows: one per slide, in the order of the file.
        labels: names of the folders of labelled images, numbers by value; else empty.
    """

    rows: tuple[ManifestRow, ...]
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


def read_manifest(
    path: Path, scale: Sequence[str] | int | None = None, images: bool = False, tasks: Sequence[Task] = ()
) -> Manifest:
    """Reads a CSV, or lists a folder of slides, a folder of labelled images, or an ``.npz`` of both.

    Labelled images lie in one folder per label, ``FOLDER/LABEL/...`` or ``FOLDER/SPLIT/LABEL/...`` with
    ``train``, ``val`` and ``test`` as splits. A label becomes the grade of its name on the scale, where
    spelling does not count. On a scale of words, numbers are grades in the order of their values. Without
    names, whole numbers are grades, and words are none: their order is not known. Each image counts as a
    separate patient. For ``.npz`` files see :mod:`slidetl.slides.npz`.

    Args:
        path: a table (:mod:`slidetl.data.spreadsheet`) with the columns ``slide_id, path, patient_id, grade``
            and optionally ``site``, ``scanner``, ``stain``, ``block``, ``mpp``, ``split``, ``grade_reader1``,
            ...; or a folder of ungraded slides, searched with its sub-folders (:mod:`slidetl.data.folder`);
            or labelled images; or one OME-Zarr. A folder without slides is searched for images (PNG, JPEG,
            BMP).
        scale: names of the grades, lowest first, or their number K; None accepts any whole number.
        images: treat a folder as labelled images even if it has TIFFs or slides.
        tasks: label scales to read from their columns, if present.

    Raises:
        ManifestError: every fault found, with line numbers. Missing files are no faults: opening them fails.
    """
    path, n_grades = Path(path), len(scale) if isinstance(scale, Sequence) else scale
    if is_ngff(path):
        row = ManifestRow(0, "", path.absolute(), "")
        return _with_labels(Manifest(_named([row], path.absolute().parent)), tasks)
    if path.is_dir() and images:
        return _with_labels(_list_images(path, scale, IMAGE_SUFFIXES | TIFF_SUFFIXES), tasks)
    if path.is_dir():
        return _with_labels(_list_folder(path, scale), tasks)
    if path.suffix.lower() == ".npz" and path.is_file():
        return _with_labels(_list_arrays(path, n_grades), tasks)
    if not path.is_file():
        raise ManifestError(
            f"{path}: expected a CSV manifest, an .npz or a folder of slides, found neither; check the path"
        )
    return parse_table(read_table(path, REQUIRED, _optional(tasks)), path, scale, tasks)


def check_scale(grades: Sequence[str], option: str = "data.grades") -> None:
    """Raises a UsageError, which names the option, unless a scale has at least two names, all different."""
    if len(grades) < 2 or len(set(grades)) < len(grades):
        raise UsageError(f"{option} must be at least two different names, lowest first, not {list(grades)}")


def is_missing(text: str) -> bool:
    """Tells if a cell has no value: empty, or NA and its like."""
    return not text or text.casefold() in _MISSING


class _Faults:
    """Collects the faults of a manifest; many of one kind become one line."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[int, str]]] = {}

    def add(self, line: int, rule: str, *values: object) -> None:
        """Adds a fault: ``rule`` formatted with ``values``."""
        self._found.setdefault(rule, []).append((line, rule.format(*values)))

    def check(self, path: Path) -> None:
        """Raises a ManifestError with all faults, if there are any."""
        found: list[tuple[int, str]] = []
        for faults in self._found.values():
            faults.sort()
            line, text = faults[0]
            if len(faults) <= _FAULTS_EACH:
                found += [(line, f"line {line}: {text}") for line, text in faults]
            else:
                first = listed([str(number) for number, _ in faults], _FAULTS_EACH)
                found.append((line, f"lines {first} ({len(faults)} in all): {text}"))
        if found:
            count = sum(map(len, self._found.values()))
            lines = "\n  ".join(text for _, text in sorted(found))
            raise ManifestError(
                f"{path}: {count} fault{'s' * (count > 1)} in the manifest:\n  {lines}",
                sorted(fault for faults in self._found.values() for fault in faults),
            )


def _optional(tasks: Sequence[Task]) -> tuple[str, ...]:
    read_by_several = ("grade", *(task.column for task in tasks if task.readers))
    readers = (f"{column}_reader{n}" for column in read_by_several for n in range(_MOST_READERS))
    return (*OPTIONAL, *(task.column for task in tasks), *readers)


def parse_table(
    table: Table, path: Path, scale: Sequence[str] | int | None, tasks: Sequence[Task] = ()
) -> Manifest:
    """Parses the table of a manifest, as :func:`read_manifest` does for a CSV.

    Args:
        table: with the required columns.
        path: its file, for messages; its folder is that of relative paths. It need not exist.
        scale: names of the grades, lowest first, or their number K; None accepts any whole number.
        tasks: label scales to read from their columns, if present.

    Raises:
        ManifestError: every fault found, with line numbers.
    """
    columns, n_grades = _optional(tasks), len(scale) if isinstance(scale, Sequence) else scale
    if not table.rows:
        raise ManifestError(f"{path}: a header but no slides; expected one line per slide")
    unknown = [name for name in table.header if name not in {*REQUIRED, *columns}]
    if unknown:
        warnings.warn(f"{path}: unknown column {', '.join(unknown)} is ignored", stacklevel=3)
    faults, rows = _Faults(), []
    unclear = {task.column: table.unclear_numbers(task.column) for task in tasks if task.numeric}
    for line, cells in table.rows:
        if len(cells) != len(table.header):
            faults.add(line, "expected {} cells as in the header, found {}", len(table.header), len(cells))
            continue
        values = dict(zip(table.header, cells, strict=True))
        for column, numbers in unclear.items():
            if (number := values.get(column, "")) in numbers:
                rule = (
                    f"{column} {{!r}} may be {{}} or {{}}; export numbers without a separator of thousands, "
                    "or write {}0 if it has decimals"
                )
                whole = re.sub("[.,]", "", number)
                faults.add(line, rule, number, whole, f"{int(whole) / 1000:g}", number)
        rows.append(_parse_row(line, values, path.parent, n_grades, tasks, faults))
    names = tuple(scale) if isinstance(scale, Sequence) else ()
    for column, of_column in {("grade", names), *((task.column, tuple(task.grades)) for task in tasks)}:
        _check_numbers(table, column, of_column, faults)
    _check_between(rows, faults)
    faults.check(path)
    _warn_of_spellings(path, rows)
    return Manifest(tuple(rows))


def _parse_row(
    line: int,
    values: dict[str, str],
    folder: Path,
    n_grades: int | None,
    tasks: Sequence[Task],
    faults: _Faults,
) -> ManifestRow:
    def known(column: str) -> str:
        text = values.get(column, "")
        return "" if is_missing(text) else text

    def grade(column: str) -> int | None:
        text = known(column)
        if not text:
            return None
        highest = "K-1" if n_grades is None else n_grades - 1
        number = _index(text)
        if number is None or (n_grades is not None and number >= n_grades):
            rule = f"{column} must be a whole number from 0 to {highest} (empty: not graded), found {{!r}}"
            faults.add(line, rule, text)
            return None
        return number

    def label(task: Task, column: str) -> int | float | Path | None:
        text = known(column)
        if not text:
            return None
        if task.numeric:
            if not math.isfinite(value := _number(text)):
                faults.add(line, f"{column} must be a finite number (empty: no label), found {{!r}}", text)
            return value
        number = _index(text)
        if number is not None and number < len(task.grades):
            return number
        table = folder.absolute() / text
        if task.of_tiles and table.is_file():
            return table
        rule = (
            f"{column} must be a whole number from 0 to {len(task.grades) - 1} "
            f"{'or a file of tile labels ' if task.of_tiles else ''}(empty: no label), found {{!r}}"
        )
        faults.add(line, rule, text)
        return None

    for column in ("slide_id", "patient_id"):
        if _ROUNDED.fullmatch(values[column]):
            rule = f"{column} {{!r}} was rounded by a spreadsheet; make it text there, and export again"
            faults.add(line, rule, values[column])
    names = {name: values[name] for name in ("slide_id", "path")}
    for column, text in (names | {name: known(name) for name in ("patient_id", *_TEXTS)}).items():
        if is_error(text):
            rule = f"{column} {{!r}} is an error value of a spreadsheet; correct it there, and export again"
            faults.add(line, rule, text)
    slide_id = safe_slide_id(values["slide_id"])
    if not slide_id:
        faults.add(line, "slide_id must have letters or digits, found {!r}", values["slide_id"])
    if not known("patient_id"):
        found = f" ({values['patient_id']!r})" if values["patient_id"] else ""
        faults.add(line, "patient_id is empty{}; without it patients would leak between splits", found)
    text = values["path"]
    if not text or "\0" in text or re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        faults.add(line, "path must name a file that this machine sees, found {!r}", text)
    mpp: float | None = None
    if text := known("mpp"):
        mpp = _number(text)
        if not (math.isfinite(mpp) and mpp > 0):
            faults.add(line, "mpp must be a positive number of micrometres per pixel, found {!r}", text)
    location: tuple[float, float, float] | None = None
    if texts := [known(name) for name in LOCATION if known(name)]:
        x, y, z = (_number(known(name)) for name in LOCATION)
        location = x, y, z
        if not all(map(math.isfinite, location)):
            faults.add(line, "x_mm, y_mm and z_mm must be three numbers of millimetres, found {}", texts)
    split = known("split").lower()
    if split and split not in SPLITS:
        faults.add(line, "split must be train, val or test, found {!r}", split)

    def of_readers(column: str) -> dict[int, str]:
        names = ((n, f"{column}_reader{n}") for n in range(_MOST_READERS))
        return {n: name for n, name in names if name in values}

    def votes(task: Task) -> tuple[int | None, ...]:
        given = (label(task, name) for name in of_readers(task.column).values())
        return tuple(vote if isinstance(vote, int) else None for vote in given)

    return ManifestRow(
        line=line,
        slide_id=slide_id,
        path=_slide_path(folder, values["path"]),
        patient_id=values["patient_id"],
        grade=grade("grade"),
        site=known("site"),
        scanner=known("scanner"),
        stain=known("stain"),
        block=known("block"),
        reader_grades=tuple(map(grade, of_readers("grade").values())),
        mpp=mpp,
        split=split,
        labels=tuple(label(task, task.column) for task in tasks),
        location_mm=location,
        votes=tuple(votes(task) if task.readers else () for task in tasks),
        readers=tuple(of_readers("grade")),
    )


def _number(text: str) -> float:
    """Parses a number, also with a decimal comma; NaN if it is none."""
    try:
        return float(text.replace(",", ".") if text.count(",") == 1 else text)
    except ValueError:
        return math.nan


def _whole(text: str) -> int | None:
    """Parses a whole number of at most three digits, also ``2.0`` or ``2,0`` of statistics programs."""
    match = re.fullmatch(r"(\d{1,3})([.,]0*)?", text)
    return int(match[1]) if match else None


def _index(text: str) -> int | None:
    """Parses the index of a grade, also as ``index 2``, which is no name even where names are numbers."""
    return _whole(text.casefold().removeprefix("index "))


def _check_numbers(table: Table, column: str, names: Sequence[str], faults: _Faults) -> None:
    """Adds the numbers that may be names or indices, as on a scale of the names 1 to 5.

    A number that is no name, such as 0 on that scale, shows that a column has indices.
    """
    places = {number: place for place, name in enumerate(names) if (number := _whole(name)) is not None}
    of_column = re.compile(rf"{re.escape(column)}(_reader\d+)?")
    found = [
        (line, name, number)
        for line, cells in table.rows
        for name, cell in zip(table.header, cells, strict=False)  # others are faults already
        if of_column.fullmatch(name) and (number := _whole(cell)) is not None
    ]
    if any(number not in places for *_, number in found):
        return
    for line, name, number in found:
        if (place := places[number]) != number and number < len(names):
            rule = (
                "{} {} may be the name of a grade, or the index of grade {!r}, as no 0 shows that the column "
                "has indices; write 'index {}' for the name, 'index {}' for the index"
            )
            faults.add(line, rule, name, number, names[number], place, number)


def _slide_path(folder: Path, text: str) -> Path:
    """Returns the absolute path of a cell; the file need not exist."""
    path = folder.absolute() / (Path(text).expanduser() if text.startswith("~/") else text)
    if "\\" in text and not path.exists():  # written on Windows
        path = folder.absolute() / text.replace("\\", "/")
    return Path(os.path.normpath(path))


def _check_between(rows: Iterable[ManifestRow], faults: _Faults) -> None:
    """Adds the faults between two rows."""
    rows = list(rows)
    first_with_id: dict[str, ManifestRow] = {}
    first_with_path: dict[object, ManifestRow] = {}
    whole = {row.path: row for row in rows if row.location_mm is None}
    first_of_patient: dict[str, ManifestRow] = {}
    some_split = any(row.split for row in rows)
    for row in rows:
        other = first_with_id.setdefault(clash_key(row.slide_id), row)
        if other is not row and row.slide_id:
            same = "" if row.slide_id == other.slide_id else f" as {other.slide_id!r} (case is ignored)"
            faults.add(row.line, "slide_id {!r} is already on line {}{}", row.slide_id, other.line, same)
        other = first_with_path.setdefault((row.path, row.location_mm), row)
        if other is not row:
            same = "the same file as on line {}" + ", at the same location" * (row.location_mm is not None)
            faults.add(row.line, same, other.line)
        elif row.location_mm is not None and row.path in whole:
            faults.add(row.line, "the file of line {}, which is there as a whole", whole[row.path].line)
        other = first_of_patient.setdefault(row.patient_id, row)
        if row.patient_id and row.split and other.split and row.split != other.split:
            faults.add(
                row.line,
                "patient {!r} is in split {!r} here and in {!r} on line {}; a patient belongs to one split",
                *(row.patient_id, row.split, other.split, other.line),
            )
        if some_split and not row.split:
            faults.add(row.line, "split is empty, though other lines have one; give all or none")


def _warn_of_spellings(path: Path, rows: Sequence[ManifestRow]) -> None:
    """Warns of names with different spellings only, of patients and of what may divide a study."""
    for column, plural in _SPELLED.items():
        lines: dict[str, int] = {}  # the first of each name
        for row in rows:
            lines.setdefault(getattr(row, column), row.line)
        pairs = [
            " and ".join(
                f"{name} (line {lines[one]})" for one, name in zip(pair, distinct(*pair), strict=True)
            )
            for pair in spelled_twice(lines)
        ]
        if pairs:
            more = f"; and {len(pairs) - 10} more" if len(pairs) > 10 else ""
            warnings.warn(
                f"{path}: {plural} that may be one, spelled twice: {'; '.join(pairs[:10])}{more}. They count "
                "as different ones, and may be in different parts; give each one spelling",
                stacklevel=4,
            )


def _with_labels(manifest: Manifest, tasks: Sequence[Task]) -> Manifest:
    """Sets labels of rows without columns: the grade for ``grade``, else None."""
    rows = (
        replace(row, labels=tuple(row.grade if task.column == "grade" else None for task in tasks))
        for row in manifest.rows
    )
    return replace(manifest, rows=tuple(rows))


def _list_folder(folder: Path, scale: Sequence[str] | int | None) -> Manifest:
    """Lists the slides and CT series below a folder, a DICOM series once, or its images if it has neither.

    A series of several files is named by its UID, since none of the files names it. Series of localizers
    alone are left out beside others.
    """
    found = find_files(folder)
    series: dict[tuple[Path, str], list[Path]] = {}
    files = [*found.slides(SLIDE_SUFFIXES), *filter(is_volume_file, found.paths)]
    for path in files:
        series.setdefault(_series(path) or (path, ""), []).append(path)
    if series:
        found.warn_of_rest(files)
        scouts = [key for key, paths in series.items() if key[1] and all(map(is_localizer, paths))]
        if 0 < len(scouts) < len(series):
            names = [str(series.pop(key)[0].relative_to(found.folder)) for key in scouts]
            warnings.warn(
                f"{found.folder}: left out series of localizer images ({len(names)}: {listed(names, 5)})",
                stacklevel=3,
            )
        rows = [
            ManifestRow(0, safe_slide_id(uid) if len(paths) > 1 else _stem(paths[0]), paths[0], "")
            for (_, uid), paths in series.items()
        ]
        return Manifest(_named(rows, found.folder))
    if found.slides(IMAGE_SUFFIXES):
        return _list_images(folder, scale, IMAGE_SUFFIXES)
    known = " ".join(sorted(SLIDE_SUFFIXES | IMAGE_SUFFIXES))
    rest = found.describe_rest([])
    raise ManifestError(
        f"{found.folder}: no slides in this folder; expected files ending in one of {known}"
        + (f"; found {rest}" if rest else "")
    )


def _stem(path: Path) -> str:
    """Returns the name of a ``.nii.gz`` without both endings; empty for other files, named by their stem."""
    return path.name[:-7] if path.name.lower().endswith(".nii.gz") else ""


def _series(path: Path) -> tuple[Path, str] | None:
    """Identifies the DICOM series of a file."""
    try:
        series = None if path.suffix.lower() in SLIDE_SUFFIXES - {".dcm"} else series_instance_uid(path)
    except OSError:  # reported on opening the slide
        return None
    return (path.parent, series) if series else None


def _list_images(folder: Path, scale: Sequence[str] | int | None, suffixes: frozenset[str]) -> Manifest:
    """Lists the images below a folder, graded by sub-folder; ungraded if some lie outside of these."""
    found = find_files(folder)
    folder, paths = found.folder, found.slides(suffixes)
    if not paths:
        raise ManifestError(
            f"{folder}: no images in this folder; expected files ending in {' '.join(sorted(suffixes))}"
        )
    found.warn_of_rest(paths)
    folders = [path.relative_to(folder).parts[:-1] for path in paths]
    has_splits = all(parts and parts[0] in SPLITS for parts in folders)
    labels = [parts[has_splits : has_splits + 1] for parts in folders]
    if not all(labels):
        return Manifest(_named([ManifestRow(0, "", path, "") for path in paths], folder))
    in_order = sorted(
        {label[0] for label in labels},
        key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name),
    )
    grades = _grade_labels(folder, in_order, scale)
    rows = [
        ManifestRow(0, "", path, "", grade=grades[label[0]], split=parts[0] if has_splits else "")
        for path, parts, label in zip(paths, folders, labels, strict=True)
    ]
    return Manifest(_named(rows, folder), tuple(in_order))


def _grade_labels(
    folder: Path, names: Sequence[str], scale: Sequence[str] | int | None
) -> Mapping[str, int | None]:
    """Returns the grade of each label, the names of folders in their order; None if its place is unknown."""
    named = () if scale is None or isinstance(scale, int) else tuple(scale)
    for form in (str, spelling):
        places = {form(grade): place for place, grade in enumerate(named)}
        meant = {form(name) for name in names}
        if meant <= places.keys() and len(places) == len(named) and len(meant) == len(names):
            return {name: places[form(name)] for name in names}
    splits = sorted(name for name in names if name.casefold() in _SPLIT_NAMES)
    if not _TRAINING.isdisjoint(name.casefold() for name in splits):
        raise ManifestError(
            f"{folder}: expected a folder for each label, found {splits}, which are splits; name these "
            f"{', '.join(SPLITS)}, and let all images lie in them"
        )
    if scale is None or isinstance(scale, int):
        _check_labels(folder, len(names), scale)
        values = {name: _whole(name) for name in names}
        return {
            name: value if scale is None or (value or 0) < scale else None for name, value in values.items()
        }
    if (
        len(named) != len({spelling(name) for name in names})
        or not all(name.isdecimal() for name in names)
        or any(letter.isnumeric() for grade in named for letter in grade)
    ):
        raise ManifestError(
            f"{folder}: its images have the labels {names}, the grades are {list(named)}; rename "
            "the folders as the grades, or give data.grades the labels, lowest first"
        )
    return {name: place for place, name in enumerate(names)}


def _list_arrays(file: Path, n_grades: int | None) -> Manifest:
    """Lists the images of an ``.npz``."""
    file = file.absolute()
    try:
        labels = read_labels(file)
    except SlideOpenError as error:
        raise ManifestError(str(error)) from error
    lowest = min((int(values.min()) for values in labels.values() if len(values)), default=0)
    if lowest < 0:
        raise ManifestError(f"{file}: labels must be from 0 up, found {lowest}")
    _check_labels(
        file, 1 + max((int(values.max()) for values in labels.values() if len(values)), default=0), n_grades
    )
    stem = safe_slide_id(file.stem) or "images"
    rows = []
    for split, values in labels.items():
        for index, grade in enumerate(values.tolist()):
            name = f"{stem}_{split}_{index}"
            rows.append(ManifestRow(0, name, NpzItem(file, split, index).path, name, grade, split=split))
    if not rows:
        raise ManifestError(f"{file}: its arrays hold no images")
    return Manifest(tuple(rows))


def _check_labels(path: Path, count: int, n_grades: int | None) -> None:
    if n_grades is not None and count > n_grades:
        raise ManifestError(
            f"{path}: its images have {count} labels, the scale has {n_grades} grades; "
            f"name {count} (slidetl tile: --grades {count})"
        )


def _named(rows: list[ManifestRow], folder: Path) -> tuple[ManifestRow, ...]:
    """Gives every row an identifier: its own or its file name, if needed with its folders or a hash."""

    def names(row: ManifestRow) -> list[str]:
        path = row.path
        below = path.relative_to(folder)
        return [
            row.slide_id or path.stem,
            "_".join([*below.parent.parts, path.stem]),
            "_".join(below.parts),
            f"{safe_slide_id(path.stem) or 'slide'}_{short_digest(str(below))}",
        ]

    every = [[safe_slide_id(name) for name in names(row)] for row in rows]
    chosen = [candidates[0] for candidates in every]
    for attempt in range(1, len(every[0])):
        counts = Counter(map(clash_key, chosen))
        chosen = [
            candidates[attempt] if not name or counts[clash_key(name)] > 1 else name
            for name, candidates in zip(chosen, every, strict=True)
        ]
    counts = Counter(map(clash_key, chosen))
    for row, name in zip(rows, chosen, strict=True):
        if counts[clash_key(name)] > 1:
            raise ManifestError(f"{row.path}: its name gives no identifier of its own; list it in a CSV")
    return tuple(replace(row, slide_id=name, patient_id=name) for row, name in zip(rows, chosen, strict=True))
