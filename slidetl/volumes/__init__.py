"""Volumes: CT series in Hounsfield units on a grid in patient coordinates. :func:`read_volume` reads them."""

from __future__ import annotations

import re
from pathlib import Path

from slidetl.errors import UsageError
from slidetl.slides.dicom import SLIDE, modality
from slidetl.slides.ngff import is_ngff
from slidetl.volumes.frame import VolumeFrame
from slidetl.volumes.series import Series
from slidetl.volumes.volume import Volume

__all__ = ["Series", "Volume", "VolumeFrame", "is_series", "is_volume_file", "open_series", "read_volume"]

SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd")


def is_volume_file(path: Path) -> bool:
    """Tells by its name if a file is a NIfTI or MetaImage."""
    return path.name.lower().endswith(SUFFIXES)


def is_series(path: Path) -> bool | None:
    """Tells if a path is of a series of images through a body (CT, but also MR), or of a slide.

    Returns:
        True for a NIfTI or MetaImage by its name and for DICOM of any modality but SM, False for all other
        files, None for a folder without DICOM and for a path that is not there.
    """
    if is_volume_file(path):
        return True
    if not path.exists():
        return None
    if is_ngff(path):
        return False
    if path.is_dir() or re.fullmatch(r"\.(dcm|dicom|ima|\d+)|", path.suffix.lower()):
        kind = modality(path)
        return kind != SLIDE if kind else None if path.is_dir() else False
    return False


def open_series(path: str | Path) -> Series:
    """Reads and checks the metadata of a CT series.

    Args:
        path: the folder of a DICOM series; of several in one folder, any file of one; a NIfTI (``.nii``,
            ``.nii.gz``) or a MetaImage (``.mha``, ``.mhd``) in Hounsfield units.

    Raises:
        VolumeError: it is no CT series that makes one volume; the message names the fault.
        UsageError: a package of the extra ``ct`` is missing.
    """
    path = Path(path)
    try:
        if is_volume_file(path):
            from slidetl.volumes.images import open_image

            return open_image(path)
        from slidetl.volumes.dicom import open_dicom

        return open_dicom(path)
    except ModuleNotFoundError as error:
        raise UsageError(f"CT series need {error.name}: pip install 'slidetl[ct]'") from error


def read_volume(path: str | Path) -> Volume:
    """Reads a CT series as one volume in Hounsfield units.

    Its axes are turned and mirrored, without resampling, to run as nearly as they can to the patient's left,
    back and head, so that all series look alike.

    Args:
        path: as :func:`open_series` takes it.

    Raises:
        VolumeError: it is no CT series that makes one volume, or damaged; the message names the fault.
        UsageError: a package of the extra ``ct`` is missing.
    """
    return open_series(path).read()
