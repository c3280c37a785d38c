"""A study of small volumes, written into caches without files of series."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import USED, Ledger, LedgerRow
from slidetl.tiles.patches import plan_patches
from slidetl.tiles.tile import write_patches
from slidetl.volumes.volume import Volume
from tests.volumes.phantom import ellipsoid, frame

SPEC = TileSpec(spacing_mm=1.0, tile_size_px=16, stride_px=8, mask="none", min_tissue=0.0)


@dataclass(frozen=True)
class VolumeStudy:
    """A manifest and its cache of volumes."""

    manifest: Path
    cache: Path

    def options(self, root: Path, *more: str) -> list[str]:
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
            *more,
        ]


def series(number: int, diameter_mm: float) -> Volume:
    """Draws a lung of 24 x 24 x 24 mm with a ball in its middle, or none of diameter 0."""
    about = frame((24, 24, 24))
    rng = np.random.default_rng(number)
    hu = rng.normal(-850, 20, about.size_voxel[::-1])
    if diameter_mm:
        radius = diameter_mm / 2
        hu[ellipsoid(about, (11.5, 11.5, 11.5), (radius, radius, radius))] = 40
    return Volume(np.rint(hu).astype(np.int16), about, f"{number:064x}")


def write_study(folder: Path, name: str, rows: list[dict[str, Any]], at: bool) -> VolumeStudy:
    """Writes the cache of a study: whole series, or one patch ``at`` the middle of each."""
    cache, manifest = folder / f"cache-{name}", folder / f"{name}.csv"
    ledger = []
    for number, row in enumerate(rows):
        diameter_mm = row.get("diameter_mm") or 9.0 * row["grade"]
        volume, location = series(number, diameter_mm), (11.5, 11.5, 11.5) if at else None
        write_patches(
            plan_patches(volume, SPEC, location), volume, cache, row["slide_id"], location_mm=location
        )
        path = str(folder / row["path"])
        ledger.append(LedgerRow(row["slide_id"], path, USED, fingerprint=volume.fingerprint))
    Ledger(cache / "ledger.csv").record(ledger)
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
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
                "path": f"n{number:02}.nii",
                "patient_id": f"p{number // 2}",
                "grade": is_nodule,
                "malignancy": malignancy,
                "malignancy_reader1": malignancy,
                "malignancy_reader2": None if malignancy is None else max(0, malignancy - number % 3 // 2),
                "diameter_mm": diameter,
            }
        )
    return rows


def target_rows(patients: int) -> list[dict[str, Any]]:
    """Lists a series of each patient, and two of the first; every other patient has a nodule."""
    return [
        {
            "slide_id": f"s{number:02}",
            "path": f"s{number:02}.nii",
            "patient_id": f"p{patient}",
            "grade": patient % 2,
        }
        for number, patient in enumerate([0, *range(patients)])
    ]
