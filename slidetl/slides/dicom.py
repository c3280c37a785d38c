"""Finds the files of one DICOM slide: each level of its pyramid is a file of the same series."""

from __future__ import annotations

import re
from pathlib import Path

from slidetl.errors import SlideOpenError
from slidetl.text import listed

# StudyInstanceUID (0020,000D) and, next to it, SeriesInstanceUID (0020,000E), explicit or implicit little
# endian. Only at the top level of a file are they neighbours: a reference to another series has no study
# beside it.
_STUDY_AND_SERIES = re.compile(
    rb"\x20\x00\x0d\x00(?:UI..|..\0\0)[0-9.]*[\0 ]?\x20\x00\x0e\x00(?:UI..|..\0\0)([0-9.]+)", re.DOTALL
)
# Modality (0008,0060), in explicit or implicit little endian.
_MODALITY = re.compile(rb"\x08\x00\x60\x00(?:CS..|..\0\0)([A-Z]{2,16})", re.DOTALL)
# Image Type (0008,0008), likewise.
_IMAGE_TYPE = re.compile(rb"\x08\x00\x08\x00(?:CS..|..\0\0)([A-Z0-9_ \\]+)", re.DOTALL)
_HEAD_BYTES = 1 << 16
SLIDE = "SM"  # the modality of whole slides


def first_instance(folder: Path) -> Path | None:
    """Finds a file of the one series in a folder, by which OpenSlide opens the slide; None without any.

    Raises:
        SlideOpenError: the folder has several series; the message names a file of each.
        OSError: it cannot be read.
    """
    series: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if uid := series_instance_uid(path):
            series.setdefault(uid, path)
    if len(series) > 1:
        names = listed([path.name for path in series.values()], 5)
        raise SlideOpenError(
            f"{folder}: {len(series)} DICOM series, each a slide of its own; name a file of one ({names}), "
            "or give the folder to 'slidetl tile'"
        )
    return next(iter(series.values()), None)


def series_instance_uid(path: Path) -> str | None:
    """Reads the series of a DICOM file; None if it is not DICOM in little endian.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        match = _STUDY_AND_SERIES.search(file.read(_HEAD_BYTES))
    return match[1].decode("ascii") if match else None


def is_localizer(path: Path) -> bool:
    """Tells if a DICOM file is a localizer of a CT series.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    kind, kept = _MODALITY.search(head), _IMAGE_TYPE.search(head)
    return bool(kind and kind[1] == b"CT" and kept and b"LOCALIZER" in kept[1].split(b"\\"))


def modality(path: Path) -> str:
    """Reads the modality of a DICOM file, or of the first in a folder: ``SM`` for a slide, ``CT`` and others.

    Returns:
        Empty if there is no DICOM, or it cannot be read.
    """
    try:
        for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
            with file.open("rb") as opened:
                head = opened.read(_HEAD_BYTES)
            if head[128:132] == b"DICM" and (match := _MODALITY.search(head)):
                return match[1].decode("ascii")
    except OSError:  # reported on opening the slide
        pass
    return ""
