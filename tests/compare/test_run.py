"""Comparisons as they are run: by the real command, on real caches, in real processes."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from pytorch_lightning.callbacks import Callback
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, cohen_kappa_score

from slidetl.cli import main
from slidetl.compare import pool, records, run, train_arm
from slidetl.compare.aggregate import _site_in_embeddings
from slidetl.compare.config import Arm, Comparison, Primary, read_comparison
from slidetl.compare.plan import FORMAT_VERSION, Job, cases_of, permuted, read_slides, refuse_seen
from slidetl.compare.pool import Workplace, run_job
from slidetl.compare.records import CurvePoint, JobResult, predictions_from, read_result
from slidetl.compare.run import (
    Options,
    _was_registered,
    plan_comparison,
    record_registration,
    run_comparison,
)
from slidetl.compare.train_arm import _Fit, check_arm, choose, draw_evenly, train_job
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.record import RecordedSlide, StudyRecord, store_record
from slidetl.data.study import Study, read_study
from slidetl.errors import CacheMismatchError, UsageError
from slidetl.evaluation.calibration import fit_temperature, with_temperature
from slidetl.evaluation.classical import fit_grader
from slidetl.evaluation.protocol import Fold, canonical_sha256, plan_folds
from slidetl.library.model_card import ModelCard
from slidetl.models.backbones import read_pretrained
from slidetl.models.spec import BackboneSpec
from slidetl.models.tensors import load_tensors, save_tensors
from slidetl.tiles.features import FeatureSource, read_features, write_features
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.store import SlideCache
from slidetl.training.checkpoint import load_grader
from slidetl.training.predictions import SlidePrediction
from tests.conftest import PATIENCE_S
from tests.conftest import Study as Cohort
from tests.small import SMALL, small_embed, small_weights
from tests.volumes.studies import VolumeStudy

PRIOR = {"prior": {"baseline": "prior"}}
SCRATCH = {"model": {"transfer": {"class_path": "slidetl.models.transfer.Scratch"}}}


def configuration(study: Cohort, folder: Path, **changes: Any) -> Path:
    """A small comparison of two arms over two folds, not nested."""
    values: dict[str, Any] = {
        "manifest": str(study.manifest),
        "cache": str(study.cache),
        "protocol": {"outer_folds": 2, "inner_folds": 0, "unit": "slide"},
        "primary": {"arm": "scratch", "against": "prior"},
        "base": {
            "data": {"bag_size": 4, "num_workers": 0},
            "model": {"backbone": {"name": SMALL, "pretrained": str(small_weights())}},
            "trainer": {"max_epochs": 2, "accelerator": "cpu"},
        },
        "arms": {"scratch": {"fit": SCRATCH}, **PRIOR},
        "bootstrap_draws": 100,
        **changes,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compared(study: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one whole comparison."""
    folder = tmp_path_factory.mktemp("compared")
    path = configuration(study, folder, sizes={"slides": [8], "arms": ["prior"]})
    assert main(["compare", "--config", str(path), "--output", str(folder / "out"), "--jobs", "2"]) == 0
    return folder / "out"


def test_every_slide_is_predicted_once_by_every_arm(compared: Path, study: Cohort) -> None:
    rows = table(compared / "predictions.csv") + table(compared / "predictions_smaller.csv")
    slides = sorted(row["slide_id"] for row in table(study.manifest))
    for arm, size in (("scratch", ""), ("prior", ""), ("prior", "8")):
        own = [row for row in rows if (row["arm"], row["train_slides"]) == (arm, size)]
        assert sorted(row["slide_id"] for row in own) == slides
        for row in own:
            probabilities = [float(row[f"probability_{grade}"]) for grade in range(5)]
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)
            assert int(row["predicted_grade"]) == int(np.argmax(probabilities))


def test_figures_are_those_of_the_pooled_predictions(compared: Path) -> None:
    predictions = [row for row in table(compared / "predictions.csv") if row["arm"] == "scratch"]
    true = [int(row["grade"]) for row in predictions]
    predicted = [int(row["predicted_grade"]) for row in predictions]
    figures = {
        row["metric"]: float(row["estimate"])
        for row in table(compared / "results.csv")
        if (row["section"], row["arm"]) == ("metric", "scratch")
    }
    kappa = cohen_kappa_score(true, predicted, labels=range(5), weights="quadratic")
    assert figures["accuracy"] == pytest.approx(accuracy_score(true, predicted), abs=1e-5)
    assert figures["qwk"] == pytest.approx(kappa, abs=1e-5)


def test_the_declared_comparison_comes_first(compared: Path) -> None:
    rows = table(compared / "results.csv")
    assert (rows[0]["section"], rows[0]["arm"], rows[0]["against"]) == ("primary", "scratch", "prior")
    qwk = {row["arm"]: float(row["estimate"]) for row in rows if row["metric"] == "qwk" and row["n"]
           and row["section"] == "metric" and not row["train_slides"]}  # fmt: skip
    assert float(rows[0]["estimate"]) == pytest.approx(qwk["scratch"] - qwk["prior"], abs=1e-5)
    assert {row["note"] for row in rows if row["section"] == "metric"} == {"not nested"}


def test_learning_curves_have_every_epoch_of_every_fold(compared: Path) -> None:
    rows = table(compared / "curves.csv")
    assert [(row["fold"], row["part"], row["epoch"]) for row in rows] == [
        (fold, "test", epoch) for fold in "01" for epoch in "12"
    ]
    assert all(0 < float(row["seconds"]) < 600 for row in rows)


def test_the_splits_on_disk_are_those_that_were_used(compared: Path, study: Cohort) -> None:
    splits = json.loads((compared / "splits.json").read_text())
    assert splits["manifest"] == str(study.manifest)
    caches = read_study(study.manifest, study.cache).caches
    assert splits["spec"] == caches[0].spec.to_dict()
    assert splits["fingerprints"] == {cache.slide_id: cache.fingerprint for cache in caches}
    assert canonical_sha256(splits["folds"]) == splits["sha256"]
    of = {fold["name"]: set(fold["test"]) for fold in splits["folds"]}
    for row in table(compared / "predictions.csv"):
        assert row["slide_id"] in of[row["fold"]]


def test_the_manifest_is_recorded_for_a_reader_in_another_folder(
    study: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study.manifest.parent)
    arms = {**PRIOR, "site": {"baseline": "site"}}
    primary = {"arm": "site", "against": "prior"}
    path = configuration(study, tmp_path, manifest=study.manifest.name, arms=arms, primary=primary)
    run_comparison(plan_comparison(read_comparison(path)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "splits.json").read_text())["manifest"] == str(study.manifest)


def test_a_prior_is_the_share_of_each_grade_in_its_training_part(compared: Path, study: Cohort) -> None:
    grade = {row["slide_id"]: int(row["grade"]) for row in table(study.manifest)}
    folds = {fold["name"]: fold for fold in json.loads((compared / "splits.json").read_text())["folds"]}
    for row in table(compared / "predictions.csv"):
        if row["arm"] == "prior":
            train = [grade[slide] for slide in folds[row["fold"]]["train"]]
            assert float(row["probability_0"]) == pytest.approx(train.count(0) / len(train), abs=1e-6)


def test_the_report_lies_beside_the_tables(compared: Path) -> None:
    page = (compared / "report.html").read_text()
    assert "scratch against prior: a comparison of 2 arms" in page
    assert "<h2" in page
    drawn = {"confusion", "forest", "learning", "referral", "reliability", "similarity", "sizes"}
    assert {path.stem for path in (compared / "figures").glob("*.svg")} == drawn


def test_similarity_is_that_of_each_block_before_and_after_training(compared: Path) -> None:
    rows = table(compared / "similarity.csv")
    assert {(row["arm"], row["fold"]) for row in rows} == {("scratch", "0"), ("scratch", "1")}
    assert rows[0]["layer"] == "bn1"
    assert {"blocks.0", "embedding"} <= {row["layer"] for row in rows}
    of_first = [float(row["linear_cka"]) for row in rows if row["layer"] == "bn1"]
    assert all(0.9 < value < 1 for value in of_first)  # two epochs hardly move the lowest block


def test_tiles_are_drawn_evenly_from_slides() -> None:
    drawn = draw_evenly([100, 3, 40], 30, seed=1)
    assert {slide: len(tiles) for slide, tiles in drawn.items()} == {0: 10, 1: 3, 2: 10}
    assert all(len(set(tiles)) == len(tiles) and list(tiles) == sorted(tiles) for tiles in drawn.values())
    assert drawn[0].max() > 10  # from anywhere in the slide
    many = draw_evenly([5] * 50, 20, seed=1)
    assert len(many) == 20
    assert all(len(tiles) == 1 for tiles in many.values())
    assert list(many) != list(range(20))


def test_a_report_of_what_is_there_computes_nothing(
    compared: Path, study: Cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compared, tmp_path / "out")
    (tmp_path / "out" / "splits.json").unlink()
    arms = {"scratch": {"fit": SCRATCH}, "prior": {"baseline": "prior"}, "site": {"baseline": "site"}}
    words = ["compare", "--config", str(configuration(study, tmp_path, arms=arms)), "--report-only"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    assert "site (0 of 2 jobs)" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "jobs").glob("*/job.json"))) == 6
    page = (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "splits.json").read_text())["sha256"] in page
    assert "This comparison is not finished" in page
    assert "site (0 of 2 jobs)" in page
    assert main([*words, "--output", str(tmp_path / "nothing")]) == 2
    assert "no arm has all its folds yet" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


def test_what_is_there_is_not_computed_again(
    compared: Path, study: Cohort, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compared, tmp_path / "out")
    before = (tmp_path / "out" / "results.csv").read_bytes()
    # Renamed, the arm is the same.
    arms = {"anew": {"fit": SCRATCH}, "prior": {"baseline": "prior"}}
    path = configuration(
        study,
        tmp_path,
        arms=arms,
        primary={"arm": "anew", "against": "prior"},
        sizes={"slides": [8], "arms": ["prior"]},
    )
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "out")]) == 0
    assert "6 jobs are done, 0 to be computed" in capfd.readouterr().err
    assert (tmp_path / "out" / "results.csv").read_bytes() == before.replace(b"scratch", b"anew")


def test_a_damaged_job_is_computed_again(
    compared: Path, study: Cohort, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compared, tmp_path / "out")
    key = next(row["key"] for row in table(compared / "jobs.csv") if row["arm"] == "prior")
    result = tmp_path / "out" / "jobs" / key / "result.json"
    whole = json.loads(result.read_text())
    result.write_text(json.dumps({**whole, "temperature": 2}))
    path = configuration(study, tmp_path)
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "out"), "--jobs", "1"]) == 0
    assert "3 jobs are done, 1 to be computed" in capfd.readouterr().err
    again = json.loads(result.read_text())
    assert again | {"seconds": 0} == whole | {"seconds": 0}


def test_series_are_compared_and_those_cut_elsewhere_again(
    nodules: VolumeStudy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The files, the numbers of patches and the names of the jobs are the same."""
    manifest, cache = tmp_path / "manifest.csv", tmp_path / "cache"
    shutil.copytree(nodules.cache, cache)
    path = configuration(
        Cohort(manifest, cache),
        tmp_path,
        grades=["0", "1"],
        near_duplicates=0,
        base={
            "data": {"bag_size": 1, "num_workers": 0},
            "model": {"backbone": {"name": "conv3d_8"}},
            "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        },
        arms={"scratch": {"fit": SCRATCH}, **PRIOR},
    )
    compare = ["compare", "--config", str(path), "--output", str(tmp_path / "out")]

    def cut(at_mm: float) -> None:
        columns = ("slide_id", "path", "patient_id", "grade", "x_mm", "y_mm", "z_mm")
        rows = [{column: row[column] for column in columns} for row in table(nodules.manifest)]
        for row in rows:
            row |= {"path": str(nodules.manifest.parent / row["path"]), "x_mm": str(at_mm)}
        with manifest.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        words = ["--spacing-mm", "1", "--tile-size", "16", "--stride", "8", "--mask", "none"]
        words += ["--min-tissue", "0", "--overwrite", "--workers", "1"]
        assert main(["tile", str(manifest), "--cache", str(cache), *words]) == 0
        assert main(compare) == 0

    cut(11.5)
    cut(11.5)
    assert "4 jobs are done, 0 to be computed" in capfd.readouterr().err
    layers = [row["layer"] for row in table(tmp_path / "out" / "similarity.csv") if row["fold"] == "0"]
    assert layers[-1] == "embedding" and len(layers) > 1
    cut(9.5)
    assert "0 jobs are done, 4 to be computed" in capfd.readouterr().err
    assert main([*compare, "--report-only"]) == 0
    for about in (tmp_path / "out" / "jobs").glob("*/job.json"):  # of a version that did not record tiles
        values = json.loads(about.read_text())
        del values["tiles"]
        about.write_text(json.dumps(values))
    assert main(compare) == 0
    assert "4 jobs are done, 0 to be computed" in capfd.readouterr().err


def test_a_training_on_other_tiles_or_weights_is_not_taken_for_that_of_a_job(
    study: Cohort, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.safetensors"
    shutil.copy(small_weights(), weights)
    fit = {"model": {**SCRATCH["model"], "backbone": {"pretrained": str(weights)}}}
    _, job = planned(study, tmp_path, {"fit": fit})
    done = tmp_path / "work" / "final" / "training.json"

    def point() -> float:
        fit = _Fit(job, done.parent, {}, job.fold.train, job.fold.test, ())
        return fit.run("test", 0).points[-1].train_loss

    loss = point()
    values = json.loads(done.read_text())
    values["points"][-1]["train_loss"] = -1.0  # to tell what is read from what is trained
    done.write_text(json.dumps(values))
    assert point() == -1.0
    done.write_text(json.dumps({**values, "tiles": "elsewhere"}))
    assert point() == pytest.approx(loss)
    shutil.rmtree(done.parent)
    weights.write_bytes(b"others")
    with pytest.raises(UsageError, match="are not those that the comparison was planned with"):
        point()
    assert not done.exists()


def test_weights_and_features_that_are_choices_are_in_the_key(study: Cohort, tmp_path: Path) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other.safetensors"
    shutil.copytree(study.cache, cache)

    def store(value: float) -> None:
        for folder in cache.glob("*.zarr"):
            tiles = SlideCache.open(folder)
            source = FeatureSource("stored_4", "", "", (0.5,) * 3, (0.5,) * 3)  # as imported: no weights
            values = np.full((len(tiles), 4), value, np.float16)
            write_features(tiles, {"first": (source, values * 0), "second": (source, values)})

    def keys(choices: dict[str, Any]) -> set[str]:
        fit = {"model": {"backbone": {"pretrained": str(small_weights())}}, "data": {"features": "first"}}
        path = configuration(
            Cohort(study.manifest, cache),
            tmp_path,
            protocol={"outer_folds": 2, "inner_folds": 2},
            arms={"chosen": {"fit": fit, "choices": choices}, **PRIOR},
            primary={"arm": "chosen", "against": "prior"},
        )
        jobs = plan_comparison(read_comparison(path)).jobs
        return {job.key for job in jobs if job.arm == "chosen"}

    weights = {"model.backbone.pretrained": [str(small_weights()), str(other)]}
    features, rates = {"data.features": ["first", "second"]}, {"model.lr": [0.1, 0.2]}
    store(1)
    other.write_bytes(b"some")
    before = [keys(choices) for choices in (weights, features, rates)]
    store(2)
    other.write_bytes(b"others")
    after = [keys(choices) for choices in (weights, features, rates)]
    assert not before[0] & after[0] and not before[1] & after[1] and before[2] == after[2]


def test_features_replaced_since_a_run_began_tell_no_site(study: Cohort, tmp_path: Path) -> None:
    shutil.copytree(study.cache, tmp_path / "cache")

    def store(scale: float) -> None:
        source = FeatureSource("net", "", "a" * 64, (0.5,) * 3, (0.5,) * 3)
        for number, folder in enumerate(sorted((tmp_path / "cache").glob("*.zarr"))):
            tiles = SlideCache.open(folder)
            write_features(tiles, {"told": (source, np.full((len(tiles), 2), scale * number, np.float16))})

    store(1)
    arms = {"ridge": {"classical": {"features": ["told"], "model": "ridge"}}, **PRIOR}
    primary = {"arm": "ridge", "against": "prior"}
    moved = Cohort(study.manifest, tmp_path / "cache")
    comparison = read_comparison(configuration(moved, tmp_path, arms=arms, primary=primary))
    plan = plan_comparison(comparison)
    of_plan = comparison, plan.study, plan.jobs, (), plan.folds
    assert _site_in_embeddings(*of_plan).keys() == {"stored features told"}
    store(2)
    with pytest.raises(CacheMismatchError, match="other features 'told' than when the study was read"):
        _site_in_embeddings(*of_plan)


@pytest.mark.parametrize("source", ["hub", "file"])
def test_the_files_of_a_network_in_a_folder_are_in_the_key(
    source: str, study: Cohort, tmp_path: Path
) -> None:
    folder = tmp_path / "lab"
    folder.mkdir()
    own, config = folder / "model.safetensors", folder / "config.json"
    backbone = {"name": f"local-dir:{folder}", "pretrained": "hub" if source == "hub" else str(own)}
    keys = []
    for weights, about in (("a", "{}"), ("b", "{}"), ("b", "{ }"), ("a", "{}")):
        own.write_text(weights)
        config.write_text(about)
        keys.append(planned(study, tmp_path, {"fit": {"model": {"backbone": backbone}}})[1].key)
    assert len(set(keys)) == 3 and keys[0] == keys[3]


def test_an_augmentation_of_the_base_hinders_no_arm_on_stored_features(study: Cohort, tmp_path: Path) -> None:
    """Each of its jobs failed, after those of the other arms."""
    cache = tmp_path / "cache"
    shutil.copytree(study.cache, cache)
    assert main(["embed", str(cache), *small_embed(), "--name", "own", "--device", "cpu"]) == 0
    frozen = {"class_path": "slidetl.models.transfer.FrozenFeatures"}
    arm = {"data": {"features": "own", "bag_size": 0}, "model": {"transfer": frozen}}
    path = configuration(
        Cohort(study.manifest, cache),
        tmp_path,
        base={
            "data": {"num_workers": 0, "augmentation": {"brightness": 0.05}},
            "model": {"backbone": {"name": SMALL, "pretrained": str(small_weights())}},
            "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        },
        arms={"stored": {"fit": arm}, **PRIOR},
        primary={"arm": "stored", "against": "prior"},
    )
    _, job, found = first_job(path, "stored", tmp_path / "jobs")
    assert {row.slide_id for row in found.predictions} == set(job.fold.test)


def test_a_killed_run_resumes_to_the_same_metrics(compared: Path, study: Cohort, tmp_path: Path) -> None:
    path = configuration(study, tmp_path, sizes={"slides": [8], "arms": ["prior"]})
    command = [sys.executable, "-m", "slidetl", "compare", "--config", str(path)]
    command += ["--output", str(tmp_path / "out"), "--jobs", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    jobs = tmp_path / "out" / "jobs"
    deadline = time.monotonic() + PATIENCE_S
    while not list(jobs.glob("*/job.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)  # itself alone: what it started must end by itself
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in jobs.glob("*/job.json")}
    assert 0 < len(done) < 6
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "out")]) == 0
    assert {file: file.stat().st_mtime_ns for file in done} == done
    same = ("predictions.csv", "results.csv", "splits.json")
    assert all((tmp_path / "out" / name).read_bytes() == (compared / name).read_bytes() for name in same)


def test_a_failed_fold_of_every_arm_ends_a_run_with_the_reasons(
    study: Cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {**PRIOR, "site": {"baseline": "site"}}
    path = configuration(study, tmp_path, arms=arms, primary={"arm": "site", "against": "prior"})
    building = tmp_path / "out" / "jobs" / ".building"
    building.mkdir(parents=True)
    for job in plan_comparison(read_comparison(path)).jobs:
        if job.fold.name == "1":
            (building / job.key).touch()  # in the place of the job's folder
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "out"), "--jobs", "2"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "no arm is complete" in line]
    assert "2 jobs failed" in line and "go on" not in line
    assert "prior, repeat 0, fold 1: " in line and "site, repeat 0, fold 1: " in line
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_run_keeps_the_data_behind_the_tables_until_it_writes_its_own(
    study: Cohort, tmp_path: Path
) -> None:
    """Before, an arm was no evidence while the comparison ran again."""
    path = tmp_path / "out" / "splits.json"
    during: list[dict[str, Any]] = []

    def splits() -> dict[str, Any]:
        return dict(json.loads(path.read_text()))

    def compare(*, seed: int = 0) -> None:
        protocol = {"outer_folds": 2, "inner_folds": 0, "unit": "slide", "seed": seed}
        arms = {**PRIOR, "site": {"baseline": "site"}}
        primary = {"arm": "site", "against": "prior"}
        configured = configuration(study, tmp_path, protocol=protocol, arms=arms, primary=primary)
        options = Options(on_start=lambda finished, to_do: during.append(splits()))
        run_comparison(plan_comparison(read_comparison(configured)), tmp_path / "out", options)

    compare()
    written = splits()
    earlier = {**written, "fingerprints": {"slide": "of the earlier tables"}}
    path.write_text(json.dumps(earlier))
    compare()
    assert (during.pop(), splits()) == (earlier, written)
    compare(seed=1)
    assert during.pop().keys() == {"sha256", "software", "folds"} and splits()["folds"] != written["folds"]


@pytest.mark.parametrize("is_late", [True, False], ids=["late", "never"])
def test_a_job_without_a_readable_result_has_failed(
    is_late: bool, study: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process has another version of the format than this one; or this one sees the files later."""
    arms = {**PRIOR, "site": {"baseline": "site"}}
    path = configuration(study, tmp_path, arms=arms, primary={"arm": "site", "against": "prior"})
    comparison = read_comparison(path)
    run_comparison(plan_comparison(comparison, ("prior",)), tmp_path / "out")
    told: list[tuple[Job, str, JobResult | None]] = []

    def misread(finished: Any, to_do: Any) -> None:
        assert {job.arm for job in finished} == {"prior"}
        monkeypatch.setattr(records, "FORMAT_VERSION", -1)

    monkeypatch.setattr(run, "_LATE_S", PATIENCE_S if is_late else 0)
    monkeypatch.setattr(
        "time.sleep", lambda seconds: monkeypatch.setattr(records, "FORMAT_VERSION", FORMAT_VERSION)
    )
    options = Options(on_start=misread, on_done=lambda *of_job: told.append(of_job))
    _, failed = run_comparison(plan_comparison(comparison), tmp_path / "out", options)
    assert [job.arm for job, *_ in told] == ["site"] * 2
    if is_late:
        assert not failed and all(result is not None and not reason for _, reason, result in told)
    else:
        assert list(failed.values()) == [reason for _, reason, _ in told]
        assert all("cannot be read as a result of slidetl" in reason for reason in failed.values())


@pytest.mark.slow
def test_a_job_that_fails_is_reported_and_the_others_go_on(
    study: Cohort, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = {"model": {"backbone": {"pretrained": str(tmp_path / "none.safetensors")}}}
    arms = {"broken": {"fit": broken}, "prior": {"baseline": "prior"}, "site": {"baseline": "site"}}
    path = configuration(study, tmp_path, arms=arms, primary={"arm": "broken", "against": "prior"})
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "out")]) == 1
    printed = capfd.readouterr()
    assert "failed: broken, repeat 0, fold 0" in printed.err
    assert "none.safetensors" in printed.err
    assert "broken against prior by QWK, is not complete yet" in printed.out
    assert "broken (0 of 2 jobs)" in printed.out
    assert {row["arm"] for row in table(tmp_path / "out" / "predictions.csv")} == {"prior", "site"}
    assert len(list((tmp_path / "out" / "jobs" / ".failed").iterdir())) == 2


def test_a_mistake_in_an_arm_is_found_before_anything_runs(
    study: Cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {"scratch": {"fit": {"model": {"lrr": 1}}}, "prior": {"baseline": "prior"}}
    path = configuration(study, tmp_path, arms=arms)
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "arm 'scratch'" in error
    assert "lrr" in error
    assert not list((tmp_path / "out" / "jobs").glob("*/job.json"))


@pytest.mark.slow
def test_weights_and_features_of_graded_patients_are_refused(
    study: Cohort, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = str(trained / "logs" / "version_0" / "checkpoints" / "best.ckpt")
    cache = tmp_path / "cache"
    shutil.copytree(study.cache, cache)
    assert main(["embed", str(cache), "--backbone", SMALL, "--pretrained", best, "--device", "cpu"]) == 0
    warm = {"fit": {"model": {"backbone": {"pretrained": best}}}}
    ridge = {"classical": {"features": [SMALL]}}
    for name, arm in {"warm": warm, "ridge": ridge}.items():
        path = configuration(
            Cohort(study.manifest, cache),
            tmp_path,
            arms={"scratch": {"fit": SCRATCH}, **PRIOR, name: arm},
        )
        capsys.readouterr()
        assert main(["compare", "--config", str(path), "--output", str(tmp_path / name), "--jobs", "1"]) == 2
        line = capsys.readouterr().err
        assert f"arm {name!r}: its weights or features were trained or chosen on 15 of the slides" in line
        assert "start from weights of other patients" in line and not any(
            (tmp_path / name / "jobs").iterdir()
        )
    scratch = {"fit": {"model": {**SCRATCH["model"], "backbone": {"pretrained": best}}}}
    comparison = read_comparison(configuration(study, tmp_path, arms={"scratch": scratch, **PRIOR}))
    refuse_seen(comparison, plan_comparison(comparison).jobs, read_slides(comparison))
    path = configuration(  # smaller parts have no choices: they start from the weights of the arm itself
        study,
        tmp_path,
        protocol={"outer_folds": 2, "inner_folds": 2, "unit": "slide"},
        sizes={"slides": [8], "arms": ["warm"]},
        arms={"warm": {**warm, "choices": {"model.backbone.pretrained": [str(small_weights())]}}, **PRIOR},
        primary={"arm": "warm", "against": "prior"},
    )
    comparison = read_comparison(path)
    with pytest.raises(UsageError, match="arm 'warm': its weights or features were trained or chosen on"):
        refuse_seen(comparison, plan_comparison(comparison).jobs, read_slides(comparison))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*temperature of 20 slides:UserWarning")  # two epochs teach little
def test_an_arm_is_evidence_of_a_checkpoint_of_its_configuration_alone(
    compared: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    words = ["--output", str(tmp_path / "m.pt"), "--no-training-data", "--evidence"]

    def export(checkpoint: Path, table: Path, *arm: str) -> tuple[int, str]:
        code = main(["export", str(checkpoint), *words, str(table), *arm])
        found = capsys.readouterr()
        return code, found.out + found.err

    alone = tmp_path / "alone.csv"
    lines = (compared / "predictions.csv").read_text().splitlines()
    alone.write_text("\n".join([lines[0], *(line for line in lines if line.startswith("scratch,"))]) + "\n")
    for checkpoint, path, arm, said in (
        (best, compared / "predictions.csv", ("--arm", "prior"), "arm 'prior' is no network"),
        (best, compared / "predictions_smaller.csv", (), "arm 'prior' is no network"),
        (best, compared / "predictions.csv", ("--arm", "scratch"), "which has model.transfer "),
        (best, alone, (), "no record of arm 'scratch' beside it"),
    ):
        code, text = export(checkpoint, path, *arm)
        assert code == 2 and said in text and not (tmp_path / "m.pt").exists()

    def scratch(bag_size: int) -> Path:
        """The checkpoint as a training with the options of the arm leaves it, but for the bags."""
        checkpoint = load_tensors(best)
        checkpoint["hyper_parameters"]["transfer"] = {"class_path": "slidetl.models.transfer.Scratch"}
        checkpoint["options"]["data"]["bag_size"] = bag_size
        save_tensors(tmp_path / "scratch.ckpt", checkpoint)
        return tmp_path / "scratch.ckpt"

    code, text = export(scratch(8), compared / "predictions.csv", "--arm", "scratch")
    assert code == 2 and "which has data.bag_size 8, the arm 4; train it with the options" in text
    shutil.copy(alone, compared / "alone.csv")  # of one arm, which need not be named
    code, text = export(scratch(4), compared / "alone.csv")
    assert code == 0 and "(arm scratch of a comparison), not by this file" in text
    evidence = ModelCard.of_file(tmp_path / "m.pt").evidence
    assert evidence is not None and evidence.arm == "scratch" and evidence.slides == 20


def test_an_arm_of_the_same_weights_by_another_name_is_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(path: Path, value: float) -> str:
        path.parent.mkdir(exist_ok=True)
        save_file({"weight": torch.full((2,), value)}, path)
        return read_pretrained(BackboneSpec(pretrained=str(path))).lineage[0]

    def check(arm: dict[str, Any], checkpoint: dict[str, Any], lineage: tuple[str, ...] = ()) -> None:
        recipe = {"fit": {"model": {"backbone": arm}, "data": {}, "trainer": {}}, "trials": [{}]}
        (tmp_path / "jobs" / "k").mkdir(parents=True, exist_ok=True)
        (tmp_path / "jobs" / "k" / "job.json").write_text(json.dumps({"recipe": recipe}))
        (tmp_path / "jobs.csv").write_text("arm,key\nwarm,k\n")
        data = {"spec": TileSpec(2.0, 64).to_dict(), "fingerprints": {"s": "f"}}
        (tmp_path / "splits.json").write_text(json.dumps(data))
        model = {"hyper_parameters": {"backbone": checkpoint}, "state_dict": {}, "lineage": list(lineage)}
        torch.save(model, tmp_path / "c.ckpt")
        check_arm(tmp_path / "predictions.csv", "warm", [tmp_path / "c.ckpt"])

    def refused(arm: dict[str, Any], checkpoint: dict[str, Any], lineage: tuple[str, ...] = ()) -> None:
        name = next(iter(arm))
        said = f"c.ckpt, which has model.backbone.{name} {checkpoint[name]}, the arm {arm[name]}; train it"
        with pytest.raises(UsageError, match=re.escape(said)):
            check(arm, checkpoint, lineage)

    monkeypatch.chdir(tmp_path)
    first = weights(tmp_path / "w" / "first.safetensors", 1)
    assert weights(tmp_path / "w" / "copy.safetensors", 1) == first
    second = weights(tmp_path / "w" / "second.safetensors", 2)
    full = {"pretrained": str(tmp_path / "w" / "first.safetensors")}
    check({"pretrained": "imagenet"}, {"pretrained": "hub"})
    check({"pretrained": "w/first.safetensors"}, full)
    check({"name": "local-dir:w"}, {"name": f"local-dir:{tmp_path}/w"})
    check({"pretrained": "w/copy.safetensors"}, full, (first,))
    refused({"pretrained": "w/copy.safetensors"}, full)  # it began from none, or does not say
    refused({"pretrained": "w/copy.safetensors"}, full, (second, first))  # trained on before
    refused({"pretrained": "w/second.safetensors"}, full, (first,))
    refused({"pretrained": "w/gone.safetensors"}, full, (first,))
    refused({"pretrained": "imagenet"}, full, (first,))
    refused({"name": "resnet18"}, {"name": "resnet34"})
    refused({"name": "local-dir:w"}, {"name": "local-dir:v"})


def test_an_arm_is_evidence_of_a_checkpoint_of_its_tiles_scans_and_length_alone(tmp_path: Path) -> None:
    """A cache that was tiled again, or has rescans of the same names, keeps the options of a training."""
    table, path = tmp_path / "predictions.csv", tmp_path / "c.ckpt"
    trainer = {"max_epochs": 7, "accumulate_grad_batches": 2, "limit_train_batches": None}
    recipe = {"fit": {"model": {}, "data": {}, "trainer": trainer}, "trials": [{}, {"trainer.max_epochs": 9}]}
    (tmp_path / "jobs" / "k").mkdir(parents=True)
    (tmp_path / "jobs" / "k" / "job.json").write_text(json.dumps({"recipe": recipe}))
    (tmp_path / "jobs.csv").write_text("arm,key\nwarm,k\n")
    spec = TileSpec(2.0, 64)

    def check(tiles: TileSpec = spec, content: str = "f", batches: int = 2, **length: object) -> bool:
        record = StudyRecord(
            (RecordedSlide("s", "p", content, "train"), RecordedSlide("new", "q", "g", "train"))
        )
        kept = {"max_epochs": 9, "max_steps": -1, "limit_train_batches": 1.0, "gradient_clip_val": None}
        checkpoint = {
            "hyper_parameters": {},
            "state_dict": {},
            "tile_spec": tiles.to_dict(),
            "record": record.to_dict(),
            "trainer": {**kept, **length},
            "step": {"processes": batches, "accumulate_grad_batches": 1},
        }
        torch.save(checkpoint, path)
        return check_arm(table, "warm", [path])

    data = {"spec": spec.to_dict(), "fingerprints": {"s": "f"}}
    for text in (None, "[]", json.dumps({**data, "spec": 1}), json.dumps({"spec": data["spec"]})):
        if text is not None:
            (tmp_path / "splits.json").write_text(text)
        with pytest.raises(UsageError, match=r"splits\.json beside it does not say .*--report-only"):
            check()
    (tmp_path / "splits.json").write_text(json.dumps({"folds": []}))  # of a version that did not record them
    with pytest.warns(
        UserWarning, match=r"does not call the networks of arm 'warm' trained alike; .*--report"
    ):
        assert not check(TileSpec(0.5, 64))
    with pytest.warns(UserWarning, match="trained alike"), pytest.raises(UsageError, match="max_epochs 8"):
        check(max_epochs=8)
    (tmp_path / "splits.json").write_text(json.dumps(data))
    assert check()
    check(max_epochs=7)
    with pytest.raises(UsageError, match=r"other tiles than those compared: .* mpp 2\.0 \(wanted: 0\.5\)"):
        check(TileSpec(0.5, 64))
    with pytest.raises(UsageError, match="1 slides had another content in the comparison: s;"):
        check(content="rescanned")
    others: list[tuple[str, Any, Any]] = [
        ("max_epochs", 8, 7),
        ("gradient_clip_val", 0.5, None),
        ("limit_train_batches", 3, 1.0),
    ]
    for name, value, usual in others:
        said = re.escape(f"which has trainer.{name} {value}, the arm {usual};")
        with pytest.raises(UsageError, match=said):
            check(**{"max_epochs": 7, name: value})
    with pytest.raises(UsageError, match="which has batches per step 4, the arm 2;"):
        check(batches=4)


@pytest.mark.slow
def test_weights_of_the_same_split_may_be_chosen_on_its_val_part(
    study: Cohort, trained: Path, tmp_path: Path
) -> None:
    best = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    record = load_grader(best).record
    assert record is not None
    part_of = {slide.slide_id: slide.part for slide in record.slides}
    moved = replace(study, manifest=relabelled(study, tmp_path, split=lambda row: part_of[row["slide_id"]]))
    path = configuration(
        moved,
        tmp_path,
        protocol={"given_split": True, "inner_folds": 2, "unit": "slide"},
        arms={"warm": {"fit": {"model": {"backbone": {"pretrained": str(best)}}}}, **PRIOR},
        primary={"arm": "warm", "against": "prior"},
    )
    comparison = read_comparison(path)
    jobs, slides = plan_comparison(comparison).jobs, read_slides(comparison)
    refuse_seen(comparison, jobs, slides)
    job = next(job for job in jobs if job.arm == "warm")
    assert {part_of[slide] for inner in job.fold.inner for slide in inner.validation} == {"val"}
    found = train_job(job, tmp_path / "work")
    assert found.nested and sorted(row.slide_id for row in found.predictions) == sorted(job.fold.test)


def test_a_dry_run_writes_nothing(study: Cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = configuration(study, tmp_path)
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    sha256 = read_comparison(path).sha256
    jobs = "20 slides, 2 folds, 2 arms, 4 jobs\n"
    assert capsys.readouterr().out == f"{jobs}configuration {sha256}: not declared\n"
    (tmp_path / "registered.md").write_text(sha256)
    path = configuration(study, tmp_path, registered=str(tmp_path / "registered.md"))
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert f"configuration {sha256}: the hash is in" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_at_least_one_job_at_a_time(
    study: Cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configuration(study, tmp_path)
    words = ["compare", "--config", str(path), "--output", str(tmp_path / "out"), "--jobs", "0"]
    assert main(words) == 2
    assert "--jobs must be at least 1, not 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_comparison_registered_after_its_first_result_stays_undeclared(
    study: Cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {name: {"baseline": name} for name in ("site", "prior")}
    about = {"arms": arms, "primary": {"arm": "site", "against": "prior"}}
    file = tmp_path / "registered.md"
    path = configuration(study, tmp_path, registered=str(file), **about)

    def declared(folder: str, *more: str) -> str:
        words = ["compare", "--config", str(path), "--output", str(tmp_path / folder), "--jobs", "1"]
        assert main([*words, *more]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "It was not declared" in declared("late")
    file.write_text(read_comparison(path).sha256)
    for more in ([], ["--report-only"]):
        assert "was not, before the first result, in" in declared("late", *more)
    record = tmp_path / "late" / "registration.json"
    assert json.loads(record.read_text())["found"] is False
    record.unlink()
    for more in ([], ["--report-only"]):
        assert "Whether it was declared before the run is not known" in declared("late", *more)
    assert "It was declared before the run" in declared("early", "--only", "prior")
    path = configuration(study, tmp_path, registered=str(file), tile_draws=3, **about)  # another hash
    file.write_text(file.read_text() + read_comparison(path).sha256)
    assert "Whether it was declared before the run is not known" in declared("early")


def registered_in(file: Path | None) -> Comparison:
    arms = {name: Arm(baseline=name) for name in ("site", "prior")}
    named = None if file is None else str(file)
    return Comparison("m.csv", "c", arms, Primary("site", "prior"), registered=named)


def test_a_training_of_an_unfinished_job_is_a_result(tmp_path: Path) -> None:
    """A run begun unregistered, ended within a job and resumed, reuses it."""
    file, output = tmp_path / "registered.md", tmp_path / "out"
    comparison = registered_in(file)
    record_registration(comparison, output)
    training = output / "jobs" / ".building" / "key" / "final" / "training.json"
    training.parent.mkdir(parents=True)
    file.write_text(comparison.sha256)
    record_registration(comparison, output)
    assert _was_registered(comparison, output) is True  # no training has ended yet
    file.write_text("")
    record_registration(comparison, output)
    training.write_text("{}")
    file.write_text(comparison.sha256)
    record_registration(comparison, output)
    assert _was_registered(comparison, output) is False


def test_a_record_says_nothing_of_another_registered_file(tmp_path: Path) -> None:
    one, other, output = tmp_path / "a.md", tmp_path / "b.md", tmp_path / "out"
    one.write_text(registered_in(one).sha256)
    record_registration(registered_in(one), output)
    assert _was_registered(registered_in(one), output) is True
    assert _was_registered(registered_in(other), output) is None
    record_registration(registered_in(None), output)
    assert _was_registered(registered_in(one), output) is None


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_a_registered_file_that_cannot_be_read_ends_a_run_before_its_jobs(
    content: bytes | None, tmp_path: Path
) -> None:
    """Also in a folder with results, where nothing is recorded."""
    file = tmp_path / "registered"
    file.mkdir() if content is None else file.write_bytes(content)
    job = tmp_path / "out" / "jobs" / "key" / "job.json"
    job.parent.mkdir(parents=True)
    job.write_text("{}")
    with pytest.raises(UsageError, match="is no readable text file"):
        record_registration(registered_in(file), tmp_path / "out")


def test_a_registered_file_in_the_output_folder_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UsageError, match="registered: expected a file outside the output folder"):
        record_registration(registered_in(output / "registration.json"), output)
    assert not output.exists()


@pytest.mark.filterwarnings("ignore:repeat 0, fold .* no training slide")  # ten slides of five grades
def test_patients_who_cannot_be_aggregated_are_refused_before_the_run(study: Cohort, tmp_path: Path) -> None:
    rows = table(study.manifest)
    one, north = rows[0]["patient_id"], {row["slide_id"] for row in rows[::2]}
    manifest = relabelled(
        study,
        tmp_path,
        patient_id=lambda row: one if row["slide_id"] == rows[-1]["slide_id"] else row["patient_id"],
        site=lambda row: "north" if row["slide_id"] in north else "south",
    )
    protocol = {"inner_folds": 0, "unit": "slide", "leave_one_site_out": True}
    path = configuration(study, tmp_path, manifest=str(manifest), protocol=protocol)
    with pytest.raises(UsageError, match=f"patient '{one}' has slides at north, south"):
        plan_comparison(read_comparison(path))
    manifest = relabelled(study, tmp_path, split=lambda row: "test" if row["patient_id"] == one else "train")
    given = {"inner_folds": 0, "given_split": True}
    path = configuration(study, tmp_path, manifest=str(manifest), protocol=given)
    with pytest.raises(UsageError, match=f"all test slides are of patient '{one}'"):
        plan_comparison(read_comparison(path))


def test_only_some_arms(study: Cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "--config", str(configuration(study, tmp_path)), "--output", str(tmp_path / "out")]
    assert main([*words, "--only", "prior", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("20 slides, 2 folds, 1 arms, 2 jobs\n")
    assert main([*words, "--only", "prio"]) == 2
    assert "there is no arm 'prio'" in capsys.readouterr().err


def relabelled(study: Cohort, folder: Path, **columns: Any) -> Path:
    """The manifest with other values; each is a function of a row."""
    rows = table(study.manifest)
    for row in rows:
        row["path"] = str(study.manifest.parent / row["path"])
        row.update({name: str(value(row)) for name, value in columns.items()})
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_training_part_without_a_grade_is_refused(study: Cohort, tmp_path: Path) -> None:
    first = next(row["slide_id"] for row in table(study.manifest) if row["grade"] == "4")
    manifest = relabelled(
        study, tmp_path, grade=lambda row: 4 if row["slide_id"] == first else min(3, int(row["grade"]))
    )
    path = configuration(study, tmp_path, manifest=str(manifest))
    with pytest.raises(UsageError, match="no training slide has grade 4, so it could not be learned; add"):
        plan_comparison(read_comparison(path))


def copied_slide(study: Cohort, folder: Path, cropped: bool = False) -> tuple[Path, Path]:
    """A manifest and a cache in which the first slide is there a second time, as another patient's.

    Cropped, it lacks up to a tenth of its sides, and is another file format.
    """
    cache = folder / "cache"
    shutil.copytree(study.cache, cache)
    manifest = relabelled(study, folder)
    rows = table(manifest)
    original = rows[0]["slide_id"]
    slide = folder / "copy.tiff"
    shutil.copy(rows[0]["path"], slide)
    if cropped:
        with Image.open(rows[0]["path"]) as picture:
            width, height = picture.size
            slide = folder / "copy.png"
            picture.convert("RGB").crop((width // 10, 0, width - width // 30, height - height // 12)).save(
                slide
            )
    again = {"slide_id": "copy", "patient_id": "another", "path": str(slide), "mpp": "4" if cropped else ""}
    rows.append({**rows[0], **again})
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1], restval="")
        writer.writeheader()
        writer.writerows(rows)
    options = ["--cache", str(cache), "--mpp", "4", "--tile-size", "64", "--workers", "1"]
    assert main(["tile", str(manifest), *options]) == 0
    assert (cache / "copy.zarr").is_dir()
    assert (cache / f"{original}.zarr").is_dir()
    return manifest, cache


@pytest.mark.slow
def test_one_slide_under_two_names_stops_the_run_or_is_joined(study: Cohort, tmp_path: Path) -> None:
    manifest, cache = copied_slide(study, tmp_path)
    places = {"manifest": str(manifest), "cache": str(cache)}
    # By its content, whatever it looks like; and where it lands depends on the seed.
    refused = 0
    for seed in range(4):
        protocol = {"outer_folds": 2, "inner_folds": 0, "seed": seed}
        path = configuration(study, tmp_path, **places, protocol=protocol, near_duplicates=0)
        try:
            plan_comparison(read_comparison(path))
        except UsageError as error:
            assert "slides with the same content" in str(error)
            refused += 1
        joined = configuration(study, tmp_path, **places, protocol=protocol, duplicates="join")
        with pytest.warns(
            UserWarning, match="duplicates: 1 slides count as slides of another patient, 0 are"
        ):
            plan = plan_comparison(read_comparison(joined))
        original = plan.study.rows[1].slide_id
        assert all(("copy" in fold.test) == (original in fold.test) for fold in plan.folds)
    assert refused


@pytest.mark.slow
def test_a_cropped_slide_on_the_other_side_stops_the_run(study: Cohort, tmp_path: Path) -> None:
    manifest, cache = copied_slide(study, tmp_path, cropped=True)
    refused = 0
    for seed in range(4):
        protocol = {"outer_folds": 2, "inner_folds": 0, "seed": seed}
        path = configuration(study, tmp_path, manifest=str(manifest), cache=str(cache), protocol=protocol)
        try:
            plan_comparison(read_comparison(path))
        except UsageError as error:
            assert "copy" in str(error) and "look alike" in str(error)
            refused += 1
    assert refused


def test_looking_alike_is_looked_for(study: Cohort, tmp_path: Path) -> None:
    path = configuration(study, tmp_path, near_duplicates=0.01)  # everything is a little alike
    with pytest.raises(UsageError, match="hold slides that look alike"):
        plan_comparison(read_comparison(path))


def first_job(path: Path, arm: str, folder: Path) -> tuple[Study, Job, JobResult]:
    """The first job of an arm, computed and read back."""
    plan = plan_comparison(read_comparison(path))
    job = next(job for job in plan.jobs if job.arm == arm)
    run_job(job, Workplace(folder))
    found = read_result(folder, job)
    assert found is not None
    return plan.study, job, found


def joined(study: Cohort, folder: Path) -> Path:
    """Writes a manifest of two patients with two slides each, of neighbouring grades; the others have one."""
    by_grade = [row["slide_id"] for row in sorted(table(study.manifest), key=lambda row: row["grade"])]
    other = {by_grade[4]: by_grade[3], by_grade[12]: by_grade[11]}
    return relabelled(study, folder, patient_id=lambda row: other.get(row["slide_id"], row["slide_id"]))


@pytest.mark.slow
def test_choices_are_made_in_inner_folds_alone(
    study: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = configuration(
        study,
        tmp_path,
        manifest=str(joined(study, tmp_path)),
        protocol={"outer_folds": 2, "inner_folds": 2, "unit": "worst"},
        arms={
            "scratch": {"fit": SCRATCH, "choices": {"model.lr": [1e-3, 1e-7], "trainer.max_epochs": [1, 3]}},
            "prior": {"baseline": "prior"},
        },
        validate_every=2,
    )
    comparison = read_comparison(path)
    plan = plan_comparison(comparison)
    job = next(job for job in plan.jobs if job.arm == "scratch")
    built = []
    from_slides = SlideDataModule.from_slides

    def counted(*slides: Any, **options: Any) -> SlideDataModule:
        built.append(1)
        return from_slides(*slides, **options)

    monkeypatch.setattr(SlideDataModule, "from_slides", counted)
    rates: list[tuple[int, list[float]]] = []

    class Rates(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            rates.append((trainer.max_epochs or 0, []))

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates[-1][1].append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer_of = train_arm._Fit._trainer
    monkeypatch.setattr(
        train_arm._Fit, "_trainer", lambda fit, every, calls: trainer_of(fit, every, [*calls, Rates()])
    )
    found = train_job(job, tmp_path / "work")
    assert len(built) == 4 * 2 + 1  # once for each training: of four trials in two inner folds, and the last
    # A training leaves what resuming it needs, to the last digit, and no table or picture.
    left = {str(path.relative_to(tmp_path / "work")) for path in (tmp_path / "work").rglob("*.*")}
    inner = {f"trial-{trial}-inner-{number}/training.json" for trial in range(4) for number in (0, 1)}
    weights = {f"final/weights/{name}.pt" for name in ("start", "last")}
    assert left == {*inner, "final/training.json", *weights}
    again = train_job(job, tmp_path / "work")
    assert again == found and np.array_equal(again.embeddings, found.embeddings)
    assert found.nested
    inner_points = [p for p in found.curves if p.part != "test"]
    assert {(p.part, p.trial) for p in inner_points} == {(f"inner-{n}", t) for n in (0, 1) for t in range(4)}
    # A training ends in a point, though its length is no multiple of validate_every.
    of_trial = {t: sorted({p.epoch for p in inner_points if p.trial == t}) for t in range(4)}
    assert of_trial == {0: [1], 1: [2, 3], 2: [1], 3: [2, 3]}
    # Chosen again by hand from the ends of the inner trainings; that of the test part has no say.
    trials = comparison.trials("scratch")
    ends = [
        np.mean([p.rps for p in inner_points if (p.trial, p.epoch) == (t, e)])
        for t, e in enumerate((1, 3) * 2)
    ]
    best = int(np.argmin(ends))
    short = best - best % 2
    chosen = short if ends[short] <= 1.02 * ends[best] else best
    assert found.chosen == {**trials[chosen], "epochs": trials[chosen]["trainer.max_epochs"]}
    assert max(p.epoch for p in found.curves if p.part == "test") == found.chosen["epochs"]
    # Each training was the whole of its own cycle; one that is stopped before ends near its peak.
    assert [epochs for epochs, _ in rates] == [1, 1, 3, 3, 1, 1, 3, 3, found.chosen["epochs"]]
    assert all(taken[-1] < 0.6 * max(taken) for epochs, taken in rates if epochs == 3)
    ends_of = [tmp_path / f"work/trial-{chosen}-inner-{number}/training.json" for number in (0, 1)]
    of_inner = [json.loads(path.read_text())["predictions"][-1] for path in ends_of]
    held_out = [row for rows in of_inner for row in predictions_from(rows)]
    patients = [row.patient_id for row in held_out]
    assert len(set(patients)) < len(held_out)
    grades = [row.grade for row in held_out if row.grade is not None]
    of_patients = fit_temperature(grades, [row.probabilities for row in held_out], patients)
    assert found.temperature == pytest.approx(of_patients, rel=1e-6)
    assert sorted(row.slide_id for row in found.predictions) == list(job.fold.test)
    # Scores by tiles drawn anew scatter around those of the whole slides, calibrated as they are.
    whole = {
        row.slide_id: float(with_temperature(row.probabilities, found.temperature) @ np.arange(5))
        for row in found.predictions
        if row.tiles > 1
    }
    assert found.draws.keys() == whole.keys() and whole
    for slide, scores in found.draws.items():
        assert len(scores) == comparison.tile_draws and np.std(scores) > 0
        assert abs(np.mean(scores) - whole[slide]) < 4 * np.std(scores)
    assert found.embeddings.shape == (len(job.fold.train) + len(job.fold.test), 1024)
    assert job.recipe["weights"] == sha256(small_weights().read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_point_of_a_curve_counts_patients_by_the_worst_of_their_slides(
    study: Cohort, tmp_path: Path
) -> None:
    by_grade = sorted(table(study.manifest), key=lambda row: row["grade"])
    patients = {row["slide_id"]: f"p{number // 2}" for number, row in enumerate(by_grade)}
    manifest = relabelled(study, tmp_path, patient_id=lambda row: patients[row["slide_id"]])
    protocol = {"outer_folds": 2, "inner_folds": 0, "unit": "worst"}
    path = configuration(study, tmp_path, manifest=str(manifest), protocol=protocol)
    _, _, found = first_job(path, "scratch", tmp_path / "jobs")
    last = found.curves[-1]
    of_patient: dict[str, list[SlidePrediction]] = {}
    for row in found.predictions:
        of_patient.setdefault(row.patient_id, []).append(row)
    assert last.n == len(of_patient) == len(found.predictions) / 2
    right, apart = [], []
    for rows in of_patient.values():
        true = max(row.grade for row in rows if row.grade is not None)
        worst = max(rows, key=lambda row: (row.predicted_grade, row.probabilities @ np.arange(5)))
        right.append(worst.predicted_grade == true)
        apart.append(np.sum((np.cumsum(worst.probabilities)[:4] - (np.arange(4) >= true)) ** 2) / 4)
    assert last.accuracy == pytest.approx(np.mean(right)) and last.rps == pytest.approx(
        np.mean(apart), abs=1e-5
    )


@pytest.mark.slow
def test_labels_are_permuted_before_anything_is_fitted(study: Cohort, tmp_path: Path) -> None:
    path = configuration(study, tmp_path, permutations={"n": 3, "arms": ["prior"]})
    comparison = read_comparison(path)
    plan = plan_comparison(comparison)
    jobs = [job for job in plan.jobs if job.permutation is not None]
    assert len(jobs) == 6
    # Folds are planned for the permuted labels, as they were for the true ones.
    for number in range(3):
        own = plan_folds(cases_of(permuted(plan.study, comparison.protocol, number)), comparison.protocol, 5)
        assert [job.fold for job in jobs if job.permutation == number] == list(own)
    assert {job.fold.test for job in jobs} != {fold.test for fold in plan.folds}
    grades = {job.permutation: {row.slide_id: row.grade for row in job.rows} for job in jobs}
    true = {row.slide_id: row.grade for row in plan.study.rows}
    assert all(sorted(map(str, of.values())) == sorted(map(str, true.values())) for of in grades.values())
    assert all(of != true for of in grades.values())
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "out"), "--only", "prior"]) == 0
    (row,) = [row for row in table(tmp_path / "out" / "results.csv") if row["section"] == "chance"]
    assert float(row["p"]) in (0.25, 0.5, 0.75, 1.0)


def test_the_shortest_training_within_two_per_cent_of_the_best_is_chosen_by_its_end() -> None:
    def point(trial: int, epoch: int, rps: float, part: str = "inner-0") -> CurvePoint:
        return CurvePoint(part, trial, epoch, 9, 1.0, 1.0, 0.5, 0.5, rps, 1.0)

    trials = [{"model.lr": rate, "trainer.max_epochs": epochs} for rate in (1, 2) for epochs in (2, 4)]
    # In mid-cycle another one was better: that is no training of so many epochs.
    curves = [point(0, 1, 0.01), point(0, 2, 0.11), point(1, 4, 0.1005), point(1, 2, 0.02), point(3, 4, 0.1)]
    for short, chosen in ((0.1021, 3), (0.1019, 2)):
        assert choose(trials, [*curves, point(2, 2, short)]) == chosen
    # The mean over the inner folds decides.
    assert choose(trials, [*curves, point(2, 2, 0.1), point(2, 2, 0.9, "inner-1")]) == 3


def test_a_job_is_read_back_to_the_last_digit(study: Cohort, tmp_path: Path) -> None:
    manifest = relabelled(study, tmp_path, patient_id=lambda row: f"={row['patient_id']}")
    path = configuration(study, tmp_path, manifest=str(manifest))
    plan, job, found = first_job(path, "prior", tmp_path / "jobs")
    grades = [row.grade for row in plan.rows if row.slide_id in job.fold.train]
    shares = tuple(grades.count(grade) / len(grades) for grade in range(5))
    assert {row.probabilities for row in found.predictions} == {shares}
    assert all(row.patient_id.startswith("=") for row in found.predictions)  # in memory it is no cell


def test_a_baseline_by_site_knows_the_site_alone(study: Cohort, tmp_path: Path) -> None:
    plan, job = planned(study, tmp_path, {"baseline": "site"})
    predictions = computed(job, tmp_path)
    by_site = {row.site: row.probabilities for row in predictions}
    assert len(by_site) == 2
    assert all(row.probabilities == by_site[row.site] for row in predictions)
    train = [row for row in plan.rows if row.slide_id in job.fold.train]
    for site, probabilities in by_site.items():
        counts = np.bincount(
            [row.grade for row in train if row.site == site and row.grade is not None], minlength=5
        )
        prior = np.bincount([row.grade for row in train if row.grade is not None], minlength=5) / len(train)
        assert probabilities == pytest.approx((counts + prior) / (counts.sum() + 1), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["colour_area", "collagen"])
def test_baselines_by_colour_give_distributions(name: str, study: Cohort, tmp_path: Path) -> None:
    _, job = planned(study, tmp_path, {"baseline": name})
    predictions = computed(job, tmp_path)
    assert sorted(row.slide_id for row in predictions) == list(job.fold.test)
    assert len({row.probabilities for row in predictions}) > 1


def planned(study: Cohort, folder: Path, arm: dict[str, Any]) -> tuple[Study, Job]:
    arms = {"it": arm, "prior": {"baseline": "prior"}}
    path = configuration(study, folder, arms=arms, primary={"arm": "it", "against": "prior"})
    plan = plan_comparison(read_comparison(path))
    return plan.study, next(job for job in plan.jobs if job.arm == "it")


def computed(job: Job, folder: Path) -> tuple[SlidePrediction, ...]:
    run_job(job, Workplace(folder))
    found = read_result(folder, job)
    assert found is not None
    return found.predictions


def test_tiles_exchanged_after_the_study_was_read_are_refused(study: Cohort, tmp_path: Path) -> None:
    moved = replace(study, cache=tmp_path / "cache")
    shutil.copytree(study.cache, moved.cache)
    _, job = planned(moved, tmp_path, {"baseline": "colour_area"})
    one, other = (moved.cache / f"{slide}.zarr" for slide in job.fold.train[:2])
    one.rename(tmp_path / "kept")
    other.rename(one)
    (tmp_path / "kept").rename(other)
    with pytest.raises(CacheMismatchError, match="the tiles of another file than the study that was read"):
        run_job(job, Workplace(tmp_path))


@pytest.mark.parametrize(
    ("what", "message", "when"),
    [
        ("tiles", "the cache has other tiles than when the study was read", "before"),
        ("features", "the cache has other features 'own' than when the study was read", "before"),
        ("features", "the cache has other features 'own' than when the study was read", "meanwhile"),
        ("weights", "are not those that the comparison was planned with", "before"),
    ],
    ids=["tiles", "features", "features-meanwhile", "weights"],
)
def test_a_job_is_not_computed_of_other_data_than_its_key_names(
    what: str,
    message: str,
    when: str,
    study: Cohort,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved, weights = replace(study, cache=tmp_path / "cache"), tmp_path / "weights.safetensors"
    shutil.copytree(study.cache, moved.cache)
    weights.write_bytes(b"some")

    def store(slide: str, seed: int) -> None:
        tiles = SlideCache.open(moved.cache / f"{slide}.zarr")
        source = FeatureSource("stored_4", "", "", (0.5,) * 3, (0.5,) * 3)  # as imported: no weights
        values = np.random.default_rng(seed).normal(size=(len(tiles), 4))
        write_features(tiles, {"own": (source, values.astype(np.float16))})

    def change() -> None:
        if what == "tiles":
            row = next(row for row in table(study.manifest) if row["slide_id"] == job.fold.train[0])
            path = study.manifest.parent / row["path"]
            line = f"{row['slide_id']},{path},{row['patient_id']},{row['grade']}"
            (tmp_path / "one.csv").write_text(f"slide_id,path,patient_id,grade\n{line}\n")
            options = ["--mpp", "4", "--tile-size", "64", "--stride", "48", "--overwrite", "--workers", "1"]
            assert main(["tile", str(tmp_path / "one.csv"), "--cache", str(moved.cache), *options]) == 0
        elif what == "features":
            store(job.fold.train[0], 99)
        else:
            weights.write_bytes(b"others")

    for number, row in enumerate(table(study.manifest)):
        store(row["slide_id"], number)
    arms: dict[str, dict[str, Any]] = {
        "tiles": {"baseline": "prior"},  # it opens no training slide
        "features": {"classical": {"features": ["own"]}},
        "weights": {"fit": {"model": {"backbone": {"pretrained": str(weights)}}}},
    }
    _, job = planned(moved, tmp_path, arms[what])
    if when == "before":
        change()
    else:
        compute = pool._compute

        def compute_and_change(*given: Any) -> JobResult:
            result = compute(*given)
            change()
            return result

        monkeypatch.setattr(pool, "_compute", compute_and_change)
    with pytest.raises((CacheMismatchError, UsageError), match=message):
        run_job(job, Workplace(tmp_path / "jobs"))
    assert not (tmp_path / "jobs" / job.key).exists()


@pytest.mark.parametrize(
    "arm",
    [pytest.param({"fit": SCRATCH}, marks=pytest.mark.slow), {"baseline": "colour_area"}],
    ids=["fit", "colour"],
)
def test_a_site_that_alone_has_a_grade_can_be_left_out(
    arm: dict[str, Any], study: Cohort, tmp_path: Path
) -> None:
    highest = max(row["site"] for row in table(study.manifest))
    manifest = relabelled(
        study,
        tmp_path,
        grade=lambda row: min(3 if row["site"] == highest else 2, int(row["grade"])),
        grade_reader1=lambda row: "",
        grade_reader2=lambda row: "",
    )
    path = configuration(
        study,
        tmp_path,
        manifest=str(manifest),
        grades=["0", "1", "2", "3"],
        protocol={"leave_one_site_out": True, "inner_folds": 0, "unit": "slide"},
        arms={"it": arm, "prior": {"baseline": "prior"}},
        primary={"arm": "it", "against": "prior"},
    )
    with pytest.warns(UserWarning, match=f"fold {highest}: no training slide has grade 3"):
        plan = plan_comparison(read_comparison(path))
    job = next(job for job in plan.jobs if (job.arm, job.fold.name) == ("it", highest))
    predictions = computed(job, tmp_path)
    assert {row.site for row in predictions} == {highest}
    if "baseline" in arm:  # a network's head has a little left for every grade
        assert all(row.probabilities[3] == 0 for row in predictions)


def test_a_classical_arm_needs_stored_features_and_says_how(study: Cohort, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make it with 'slidetl embed'"):
        planned(study, tmp_path, {"classical": {"features": ["none"]}})


def test_features_of_other_patients_of_the_same_names_are_told_by_content(
    study: Cohort, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(study.cache, cache)
    slides = read_study(study.manifest, cache, 5).slides
    seen = [
        RecordedSlide(row.slide_id, row.patient_id, "f" * 64, "train")
        for row in (slide.row for slide in slides)
    ]
    source = FeatureSource("net", "", "a" * 64, (), (), record=store_record(cache, StudyRecord(tuple(seen))))
    for slide in slides:
        write_features(slide.cache, {"own": (source, np.ones((len(slide.cache), 2), np.float16))})
    arms = {"ridge": {"classical": {"features": ["own"]}}, **PRIOR}
    for data in ({}, {"data": {"split_from": "external"}}):
        moved = replace(study, cache=cache)
        path = configuration(
            moved, tmp_path, arms=arms, base=data, primary={"arm": "ridge", "against": "prior"}
        )
        plan = plan_comparison(read_comparison(path))
        with (
            nullcontext()
            if data
            else pytest.raises(UsageError, match=r"set data\.split_from external in base")
        ):
            refuse_seen(plan.comparison, plan.jobs, plan.study)


@pytest.mark.slow
def test_a_classical_arm_is_fitted_and_calibrated_on_its_training_part(study: Cohort, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(study.cache, cache)
    assert main(["embed", str(cache), *small_embed(), "--name", "tiny"]) == 0
    path = configuration(
        study,
        tmp_path,
        manifest=str(joined(study, tmp_path)),
        cache=str(cache),
        protocol={"outer_folds": 2, "inner_folds": 2, "unit": "slide"},
        arms={"ridge": {"classical": {"features": ["tiny"]}}, "prior": {"baseline": "prior"}},
        primary={"arm": "ridge", "against": "prior"},
    )
    whole, job, found = first_job(path, "ridge", tmp_path / "jobs")
    assert found.nested
    # Once more by hand.
    rows = {row.slide_id: row for row in whole.rows}
    grade = {slide: row.grade for slide, row in rows.items() if row.grade is not None}
    means = {each.slide_id: read_features(each, "tiny").astype(float).mean(0) for each in whole.caches}

    def graded(train: tuple[str, ...], other: tuple[str, ...]) -> Any:
        grades, patients = [grade[slide] for slide in train], [rows[slide].patient_id for slide in train]
        x, new = (np.stack([means[slide] for slide in part]) for part in (train, other))
        return fit_grader("ridge", x, grades, patients, 5, seed=job.fold.seed).probabilities(new)

    held_out = np.concatenate([graded(inner.train, inner.validation) for inner in job.fold.inner])
    true = [grade[slide] for inner in job.fold.inner for slide in inner.validation]
    patients = [rows[slide].patient_id for inner in job.fold.inner for slide in inner.validation]
    assert len(set(patients)) < len(true)
    assert found.temperature == pytest.approx(fit_temperature(true, held_out, patients), rel=1e-6)
    of_slide = {row.slide_id: row.probabilities for row in found.predictions}
    predicted = np.array([of_slide[slide] for slide in job.fold.test])
    np.testing.assert_allclose(predicted, graded(job.fold.train, job.fold.test), atol=1e-6)


def test_slides_that_are_not_in_the_cache_are_left_out(study: Cohort, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(study.cache, cache)
    gone = sorted(cache.glob("*.zarr"))[0]
    shutil.rmtree(gone)
    path = configuration(study, tmp_path, cache=str(cache))
    with pytest.warns(UserWarning, match="1 of 20 slides are not in the cache"):
        left = read_slides(read_comparison(path))
    assert len(left.rows) == 19
    assert gone.stem not in {row.slide_id for row in left.rows}


def test_an_inner_fold_is_part_of_the_name_of_a_job(study: Cohort, tmp_path: Path) -> None:
    keys = []
    for inner in (0, 2):
        protocol = {"outer_folds": 2, "inner_folds": inner}
        path = configuration(study, tmp_path, protocol=protocol)
        plan = plan_comparison(read_comparison(path))
        assert all(isinstance(job.fold, Fold) for job in plan.jobs)
        keys.append({job.key for job in plan.jobs if job.arm == "scratch"})
    assert keys[0].isdisjoint(keys[1])


@pytest.mark.slow
def test_jobs_are_computed_by_the_workers_of_a_scheduler(study: Cohort, tmp_path: Path) -> None:
    """A real scheduler, a real worker, and the command, each a process of its own."""
    arms = {"site": {"baseline": "site"}, "prior": {"baseline": "prior"}}
    path = configuration(study, tmp_path, arms=arms, primary={"arm": "site", "against": "prior"})
    file, log = tmp_path / "scheduler.json", tmp_path / "log"
    words = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--scheduler-file", str(file)]
    running = []
    try:
        for module, arguments in (("scheduler", words), ("worker", options)):
            command = [sys.executable, "-m", f"distributed.cli.dask_{module}", *arguments]
            with log.open("a") as output:
                running.append(subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output))
        deadline = time.monotonic() + PATIENCE_S
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        command = [sys.executable, "-m", "slidetl", "compare", "--config", str(path)]
        command += ["--output", str(tmp_path / "out"), "--scheduler", json.loads(file.read_text())["address"]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert done.returncode == 0, done.stderr
    assert "[4/4]" in done.stderr
    assert {row["arm"] for row in table(tmp_path / "out" / "predictions.csv")} == {"site", "prior"}
    hosts = {file.parent.name for file in (tmp_path / "out" / "jobs").glob("*/job.json")}
    assert len(hosts) == 4


@pytest.mark.slow
def test_arms_left_out_need_nothing(study: Cohort, tmp_path: Path) -> None:
    arms = {
        "ridge": {"classical": {"features": ["never-stored"], "model": "ridge"}},
        "prior": {"baseline": "prior"},
        "site": {"baseline": "site"},
    }
    path = configuration(study, tmp_path, arms=arms, primary={"arm": "site", "against": "prior"})
    command = ["compare", "--config", str(path), "--output", str(tmp_path / "out")]
    assert main([*command, "--only", "prior", "site"]) == 0
    assert {row["arm"] for row in table(tmp_path / "out" / "predictions.csv")} == {"prior", "site"}
    assert main(command) == 2  # before anything is computed


def test_a_smaller_part_is_trained_for_as_many_steps(study: Cohort, tmp_path: Path) -> None:
    sizes = {"slides": [6], "arms": ["scratch", "prior"]}
    comparison = read_comparison(configuration(study, tmp_path, sizes=sizes))
    jobs = plan_comparison(comparison).jobs
    whole = next(job for job in jobs if (job.arm, job.n_slides) == ("scratch", None))
    smaller = next(job for job in jobs if (job.arm, job.n_slides) == ("scratch", 6))
    slides = [len(job.fold.train) for job in (whole, smaller)]
    epochs = [job.recipe["fit"]["trainer"]["max_epochs"] for job in (whole, smaller)]
    assert slides[1] == 6
    assert epochs == [2, round(2 * slides[0] / 6)]
    assert smaller.recipe["validate_every"] == round(slides[0] / 6)
