"""Compute one arm on one fold, and keep its result as a folder on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

import slidetl
from slidetl.compare.plan import FORMAT_VERSION, Unit, permuted
from slidetl.compare.records import CurvePoint, Job, UnitResult, predictions_from
from slidetl.data.study import Study
from slidetl.errors import UsageError
from slidetl.tiles.lock import slide_lock

_ABOUT, _RESULT, _EMBEDDINGS = "unit.json", "result.json", "embeddings.npy"


def job_of(
    unit: Unit,
    study: Study,
    grades: Sequence[str],
    folder: Path,
    threads: int = 1,
    allow: tuple[str, ...] = (),
) -> Job:
    """Joins a unit with the part of the study that it needs."""
    inside = {*unit.fold.train, *unit.fold.test}
    labelled = study if unit.permutation is None else permuted(study, unit.permutation)
    slides = [slide for slide in labelled.slides if slide.row.slide_id in inside]
    return Job(
        unit,
        rows=tuple(slide.row for slide in slides),
        fingerprints={slide.row.slide_id: slide.cache.fingerprint for slide in slides},
        cache=study.folder,
        grades=tuple(grades),
        folder=folder,
        threads=threads,
        allow=allow,
    )


def run_unit(job: Job) -> None:
    """Computes a unit, unless it is there; its folder appears whole or not at all.

    Raises:
        SlidetlError: the arm cannot be fitted; the message says why.
    """
    with slide_lock(job.folder, job.unit.key):  # another machine may be at it
        if read_unit(job.folder, job.unit.key) is not None:
            return
        building = job.folder / ".building" / job.unit.key
        building.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        result = _compute(job, building)
        work = building / "result"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        values = {item.name: getattr(result, item.name) for item in fields(UnitResult)}
        np.save(work / _EMBEDDINGS, values.pop("embeddings"))
        values |= {
            "predictions": [asdict(row) for row in result.predictions],
            "curves": [asdict(point) for point in result.curves],
            "seconds": round(time.monotonic() - started, 3),
        }
        (work / _RESULT).write_text(json.dumps(values) + "\n", encoding="utf-8")
        about = {
            "format": FORMAT_VERSION,
            "software": f"slidetl {slidetl.__version__}",
            "recipe": job.unit.recipe,
            "seed": job.unit.fold.seed,
            "train_slides": len(job.unit.fold.train),
            "test_slides": len(job.unit.fold.test),
            "sha256": {name: _sha256(work / name) for name in (_RESULT, _EMBEDDINGS)},
        }
        (work / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        finished = job.folder / job.unit.key
        if finished.exists():  # it was there, but damaged
            shutil.rmtree(finished)
        work.rename(finished)
        shutil.rmtree(building)


def read_unit(folder: Path, key: str) -> UnitResult | None:
    """Reads a finished unit; None where there is none, or where its files are not those it ended with."""
    unit = folder / key
    try:
        about = json.loads((unit / _ABOUT).read_text(encoding="utf-8"))
        if about["format"] != FORMAT_VERSION:
            return None
        if any(_sha256(unit / name) != sha256 for name, sha256 in about["sha256"].items()):
            return None
        values = json.loads((unit / _RESULT).read_text(encoding="utf-8"))
        values["predictions"] = predictions_from(values["predictions"])
        values["curves"] = tuple(CurvePoint(**point) for point in values["curves"])
        # By way of a map, which is no larger than the file.
        return UnitResult(
            **values, embeddings=np.array(np.load(unit / _EMBEDDINGS, mmap_mode="r", allow_pickle=False))
        )
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _compute(job: Job, folder: Path) -> UnitResult:
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped] # it ships none

    recipe = job.unit.recipe
    with threadpool_limits(job.threads):
        if "fit" in recipe:  # imported here: reading units needs no torch
            from slidetl.compare.train_arm import train_unit

            return train_unit(job, folder)
        from slidetl.compare.fixed_arms import grade_by_baseline, grade_by_features

        if "classical" in recipe:
            return grade_by_features(job)
        if "baseline" in recipe:
            return grade_by_baseline(job)
    raise UsageError(f"a unit is a fit, classical or a baseline, not {sorted(recipe)}")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
