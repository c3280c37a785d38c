"""DICOM series drawn for tests, one small file per slice, with any fault wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from slidetl.volumes.volume import Volume
from tests.volumes.phantom import frame

Change = Callable[[Any, int], None]
ROOT = "1.2.826.0.1.3680043.8.498"


def small(size: tuple[int, int, int] = (6, 5, 4)) -> Volume:
    """Draws a volume with different values in each voxel."""
    x, y, z = np.meshgrid(*map(np.arange, size), indexing="ij")
    hu = (-900 + 100 * z + 10 * y + x).transpose(2, 1, 0).astype(np.int16)
    return Volume(np.ascontiguousarray(hu), frame(size, (0.7, 0.8, 2.5), (-100.0, -50.0, 20.0)))


def write_series(
    folder: Path,
    volume: Volume | None = None,
    change: Change = lambda dataset, number: None,
    slope: float = 1.0,
    intercept: float = -1024.0,
    series: str = "1",
) -> Path:
    """Writes a series; ``change`` edits the dataset of each slice before it is written."""
    volume = volume or small()
    folder.mkdir(parents=True, exist_ok=True)
    about, matrix = volume.frame, volume.frame.matrix
    for number, plane in enumerate(volume.hu):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = UID(f"{ROOT}.{series}.{number + 1}")
        dataset: Any = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"{ROOT}.0", f"{ROOT}.{series}"
        dataset.Modality, dataset.PatientID, dataset.InstanceNumber = "CT", "P", number + 1
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.Rows, dataset.Columns = plane.shape
        dataset.PixelSpacing = [about.spacing_mm[1], about.spacing_mm[0]]
        dataset.ImageOrientationPatient = [*matrix[:, 0].tolist(), *matrix[:, 1].tolist()]
        dataset.ImagePositionPatient = [round(v, 6) for v in about.to_patient_mm((0, 0, number)).tolist()]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 1
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = slope, intercept, "HU"
        dataset.PixelData = _stored(plane, slope, intercept).tobytes()
        change(dataset, number)
        dataset.save_as(folder / f"{(7 * number) % 11:02d}-{series}-{number}.dcm")  # not in order
    return folder


def _stored(plane: NDArray[np.int16], slope: float, intercept: float) -> NDArray[np.int16]:
    return np.asarray(np.rint((plane - intercept) / slope), np.int16)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Edits a DICOM file in place."""
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)
