"""A study of small volumes, tiled by the real command."""

from __future__ import annotations

import csv
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slidetl.cli import main
from tests.volumes.phantom import ellipsoid, frame

MIDDLE_MM = 11.5


@dataclass(frozen=True)
class VolumeStudy:
    """A manifest and its cache of volumes."""

    manifest: Path
    cache: Path

    def options(self, root: Path) -> list[str]:
        """Options of the training commands: this study, a small network, outputs below ``root``."""
        return [
            f"--data.manifest={self.manifest}",
            f"--data.cache={self.cache}",
            "--data.num_workers=0",
            "--model.backbone.name=conv3d_8",
            f"--trainer.default_root_dir={root}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]


def write_series(path: Path, seed: int, diameter_mm: float) -> None:
    """Draws a lung of 24 x 24 x 24 mm with a ball in its middle, or none of diameter 0."""
    import SimpleITK as sitk

    about, radius = frame((24, 24, 24)), diameter_mm / 2
    hu = np.random.default_rng(seed).normal(-850, 20, about.size_voxel[::-1])
    if radius:
        hu[ellipsoid(about, (MIDDLE_MM,) * 3, (radius,) * 3)] = 40
    sitk.WriteImage(sitk.GetImageFromArray(np.rint(hu).astype(np.int16)), str(path))


def write_study(folder: Path, name: str, rows: list[dict[str, Any]]) -> VolumeStudy:
    """Writes series of a study, and tiles them with patches of 16 voxels that overlap by half."""
    cache, manifest = folder / f"cache-{name}", folder / f"{name}.csv"
    for number, row in enumerate(rows):
        write_series(folder / row["path"], number, row.get("diameter_mm") or 9.0 * row["grade"])
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    words = ["--spacing-mm", "1", "--tile-size", "16", "--stride", "8", "--mask", "none", "--min-tissue", "0"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*unknown column", UserWarning)  # those of tasks
        assert main(["tile", str(manifest), "--cache", str(cache), *words, "--workers", "1"]) == 0
    return VolumeStudy(manifest, cache)


def source_rows(patients: int) -> list[dict[str, Any]]:
    """Lists a patch with a nodule and one without for each patient, two readers apart in some."""
    rows = []
    for number in range(2 * patients):
        is_nodule = number % 2
        diameter = 5.0 + number % 7 if is_nodule else None
        malignancy = int(min(4, diameter - 5)) if diameter else None
        rows.append(
            {
                "slide_id": f"n{number:02}",
                "path": f"n{number:02}.mha",
                "patient_id": f"p{number // 2}",
                "grade": is_nodule,
                "malignancy": malignancy,
                "malignancy_reader1": malignancy,
                "malignancy_reader2": None if malignancy is None else max(0, malignancy - number % 3 // 2),
                "diameter_mm": diameter,
                **dict.fromkeys(("x_mm", "y_mm", "z_mm"), MIDDLE_MM),
            }
        )
    return rows


def target_rows(patients: int) -> list[dict[str, Any]]:
    """Lists a series of each patient, and two of the first; every other patient has a nodule."""
    return [
        {
            "slide_id": f"s{number:02}",
            "path": f"s{number:02}.mha",
            "patient_id": f"p{patient}",
            "grade": patient % 2,
        }
        for number, patient in enumerate([0, *range(patients)])
    ]
