"""The manifest: which slides there are, whose they are, and how they were graded."""

from __future__ import annotations

import csv
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slidetl.data.tasks import Task
from slidetl.errors import ManifestError, SlideOpenError, UsageError
from slidetl.slides.dicom import series_instance_uid
from slidetl.slides.npz import NpzItem, read_labels
from slidetl.slides.raster import IMAGE_SUFFIXES, TIFF_SUFFIXES

SPLITS = ("train", "val", "test")
REQUIRED = ("slide_id", "path", "patient_id", "grade")
FIVE_GRADES = ("0", "1", "2", "3", "4")  # the default scale
OPTIONAL = ("site", "scanner", "stain", "block", "mpp", "split")
_READER = re.compile(r"grade_reader(\d+)")
# What OpenSlide 4 reads, by file name; whether a file really is a slide is found out when it is opened.
SLIDE_SUFFIXES = frozenset(
    ".svs .tif .tiff .ndpi .vms .vmu .scn .mrxs .svslide .bif .dcm .czi".split()  # noqa: SIM905 (reads better)
)


@dataclass(frozen=True)
class ManifestRow:
    """One slide.

    Attributes:
        line: line in the CSV, 1 being the header; 0 for a slide found in a folder.
        slide_id: identifier, safe as the name of a folder.
        path: the slide's file, absolute; of an image in an ``.npz``, ``FILE.npz#SPLIT/INDEX``.
        patient_id: whose slide it is; equal to ``slide_id`` where nothing is known.
        grade: 0..K-1, or None for a slide that nobody graded.
        site, scanner, stain, block: as given, empty where not.
        reader_grades: each reader's grade, in the order of their numbers.
        mpp: spacing of level 0 in micrometres per pixel, for slides whose metadata has none.
        split: ``train``, ``val`` or ``test``; empty where the split is left to a seed.
        labels: label of each task: 0..K-1, the path of a table of tile labels, or None.
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
    labels: tuple[int | Path | None, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """All slides of a study, checked.

    Attributes:
        rows: one per slide, in the order of the file.
        grades: names of the grades, lowest first, where folders of labelled images name them; else empty.
    """

    rows: tuple[ManifestRow, ...]
    grades: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


def read_manifest(
    path: Path, n_grades: int | None = None, images: bool = False, tasks: Sequence[Task] = ()
) -> Manifest:
    """Reads a CSV, or lists a folder of slides, a folder of labelled images, or an ``.npz`` of both.

    Labelled images lie in one folder for each label, ``FOLDER/LABEL/...`` or ``FOLDER/SPLIT/LABEL/...`` with
    ``train``, ``val`` and ``test`` as splits. The labels become grades in the order of their names, of
    numbers in the order of their values; each image counts as a patient of its own. In an ``.npz`` they lie
    as :mod:`slidetl.slides.npz` says.

    Args:
        path: a CSV with the columns ``slide_id, path, patient_id, grade`` and optionally ``site``,
            ``scanner``, ``stain``, ``block``, ``mpp``, ``split``, ``grade_reader1``, ...; or a folder,
            searched with its sub-folders, whose slides have no grades; or labelled images. A folder without
            slides is searched for images (PNG, JPEG, BMP).
        n_grades: number of grades K on the scale; None checks only that a grade is a whole number.
        images: whether a folder is one of labelled images even if there are TIFFs or slides in it.
        tasks: label scales whose columns are read where they are there.

    Raises:
        ManifestError: every fault found, each with its line number.
    """
    path = Path(path)
    if path.is_dir() and images:
        return _with_labels(_list_images(path, n_grades, IMAGE_SUFFIXES | TIFF_SUFFIXES), tasks)
    if path.is_dir():
        return _with_labels(_list_folder(path, n_grades), tasks)
    if path.suffix.lower() == ".npz" and path.is_file():
        return _with_labels(_list_arrays(path, n_grades), tasks)
    if not path.is_file():
        raise ManifestError(
            f"{path}: expected a CSV manifest, an .npz or a folder of slides, found neither; check the path"
        )
    return _read_csv(path, n_grades, tasks)


def check_scale(grades: Sequence[str]) -> None:
    """Checks a scale's names, lowest first.

    Raises:
        UsageError: fewer than two, or the same name twice.
    """
    if len(grades) < 2 or len(set(grades)) < len(grades):
        raise UsageError(
            f"data.grades must be at least two different names, lowest first, not {list(grades)}"
        )


def safe_slide_id(name: str) -> str:
    """Turns a name into one that is safe as a single folder name on any file system; may be empty."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name.strip()).lstrip(".-")[:150]
    return safe if re.search("[A-Za-z0-9]", safe) else ""


def _read_csv(path: Path, n_grades: int | None, tasks: Sequence[Task]) -> Manifest:
    faults: list[str] = []
    lines: list[tuple[int, list[str]]] = []
    begins = 1  # the line of the next row; with a quote left open, a row goes on to the end of the file
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    lines.append((begins, cells))
                begins = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: expected a CSV in UTF-8: {error}") from error
    except csv.Error as error:
        raise ManifestError(
            f"{path}, line {begins}: expected a row of a CSV, found a fault ({error}); check its quotes"
        ) from error
    if not lines:
        raise ManifestError(f"{path}: the file is empty; expected a header with {', '.join(REQUIRED)}")
    header = [name.strip() for name in lines[0][1]]
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        hint = "; separate the columns by commas" if ";" in header[0] else ""
        raise ManifestError(
            f"{path}, line 1: missing column {', '.join(missing)}; found {', '.join(header)}{hint}"
        )
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated:
        raise ManifestError(f"{path}, line 1: column {', '.join(repeated)} occurs more than once")
    if len(lines) == 1:
        raise ManifestError(f"{path}: a header but no slides; expected one line per slide")
    known = {*REQUIRED, *OPTIONAL, *(task.column for task in tasks)}
    unknown = [name for name in header if name not in known and not _READER.fullmatch(name)]
    if unknown:
        warnings.warn(f"{path}: unknown column {', '.join(unknown)} is ignored", stacklevel=3)
    rows = []
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            faults.append(f"line {line}: expected {len(header)} cells as in the header, found {len(cells)}")
            continue
        values = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        rows.append(_parse_row(line, values, path.parent, n_grades, tasks, faults))
    faults += _faults_between(rows)
    if faults:
        faults.sort(key=lambda fault: int(re.search(r"\d+", fault)[0]))  # type: ignore[index] # each has its line
        listed = "\n  ".join(faults)
        raise ManifestError(
            f"{path}: {len(faults)} fault{'s' * (len(faults) > 1)} in the manifest:\n  {listed}"
        )
    return Manifest(tuple(rows))


def _parse_row(
    line: int,
    values: dict[str, str],
    folder: Path,
    n_grades: int | None,
    tasks: Sequence[Task],
    faults: list[str],
) -> ManifestRow:
    def fault(text: str) -> None:
        faults.append(f"line {line}: {text}")

    def grade(column: str) -> int | None:
        text = values[column]
        if not text:
            return None
        highest = "K-1" if n_grades is None else n_grades - 1
        if not re.fullmatch(r"\d{1,3}", text) or (n_grades is not None and int(text) >= n_grades):
            fault(f"{column} must be a whole number from 0 to {highest} (empty: not graded), found {text!r}")
            return None
        return int(text)

    def label(task: Task) -> int | Path | None:
        text = values.get(task.column, "")
        if not text:
            return None
        if re.fullmatch(r"\d{1,3}", text) and int(text) < len(task.grades):
            return int(text)
        table = folder.absolute() / text
        if task.of_tiles and table.is_file():
            return table
        fault(
            f"{task.column} must be a whole number from 0 to {len(task.grades) - 1} "
            f"{'or a table of tile labels ' if task.of_tiles else ''}(empty: no label), found {text!r}"
        )
        return None

    slide_id = safe_slide_id(values["slide_id"])
    if not slide_id:
        fault(f"slide_id must have letters or digits, found {values['slide_id']!r}")
    if not values["patient_id"]:
        fault("patient_id is empty; without it patients would leak between splits")
    slide = Path(os.path.normpath(folder.absolute() / values["path"]))
    try:
        item = NpzItem.of(slide)
        is_there = bool(values["path"]) and (item.file if item else slide).exists()
    except (OSError, ValueError):  # it cannot be a path: too long, or with a NUL
        is_there = False
    if not is_there:
        fault(f"no file {values['path']!r}; paths are absolute or relative to the manifest's folder")
    mpp: float | None = None
    if text := values.get("mpp", ""):
        try:
            mpp = float(text)
        except ValueError:
            mpp = math.nan
        if not (math.isfinite(mpp) and mpp > 0):
            fault(f"mpp must be a positive number of micrometres per pixel, found {text!r}")
    split = values.get("split", "")
    if split and split not in SPLITS:
        fault(f"split must be train, val or test, found {split!r}")
    readers = sorted((int(match[1]), name) for name in values if (match := _READER.fullmatch(name)))
    return ManifestRow(
        line=line,
        slide_id=slide_id,
        path=slide,
        patient_id=values["patient_id"],
        grade=grade("grade"),
        site=values.get("site", ""),
        scanner=values.get("scanner", ""),
        stain=values.get("stain", ""),
        block=values.get("block", ""),
        reader_grades=tuple(grade(name) for _, name in readers),
        mpp=mpp,
        split=split,
        labels=tuple(label(task) for task in tasks),
    )


def _faults_between(rows: Iterable[ManifestRow]) -> list[str]:
    """Faults that take two rows to see."""
    rows = list(rows)
    faults = []
    first_with_id: dict[str, ManifestRow] = {}
    first_with_path: dict[Path, ManifestRow] = {}
    first_of_patient: dict[str, ManifestRow] = {}
    some_split = any(row.split for row in rows)
    for row in rows:
        # Compared without case, since some file systems do not tell A.zarr from a.zarr.
        other = first_with_id.setdefault(row.slide_id.lower(), row)
        if other is not row and row.slide_id:
            faults.append(f"line {row.line}: slide_id {row.slide_id!r} is already on line {other.line}")
        other = first_with_path.setdefault(row.path, row)
        if other is not row:
            faults.append(f"line {row.line}: the same file as on line {other.line}")
        other = first_of_patient.setdefault(row.patient_id, row)
        if row.patient_id and row.split and other.split and row.split != other.split:
            faults.append(
                f"line {row.line}: patient {row.patient_id!r} is in split {row.split!r} here "
                f"and in {other.split!r} on line {other.line}; a patient belongs to one split"
            )
        if some_split and not row.split:
            faults.append(f"line {row.line}: split is empty, though other lines have one; give all or none")
    return faults


def _with_labels(manifest: Manifest, tasks: Sequence[Task]) -> Manifest:
    """Leaves everything but the grade unknown where there are no columns."""
    rows = (
        replace(row, labels=tuple(row.grade if task.column == "grade" else None for task in tasks))
        for row in manifest.rows
    )
    return replace(manifest, rows=tuple(rows))


def _list_folder(folder: Path, n_grades: int | None) -> Manifest:
    """The slides below a folder, files of one slide (DICOM instances) once; its images if it has none."""
    folder = folder.absolute()
    slides: dict[object, Path] = {}
    for path in _files(folder, SLIDE_SUFFIXES):
        series = series_instance_uid(path) if path.suffix.lower() == ".dcm" else None
        slides.setdefault((path.parent, series) if series else path, path)
    if slides:
        return Manifest(_named([ManifestRow(0, "", path, "") for path in slides.values()], folder))
    if _files(folder, IMAGE_SUFFIXES):
        return _list_images(folder, n_grades, IMAGE_SUFFIXES)
    known = " ".join(sorted(SLIDE_SUFFIXES | IMAGE_SUFFIXES))
    raise ManifestError(f"{folder}: no slides in this folder; expected files ending in one of {known}")


def _list_images(folder: Path, n_grades: int | None, suffixes: frozenset[str]) -> Manifest:
    """The images below a folder, graded by the folders in it; not graded if some lie beside those."""
    folder = folder.absolute()
    paths = _files(folder, suffixes)
    if not paths:
        raise ManifestError(
            f"{folder}: no images in this folder; expected files ending in {' '.join(sorted(suffixes))}"
        )
    folders = [path.relative_to(folder).parts[:-1] for path in paths]
    has_splits = all(parts and parts[0] in SPLITS for parts in folders)
    labels = [parts[has_splits : has_splits + 1] for parts in folders]
    if not all(labels):
        return Manifest(_named([ManifestRow(0, "", path, "") for path in paths], folder))
    names = {label[0] for label in labels}
    grades = tuple(
        sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    )
    _check_labels(folder, len(grades), n_grades)
    rows = [
        ManifestRow(0, "", path, "", grade=grades.index(label[0]), split=parts[0] if has_splits else "")
        for path, parts, label in zip(paths, folders, labels, strict=True)
    ]
    return Manifest(_named(rows, folder), grades)


def _list_arrays(file: Path, n_grades: int | None) -> Manifest:
    """The images of an ``.npz``."""
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


def _files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )


def _named(rows: list[ManifestRow], folder: Path) -> tuple[ManifestRow, ...]:
    """Gives every row an identifier, from its file's name and as much of its folders as it takes."""
    rows = [replace(row, slide_id=safe_slide_id(row.path.stem)) for row in rows]
    rows = _rename_clashes(rows, lambda path: "_".join([*path.relative_to(folder).parent.parts, path.stem]))
    rows = _rename_clashes(rows, lambda path: "_".join(path.relative_to(folder).parts))
    taken: set[str] = set()
    for row in rows:
        if not row.slide_id or row.slide_id.lower() in taken:
            raise ManifestError(f"{row.path}: no identifier can be made from this name; list it in a CSV")
        taken.add(row.slide_id.lower())
    return tuple(replace(row, patient_id=row.slide_id) for row in rows)


def _rename_clashes(rows: list[ManifestRow], name: Callable[[Path], str]) -> list[ManifestRow]:
    counts = Counter(row.slide_id.lower() for row in rows)
    return [
        replace(row, slide_id=safe_slide_id(name(row.path))) if counts[row.slide_id.lower()] > 1 else row
        for row in rows
    ]
