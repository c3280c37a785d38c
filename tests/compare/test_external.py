"""An external site: nothing trains on it, and no other metric counts it."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score

from slidetl.compare.aggregate import combine, metric_interval
from slidetl.compare.config import read_comparison
from slidetl.compare.external import external_results
from slidetl.compare.pool import Workplace, run_job
from slidetl.compare.records import read_result
from slidetl.compare.report.page import document_of
from slidetl.compare.report.tables import tables_of
from slidetl.compare.report.view import View
from slidetl.compare.run import plan_comparison
from slidetl.compare.table import Table
from slidetl.compare.tables import write_tables
from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import share_interval
from slidetl.evaluation.comparison import patient_results
from tests.conftest import Study

HOME, AWAY = 12, 8


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_study(study: Study, folder: Path) -> Path:
    """Writes the study's manifest with two grades, and eight slides of another site."""
    rows = table(study.manifest)
    for number, row in enumerate(rows):
        row["path"] = str(study.manifest.parent / row["path"])
        row["grade"], row["site"] = str(number % 2), "home" if number < HOME else "away"
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ["slide_id", "path", "patient_id", "grade", "site"], extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(rows)
    return path


def configuration(study: Study, folder: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "manifest": str(write_study(study, folder)),
        "cache": str(study.cache),
        "grades": ["0", "1"],
        "protocol": {"outer_folds": 2, "inner_folds": 0, "unit": "slide", "external_site": "away"},
        "primary": {"arm": "scratch", "against": "prior"},
        "base": {
            "data": {"bag_size": 2, "num_workers": 0},
            "model": {"backbone": {"name": "mobilenetv3_small_050"}},
            "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        },
        "arms": {
            "scratch": {"fit": {"model": {"transfer": {"class_path": "slidetl.models.transfer.Scratch"}}}},
            "prior": {"baseline": "prior"},
        },
        "tile_draws": 0,
        "bootstrap_draws": 100,
        **changes,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_an_external_site_is_graded_by_every_fold_and_counted_apart(study: Study, tmp_path: Path) -> None:
    plan = plan_comparison(read_comparison(configuration(study, tmp_path)))
    place = Workplace(tmp_path / "out" / "jobs")
    place.folder.mkdir(parents=True)
    for job in plan.jobs:
        run_job(job, place)
    found_jobs = [(job, read_result(place.folder, job)) for job in plan.jobs]
    result = combine(plan.comparison, plan.study, plan.folds, found_jobs)
    write_tables(result, tmp_path / "out")

    assert {row.site for row in result.rows} == {"home"} and len(result.rows) == HOME
    rows = [row for row in table(tmp_path / "out" / "predictions_external.csv") if row["arm"] == "scratch"]
    assert len(rows) == 2 * AWAY and {row["site"] for row in rows} == {"away"}
    assert len(table(tmp_path / "out" / "predictions.csv")) == 2 * HOME

    accuracies = []
    for fold in "01":
        own = [row for row in rows if row["fold"] == fold]
        true, predicted = ([int(row[name]) for row in own] for name in ("grade", "predicted_grade"))
        accuracies.append(accuracy_score(true, predicted))
    found = {found.arm: found for found in external_results(result)}
    assert found["scratch"].metrics["accuracy"].estimate == pytest.approx(np.mean(accuracies))
    printed = {
        (row["arm"], row["note"], row["metric"]): row
        for row in table(tmp_path / "out" / "results.csv")
        if row["section"] == "external"
    }
    assert printed["scratch", "as it comes", "accuracy"]["n"] == str(AWAY)
    assert float(printed["scratch", "as it comes", "accuracy"]["estimate"]) == pytest.approx(
        np.mean(accuracies)
    )
    right = np.stack(
        [[row["grade"] == row["predicted_grade"] for row in rows if row["fold"] == fold] for fold in "01"]
    )
    patients = [row["patient_id"] for row in rows if row["fold"] == "0"]
    assert found["scratch"].metrics["accuracy"] == share_interval(right, patients)
    # Four slides of a grade are too few to recalibrate on: that is left out, and the report is written.
    assert not any(note == "recalibrated" for _, note, _ in printed)
    view = View(result, {})
    sections = {section.anchor: section for section in document_of(view, tables_of(view), {}).sections}
    assert result.parts["external"].slides == AWAY and result.parts["external"].sites == ("away",)
    assert result.parts["all"].slides == HOME + AWAY and result.parts["test"].sites == ("home",)
    text, shown = sections["external"].parts
    assert isinstance(text, str) and f"{AWAY} slides of site away" in text
    assert isinstance(shown, Table) and shown.rows[0][3] == found["scratch"].metrics["accuracy"]


def test_intervals_of_several_models_are_exact_for_shares_and_resample_models() -> None:
    true = np.arange(20) % 5
    right = np.eye(5)[true]
    of_one = patient_results(true, right, np.arange(20), "slide")
    found = metric_interval("accuracy", of_one, n_draws=200)
    exact = binomtest(20, 20).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    wrong = np.eye(5)[np.where(np.arange(20) < 6, (true + 2) % 5, true)]
    of_two = patient_results(true, np.stack([right, wrong]), np.arange(20), "slide")
    pair, alone = metric_interval("qwk", of_two, n_draws=500), metric_interval("qwk", of_one, n_draws=500)
    assert pair.low < alone.low == 1  # the second model errs, and another one might err more


def test_no_slide_of_the_external_site_is_in_a_fold(study: Study, tmp_path: Path) -> None:
    comparison = read_comparison(configuration(study, tmp_path))
    plan = plan_comparison(comparison)
    away = {row.slide_id for row in plan.study.rows if row.site == "away"}
    for fold in plan.folds:
        assert not away & {*fold.train, *fold.test} and set(fold.external) == away
    without = replace(comparison, protocol=replace(comparison.protocol, external_site=""))
    assert {job.key for job in plan_comparison(without).jobs}.isdisjoint(job.key for job in plan.jobs)
    with pytest.raises(UsageError, match="no slide is of site 'there'"):
        plan_comparison(replace(comparison, protocol=replace(comparison.protocol, external_site="there")))


def test_a_patient_at_home_and_away_stops_the_run(study: Study, tmp_path: Path) -> None:
    path = configuration(study, tmp_path)
    manifest = tmp_path / "manifest.csv"
    rows = table(manifest)
    manifest.write_text(
        manifest.read_text().replace(rows[-1]["patient_id"] + ",", rows[0]["patient_id"] + ",")
    )
    with pytest.raises(UsageError, match="external part share patient"):
        plan_comparison(read_comparison(path))


def test_an_external_site_of_one_patient_is_refused_before_the_run(study: Study, tmp_path: Path) -> None:
    path = configuration(study, tmp_path)
    manifest = tmp_path / "manifest.csv"
    rows = table(manifest)
    for row in rows:
        row["site"] = "away" if row["patient_id"] == rows[-1]["patient_id"] else "home"
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(UsageError, match=f"all external slides are of patient '{rows[-1]['patient_id']}'"):
        plan_comparison(read_comparison(path))
