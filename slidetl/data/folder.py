"""Finds slide files below a folder, and reports files left out."""

from __future__ import annotations

import json
import os
import re
import stat
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from slidetl.slides.ngff import is_ngff
from slidetl.text import listed

# Formats of OpenSlide 4 and OME-Zarr, by name; opening a file shows if it really is a slide.
SLIDE_SUFFIXES = frozenset(
    ".svs .tif .tiff .ndpi .vms .vmu .scn .mrxs .svslide .bif .dcm .czi .zarr".split()  # noqa: SIM905 (reads better)
)
# Documents beside the slides of any study; not worth a warning.
_PAPERS = frozenset(
    ".csv .tsv .txt .md .json .geojson .xml .yaml .yml .html .log .ini .db .pdf .doc .docx .xls .xlsx".split()  # noqa: SIM905
)
_NAMED = 5  # of each kind left out


@dataclass(frozen=True)
class FoundFiles:
    """The files below a folder.

    Attributes:
        folder: the folder, absolute.
        paths: regular files, and folders named ``.zarr``, sorted.
        dangling: links without a readable target.
        unreadable: folders that cannot be listed.
        odd: neither files nor folders: pipes, sockets, devices.
        again: further links to listed files and folders.
    """

    folder: Path
    paths: tuple[Path, ...]
    dangling: tuple[Path, ...]
    unreadable: tuple[Path, ...]
    odd: tuple[Path, ...]
    again: tuple[Path, ...]

    def slides(self, suffixes: frozenset[str]) -> list[Path]:
        """Returns the files with these suffixes, and OME-Zarr folders if ``.zarr`` is one.

        If ``.dcm`` is one, DICOM files without a suffix too.

        Dangling links are included: opening them fails, and the slide is reported.
        """
        dicom = ".dcm" in suffixes
        every = sorted((*self.paths, *self.dangling))
        return [
            path
            for path in every
            if path.suffix.lower() in suffixes - {".zarr"}
            or (dicom and _is_dicom(path))
            or (".zarr" in suffixes and path.suffix.lower() == ".zarr" and is_ngff(path))
        ]

    def warn_of_rest(self, taken: list[Path]) -> None:
        """Warns in one line of files not taken, documents apart."""
        if rest := self.describe_rest(taken):
            warnings.warn(f"{self.folder}: left out {rest}", stacklevel=4)

    def describe_rest(self, taken: list[Path]) -> str:
        """Counts and names files not taken, documents apart; empty if there are none."""
        known = set(taken)
        formats = Counter(path.suffix.lower() or "no suffix" for path in self.paths if path not in known)
        for suffix in _PAPERS:
            formats.pop(suffix, None)
        parts = []
        if formats:
            counts = listed([f"{suffix} {count}" for suffix, count in formats.most_common()], 2 * _NAMED)
            parts.append(f"files in formats that are not read here ({formats.total()}: {counts})")
        for what, paths in (
            ("links to nothing", [path for path in self.dangling if path not in known]),
            ("folders that cannot be read", self.unreadable),
            ("pipes or devices", self.odd),
            ("links to what is listed already", self.again),
        ):
            if paths:
                names = listed([str(path.relative_to(self.folder)) for path in paths], _NAMED)
                parts.append(f"{what} ({len(paths)}: {names})")
        return "; ".join(parts)


def find_files(folder: Path) -> FoundFiles:
    """Lists the files below a folder, linked folders included.

    Links may lead out of the folder, since sites are often mounted elsewhere, but not to a parent of it. Each
    file and folder is listed once, under its own path if it is below ``folder``. Hidden files and folders,
    the content of tile caches, pictures by ``slidetl grade``, and data folders beside a ``.mrxs`` are skipped
    silently.
    """
    folder = folder.absolute()
    root = os.path.realpath(folder)
    entered: set[str] = set()
    real: dict[Path, Path] = {}
    links, linked_folders = list[Path](), list[Path]()
    dangling, unreadable, odd, again = list[Path](), list[Path](), list[Path](), list[Path]()
    waiting = [folder]
    while waiting or linked_folders:
        here = waiting.pop() if waiting else linked_folders.pop(0)
        place = os.path.realpath(here)
        if place in entered or (place != root and Path(root).is_relative_to(place)):
            again.append(here)
            continue
        entered.add(place)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError:
            unreadable.append(here)
            continue
        names = {entry.name.lower() for entry in entries}
        is_cache = {"ledger.csv", ".locks"} <= names
        for entry in entries:
            path = here / entry.name
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                if is_cache and (path.suffix == ".zarr" or entry.name == "previews"):
                    continue
                if path.suffix.lower() == ".zarr":
                    real[path] = path  # an OME-Zarr, or a format that is not read
                elif f"{entry.name.lower()}.mrxs" not in names:
                    (linked_folders if entry.is_symlink() else waiting).append(path)
            elif _is_of_grade(path, names):
                continue
            elif entry.is_symlink():
                links.append(path)
            elif entry.is_file():
                real.setdefault(Path(place, entry.name), path)
            else:
                odd.append(path)
    for path in links:
        try:
            mode = path.stat().st_mode
        except OSError:
            dangling.append(path)
            continue
        if not stat.S_ISREG(mode):
            odd.append(path)
        elif real.setdefault(Path(os.path.realpath(path)), path) is not path:
            again.append(path)
    kinds = (real.values(), dangling, unreadable, odd, again)
    return FoundFiles(folder, *(tuple(sorted(paths)) for paths in kinds))


def _is_of_grade(path: Path, names: set[str]) -> bool:
    """Tells if a picture lies beside its result of ``slidetl grade``; ``names`` are in lower case."""
    found = re.fullmatch(r"(.+?)(\.thumbnail\.jpg|\.png)", path.name)
    if found is None or f"{found[1].lower()}.json" not in names:
        return False
    try:
        result = json.loads(path.with_name(f"{found[1]}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(result, dict) and "model_sha256" in result


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_dicom(path: Path) -> bool:
    """Checks if a file without suffix, or named ``.dicom`` or by a DICOM UID (1.2.840...), is DICOM."""
    if not re.fullmatch(r"(\.(\d+|dicom))?", path.suffix.lower()):
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
