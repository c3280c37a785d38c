"""Computes the evidence on a model card from predictions of held-out slides."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from slidetl.data.manifest import ManifestRow, read_manifest
from slidetl.data.record import StudyRecord
from slidetl.data.study import CachedSlide, Study
from slidetl.errors import CheckpointError, ManifestError, SlidetlError, UsageError
from slidetl.evaluation.bootstrap import bca_interval, proven, share_interval
from slidetl.evaluation.calibration import fit_temperature, is_at_bound, with_temperature
from slidetl.evaluation.conformal import fit_grade_sets
from slidetl.evaluation.metrics import check_finite, mae, qwk
from slidetl.files import csv_rows
from slidetl.library.model_card import Evidence
from slidetl.text import listed, one_line, spelling

LEAST_PATIENTS = 10


def evidence_from(
    path: Path,
    records: Mapping[str, StudyRecord | None],
    n_grades: int,
    coverage: float = 0.9,
    arm: str | None = None,
) -> Evidence:
    """Reads predictions of held-out slides, and computes their metrics.

    Metrics are of the network's own probabilities (in a table of ``slidetl compare`` the columns
    ``uncalibrated_K``), with BCa intervals over patients, given the models; that of the accuracy is exact,
    and a QWK or MAE that is the same in all resamples is left out. The temperature is fitted on the same
    slides, and the sets of grades on the calibrated probabilities. One number fitted on all of them hardly
    flatters the sets; :func:`slidetl.evaluation.conformal.check_coverage` checks them on folds, as
    ``slidetl compare`` does with results.

    Args:
        path: ``predictions.csv`` of ``slidetl test`` or of ``slidetl compare``; of several repeats the first
            counts. Slides that are not graded are left out with a warning.
        records: of the exported checkpoints, by the SHA-256 of their weights.
        n_grades: number of grades of the checkpoints.
        coverage: wanted share of patients with their grades in their sets, between 0 and 1.
        arm: of a comparison.

    Raises:
        UsageError: no such table, too few graded patients in it, several arms and none named, several sizes
            of the training part, a table of an older ``slidetl compare`` with calibrated probabilities alone,
            or predictions on another scale, of another checkpoint or not of all, of slides of its training or
            choice, or of arms on another study. :func:`slidetl.compare.train_arm.check_arm` compares the arm.
    """
    if not 0 < coverage < 1:
        raise UsageError(f"expected a coverage between 0 and 1, not {coverage}")
    try:
        content = path.read_bytes()
        rows = csv_rows(content.decode("utf-8").splitlines())
        arms = sorted({row["arm"] for row in rows if "arm" in row})
        if len(arms) > 1 and arm is None:
            raise UsageError(f"{path}: has several arms, name one with --arm: {', '.join(arms)}")
        if arm is not None and arm not in arms:
            raise UsageError(f"{path}: has no arm {arm!r}, only {', '.join(arms) or 'a single table'}")
        rows = [row for row in rows if row["grade"] and (arm is None or row["arm"] == arm)]
        if len({row.get("train_slides") for row in rows}) > 1:
            raise UsageError(f"{path}: of smaller training parts; expected predictions.csv of the comparison")
        repeats = sorted({row["repeat"] for row in rows if "repeat" in row}, key=int)
        rows = [row for row in rows if not repeats or row["repeat"] == repeats[0]]
        if lost := _slide_ids(row for row in rows if row.get("reason")):
            warnings.warn(
                f"{path}: {len(lost)} slides are not graded, left out: {listed(lost)}", stacklevel=3
            )
        rows = [row for row in rows if not row.get("reason")]
        _check_kept(path, rows, records)
        kind = "uncalibrated_" if rows and "temperature" in rows[0] else "probability_"
        names = [key for key in rows[0] if key.startswith(kind)] if rows else []
        if rows and not names:
            raise UsageError(
                f"{path}: expected columns {kind}0, {kind}1, ..., found none; a table of an older version "
                "has calibrated probabilities alone: write it again with 'slidetl compare'"
            )
        true = np.array([int(row["grade"]) for row in rows], np.int64)
        expected = [f"{kind}{grade}" for grade in range(n_grades)]
        if rows and not (names == expected and 0 <= true.min() <= true.max() < n_grades):
            raise UsageError(
                f"{path}: of another scale, with {', '.join(names)} and grades {true.min()} to {true.max()}; "
                f"the checkpoint has {n_grades} grades, from 0 up"
            )
        probabilities = np.array([[float(row[key]) for key in names] for row in rows], np.float64)
        patients = np.array([row["patient_id"] for row in rows])
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, SlidetlError):
            raise
        raise UsageError(f"{path}: expected predictions as 'slidetl test' writes them: {error!r}") from error
    check_finite(probabilities)
    if len(set(patients)) < LEAST_PATIENTS:
        raise UsageError(
            f"{path}: graded slides of {len(set(patients))} patients say too little; "
            f"expected at least {LEAST_PATIENTS}"
        )
    predicted = probabilities.argmax(1)
    intervals = {
        "QWK": bca_interval(partial(qwk, true, predicted, len(names)), patients),
        "accuracy": share_interval(predicted == true, patients),
        "MAE": bca_interval(partial(mae, true, predicted), patients),
    }
    n_slides = len(_slide_ids(rows))
    temperature = fit_temperature(true, probabilities, patients)
    if is_at_bound(temperature):
        why = "say nothing about the grades" if temperature > 1 else "hardly differ, and yet are right"
        warnings.warn(
            f"{path}: the temperature of {n_slides} slides, {temperature:.2g}, is at a bound: "
            f"the probabilities {why}",
            stacklevel=3,
        )
    sets = fit_grade_sets(true, with_temperature(probabilities, temperature), patients, risk=1 - coverage)
    return Evidence(
        slides=n_slides,
        patients=sets.n_patients,
        figures=proven(intervals),
        temperature=temperature,
        coverage=coverage,
        quantile=sets.quantile,
        predictions_sha256=hashlib.sha256(content).hexdigest(),
        arm=arms[0] if arm is None and arms else arm or "",
    )


def check_today(
    path: Path, grades: Sequence[str], studies: Mapping[str, Study], records: Mapping[str, StudyRecord | None]
) -> None:
    """Refuses predictions of slides whose grade or patient was corrected since, or that were withdrawn.

    They are compared with the manifest that was tested, as the file beside the table names it. If it names
    none, or one that is not here (of another hospital, say; a warning), they are compared with the manifests
    of the trainings, as far as these have the slides.

    Args:
        path: a table that :func:`evidence_from` takes.
        grades: names, lowest first.
        studies: of the trainings, today, by the SHA-256 of the weights; none if they are not at hand, and
            then a manifest of the test that cannot be read is skipped, too.
        records: as for :func:`evidence_from`.

    Raises:
        UsageError: there are such slides, or a patient has a slide of the training now; the message names
            them. Or the manifest that was tested cannot be read.
    """
    table = csv_rows(path.read_text(encoding="utf-8").splitlines())
    tested = [row for row in table if row["grade"]]
    known = {sha256: record for sha256, record in records.items() if record is not None}
    manifest = _tested_manifest(path)
    if manifest is not None:
        try:
            manifest.stat()
        except (OSError, ValueError):  # it may be in a folder that is closed here, or another system's path
            warnings.warn(
                f"the manifest that {path} was tested with is not here ({manifest}): grades and patients are "
                "compared with those of today only for slides in a manifest of the training at hand",
                stacklevel=2,
            )
            manifest = None
    if manifest is None:
        for sha256, study in studies.items():
            ours = {(slide.row.slide_id, slide.cache.fingerprint) for slide in study.slides}
            ours |= {(slide.slide_id, slide.fingerprint) for slide in known[sha256].slides}
            names = {name for name, _ in ours}
            own = [  # others are of another cohort, or of another network
                row
                for row in tested
                if row.get("checkpoint", sha256) == sha256
                and (
                    (row["slide_id"], row["fingerprint"]) in ours
                    if row.get("fingerprint")
                    else row["slide_id"] in names
                )
            ]
            one = {sha256: known[sha256]}
            _check_rows(path, "the manifest of the training", own, study.manifest, study.slides, one)
        return
    try:
        rows = read_manifest(manifest, grades).rows
    except ManifestError as error:
        if not studies:
            return
        raise UsageError(
            f"the manifest that {path} was tested with cannot be read, so nothing shows that its grades and "
            f"patients are still the same ({error}); mend it, test again, or add --no-training-data"
        ) from error
    cached = [slide for study in studies.values() for slide in study.slides]
    _check_rows(path, str(manifest), tested, rows, cached, known)


def _tested_manifest(path: Path) -> Path | None:
    """Returns the manifest behind predictions by the file beside them; None if it does not say."""
    for name in ("metrics.json", "splits.json"):  # of 'slidetl test', and of 'slidetl compare'
        with suppress(OSError, ValueError):
            about = json.loads((path.parent / name).read_text(encoding="utf-8"))
            if isinstance(about, dict) and about.get("manifest"):
                return Path(str(about["manifest"]))
    return None


def _check_rows(
    path: Path,
    source: str,
    tested: Sequence[Mapping[str, str]],
    rows: Sequence[ManifestRow],
    slides: Sequence[CachedSlide],
    records: Mapping[str, StudyRecord],
) -> None:
    """Compares rows of a table with the lines of a manifest; arguments as for :func:`check_today`.

    ``slides`` tell the content of the manifest's lines with the same name and file.
    """
    now = {row.slide_id: row for row in rows}
    changes: dict[str, set[str]] = defaultdict(set)
    for row in tested:
        name, today = row["slide_id"], now.get(row["slide_id"])
        if today is None:
            changes["gone"].add(name)
        elif one_line(today.patient_id) != row["patient_id"]:
            changes["of another patient"].add(f"{name} ({today.patient_id}, was {row['patient_id']})")
        elif today.grade != int(row["grade"]):
            grade = "none" if today.grade is None else today.grade
            changes["of another grade"].add(f"{name} ({grade}, was {row['grade']})")
    if found := [f"{len(names)} {kind}: {listed(sorted(names))}" for kind, names in changes.items()]:
        raise UsageError(
            f"{path}: {source} has changed since its slides were graded, {'; '.join(found)}; run "
            "'slidetl test' or 'slidetl compare' again"
        )
    contents = {(slide.row.slide_id, slide.row.path): slide.cache.fingerprint for slide in slides}
    own = [(row, contents.get((row.slide_id, row.path), "")) for row in rows]
    for sha256, record in records.items():
        used = {
            spelling(row.patient_id)
            for row, fingerprint in own
            if record.part_of("", row.patient_id, fingerprint) in ("train", "val")
        }
        of_it = {row["slide_id"] for row in tested if row.get("checkpoint") == sha256}
        if seen := [name for name in of_it if spelling(now[name].patient_id) in used]:
            raise UsageError(
                f"{path}: the checkpoint was trained or chosen on slides that {source} now has of the "
                f"patients of {len(seen)} of these: {listed(sorted(seen))}; run 'slidetl test' with "
                "--data.split_from manifest"
            )


def _check_kept(
    path: Path, rows: Sequence[Mapping[str, str]], records: Mapping[str, StudyRecord | None]
) -> None:
    """Refuses predictions that do not show how well the exported checkpoints grade."""
    if None in records.values():
        raise CheckpointError(
            "a checkpoint of an older version has no record of its slides, so nothing shows that those of "
            f"{path} were kept from it; train again"
        )
    known = {sha256: _in_lines(record) for sha256, record in records.items() if record is not None}
    if rows and "arm" in rows[0]:  # of networks that compare trained, each on other patients than it graded
        strangers = [
            row["slide_id"]
            for row in rows
            if not any(was.knows(row["slide_id"], row["patient_id"]) for was in known.values())
        ]
        if strangers:
            raise UsageError(
                f"{path}: compared on another study than the checkpoint was trained with: {listed(strangers)}"
            )
        return
    graders = {row.get("checkpoint") or "" for row in rows}
    others = sorted(graders - known.keys())
    if others:
        told = f"checkpoint {others[0][:12]}..." if others[0] else "no checkpoint"
        raise UsageError(
            f"{path}: predictions of {told}, the one to be exported is {next(iter(known))[:12]}...; "
            "write the table by 'slidetl test' with this checkpoint"
        )
    if rows and (without := sorted(known.keys() - graders)):
        raise UsageError(
            f"{path}: no predictions of {len(without)} of the {len(known)} checkpoints to be exported "
            f"({without[0][:12]}...); run 'slidetl test' with each, and join the tables"
        )
    seen = _slide_ids(
        row
        for row in rows
        if known[row["checkpoint"]].part_of(row["slide_id"], row["patient_id"], row.get("fingerprint") or "")
        in ("train", "val")
    )
    if seen:
        raise UsageError(
            f"{path}: the checkpoint was trained or chosen on {len(seen)} of these slides or their patients: "
            f"{listed(seen)}; write the table by 'slidetl test'"
        )


def _slide_ids(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """Lists the slides of rows, each once; a joined table has a row for each network that graded one."""
    return list(dict.fromkeys(row["slide_id"] for row in rows))


def _in_lines(record: StudyRecord) -> StudyRecord:
    """Makes one line of each patient's name, as a table does."""
    slides = (replace(slide, patient_id=one_line(slide.patient_id)) for slide in record.slides)
    return replace(record, slides=tuple(slides))
