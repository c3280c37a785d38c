"""Keeps the results of a comparison's jobs, each as a folder on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.compare.plan import FORMAT_VERSION, Job
from slidetl.errors import UsageError
from slidetl.files import csv_rows, file_sha256
from slidetl.tiles.grid import TileSpec
from slidetl.training.predictions import SlidePrediction
from slidetl.version import VERSION

JOBS = "jobs"  # folder of the jobs in the output of a comparison
SPLITS = "splits.json"  # beside them: folds, and the data behind the tables
_ABOUT, _RESULT, _EMBEDDINGS = "job.json", "result.json", "embeddings.npy"


@dataclass(frozen=True)
class CurvePoint:
    """A point of a learning curve.

    Attributes:
        part: predicted slides: ``inner-0``, ... or ``test``. The test part chooses nothing.
        trial: number of the combination of the arm's choices.
        epoch: epochs done.
        n: results of the part: its patients or slides, by the protocol's unit.
        seconds: of training until then, without the evaluations between.
        train_loss: of the last epoch, penalties included.
        accuracy, qwk, rps, log_loss: of these results, not calibrated.
    """

    part: str
    trial: int
    epoch: int
    n: int
    seconds: float
    train_loss: float
    accuracy: float
    qwk: float
    rps: float
    log_loss: float


@dataclass(frozen=True)
class JobResult:
    """The result of a job.

    Attributes:
        predictions: of the slides of its test part, not calibrated.
        curves: empty for arms without epochs.
        draws: expected grades of each test slide by as many tiles as it has, drawn from them with
            replacement, calibrated by ``temperature``; empty without draws.
        drift: ``||w - w0|| / ||w0||`` of each layer, w0 being its pretrained weights; empty without them.
        similarity: linear CKA of each block's output on test tiles before and after training; empty for arms
            without epochs.
        chosen: choices of the inner folds: dotted names, and ``epochs``; or the fixed number of epochs.
        temperature: of the probabilities, from the inner folds; 1 without them.
        nested: True if the inner folds chose.
        seconds: of computation.
        embeddings: ``[n, D]`` pooled by the trained network, of the training slides, then of the test slides;
            empty for arms without one, and if all slides are of one site.
    """

    predictions: tuple[SlidePrediction, ...]
    curves: tuple[CurvePoint, ...] = ()
    draws: Mapping[str, Sequence[float]] = field(default_factory=dict)
    drift: Mapping[str, float] = field(default_factory=dict)
    similarity: Mapping[str, float] = field(default_factory=dict)
    chosen: dict[str, Any] | None = None
    temperature: float = 1.0
    nested: bool = False
    seconds: float = 0.0
    embeddings: NDArray[np.float32] = field(
        default_factory=lambda: np.empty((0, 0), np.float32), compare=False
    )


def predictions_from(rows: Iterable[Mapping[str, Any]]) -> tuple[SlidePrediction, ...]:
    """Makes predictions of their fields, as JSON has them."""
    return tuple(SlidePrediction(**{**row, "probabilities": tuple(row["probabilities"])}) for row in rows)


def values_of(result: JobResult) -> dict[str, Any]:
    """Returns the fields of a result but for its embeddings, as JSON has them."""
    values = {item.name: getattr(result, item.name) for item in fields(JobResult)}
    del values["embeddings"]
    for name in ("predictions", "curves"):
        values[name] = [asdict(record) for record in values[name]]
    return values


def result_from(values: Mapping[str, Any], embeddings: NDArray[np.float32] | None = None) -> JobResult:
    """Makes a result of its fields, as JSON has them, and its embeddings.

    Raises:
        KeyError, TypeError, ValueError: they are not those of a result.
    """
    made = {
        **values,
        "predictions": predictions_from(values["predictions"]),
        "curves": tuple(CurvePoint(**point) for point in values["curves"]),
    }
    return JobResult(**made) if embeddings is None else JobResult(**made, embeddings=embeddings)


def write_result(job: Job, result: JobResult, building: Path, finished: Path) -> None:
    """Writes the files of a result below ``building``, and renames them to ``finished`` as a whole."""
    work = building / "result"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    np.save(work / _EMBEDDINGS, result.embeddings)
    (work / _RESULT).write_text(json.dumps(values_of(result)) + "\n", encoding="utf-8")
    about = {
        "format": FORMAT_VERSION,
        "software": f"slidetl {VERSION}",
        "recipe": job.recipe,
        "seed": job.fold.seed,
        "train_slides": len(job.fold.train),
        "test_slides": len(job.fold.test),
        "tiles": job.tiles,
        "sha256": {name: file_sha256(work / name) for name in (_RESULT, _EMBEDDINGS)},
    }
    (work / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    if finished.exists():  # it was there, but damaged
        shutil.rmtree(finished)
    work.rename(finished)


def read_recipe(table: Path, arm: str) -> dict[str, Any]:
    """Reads the recipe of an arm from the record beside the predictions of a comparison.

    Raises:
        UsageError: there is no such record.
    """
    try:
        jobs = csv_rows((table.parent / "jobs.csv").read_text(encoding="utf-8").splitlines())
        key = next((row["key"] for row in jobs if row["arm"] == arm), "")
        recipe = json.loads((table.parent / JOBS / key / _ABOUT).read_text(encoding="utf-8"))["recipe"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{table}: no record of arm {arm!r} beside it, so nothing shows which networks these are; "
            f"name the table in the folder of 'slidetl compare', with jobs.csv and {JOBS}/"
        ) from error
    return dict(recipe)


def read_data(table: Path) -> tuple[TileSpec, dict[str, str]] | None:
    """Reads the tiles behind the predictions of a comparison, and the fingerprint of each slide.

    Returns None for a comparison of a version that did not record them, or with tables not written whole.

    Raises:
        UsageError: there is no such record.
    """
    try:
        about = json.loads((table.parent / SPLITS).read_text(encoding="utf-8"))
        if not {"spec", "fingerprints"} & about.keys():
            return None
        fingerprints = {str(name): str(sha256) for name, sha256 in about["fingerprints"].items()}
        return TileSpec.from_dict(about["spec"]), fingerprints
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{table}: {SPLITS} beside it does not say of which slides and tiles; run 'slidetl compare "
            "--report-only', or to its end, with this version (jobs of the same tiles are kept)"
        ) from error


def has_results(folder: Path) -> bool:
    """Returns True if a job below the folder is finished, or a training of one, which a later run reuses."""
    return any(any(folder.glob(pattern)) for pattern in (f"*/{_ABOUT}", ".building/**/training.json"))


def is_of_tiles(about: Mapping[str, Any], job: Job) -> bool:
    """Returns True if a record is of the job's tiles, or of a version that did not record them."""
    return bool(about.get("tiles", job.tiles) == job.tiles)


def read_result(folder: Path, job: Job) -> JobResult | None:
    """Reads the result of a job; None if there is none, it is of other tiles, or its files were changed."""
    finished = folder / job.key
    try:
        about = json.loads((finished / _ABOUT).read_text(encoding="utf-8"))
        if about["format"] != FORMAT_VERSION or not is_of_tiles(about, job):
            return None
        if any(file_sha256(finished / name) != sha256 for name, sha256 in about["sha256"].items()):
            return None
        # By way of a map, which is no larger than the file.
        embeddings = np.array(np.load(finished / _EMBEDDINGS, mmap_mode="r", allow_pickle=False))
        return result_from(json.loads((finished / _RESULT).read_text(encoding="utf-8")), embeddings)
    except (OSError, KeyError, TypeError, ValueError):
        return None
