"""How much memory a CT series takes, and how fast it becomes patches, beside MONAI's transforms, in one run.

A drawn DICOM series of 512 x 512 x 600 voxels of 0.7 x 0.7 x 0.6 mm is read, resampled to 1 mm and cut into
all its 216 patches of 64 voxels, by slidetl (``plan_patches`` without a mask, ``PatchPlan.patch``) and by
MONAI (``LoadImage`` with its pydicom reader, ``EnsureChannelFirst``, ``Spacing``, ``ScaleIntensityRange``,
``GridPatch``). Each run is a process of its own, both take turns, and the first turn, with cold files, is not
counted. Then ``slidetl tile`` runs on the series and on a NIfTI of it, its memory watched.

    python -m venv PEERS && PEERS/bin/pip install --constraint constraints.txt monai pydicom simpleitk
    python -m tools.bench_volumes --monai-python PEERS/bin/python --output docs/evidence/volumes-tiling.md

The environment of MONAI needs neither slidetl nor its other packages.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SIZE, SPACING_MM = (512, 512, 600), (0.7, 0.7, 0.6)
SIDE = 64
WINDOW_HU = (-1000, 400)


def draw_series(folder: Path, size: tuple[int, int, int]) -> None:
    """Draws a chest: an elliptic cylinder with two lungs and noise, one file per slice."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir()
    x, y, z = ((np.arange(n) + 0.5) * s - n * s / 2 for n, s in zip(size, SPACING_MM, strict=True))
    reach = [n * s / 2 for n, s in zip(size, SPACING_MM, strict=True)]
    noise = np.random.default_rng(0).normal(0, 25, (8, size[1], size[0]))
    body = (x / reach[0] / 0.9) ** 2 + (y[:, None] / reach[1] / 0.65) ** 2 <= 1
    for number in range(size[2]):
        plane = np.where(body, 40.0, -1000.0)
        for side in (-1, 1):
            wide = ((x / reach[0] - 0.42 * side) / 0.3) ** 2 + (y[:, None] / reach[1] / 0.45) ** 2
            plane[wide + (z[number] / reach[2] / 0.85) ** 2 <= 1] = -850
        data = Dataset()
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, UID(f"1.2.3.1.{number + 1}")
        data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = UID("1.2.3"), UID("1.2.3.1"), "CT"
        data.ImagePositionPatient = [float(x[0]), float(y[0]), round(float(z[number]), 4)]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.InstanceNumber = [SPACING_MM[1], SPACING_MM[0]], number + 1
        data.SliceThickness = SPACING_MM[2]
        data.RescaleIntercept, data.RescaleSlope, data.RescaleType = -1024, 1, "HU"
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.Rows, data.Columns = size[1], size[0]
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.PixelData = np.rint(plane + noise[number % 8] + 1024).astype("<i2").tobytes()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.save_as(folder / f"{number:04d}.dcm", enforce_file_format=True)


def write_nifti(folder: Path, path: Path) -> None:
    """Writes a series as the largest NIfTI that holds it."""
    import SimpleITK as sitk

    from slidetl.volumes import read_volume

    volume = read_volume(folder)
    image: Any = sitk.GetImageFromArray(volume.hu.astype(np.float64))
    image.SetSpacing(volume.spacing_mm)
    image.SetOrigin(volume.origin_mm)
    sitk.WriteImage(image, str(path), useCompression=True, compressionLevel=1)


def slidetl_engine(folder: Path) -> int:
    from slidetl.tiles.grid import TileSpec
    from slidetl.tiles.patches import plan_patches
    from slidetl.volumes import open_series

    spec = TileSpec(
        spacing_mm=1.0, tile_size_px=SIDE, min_tissue=0.0, mask="none", window_hu=(WINDOW_HU[0], WINDOW_HU[1])
    )
    plan = plan_patches(open_series(folder), spec)
    return len([plan.patch(number) for number in range(len(plan))])


def monai_engine(folder: Path) -> int:
    from monai import transforms  # type: ignore[import-not-found,unused-ignore] # in its own environment

    steps = transforms.Compose(
        [
            transforms.LoadImage(reader="PydicomReader", image_only=True),
            transforms.EnsureChannelFirst(),
            transforms.Spacing(pixdim=(1.0, 1.0, 1.0), mode="bilinear"),
            transforms.ScaleIntensityRange(*WINDOW_HU, 0.0, 1.0, clip=True),
            transforms.GridPatch(patch_size=(SIDE, SIDE, SIDE), pad_mode="constant"),
        ]
    )
    return len(steps(str(folder)))


ENGINES = {"slidetl": slidetl_engine, "MONAI": monai_engine}


def measure_here(engine: str, folder: Path) -> None:
    """Runs an engine in this process and prints a line of JSON."""
    if engine == "MONAI":
        import monai  # type: ignore[import-not-found,unused-ignore] # noqa: F401 # start-up is not measured
    else:
        import slidetl.tiles.patches  # noqa: F401
    started, cpu = time.perf_counter(), time.process_time()
    patches = ENGINES[engine](folder)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu = time.process_time() - cpu
    print(json.dumps({"patches": patches, "seconds": seconds, "cpu": cpu, "peak_mib": peak}))


def measure(python: str, engine: str, folder: Path) -> dict[str, float]:
    words = [python, str(Path(__file__).resolve()), "--engine", engine, "--series", str(folder)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{engine}: {ran.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def watch_command(path: Path, scratch: Path, words: list[str]) -> tuple[float, float, int]:
    """Runs ``slidetl tile`` on a series; returns the peak MiB of all its processes, seconds, patches."""
    from slidetl.tiles.ledger import Ledger
    from tools.bench_tiling import tree_mib

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        manifest, cache = Path(folder, "series.csv"), Path(folder, "cache")
        manifest.write_text(f"slide_id,path,patient_id,grade\nC,{path},P,\n")
        started, peak = time.perf_counter(), 0.0
        command = [sys.executable, "-m", "slidetl", "tile", str(manifest), f"--cache={cache}", "--workers=1"]
        process = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, tree_mib(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        (row,) = Ledger(cache / "ledger.csv").rows()
        if process.returncode:
            raise SystemExit(f"slidetl tile ended with {process.returncode}: {row.reason}")
        return peak, seconds, row.tiles


def report(options: argparse.Namespace, scratch: Path) -> list[str]:
    from tools.bench_tiling import processor

    size = tuple(options.size)
    folder, nifti = scratch / "series", scratch / "series.nii.gz"
    draw_series(folder, size)
    pythons = {"slidetl": sys.executable, "MONAI": options.monai_python}
    turns = [
        {engine: measure(python, engine, folder) for engine, python in pythons.items()}
        for _ in range(options.runs + 1)
    ][1:]
    theirs = subprocess.run(
        [options.monai_python, "-c", "import monai, torch; print(monai.__version__, torch.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    names = ("numpy", "scipy", "pydicom", "simpleitk", "zarr")
    versions = ", ".join(
        [*(f"{name} {version(name)}" for name in names), f"monai {theirs[0]}, torch {theirs[1]}"]
    )
    ratios = {
        what: [turn["MONAI"][what] / turn["slidetl"][what] for turn in turns] for what in ("seconds", "cpu")
    }
    shape = " x ".join(map(str, size))
    lines = [
        "# From a CT series to patches: memory and speed",
        "",
        f"`tools/bench_volumes.py`, {date.today().isoformat()}, {processor()}, "
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {versions}. The machine "
        "is shared: other work ran beside both, so seconds are higher than on a quiet one; the "
        "ratio, taken within each turn, is the figure to read.",
        "",
        f"A drawn DICOM series of {shape} voxels of {' x '.join(map(str, SPACING_MM))} mm, "
        f"{sum(p.stat().st_size for p in folder.iterdir()) / 1e6:.0f} MB. Repeat it: the head of the program "
        "says how, and how to make MONAI's environment.",
        "",
        f"## Load, resample to 1 mm, window, cut into patches of {SIDE}",
        "",
        f"Medians of {options.runs} turns, each engine in a process of its own, files in the page cache. "
        "slidetl keeps `int16`, and averages where the spacing grows; MONAI's `Spacing` interpolates in "
        "float32 without that.",
        "",
        "| | patches | seconds | CPU seconds | patches/s | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for engine in pythons:
        median = {key: statistics.median(turn[engine][key] for turn in turns) for key in turns[0][engine]}
        rate = median["patches"] / median["seconds"]
        cells = (f"{median[key]:.{digits}f}" for key, digits in (("patches", 0), ("seconds", 1), ("cpu", 1)))
        lines.append(f"| {engine} | {' | '.join(cells)} | {rate:.1f} | {median['peak_mib']:.0f} |")
    spread = {
        what: f"{statistics.median(each):.1f} times ({min(each):.1f} to {max(each):.1f})"
        for what, each in ratios.items()
    }
    lines += [
        "",
        f"MONAI takes {spread['seconds']} the seconds of slidetl, and {spread['cpu']} its CPU seconds, which "
        "other work on the machine changes less.",
        "",
    ]
    write_nifti(folder, nifti)
    lines += [
        "## The whole command",
        "",
        "`slidetl tile --workers 1`: reading, mask, patches, compression, checksums, ledger; resident "
        "memory of all its processes added up, sampled 20 times a second.",
        "",
        "| series | options | patches | seconds | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for path, name, words in (
        (folder, "DICOM", ["--spacing-mm=1", "--stride=32"]),
        (folder, "DICOM", ["--spacing-mm=0.7", "--mask=body"]),
        (nifti, "NIfTI, float64, gzip", ["--spacing-mm=1", "--stride=32"]),
    ):
        peak, seconds, patches = watch_command(path, scratch, words)
        lines.append(f"| {name} | {' '.join(words)} | {patches} | {seconds:.1f} | {peak:.0f} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--monai-python", default=sys.executable, help="Python of an environment with MONAI")
    parser.add_argument("--runs", type=int, default=3, help="turns that count (default: 3)")
    parser.add_argument("--size", type=int, nargs=3, default=SIZE, help="voxels of the series")
    parser.add_argument("--output", type=Path, help="file for the table; the screen by default")
    parser.add_argument("--engine", choices=list(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--series", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.engine is not None:
        measure_here(options.engine, options.series)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        text = "\n".join(report(options, Path(scratch))) + "\n"
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
