"""Computes the evidence on a model card from predictions of held-out slides."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from slidetl.data.record import StudyRecord
from slidetl.data.study import CachedSlide
from slidetl.errors import CheckpointError, SlidetlError, UsageError
from slidetl.evaluation.bootstrap import bca_interval, proven, share_interval
from slidetl.evaluation.calibration import fit_temperature, is_at_bound, with_temperature
from slidetl.evaluation.conformal import fit_grade_sets
from slidetl.evaluation.metrics import check_finite, mae, qwk
from slidetl.files import csv_rows
from slidetl.library.model_card import Evidence
from slidetl.text import listed, one_line

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
            or predictions on another scale, of another checkpoint, of slides of its training or choice, or of
            arms on another study. :func:`slidetl.compare.train_arm.check_arm` compares the arm.
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
        if lost := [row["slide_id"] for row in rows if row.get("reason")]:
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
    temperature = fit_temperature(true, probabilities, patients)
    if is_at_bound(temperature):
        why = "say nothing about the grades" if temperature > 1 else "hardly differ, and yet are right"
        warnings.warn(
            f"{path}: the temperature of {len(rows)} slides, {temperature:.2g}, is at a bound: "
            f"the probabilities {why}",
            stacklevel=3,
        )
    sets = fit_grade_sets(true, with_temperature(probabilities, temperature), patients, risk=1 - coverage)
    return Evidence(
        slides=len(rows),
        patients=sets.n_patients,
        figures=proven(intervals),
        temperature=temperature,
        coverage=coverage,
        quantile=sets.quantile,
        predictions_sha256=hashlib.sha256(content).hexdigest(),
        arm=arms[0] if arm is None and arms else arm or "",
    )


def check_grades(path: Path, slides: Iterable[CachedSlide]) -> None:
    """Refuses predictions of slides whose grades were corrected since.

    Args:
        path: a table that :func:`evidence_from` takes.
        slides: with today's grades; those of other names or content do not count.

    Raises:
        UsageError: a slide has another grade now; the message names it.
    """
    rows = csv_rows(path.read_text(encoding="utf-8").splitlines())
    tested = {row["slide_id"]: row for row in rows if row["grade"]}
    changed = {}
    for slide in slides:
        row = tested.get(slide.row.slide_id)
        if row is None or (row.get("fingerprint") or slide.cache.fingerprint) != slide.cache.fingerprint:
            continue
        if slide.row.grade != int(row["grade"]):
            now = "no grade" if slide.row.grade is None else slide.row.grade
            changed[slide.row.slide_id] = f"{slide.row.slide_id} ({now}, was {row['grade']})"
    if changed:
        raise UsageError(
            f"{path}: {len(changed)} slides have another grade in the manifest now: "
            f"{listed(sorted(changed.values()))}; run 'slidetl test' or 'slidetl compare' again"
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
    others = sorted({row.get("checkpoint") or "" for row in rows} - known.keys())
    if others:
        told = f"checkpoint {others[0][:12]}..." if others[0] else "no checkpoint"
        raise UsageError(
            f"{path}: predictions of {told}, the one to be exported is {next(iter(known))[:12]}...; "
            "write the table by 'slidetl test' with this checkpoint"
        )
    seen = [
        row["slide_id"]
        for row in rows
        if known[row["checkpoint"]].part_of(row["slide_id"], row["patient_id"], row.get("fingerprint") or "")
        in ("train", "val")
    ]
    if seen:
        raise UsageError(
            f"{path}: the checkpoint was trained or chosen on {len(seen)} of these slides or their patients: "
            f"{listed(seen)}; write the table by 'slidetl test'"
        )


def _in_lines(record: StudyRecord) -> StudyRecord:
    """Makes one line of each patient's name, as a table does."""
    slides = (replace(slide, patient_id=one_line(slide.patient_id)) for slide in record.slides)
    return replace(record, slides=tuple(slides))
