"""Reads what commands wrote, in numbers for the pages."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slidetl import library
from slidetl.compare.config import ALPHA, LOWER_IS_BETTER
from slidetl.errors import SlidetlError, UsageError
from slidetl.evaluation.bootstrap import Interval, bca_interval_if_defined, share_interval
from slidetl.evaluation.calibration import ReliabilityBin, reliability
from slidetl.evaluation.conformal import ReferralPoint, referral_rule, risk_coverage
from slidetl.evaluation.metrics import GradeMetrics, grade_metrics, qwk
from slidetl.files import csv_rows
from slidetl.slides.spacing import cohort_notes
from slidetl.studio.presets import predictions_of
from slidetl.text import short_names
from slidetl.training.predictions import SlidePrediction, read_predictions

CURVES = ("train/loss", "val/loss", "val/qwk", "val/rps", "val/accuracy")
_MOST_POINTS = 2000


@dataclass(frozen=True)
class Judged:
    """The test part of a run.

    Attributes:
        metrics: of its slides.
        patients: their number.
        accuracy: with its exact 95 % interval.
        qwk: with its 95 % interval over patients; None if undefined, or for a single patient.
        bins: of the reliability diagram.
        sites: name, slides, accuracy of each site.
        referral: the rule for a chosen risk; None if no rule keeps it.
        ungraded: slides with a true grade that the model did not grade; in no number above.
    """

    metrics: GradeMetrics
    patients: int
    accuracy: Interval
    qwk: Interval | None
    bins: tuple[ReliabilityBin, ...]
    sites: tuple[tuple[str, int, float], ...]
    referral: ReferralPoint | None
    ungraded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The primary comparison of a run of ``slidetl compare``.

    Attributes:
        arms: arm, and its QWK with interval.
        difference: of the primary arms; None if they are not complete.
        better: the arm that the sign-flip test favours; empty if it finds no difference, is undefined, or
            means nothing.
        dead: arms of which a training learned nothing: a difference from them is no finding.
    """

    arms: tuple[tuple[str, dict[str, float]], ...]
    difference: dict[str, Any] | None
    better: str
    dead: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFileEntry:
    """A model file to grade with.

    Attributes:
        name: for the page.
        path: of the file.
        card: its card; None if it cannot be read.
        is_pulled: taken from a library.
    """

    name: str
    path: Path
    card: library.ModelCard | None
    is_pulled: bool


def judge(folder: Path, n_grades: int, risk: float) -> Judged | None:
    """Judges the predictions of a run; None if there are none of graded slides.

    Raises:
        UsageError: the table is damaged.
    """
    table = predictions_of(folder)
    if table is None or (folder / "comparison.yaml").is_file():
        return None
    every = [row for row in read_predictions(table) if row.grade is not None]
    rows = [row for row in every if not row.reason]
    if not rows:
        return None
    true = np.array([row.grade for row in rows])
    probabilities = np.array([row.probabilities for row in rows])
    if probabilities.shape[1:] != (n_grades,):
        raise UsageError(f"{table.name}: made for another scale than the {n_grades} grades of this project")
    predicted, who = probabilities.argmax(axis=1), np.array([row.patient_id for row in rows])
    patients, agreement = len(set(who.tolist())), partial(qwk, true, predicted, n_grades)
    curve = risk_coverage(predicted != true, probabilities.max(axis=1), who)
    return Judged(
        metrics=grade_metrics(true, predicted, n_grades),
        patients=patients,
        accuracy=share_interval(predicted == true, who),
        qwk=bca_interval_if_defined(agreement, who, n_draws=1000) if patients > 1 else None,
        bins=reliability(true, probabilities, n_bins=5, n_draws=300),
        sites=_by_site(rows),
        referral=referral_rule(curve, risk),
        ungraded=tuple(row.slide_id for row in every if row.reason),
    )


def _by_site(rows: list[SlidePrediction]) -> tuple[tuple[str, int, float], ...]:
    hits: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        hits[row.site].append(row.predicted_grade == row.grade)
    return tuple((site, len(of), sum(of) / len(of)) for site, of in sorted(hits.items()))


def verdict(folder: Path) -> Verdict | None:
    """Reads the verdict of a comparison; None before it has one."""
    try:
        with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
            rows = csv_rows(file)
    except (OSError, UnicodeDecodeError, csv.Error):
        return None
    arms = [
        (row["arm"], _numbers(row)) for row in rows if (row["section"], row["metric"]) == ("metric", "qwk")
    ]
    primary = [row for row in rows if row["section"] == "primary"]
    untold = [row for row in rows if (row["section"], row["metric"]) == ("training", "learned_nothing")]
    dead = tuple(row["arm"] for row in untold if not row.get("train_slides"))
    if not primary:
        return Verdict(tuple(arms), None, "", dead)
    names, numbers = {key: primary[0][key] for key in ("arm", "against")}, _numbers(primary[0])
    better = ""
    is_finding = not set(names.values()) & set(dead)
    if is_finding and "estimate" in numbers and numbers.get("p", 1.0) <= ALPHA:
        is_first = (numbers["estimate"] > 0) != (primary[0]["metric"] in LOWER_IS_BETTER)
        better = names["arm" if is_first else "against"]
    return Verdict(tuple(arms), {**names, **numbers}, better, dead)


def _numbers(row: dict[str, str]) -> dict[str, float]:
    return {name: float(row[name]) for name in ("estimate", "low", "high", "p") if row.get(name)}


def curve(folder: Path) -> dict[str, list[float | None]]:
    """Reads the learning curve of a training: metrics by epoch, of all its resumed parts."""
    points: dict[int, dict[str, float]] = defaultdict(dict)
    for table in sorted(
        folder.glob("logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:])
    ):
        try:
            with table.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    for name in CURVES:
                        if row.get("epoch") and row.get(name) and math.isfinite(value := float(row[name])):
                            points[int(row["epoch"])][name] = value
        except (OSError, ValueError, csv.Error):
            continue  # a line is being written
    epochs = sorted(points)[-_MOST_POINTS:]
    names = [name for name in CURVES if any(name in points[epoch] for epoch in epochs)]
    return {
        "epoch": [epoch + 1 for epoch in epochs],
        **{n: [points[e].get(n) for e in epochs] for n in names},
    }


def models(project: Path) -> list[ModelFileEntry]:
    """Lists the model files of a project, and those taken from libraries."""
    own = [(path.stem, path, False) for path in sorted((project / "models").glob("*.pt"))]
    pulled = [(path.parent.name, path, True) for path in sorted(library.pulled_folder().glob("*/model.pt"))]
    return [ModelFileEntry(name, path, _card(path), is_pulled) for name, path, is_pulled in (*own, *pulled)]


def _card(path: Path) -> library.ModelCard | None:
    try:
        return library.ModelCard.of_file(path)
    except (SlidetlError, OSError):
        return None


def graded(folder: Path, model: Path) -> list[dict[str, Any]]:
    """Reads the results of a run of ``slidetl grade``, with the name of each slide's page, and its doubts.

    Args:
        folder: of the results.
        model: the file that graded, for the names of the grades in a set.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for path in folder.glob("*.json"):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            found[str(result["slide"])] = path.stem, result
        except (OSError, ValueError, KeyError, TypeError):
            continue
    try:
        with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
            rows: list[dict[str, Any]] = [*csv_rows(file)]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []
    names = _names(model, rows)
    graded = {
        row["slide"] for row in rows if row.get("status") == "graded"
    }  # others' results are of earlier runs
    found = {slide: result for slide, result in found.items() if slide in graded}
    far = cohort_notes({slide: float(result.get("mpp_level0", 0)) for slide, (_, result) in found.items()})
    short = short_names(row["slide"] for row in rows)
    for row in rows:
        row["page"], result = found.get(row["slide"], ("", {}))
        row["doubts"] = [str(note) for note in result.get("notes") or ()]
        row["doubts"] += [far[row["slide"]]] if row["slide"] in far else []
        row["novelty"] = library.ModelCard.format_novelty(float(row["novelty"])) if row.get("novelty") else ""
        bounds = [int(row[name]) for name in ("set_lowest", "set_highest") if row.get(name)]
        row["set"] = (
            [names[grade] for grade in dict.fromkeys(bounds)] if bounds and max(bounds) < len(names) else []
        )
        row["name"] = short[row["slide"]]
        shares = [float(row[name]) for name in row if name.startswith("probability_") and row[name]]
        row["probability"] = max(shares, default=None)
    return rows


def _names(model: Path, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Returns the names of a model's grades; none if it is not the one that graded these rows."""
    card = _card(model)
    names = card.grades if card is not None else ()
    given = [(int(row["grade"]), row["grade_name"]) for row in rows if row.get("grade")]
    return names if all(pair in enumerate(names) for pair in given) else ()
